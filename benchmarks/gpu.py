"""All that is measured on one GPU, in one call: `python benchmarks/gpu.py --part all --out DIR`.

Part A tells what the machine is, compares its numbers with the CPU's and its kernels with plain
XLA, times the ways to attend in decoding, trains the quickstart and times updates on sequences of
16,384 tokens. Part B times and traces steps of the 0.5B and 1.5B shapes, completions of full length
and of mean 200, and PyTorch on the same shape. Part C times 7B and looks for the longest completion
that can be trained on. A part ends within `--minutes` (25 in all): a piece that has no time left,
or fails, is told as such, with what it had found. Pieces are processes of their own, so that each
has the whole memory; `--pieces "step middle auto" ...` runs these alone.

Writes DIR/gpu.json and, from it, DIR/gpu.md; what another part left there stays. `--shape tiny`
runs every piece with a tiny network, on a CPU too, where no number means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    "lean": "qwen2.5-1.5b",
    "large": "qwen2.5-7b",
}
# What lets all weights of 7B learn on one card of 141 GB: 2 + 4 + 2.06 bytes of each are kept, 4 of
# its gradient and 2 of the reference. "lean" is as little memory as PyTorch's precision takes. The
# others keep the usual 12.
KEPT = {
    "large": {"param_dtype": "bfloat16", "master_weights": True, "moments": "int8"},
    "lean": {
        "param_dtype": "bfloat16",
        "moments": "bfloat16",
        "offload_reference": True,
        "num_slots": SIZES["prompts"] * SIZES["group"] // 2,
    },
}
KERNEL_TESTS = (
    "test_gpu_cudnn.py",
    "test_gpu_decode.py",
    "test_gpu_block_sums.py",
    "test_gpu_norm.py",
    "test_gpu_codes.py",
)
LONG = 16384  # tokens of a prompt and its completion
MEAN = 200  # tokens, of the completions that are not of full length
LIMIT_S = 270  # of a piece
OUT = Path()  # where pieces leave files

# Prompts of a microbatch: about as many tokens as leave room for what the backward pass keeps.
MICROBATCH = {"small": 8, "middle": 4, "lean": 1, "large": 2}

# Name, and the arguments that it is called with.
PIECES: dict[str, list[tuple[str, list[str]]]] = {
    "A": [
        ("environment", []),
        ("parity", []),
        ("numerics", []),
        ("decoding", ["middle"]),
        ("quickstart", []),
        ("sequence", ["long", "cudnn"]),
        ("sequence", ["long", "xla"]),
    ],
    "B": [
        ("step", ["middle", "auto", "off", "both"]),
        ("rollout", ["middle", "auto", "auto", "1"]),
        ("update", ["middle", "on"]),
        ("torch", ["middle"]),
        ("rollout", ["middle", "auto", "int8", "0"]),
        ("step", ["small", "auto", "off", "full"]),
        ("step", ["lean", "auto", "off", "full"]),
    ],
    "C": [
        ("step", ["large", "auto", "on", "full"]),
        ("longest", ["middle", "32768", "65536"]),
        ("longest", ["large", "32768", "32768"]),
    ],
}


def _work(size: str, tiny: bool, **changes: Any):
    import workload

    changes = KEPT.get(size, {}) | changes
    if tiny:
        workload.SHAPES["tiny"] = workload.shape(2, 32, 4, 2, 8, 48, 64, True)
        return workload.Work(**TINY_SIZES | changes)
    full = {"model": MODELS[size], "dtype": "bfloat16", "attention": "cudnn"}
    full["microbatch"] = MICROBATCH.get(size, 0)
    if size in ("long", "lean", "large"):
        full["remat"] = "full"
    return workload.Work(**full | SIZES | changes)


# --- The pieces: each returns what goes into the JSON, or yields it as it grows -------------------


def environment(tiny: bool) -> dict[str, Any]:
    import floors
    import timing

    from grpo_jax.devices import memory

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
    import jax
    import jax.numpy as jnp
    import numpy as np
    import workload

    from grpo_jax.learner import logprobs
    from grpo_jax.models import parameters, transformer
    from grpo_jax.models.lanes import PackedInputs
    from grpo_jax.structs import Sampling

    model, rng = workload.SHAPES["tiny"], np.random.default_rng(0)
    prompt_PQ = rng.integers(2, model.vocab_size, (4, 16)).astype(np.int32)
    completion_PGC = rng.integers(2, model.vocab_size, (4, 2, 24)).astype(np.int32)
    length_P = np.full(4, 16, np.int32)

    def loss(params, dtype):
        inputs = PackedInputs.of(prompt_PQ, length_P, completion_PGC)
        states = transformer.completion_states(params, model, inputs, dtype=dtype)
        hidden_PGCD = inputs.by_completion(states)
        hidden_BTD = hidden_PGCD.reshape(-1, *hidden_PGCD.shape[2:])
        target_BT = completion_PGC.reshape(hidden_BTD.shape[:2])
        head_DV = parameters.head_kernel(params)
        total, logp_BT, _ = logprobs.loss(
            lambda logp, entropy, terms: -logp, Sampling(), logprobs.UNSPLIT, None,
            hidden_BTD, head_DV, target_BT, jnp.ones(target_BT.shape), {},
        )  # fmt: skip
        return total, logp_BT

    def on(device, dtype, precision):
        with jax.default_device(device), jax.default_matmul_precision(precision):
            params = jax.jit(functools.partial(parameters.init, model))(jax.random.key(0))
            both = jax.jit(jax.value_and_grad(functools.partial(loss, dtype=dtype), has_aux=True))
            (total, logp_BT), grads = both(params)
            flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
            return {"loss": np.asarray(total), "logp": np.asarray(logp_BT), "gradient": flat}

    reference = on(jax.devices("cpu")[0], jnp.float32, "highest")
    found = {}
    for name, dtype, precision in (
        ("float32, highest precision", jnp.float32, "highest"),
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


def parity(tiny: bool) -> dict[str, Any]:
    """Kernels of this device against plain XLA, by the tests that need one."""
    found = {}
    for test in () if tiny else KERNEL_TESTS:
        file = HERE.parent / "tests" / "kernels" / test
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(file.parents[1] / "helpers")])
        }
        done = subprocess.run(
            [sys.executable, str(file)], env=env, capture_output=True, text=True, timeout=120
        )
        print(done.stdout, done.stderr, file=sys.stderr)
        found[test] = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else "equal"
    return found


def rollout(size: str, decoding: str, cache: str, steps: str, tiny: bool) -> dict[str, Any]:
    """Tokens per second of rollouts of full length.

    `steps`: tokens between two looks at the host, 0 for as many as the program chooses.
    """
    import timing
    import workload

    kinds = {} if tiny else {"decoding": decoding, "cache": cache}
    work = _work(size, tiny, decode_steps=int(steps), **kinds)
    runner = workload.Step(work)
    _, first = timing.timed(lambda: runner.rollout(0, mean=-4))
    runner.rollout(0, mean=-4)
    rollouts, seconds = timing.timed(lambda: runner.rollout(1))
    tokens = int(rollouts.length_PG.sum())
    return {"first_s": first, "seconds": seconds, "tokens_per_s": tokens / seconds}


def decoding(size: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Microseconds of one layer's attention for a token of each lane, and the cache's GB/s."""
    from grpo_jax.kernels.gpu_decode import TritonDecode
    from grpo_jax.kernels.kv_cache import RingCache

    kinds = {"xla": RingCache(), "xla, int8": RingCache(True)}
    if not tiny:
        kinds |= {"streamed": TritonDecode(), "streamed, int8": TritonDecode(True)}
    yield from _decoding(_work(size, tiny), kinds)


def _decoding(work: Any, kinds: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grpo_jax.kernels import rotary
    from grpo_jax.kernels.kv_cache import CacheShape, DecodeStep
    from grpo_jax.models import frequencies

    model, limit = work.shape, work.completion_tokens
    slots, lanes, prompt = work.prompts, work.group, work.prompt_tokens
    heads, kv, width = model.num_heads, model.num_kv_heads, model.head_size
    repeats, found = 50, {}
    for name, kind in kinds.items():

        @jax.jit
        def begin(kind=kind):
            keys = iter(jax.random.split(jax.random.key(0), 16))

            def drawn(x):
                y = jax.random.normal(next(keys), x.shape, jnp.float32)
                return (100 * y if x.dtype == jnp.int8 else y).astype(x.dtype)

            cache = kind.empty(CacheShape(slots, lanes, prompt, limit, kv, width), jnp.bfloat16)
            qkv = [jnp.empty((slots, lanes, n, width), jnp.bfloat16) for n in (heads, kv, kv)]
            return jax.tree.map(drawn, (cache, *qkv))

        @functools.partial(jax.jit, donate_argnums=0)
        def run(cache, q, k, v, last, kind=kind):
            where = jnp.full(slots, prompt), jnp.full((slots, lanes), last)
            inv_freq = frequencies.of(model.rotaries[0], width)
            angles = rotary.rotary(where[0][:, None] + where[1], inv_freq)
            step = DecodeStep(*where, jnp.ones((slots, lanes), bool), last, limit, angles)

            def one(i, carry):
                q, cache = carry
                out, cache = kind.extend(cache, q, k, v, step)
                return out.astype(q.dtype), cache

            return jax.lax.fori_loop(0, repeats, one, (q, cache))

        (cache, *qkv), rows = begin(), {}
        for last in (limit // 8 - 1, limit // 2 - 1, limit - 1):
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                _, cache = jax.block_until_ready(run(cache, *qkv, np.int32(last)))
                seconds.append((time.perf_counter() - began) / repeats)
            read = 2 * slots * kv * width * (lanes * (last + 1) + prompt) * (2 - kind.int8)
            best = min(seconds)
            rows[f"{last + 1} tokens"] = {"us": 1e6 * best, "gb_per_s": read / best / 1e9}
        found[name] = rows
        yield found


def step(size: str, decoding: str, layers: str, which: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Each phase beside its floor: completions of "full" length, or "both" these and of a mean.

    `layers`: as `config.model.scan_layers`. With "both" come traces. Of the large shape, scoring
    and the update run once, and the compiler's seconds are taken off.
    """
    import jax
    import timing
    import workload

    from grpo_jax.devices import chips, compiling, memory, roofline

    mean = 3 if tiny else MEAN
    kinds = {} if tiny else {"decoding": decoding}
    work = _work(size, tiny, layers=layers, **kinds)
    runner, began = workload.Step(work), time.monotonic()
    found: dict[str, Any] = {"work": dataclasses.asdict(work)}
    found["environment"] = timing.environment()
    rates = chips.chip(jax.devices()[0].device_kind)
    table, experience = timing.Phases(work, megabytes=16 if tiny else 0), None
    runs = (("full", 0, -4), ("spread", mean, 2 if tiny else 8))
    for name, tokens, brief in runs[: 2 if which == "both" else 1]:
        for _ in range(2):
            runner.rollout(0, mean=brief)  # compiles
        first, table = time.monotonic() - began, table.begun()
        rollouts, seconds = timing.timed(lambda n=tokens: runner.rollout(1, mean=n))
        lengths = rollouts.prompt_length_P, rollouts.length_PG
        least = roofline.rollout(work.shape, *lengths, **runner.engine.traffic)
        table.add("rollout", seconds, least)
        forward, number = roofline.forward(work.shape, *lengths), int(rollouts.length_PG.sum())
        done = found[name] = {"completion_tokens": number, "rollout_tokens_per_s": number / seconds}
        done["first_rollouts_s"] = first
        found[name] |= table.medians(number) | {"work": None}
        yield found
        for phase, call, times in (
            ("prepare", lambda r=rollouts: runner.prepare(r), 1),
            ("update", lambda: runner.update(experience), 3),  # noqa: B023
        ):
            with compiling.Compiling() as compiled:
                value, first = timing.timed(call)
            done[f"first_{phase}_s"], seconds = first, first - compiled.seconds
            if size != "large":
                value, seconds = timing.timed(call)
            experience = value if phase == "prepare" else experience
            table.add(phase, seconds, forward.times(times))
            if rates:
                flops = forward.flops * times
                done[f"{phase}_mfu"] = flops / seconds / rates.bf16_flops
            done |= table.medians(number) | {"work": None}
            yield found
        began = time.monotonic()
        if name == "full":
            at_once = rollouts, experience
    found["memory"] = memory.usage()
    yield found
    if which == "both":
        yield found | {"traces": _traces(runner, *at_once)}


def trace(size: str, decoding: str, tiny: bool) -> dict[str, Any]:
    """The longest operations of each phase, completions of full length."""
    import workload

    runner = workload.Step(_work(size, tiny, **{} if tiny else {"decoding": decoding}))
    rollouts = runner.rollout(1)
    experience = runner.prepare(rollouts)
    runner.update(experience)
    return {"traces": _traces(runner, rollouts, experience)}


def _traces(runner: Any, rollouts: Any, experience: Any) -> list[dict[str, Any]]:
    """The longest operations of 32 tokens of a rollout, of the reference and of an update."""
    import gzip
    import tempfile

    import jax

    from grpo_jax.metrics import trace as trace_lib

    rows = []
    for name, call in (
        ("rollout", lambda: runner.rollout(2, mean=-32)),
        ("prepare", lambda: runner.prepare(rollouts)),
        ("update", lambda: runner.update(experience)),
    ):
        call()
        with tempfile.TemporaryDirectory() as folder:
            # Begun while the device works, a trace can end the program on it.
            with jax.profiler.trace(folder):
                call()
            trace = trace_lib.newest_trace(Path(folder))
            (OUT / f"{name}.xplane.pb.gz").write_bytes(gzip.compress(trace.read_bytes()))
            rows += trace_lib.rows(trace_lib.operations(trace), top=15)
    return rows


def longest(size: str, first: str, last: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """One update on a group of 8 completions of `first` tokens, twice as many, up to `last`.

    It ends when memory or time runs out. The seconds are with the compiler's taken off.
    """
    from grpo_jax.devices import memory

    began, rows = time.monotonic(), []
    tokens, last_tokens = (8, 16) if tiny else (int(first), int(last))
    while tokens <= last_tokens and time.monotonic() - began < 0.6 * LIMIT_S:
        try:
            work = _work(
                size, tiny, completion_tokens=tokens, prompts=1, kl=False, microbatch=0,
                remat="full",
            )  # fmt: skip
            rows.append(_one_update(work, once=True))
        except memory.OutOfMemory as error:
            yield {"fits": rows, "fails": {"completion_tokens": tokens, "message": str(error)}}
            return
        yield {"fits": rows}
        tokens *= 2


def sequence(size: str, attention: str, tiny: bool) -> dict[str, Any]:
    """An update on one group of sequences of 16,384 tokens: tokens per second and MFU."""
    import jax
    import numpy as np

    from grpo_jax.devices import chips, roofline

    work = _work(size, tiny, prompts=1, kl=False)
    if not tiny:
        tokens = LONG - work.prompt_tokens
        work = dataclasses.replace(work, completion_tokens=tokens, attention=attention)
    found = _one_update(work)
    lengths = [work.prompt_tokens], [[work.completion_tokens] * work.group]
    done = roofline.forward(work.shape, *map(np.array, lengths)).times(3)
    rates = chips.chip(jax.devices()[0].device_kind)
    return found | ({"mfu": done.flops / found["seconds"] / rates.bf16_flops} if rates else {})


def update(size: str, layers: str, tiny: bool) -> dict[str, Any]:
    """An update alone, completions of full length; `layers` as in `step`."""
    return _one_update(_work(size, tiny, layers=layers))


def objectives(size: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Updates of a token-wise objective and of one of whole completions."""
    found: dict[str, Any] = {}
    for preset in ("bnpo", "gspo"):
        found[preset] = _one_update(_work(size, tiny, preset=preset))
        yield found
    yield found | {"gspo / bnpo": found["gspo"]["seconds"] / found["bnpo"]["seconds"]}


def _one_update(work: Any, once: bool = False) -> dict[str, Any]:
    """Seconds, tokens per second and memory of an update on completions of full length.

    `once`: of its first run, with the compiler's seconds taken off.
    """
    import numpy as np
    import timing
    import workload

    from grpo_jax.devices import compiling, memory
    from grpo_jax.devices.phases import phase
    from grpo_jax.structs import Rollouts

    shape = (work.prompts, work.group, work.completion_tokens)
    rng = np.random.default_rng(0)
    rollouts = Rollouts(
        prompt_PQ=rng.integers(2, work.shape.vocab_size, (work.prompts, work.prompt_tokens)),
        prompt_length_P=np.full(work.prompts, work.prompt_tokens, np.int32),
        completion_PGC=rng.integers(2, work.shape.vocab_size, shape, np.int32),
        logp_PGC=np.zeros(shape, np.float32),
        length_PG=np.full(shape[:2], work.completion_tokens, np.int32),
        stopped_PG=np.zeros(shape[:2], bool),
    )
    with phase("update"):
        runner = workload.Step(work)
        experience = runner.prepare(rollouts)
        with compiling.Compiling() as compiled:
            _, seconds = timing.timed(lambda: runner.update(experience))
        seconds -= compiled.seconds
        if not once:
            _, seconds = timing.timed(lambda: runner.update(experience))
    trained = int(np.prod(shape)) + rollouts.prompt_PQ.size
    found = {"completion_tokens": work.completion_tokens, "seconds": seconds}
    return found | {"tokens_per_s": trained / seconds} | memory.usage()


def torch(size: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """PyTorch's step of the same work, beside the rollout, reference and update of `step`."""
    import torch_step

    yield from torch_step.measure(_work(size, tiny))


# --- The run --------------------------------------------------------------------------------------


def run(
    pieces: list[tuple[str, list[str]]], out: Path, tiny: bool, minutes: float
) -> dict[str, Any]:
    """Runs some pieces; returns and writes everything measured so far."""
    file, ends = out / "gpu.json", time.monotonic() + 60 * minutes
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, arguments in pieces:
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
    failed, printed = {}, log.with_suffix(".json")
    with log.open("w") as errors, printed.open("w") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=errors, timeout=left_s, env=env)
        except subprocess.TimeoutExpired:
            failed = {"failed": f"not done after {left_s:.0f} s"}
        else:
            if done.returncode:
                failed = {"failed": _message(log.read_text())}
    lines = printed.read_text().splitlines()
    printed.unlink()
    return (json.loads(lines[-1]) if lines else {}) | failed


def _message(log: str) -> str:
    """The last line that begins with an error's name, or the last one."""
    lines = log.strip().splitlines() or ["no message"]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|OutOfMemory)\b", line)]
    return (errors or lines)[-1]


def table(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    forms: dict[str, Callable[[Any], list[str]]] = {
        "step": _step_lines, "trace": _trace_lines, "longest": _longest_lines,
        "decoding": _decoding_lines,
    }  # fmt: skip
    lines = ["# One GPU", ""]
    for title, value in found.items():
        lines += [f"## {title}", ""]
        if "failed" in value:
            lines += [f"Failed: {value['failed']}", ""]
        try:
            lines += [*forms.get(title.split()[0], _plain_lines)(value), ""]
        except (KeyError, IndexError, AttributeError, TypeError):
            lines += [json.dumps(value), ""]  # it failed before there was as much
    return "\n".join(lines)


def _grid(names: list[str], rows: list[list[Any]]) -> list[str]:
    shown = [[f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *shown]]


def _plain_lines(value: dict[str, Any]) -> list[str]:
    return _grid(["", "value"], [[k, v] for k, v in value.items()])


def _step_lines(value: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("full", "spread"):
        if name not in value:
            continue
        done = value[name]
        rows = [
            [
                phase,
                row["seconds"],
                row["floor_seconds"],
                f"{row['share']:.0%}",
                done.get(f"{phase}_mfu", ""),
            ]
            for phase, row in done["phases"].items()
        ]
        lines += ["", f"### {name}: {done['completion_tokens']:,} completion tokens", ""]
        lines += _grid(["phase", "seconds", "floor", "share", "MFU"], rows)
        lines += ["", f"rollout {done['rollout_tokens_per_s']:,.0f} tokens per second"]
        first = [f"{key} {done[key]:.1f}" for key in done if key.startswith("first_")]
        lines += ["Compiling too: " + ", ".join(first)]
        lines += [", ".join(f"{n} {gib:.1f}" for n, gib in done["memory"].items())]
    return [*lines, "", *_trace_lines(value)]


def _decoding_lines(value: dict[str, Any]) -> list[str]:
    rows = [
        [name, tokens, row["us"], row["gb_per_s"]]
        for name, by_tokens in value.items()
        for tokens, row in by_tokens.items()
    ]
    return _grid(["attention", "up to", "us", "GB/s"], rows)


def _trace_lines(value: dict[str, Any]) -> list[str]:
    rows = [
        [r["phase"], r["name"], r["part"], r["calls"], 1e3 * r["seconds"], f"{r['share']:.1%}"]
        for r in value.get("traces", [])
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
    parser.add_argument("--pieces", nargs="+", help="these alone, such as 'step middle streamed'")
    parser.add_argument("--piece", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tiny = args.shape == "tiny"
    if args.piece:
        name, *arguments = args.piece
        globals()["OUT"] = args.out
        found = globals()[name](*arguments, tiny=tiny)
        for so_far in found if inspect.isgenerator(found) else [found]:
            print(json.dumps(so_far), flush=True)
        return
    parts = list(PIECES.values()) if args.part == "all" else [PIECES[args.part]]
    if args.pieces:
        parts = [[(name, rest) for name, *rest in map(str.split, args.pieces)]]
    for pieces in parts:
        found = run(pieces, args.out, tiny, args.minutes)
    print(table(found))


if __name__ == "__main__":
    main()
