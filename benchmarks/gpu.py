"""All that is measured on one GPU, in one call: `python benchmarks/gpu.py --part all --out DIR`.

Part A tells what the machine is, compares its numbers with the CPU's, trains the quickstart, makes
a table of a trace and times updates on sequences of 16,384 tokens, by cuDNN and by XLA. Part B
times steps of 0.5B and 1.5B shapes, completions of full length and of mean 200, and PyTorch on the
same shape. Part C times 7B and looks for the longest completion that can be trained on. A part ends
within `--minutes` (25 in all): a piece that has no time left, or fails, is told as such. Pieces are
processes of their own, so that each has the whole memory.

Writes DIR/gpu.json and, from it, DIR/gpu.md; what another part left there stays. `--shape tiny`
runs every piece with a tiny network, on a CPU too, where no number means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

SIZES = {"prompts": 64, "group": 8, "prompt_tokens": 256, "completion_tokens": 1024}
TINY_SIZES = {"prompts": 4, "group": 2, "prompt_tokens": 8, "completion_tokens": 8}
MODELS = {
    "small": "qwen2.5-0.5b",
    "long": "qwen3-0.6b",
    "middle": "qwen2.5-1.5b",
    "large": "qwen2.5-7b",
}
# What lets all weights of 7B learn on one card of 141 GB: 2 + 4 + 2.06 bytes of each are kept, 4 of
# its gradient and 2 of the reference. The others keep the usual 12.
KEPT = {"large": {"param_dtype": "bfloat16", "float32_copy": True, "moments": "int8"}}
LONG = 16384  # tokens of a prompt and its completion
MEAN = 200  # tokens, of the completions that are not of full length
LIMIT_S = 270  # of a piece

# Name, and the arguments that it is called with.
PIECES: dict[str, list[tuple[str, list[str]]]] = {
    "A": [
        ("environment", []),
        ("numerics", []),
        ("quickstart", []),
        ("trace", ["small"]),
        ("sequence", ["long", "cudnn"]),
        ("sequence", ["long", "xla"]),
    ],
    "B": [
        ("step", ["small", "full"]),
        ("step", ["small", "spread"]),
        ("step", ["middle", "full"]),
        ("step", ["middle", "spread"]),
        ("torch", ["middle"]),
    ],
    "C": [
        ("step", ["large", "full"]),
        ("step", ["large", "spread"]),
        ("longest", ["middle"]),
        ("longest", ["large"]),
        ("trace", ["middle"]),
    ],
}


def _work(size: str, tiny: bool, **changes: Any):
    import workload

    changes = KEPT.get(size, {}) | changes
    if tiny:
        workload.SHAPES["tiny"] = workload.shape(2, 32, 4, 2, 8, 48, 64, True)
        return workload.Work(**TINY_SIZES | changes)
    full = {"model": MODELS[size], "dtype": "bfloat16"}
    if size in ("long", "large"):
        full["remat"] = "full"
    return workload.Work(**full | SIZES | changes)


# --- The pieces: each returns what goes into the JSON ---------------------------------------------


def environment(tiny: bool) -> dict[str, Any]:
    import floors
    import timing

    from grpo_jax import memory

    found = timing.environment() | {"cpus": os.cpu_count()}
    found["tflops_of_a_product"] = floors.measured_flops("float32" if tiny else "bfloat16") / 1e12
    found["gb_per_s_of_a_copy"] = floors.measured_bandwidth(16 if tiny else 2048) / 1e9
    found["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        found["nvidia_smi"] = "not there"
    return found | memory.usage()


def numerics(tiny: bool) -> dict[str, Any]:
    """Relative differences of a small network on this device from the CPU's, in float32 there."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np
    import workload

    from grpo_jax.algorithm import logprobs
    from grpo_jax.models import transformer
    from grpo_jax.structs import Sampling

    model, rng = workload.SHAPES["tiny"], np.random.default_rng(0)
    prompt_PQ = rng.integers(2, model.vocab_size, (4, 16)).astype(np.int32)
    completion_PGC = rng.integers(2, model.vocab_size, (4, 2, 24)).astype(np.int32)
    length_P = np.full(4, 16, np.int32)

    def loss(params, dtype):
        hidden_PGCD = transformer.score(
            params, model, prompt_PQ, length_P, completion_PGC, dtype=dtype
        )
        hidden_BTD = hidden_PGCD.reshape(-1, *hidden_PGCD.shape[2:])
        target_BT = completion_PGC.reshape(hidden_BTD.shape[:2])
        head_DV = transformer.head_kernel(params)
        total, logp_BT, _ = logprobs.loss(
            lambda logp, entropy, terms: -logp, Sampling(), logprobs.Along(), hidden_BTD, head_DV,
            target_BT, jnp.ones(target_BT.shape), {},
        )  # fmt: skip
        return total, logp_BT

    def on(device, dtype, precision):
        with jax.default_device(device), jax.default_matmul_precision(precision):
            params = jax.jit(functools.partial(transformer.init, model))(jax.random.key(0))
            both = jax.jit(jax.value_and_grad(functools.partial(loss, dtype=dtype), has_aux=True))
            (total, logp_BT), grads = both(params)
            flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
            return {"loss": np.asarray(total), "logp": np.asarray(logp_BT), "gradient": flat}

    reference = on(jax.devices("cpu")[0], jnp.float32, "highest")
    found = {}
    for name, dtype, precision in (
        ("float32, highest precision", jnp.float32, "highest"),
        ("float32", jnp.float32, "default"),
        ("bfloat16", jnp.bfloat16, "default"),
    ):
        try:
            ours = on(jax.devices()[0], dtype, precision)
        except jax.errors.JaxRuntimeError as error:  # some CPUs have no such product
            found[name] = str(error).splitlines()[0]
            continue
        found[name] = {
            key: float(np.linalg.norm(ours[key] - value) / np.linalg.norm(value))
            for key, value in reference.items()
        }
    return found


def quickstart(tiny: bool) -> dict[str, Any]:
    import tempfile

    options = ["sft.num_steps=2", "loop.num_steps=1", "data.num_eval=8", "data.num_train=64",
               "batch.prompts=4", "batch.group=2", "sft.batch=8", "sft.microbatch=0",
               "model.num_layers=1", "optim.warmup_steps=0", "sft.warmup_steps=1"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpo_jax.train", "--config", "configs/quickstart.py"]
        command += ["--workdir", folder, *(f"--config.{o}" for o in options * tiny)]
        subprocess.run(command, check=True, cwd=HERE.parent, stdout=sys.stderr)
        return json.loads((Path(folder) / "summary.json").read_text())


def step(size: str, lengths: str, tiny: bool) -> dict[str, Any]:
    """Seconds of rollout, reference and update beside their floors, and the peak of memory."""
    import timing

    mean = {"full": 0, "spread": 3 if tiny else MEAN}[lengths]
    return timing.measure(
        _work(size, tiny, mean_tokens=mean), ("rollout", "prepare", "update"), steps=3
    )


def longest(size: str, tiny: bool) -> dict[str, Any]:
    """Updates on one group of 8 completions of doubling length, until memory or time runs out."""
    from grpo_jax import memory

    began, rows = time.monotonic(), []
    tokens = 8 if tiny else 1024
    while tokens <= (16 if tiny else 2**17) and time.monotonic() - began < 0.6 * LIMIT_S:
        try:
            rows.append(_one_update(_work(size, tiny, completion_tokens=tokens)))
        except memory.OutOfMemory as error:
            return {"fits": rows, "fails": {"completion_tokens": tokens, "message": str(error)}}
        tokens *= 2
    return {"fits": rows}


def sequence(size: str, attention: str, tiny: bool) -> dict[str, Any]:
    """An update on one group of sequences of 16,384 tokens: tokens per second and MFU."""
    import jax
    import numpy as np

    from grpo_jax import chips, floor

    work = _work(size, tiny)
    if not tiny:
        tokens = LONG - work.prompt_tokens
        work = dataclasses.replace(work, completion_tokens=tokens, attention=attention)
    found = _one_update(work)
    lengths = [work.prompt_tokens], [[work.completion_tokens] * work.group]
    done = floor.forward(work.shape, *map(np.array, lengths)).times(3)
    rates = chips.chip(jax.devices()[0].device_kind)
    return found | ({"mfu": done.flops / found["seconds"] / rates.bf16_flops} if rates else {})


def _one_update(work: Any) -> dict[str, Any]:
    """Seconds, tokens per second and memory of an update on one group of full length, no KL."""
    import numpy as np
    import timing
    import workload

    from grpo_jax import memory
    from grpo_jax.phases import phase
    from grpo_jax.structs import Rollouts

    work = dataclasses.replace(work, prompts=1, kl=False)
    shape = (1, work.group, work.completion_tokens)
    rng = np.random.default_rng(0)
    rollouts = Rollouts(
        prompt_PQ=rng.integers(2, work.shape.vocab_size, (1, work.prompt_tokens)),
        prompt_length_P=np.full(1, work.prompt_tokens, np.int32),
        completion_PGC=rng.integers(2, work.shape.vocab_size, shape, np.int32),
        logp_PGC=np.zeros(shape, np.float32),
        length_PG=np.full(shape[:2], work.completion_tokens, np.int32),
        stopped_PG=np.zeros(shape[:2], bool),
    )
    with phase("update"):
        runner = workload.Step(work)
        experience = runner.prepare(rollouts)
        for _ in range(2):  # the first compiles
            _, seconds = timing.timed(lambda: runner.update(experience))
    trained = int(np.prod(shape)) + rollouts.prompt_PQ.size
    found = {"completion_tokens": work.completion_tokens, "seconds": seconds}
    return found | {"tokens_per_s": trained / seconds} | memory.usage()


def trace(size: str, tiny: bool) -> list[dict[str, Any]]:
    """The ten longest operations of rollout, reference and update, completions of 128 tokens."""
    import tempfile

    import workload

    from grpo_jax import profile
    from grpo_jax.phases import Trace

    runner = workload.Step(_work(size, tiny, **{} if tiny else {"completion_tokens": 128}))
    with tempfile.TemporaryDirectory() as folder, Trace(Path(folder), (2, 2)) as traced:
        for n in (1, 2, 3):
            traced.begin(n, lambda: None)  # a step ends when its update has
            if n < 3:
                runner.update(runner.prepare(runner.rollout(n)))
        return profile.rows(profile.operations(profile.newest_trace(Path(folder))), top=10)


def torch(size: str, tiny: bool) -> dict[str, Any]:
    import torch_step

    return torch_step.measure(_work(size, tiny))


# --- The run --------------------------------------------------------------------------------------


def run(part: str, out: Path, tiny: bool, minutes: float) -> dict[str, Any]:
    """Runs the pieces of a part; returns and writes everything measured so far."""
    file, ends = out / "gpu.json", time.monotonic() + 60 * minutes
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, arguments in PIECES[part]:
        title = " ".join([name, *arguments])
        left = min(LIMIT_S, ends - time.monotonic())
        print(f"{title} ...", file=sys.stderr, flush=True)
        found[title] = _piece(name, arguments, out, tiny, left)
        file.write_text(json.dumps(found, indent=1) + "\n")
        (out / "gpu.md").write_text(table(found))
    return found


def _piece(name: str, arguments: list[str], out: Path, tiny: bool, left_s: float) -> Any:
    """What a piece returns, in a process of its own; where it has nothing, {"failed": why}."""
    if left_s < 1:
        return {"failed": "no time was left for it"}
    log = out / f"{'_'.join([name, *arguments])}.log"
    command = [sys.executable, __file__, "--piece", name, *arguments, "--out", str(out)]
    command += ["--shape", "tiny"] * tiny
    # Most of the memory from the start, as launch/gpu.sh has it.
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"} | os.environ
    try:
        with log.open("w") as errors:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=left_s, env=env
            )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {left_s:.0f} s"}
    if done.returncode:
        return {"failed": (log.read_text().strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    forms: dict[str, Callable[[Any], list[str]]] = {
        "step": _step_lines, "trace": _trace_lines, "longest": _longest_lines,
    }  # fmt: skip
    lines = ["# One GPU", ""]
    for title, value in found.items():
        lines += [f"## {title}", ""]
        if "failed" in value:
            lines += [f"Failed: {value['failed']}", ""]
            continue
        lines += [*forms.get(title.split()[0], _plain_lines)(value), ""]
    return "\n".join(lines)


def _grid(names: list[str], rows: list[list[Any]]) -> list[str]:
    shown = [[f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *shown]]


def _plain_lines(value: dict[str, Any]) -> list[str]:
    return _grid(["", "value"], [[k, v] for k, v in value.items()])


def _step_lines(value: dict[str, Any]) -> list[str]:
    names = ["phase", "seconds", "floor", "share"]
    rows = [
        [name, row["seconds"], row["floor_seconds"], f"{row['share']:.0%}"]
        for name, row in value["phases"].items()
    ]
    speed = f"{value['completion_tokens_per_s']:,.0f} completion tokens per second"
    memory = ", ".join(f"{name} {gib:.1f}" for name, gib in value["memory"].items())
    return [*_grid(names, rows), "", f"{speed}; {memory}"]


def _trace_lines(value: list[dict[str, Any]]) -> list[str]:
    rows = [
        [r["phase"], r["name"], r["part"], r["calls"], 1e3 * r["seconds"], f"{r['share']:.1%}"]
        for r in value
        if r["phase"] != "other"
    ]
    return _grid(["phase", "operation", "part", "calls", "ms", "share"], rows)


def _longest_lines(value: dict[str, Any]) -> list[str]:
    lines = _grid(list(value["fits"][0]), [list(r.values()) for r in value["fits"]])
    if "fails" in value:
        fails = value["fails"]
        lines += ["", f"{fails['completion_tokens']:,} tokens: {fails['message']}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--part", choices=[*PIECES, "all"], default="all")
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--shape", choices=["full", "tiny"], default="full")
    parser.add_argument("--minutes", type=float, default=8.3, help="of each part")
    parser.add_argument("--piece", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tiny = args.shape == "tiny"
    if args.piece:
        name, *arguments = args.piece
        print(json.dumps(globals()[name](*arguments, tiny=tiny)))
        return
    for part in PIECES if args.part == "all" else [args.part]:
        found = run(part, args.out, tiny, args.minutes)
    print(table(found))


if __name__ == "__main__":
    main()
