"""Breaks the program in small ways, one at a time, and tells which breaks no test sees.

    python tests/mutants.py --number 300 --out mutants.jsonl
    python tests/mutants.py --out mutants.jsonl --report
    python tests/mutants.py --out mutants.jsonl --again      # those alive, after tests were written
    python tests/mutants.py --out mutants.jsonl --again --slow --jobs 2
    python tests/mutants.py --out mutants.jsonl --again --only data/ --tests tests/data/*.py

It is no part of the suite: a mutant takes as long as the tests nearest to its file, half a minute
of a core in the mean; `--jobs` tries several at once. Mutants are drawn by lot over all of
`grpo_jax/`. The lot follows from the seed and the text of what is broken, so that it stays the same
when other lines change, and a larger number adds to a smaller one. Each is written into a copy of
the repository, where the nearest test files run (`NEAREST`, or the file of the same name), the
shortest first, until one test fails. Results are appended to `--out` as they come; the same command
goes on where it was stopped.

Files of tests run unbroken once before they count, for how long they take and whether they pass. A
mutant that takes much longer than that is stopped, and counts as killed. `--slow` adds the tests
that are marked slow, and those of whole runs for every file; use it with `--again`.

An alive mutant is to be looked at: where it changes a number, a verdict or what a user is told, a
test is missing; where it changes speed, the text of a message or nothing, it is as it should be.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIRING = "tests/setup/test_wiring.py"
MATHS = ("tests/rewards/test_math_answer.py", "tests/rewards/test_verdicts.py")
RUNS = ("tests/runs/test_loop.py", "tests/runs/test_bad_numbers.py", "tests/runs/test_resume.py")
# Test files of files without one of their own, or in need of more; shortest first.
NEAREST = {
    "cli": ("tests/test_cli.py",),
    "keys": ("tests/test_keys.py", WIRING),
    "evaluate": ("tests/evaluation/test_evaluate.py",),
    "export": ("tests/test_export_program.py",),
    "generate": ("tests/test_generate.py",),
    "plan": ("tests/planning/test_plan.py",),
    "profile": ("tests/metrics/test_trace.py", RUNS[0]),
    "label": ("tests/runs/test_label_program.py",),
    "score": ("tests/runs/test_score_program.py",),
    "sft": (RUNS[0],),
    "structs": ("tests/models/test_families.py", WIRING),
    "train": ("tests/trainers/test_epochs.py", RUNS[0], "tests/runs/test_bad_input.py"),
    "api": ("tests/runs/test_from_python.py",),
    "data/given": ("tests/runs/test_from_python.py",),
    "rewards/choices": ("tests/rewards/test_numeric.py",),
    "rewards/equations": ("tests/rewards/test_steps.py",),
    "rewards/extras": ("tests/rewards/test_tags.py",),
    "rewards/kinds": ("tests/rewards/test_registry.py",),
    "rewards/language": ("tests/rewards/test_overlap.py",),
    "rewards/listing": ("tests/runs/test_score_program.py",),
    "rewards/similarity": ("tests/rewards/test_overlap.py",),
    "rewards/structured": ("tests/rewards/test_tags.py",),
    "rewards/tone": ("tests/rewards/test_overlap.py",),
    "rewards/given": ("tests/runs/test_from_python.py",),
    "algorithm": (
        "tests/algorithm/test_losses.py", "tests/learner/test_plain.py",
        "tests/learner/test_update.py",
    ),
    "config": (
        "tests/config/test_rules.py",
        "tests/config/test_options.py",
        "tests/config/test_loading.py",
    ),
    "data/problems": ("tests/data/test_problems.py", "tests/data/test_sources.py"),
    "data/tasks": ("tests/data/test_tasks.py",),
    "devices": ("tests/devices/test_collectives.py", "tests/devices/test_mesh.py"),
    "devices/compiling": ("tests/devices/test_compiling.py", "tests/test_cli.py"),
    "devices/phases": ("tests/metrics/test_trace.py", RUNS[0]),
    "environments": ("tests/environments/test_rewarding.py", "tests/evaluation/test_held_out.py"),
    "evaluation": ("tests/evaluation/test_held_out.py", "tests/evaluation/test_evaluate.py"),
    "hosts": ("tests/hosts/test_processes.py",),
    "hosts/paths": ("tests/run/test_claim.py", "tests/models/test_folder.py"),
    "kernels": ("tests/learner/test_plain.py", "tests/parity/test_logits.py"),
    "kernels/block_sums": ("tests/models/test_logits_sampling.py", WIRING),
    "kernels/choice": ("tests/kernels/test_tpu_splash.py", "tests/sampling/test_engine.py"),
    "kernels/fused_attention": (
        "tests/kernels/test_gpu_cudnn.py", "tests/kernels/test_tpu_splash.py",
    ),
    "kernels/kv_cache": ("tests/kernels/test_tpu_paged.py", "tests/sampling/test_engine.py"),
    "kernels/pallas_triton": ("tests/kernels/test_gpu_decode.py",),
    "learner": ("tests/learner/test_plain.py", WIRING, "tests/learner/test_update.py"),
    "learner/bins": ("tests/learner/test_row_sizes.py", "tests/learner/test_packing.py"),
    "learner/scoring": ("tests/devices/test_mesh.py", "tests/learner/test_plain.py", WIRING),
    "learner/logprobs": ("tests/learner/test_logprobs.py", WIRING),
    "kernels/nf4": ("tests/kernels/test_nf4.py",),
    "kernels/dense": ("tests/learner/test_lora.py", "tests/models/test_peft.py"),
    "learner/optim": ("tests/learner/test_optim.py", WIRING),
    "learner/packing": ("tests/learner/test_packing.py", "tests/learner/test_plain.py"),
    "learner/row_sizes": ("tests/learner/test_row_sizes.py", "tests/learner/test_packing.py"),
    "messages": ("tests/metrics/test_writers.py", "tests/config/test_rules.py"),
    "metrics": ("tests/metrics/test_writers.py",),
    "metrics/summary": ("tests/metrics/test_curves.py",),
    "models": ("tests/learner/test_plain.py", "tests/parity/test_logits.py", WIRING),
    "models/families": (
        "tests/models/test_families.py", "tests/models/test_names.py",
        "tests/models/test_weights.py", "tests/models/test_export.py",
        "tests/parity/test_logits.py",
    ),
    "models/hf": ("tests/models/test_weights.py", "tests/models/test_export.py"),
    "models/hf/export": ("tests/models/test_export.py",),
    "models/hf/folder": (
        "tests/models/test_folder.py", "tests/models/test_hostile_folder.py",
        "tests/models/test_weights.py",
    ),
    "models/hf/bnb": ("tests/models/test_bnb.py",),
    "models/hf/peft": ("tests/models/test_peft.py",),
    "models/hf/targets": ("tests/models/test_peft.py",),
    "models/lora": ("tests/models/test_peft.py", "tests/learner/test_lora.py"),
    "models/hf/tokenizer": ("tests/models/test_tokenizer.py", "tests/test_generate.py"),
    "models/logits": ("tests/models/test_logits_sampling.py", WIRING),
    "algorithm/gae": ("tests/algorithm/test_gae.py",),
    "algorithm/scalar_losses": (
        "tests/algorithm/test_scalar_losses.py", "tests/learner/test_scalar_updates.py",
    ),
    "learner/scalars": (
        "tests/models/test_scalar_head.py", "tests/learner/test_scalar_updates.py",
    ),
    "learner/actor_critic": ("tests/learner/test_scalar_updates.py",),
    "metrics/calibration": ("tests/metrics/test_calibration.py",),
    "setup/critic": ("tests/runs/test_reward_model_runs.py",),
    "setup/reward_models": ("tests/runs/test_reward_model_runs.py",),
    "trainers/reward_model": ("tests/runs/test_reward_model_runs.py",),
    "models/policy": ("tests/models/test_weights.py", "tests/test_generate.py"),
    "planning": (
        "tests/planning/test_plan.py", "tests/planning/test_fit.py",
        "tests/planning/test_programs.py",
    ),
    "rewards": ("tests/rewards/test_registry.py", "tests/rewards/test_pool.py"),
    "rewards/answers": ("tests/rewards/test_answers.py", "tests/rewards/test_math_answer.py"),
    "rewards/expressions": MATHS,
    "rewards/math_answer": MATHS,
    "rewards/characters": MATHS,
    "rewards/spelling": MATHS,
    "rewards/shapes": MATHS,
    "rewards/units": MATHS,
    "rewards/worker": ("tests/rewards/test_worker.py", "tests/rewards/test_pool.py"),
    "rewards/trial": ("tests/runs/test_score_program.py",),
    "run": ("tests/run/test_workdir.py", "tests/run/test_checkpoints.py"),
    "run/append_log": ("tests/metrics/test_tensorboard.py", "tests/metrics/test_writers.py"),
    "sampling": ("tests/sampling/test_engine.py", WIRING),
    "setup": (WIRING, "tests/config/test_rules.py", RUNS[0]),
    "setup/lora": ("tests/runs/test_lora_runs.py",),
    "setup/model": ("tests/test_generate.py", WIRING),
    "setup/inputs": ("tests/setup/test_inputs.py",),
    "trainers": (WIRING, RUNS[0]),
    "trl": ("tests/runs/test_trl_names.py",),
    "trainers/check": ("tests/trainers/test_check.py",),
    "trainers/exporting": ("tests/models/test_export.py", "tests/test_export_program.py"),
    "run/saved": ("tests/test_export_program.py", "tests/run/test_checkpoints.py"),
    "trainers/listeners": ("tests/runs/test_from_python.py",),
    "trainers/monitor": ("tests/trainers/test_monitor.py", WIRING, RUNS[0]),
    "trainers/guards": ("tests/trainers/test_guards.py",),
    "trainers/rollout": ("tests/trainers/test_rollout.py", WIRING),
    "trainers/run_state": ("tests/trainers/test_run_state.py", RUNS[1]),
    "trainers/step_metrics": (
        "tests/metrics/test_writers.py", "tests/trainers/test_guards.py", RUNS[0],
    ),
}  # fmt: skip


# --- What can be broken ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: `new` in place of bytes `start` to `end` of a file."""

    path: str
    where: str  # function or class that it is in
    kind: str
    start: int
    end: int
    old: str
    new: str
    line: int
    number: int = 0  # of those that are alike in one function

    @property
    def name(self) -> str:
        return f"{self.path}:{self.where}:{self.kind}:{self.old} -> {self.new}:{self.number}"

    def lot(self, seed: int) -> str:
        return hashlib.sha256(f"{seed}:{self.name}".encode()).hexdigest()


_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all",
          "all": "any", "argmax": "argmin", "argmin": "argmax"}  # fmt: skip
_PLAIN = (ast.Name, ast.Attribute, ast.Subscript)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST | str]]:
    """(kind, what is replaced, by what) of one node."""
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in _COMPARISONS:
            ops = [_COMPARISONS[type(op)](), *node.ops[1:]]
            yield "comparison", node, ast.Compare(node.left, ops, node.comparators)
        case ast.BinOp() if type(node.op) in _OPERATORS and not _is_text(node):
            yield "operator", node, ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)
        case ast.AugAssign() if type(node.op) in _OPERATORS and not _is_text(node.value):
            op = _OPERATORS[type(node.op)]()
            yield "operator", node, ast.AugAssign(node.target, op, node.value)
            yield "statement", node, "pass"
        case ast.Constant(value=bool()):
            yield "constant", node, ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield "constant", node, ast.Constant(node.value + 1)
            yield "constant", node, ast.Constant(node.value - 1)
        case ast.Constant(value=float()) if abs(node.value) < 1e300:
            yield "constant", node, ast.Constant(node.value * 2 or 1.0)
        case ast.BoolOp():
            op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield "operator", node, ast.BoolOp(op, node.values)
        case ast.UnaryOp(op=ast.Not() | ast.Invert()):
            yield "negation", node, node.operand
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield "negation", node, node.operand
        case ast.IfExp():
            yield "negation", node, ast.IfExp(node.test, node.orelse, node.body)
        case ast.If() | ast.While():
            yield "negation", node.test, ast.UnaryOp(ast.Not(), node.test)
        case ast.Slice():
            for part, new in ((node.lower, ast.Add), (node.upper, ast.Sub)):
                if part is not None:
                    yield "slice", part, ast.BinOp(part, new(), ast.Constant(1))
        case ast.Name() | ast.Attribute() if _name(node) in _NAMES:
            name = _NAMES[_name(node)]
            new = ast.Name(name) if isinstance(node, ast.Name) else ast.Attribute(node.value, name)
            yield "name", node, new
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield "statement", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, "pass"
        case ast.Call() if ast.unparse(node.func) != "isinstance":  # which would only raise
            yield from _swapped(node)


def _swapped(call: ast.Call) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """A call with two neighbouring arguments, or values of two keywords, exchanged."""
    for i, (a, b) in enumerate(zip(call.args, call.args[1:])):
        if isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and ast.dump(a) != ast.dump(b):
            args = [*call.args[:i], b, a, *call.args[i + 2 :]]
            yield "arguments", call, ast.Call(call.func, args, call.keywords)
    for i, (a, b) in enumerate(zip(call.keywords, call.keywords[1:])):
        if not a.arg or not b.arg or ast.dump(a.value) == ast.dump(b.value):
            continue
        both_plain = isinstance(a.value, _PLAIN) and isinstance(b.value, _PLAIN)
        if both_plain or type(a.value) is type(b.value):
            pair = ast.keyword(a.arg, b.value), ast.keyword(b.arg, a.value)
            keywords = [*call.keywords[:i], *pair, *call.keywords[i + 2 :]]
            yield "keywords", call, ast.Call(call.func, call.args, keywords)


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def _is_text(node: ast.AST) -> bool:
    texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    joined = any(isinstance(n, ast.JoinedStr) for n in ast.walk(node))
    return joined or any(isinstance(text, str) for text in texts)


def mutants_of(path: Path) -> list[Mutant]:
    """All of a file, in the order of its text."""
    text = path.read_bytes()
    starts = [0]
    for row in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    found, seen = [], Counter()

    def visit(node: ast.AST, where: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            where = f"{where}.{node.name}".lstrip(".")
        for kind, old, new in _changes(node):
            new = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            if isinstance(old, ast.expr):
                new = f"({new})"
            made = Mutant(str(path.relative_to(ROOT)), where, kind, start, end,
                          ast.unparse(old), new, old.lineno)  # fmt: skip
            seen[made.name] += 1
            found.append(dataclasses.replace(made, number=seen[made.name] - 1))
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for child in children:
                if isinstance(child, ast.AST) and not _is_told(child, field):
                    visit(child, where)

    visit(ast.parse(text), "")
    return found


def _is_told(node: ast.AST, field: str) -> bool:
    """Whether it only reaches a reader: texts, types, decorators, what is raised or said."""
    if field in ("annotation", "returns", "decorator_list", "exc"):
        return True
    if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    is_main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    is_said = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
        "say", "print", "print_title", "add_argument", "named_scope", "ArgumentParser",
    )  # fmt: skip
    return is_main or is_said


def lot(seed: int, only: str) -> list[Mutant]:
    """All mutants of the files whose path has `only` in it, in the order they are drawn."""
    files = sorted((ROOT / "grpo_jax").rglob("*.py"))
    found = [m for f in files if only in str(f.relative_to(ROOT)) for m in mutants_of(f)]
    return sorted(found, key=lambda m: m.lot(seed))


# --- Whether tests see it -------------------------------------------------------------------------


def nearest(path: str, slow: bool) -> list[str]:
    """Files of tests for a file of the program, those that are there."""
    noun = path.removeprefix("grpo_jax/").removesuffix(".py")
    folder, _, name = noun.rpartition("/")
    tests = NEAREST.get(noun) or [f"tests/{folder}/test_{name}.py".replace("//", "/")]
    there = [t for t in tests if (ROOT / t).exists()]
    tests = there or [t for t in NEAREST.get(folder, ("tests/test_imports.py",))]
    return list(dict.fromkeys([*tests, *(RUNS if slow else ())]))


class Tests:
    """Runs files of tests in a copy of the repository, and knows them unbroken."""

    def __init__(
        self, copy: Path, slow: bool, seconds: dict[str, float], known: Path, chosen: list[str]
    ):
        """`seconds`: of each file unbroken, shared by all copies and kept in the file `known`.

        `chosen`: the files to run, where they are not the nearest.
        """
        self.copy, self.slow, self.seconds, self.known = copy, slow, seconds, known
        self.chosen = chosen
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                                capture_output=True, text=True, check=True)  # fmt: skip
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)

    def unbroken(self, file: str) -> float:
        """Seconds that a file of tests takes, 0 where it does not pass and is not used."""
        key = f"{file}{' slow' * self.slow}"
        if key not in self.seconds:
            began = time.monotonic()
            passed = self.run([file], 1800)[0] == "alive"
            self.seconds[key] = (time.monotonic() - began) * passed
            self.known.write_text(json.dumps(self.seconds, indent=1) + "\n")
            if not passed:
                print(f"warning: {file} does not pass unbroken, and is left out", flush=True)
        return self.seconds[key]

    def run(self, files: list[str], limit_s: float) -> tuple[str, str]:
        """("killed", by which test), ("stopped", "") past the limit, or ("alive", "")."""
        shared = os.environ.get("GRPO_JAX_SHARED", str(ROOT.parent / "shared"))
        environment = os.environ | {"PYTHONPATH": str(self.copy), "GRPO_JAX_SHARED": shared}
        marks = [] if self.slow else ["-m", "not slow"]
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
        process = subprocess.Popen([*command, *marks, *files], cwd=self.copy, env=environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)  # fmt: skip
        try:
            text, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "stopped", ""
        if process.returncode == 4:
            raise RuntimeError(f"pytest did not start in {self.copy}: {text}")
        if process.returncode in (0, 5):  # 5: all are marked slow
            return "alive", ""
        failed = [x for x in text.splitlines() if x.startswith(("FAILED", "ERROR"))]
        return "killed", failed[0].split(" - ")[0].split(" ", 1)[1] if failed else text[-300:]

    def verdict(self, mutant: Mutant) -> dict:
        """What became of a mutant, as a line of the results."""
        tests = self.chosen or nearest(mutant.path, self.slow)
        tests = [t for t in tests if self.unbroken(t)]
        usual_s, file = sum(map(self.unbroken, tests)), self.copy / mutant.path
        text, began = file.read_bytes(), time.monotonic()
        try:
            file.write_bytes(text[: mutant.start] + mutant.new.encode() + text[mutant.end :])
            end, by = self.run(tests, 3 * usual_s + 60)
        finally:
            file.write_bytes(text)
        return dataclasses.asdict(mutant) | {
            "name": mutant.name, "end": end, "by": by, "tests": tests,
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip


# --- The program ----------------------------------------------------------------------------------


def results(out: Path) -> dict[str, dict]:
    """The newest result of each mutant, by name."""
    if not out.exists():
        return {}
    return {r["name"]: r for r in map(json.loads, out.read_text().splitlines())}


def report(found: dict[str, dict]) -> None:
    """A table by file, and those alive."""
    files = sorted({r["path"] for r in found.values()})
    ends = {f: Counter(r["end"] for r in found.values() if r["path"] == f) for f in files}
    print("| file | mutants | killed | of these stopped | alive |\n| --- | --- | --- | --- | --- |")
    total = sum(ends.values(), Counter())
    for name, counts in [*ends.items(), ("all", total)]:
        dead = counts["killed"] + counts["stopped"]
        stopped = counts["stopped"]
        print(f"| {name} | {counts.total()} | {dead} | {stopped} | {counts['alive']} |")
    print(f"\nkilled: {1 - total['alive'] / max(total.total(), 1):.1%}\n\nalive:")
    for r in sorted(found.values(), key=lambda r: (r["path"], r["line"])):
        if r["end"] == "alive":
            print(f"{r['path']}:{r['line']} {r['where']} [{r['kind']}] {r['old']}  ->  {r['new']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=100, help="mutants of the lot")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument("--only", default="", help="files with this in their path")
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tried at once")
    parser.add_argument("--again", action="store_true", help="those of --out that are alive")
    parser.add_argument("--slow", action="store_true", help="slow tests and whole runs too")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="not the nearest")
    parser.add_argument("--list", action="store_true", help="show the lot and break nothing")
    parser.add_argument("--report", action="store_true", help="show the results there are")
    args = parser.parse_args()
    found = results(args.out)
    if args.report:
        return report(found)
    drawn = lot(args.seed, args.only)
    if args.again:
        chosen = [m for m in drawn if found.get(m.name, {}).get("end") == "alive"]
    else:
        chosen = [m for m in drawn[: args.number] if m.name not in found]
    print(f"{len(drawn)} mutants can be made; {len(chosen)} to try", flush=True)
    if args.list:
        for m in chosen:
            print(f"{m.path}:{m.line} {m.where} [{m.kind}] {m.old}  ->  {m.new}")
        return None
    known = args.out.with_suffix(".tests.json")
    seconds = json.loads(known.read_text()) if known.exists() else {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        free: queue.SimpleQueue[Tests] = queue.SimpleQueue()
        for i in range(args.jobs):
            free.put(Tests(Path(folder) / str(i), args.slow, seconds, known, args.tests))

        def one(mutant: Mutant) -> dict:
            tests = free.get()
            try:
                return tests.verdict(mutant)
            finally:
                free.put(tests)

        for done in as_completed([pool.submit(one, m) for m in chosen]):
            result = done.result()
            with args.out.open("a") as out:
                out.write(json.dumps(result) + "\n")
            print(f"{result['end']:8}{result['seconds']:6.0f} s  {result['path']}:{result['line']} "
                  f"[{result['kind']}] {result['old'][:60]}  ->  {result['new'][:60]}  "
                  f"{result['by']}", flush=True)  # fmt: skip
    return report(results(args.out))


if __name__ == "__main__":
    main()
