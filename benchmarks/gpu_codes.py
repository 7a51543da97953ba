"""Products with kernels in 8 and 4 bits on a GPU: `python benchmarks/gpu_codes.py products`.

`products` times those of one layer of the 7B shape for several numbers of rows, by XLA and by
`kernels/gpu_codes.py`; `tiles` compares sizes of its programs; `rollouts` draws completions with a
model whose adapters are not merged, its base in bfloat16, int8 and NF4. Each prints a table, and
writes DIR/NAME.json. `--shape tiny` tries it on any device, where no number means anything.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from grpo_jax.kernels import gpu_codes, nf4, quantize  # noqa: E402
from grpo_jax.kernels.gpu_codes import Tile  # noqa: E402

LAYERS = {
    "7b": {"qkv": (3584, 4608), "o": (3584, 3584), "gate_up": (3584, 37888), "down": (18944, 3584)},
    "tiny": {"qkv": (128, 128), "down": (256, 128)},
}
ROWS = {"7b": (8, 32, 64, 128, 256), "tiny": (8,)}
TILES = [
    Tile(outputs, blocks, programs, warps, stages)
    for outputs, blocks, programs, warps, stages in (
        (128, 1, 264, 4, 4),
        (128, 1, 528, 4, 4),
        (128, 1, 1056, 4, 4),
        (128, 2, 264, 4, 3),
        (128, 2, 528, 4, 3),
        (128, 4, 528, 4, 3),
        (64, 2, 528, 4, 4),
        (64, 4, 528, 4, 3),
        (128, 1, 528, 8, 4),
        (128, 2, 528, 8, 4),
    )
]
BYTES, TIMES = 600e6, 5  # of the copies that a program goes through; more than a cache holds
OUT = Path()


def kernels(size: tuple[int, int], key: Any) -> dict[str, Any]:
    whole = jax.random.normal(key, size, jnp.float32) * 0.02
    return {
        "bfloat16": whole.astype(jnp.bfloat16),
        "int8": quantize.int8(whole, -2),
        "nf4": nf4.quantize(whole, double=False),
    }


def copies_of(kernel: Any) -> list[Any]:
    number = max(2, int(BYTES / sum(x.nbytes for x in jax.tree.leaves(kernel))))
    return [jax.tree.map(lambda x: jnp.array(x, copy=True), kernel) for _ in range(min(number, 40))]


def program(multiply: Any, x: Any, copies: list[Any]) -> Any:
    """Goes through the copies `TIMES` times; compiled."""

    def run(x, copies):
        def once(i, ys):
            # What is added depends on the last round, so that no round can be left out.
            return [multiply(x + ys[0][0, 0].astype(x.dtype) * 0, kernel) for kernel in copies]

        ys = [jnp.zeros((x.shape[0], copies[0].shape[1]), jnp.float32) for _ in copies]
        return jax.lax.fori_loop(0, TIMES, once, ys)

    return jax.jit(run).lower(x, copies).compile()


def by_xla(x: Any, kernel: Any) -> Any:
    if isinstance(kernel, (quantize.Int8, nf4.NF4)):
        return quantize.frozen_product(x, kernel)
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def microseconds(compiled: Any, x: Any, copies: list[Any]) -> float:
    jax.block_until_ready(compiled(x, copies))
    found = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(compiled(x, copies))
        found.append(time.perf_counter() - began)
    return 1e6 * statistics.median(found) / TIMES / len(copies)


def measure(cases: list[tuple], sizes: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Microseconds of cases (layer, rows, name of the kernel, how, tile or None)."""
    interpret = jax.default_backend() == "cpu"
    weights = {n: kernels(s, jax.random.key(i)) for i, (n, s) in enumerate(sizes.items())}
    copies = {(n, k): copies_of(w) for n, both in weights.items() for k, w in both.items()}
    xs = {
        (n, rows): jax.random.normal(jax.random.key(7), (rows, size[0])).astype(jnp.bfloat16)
        for n, size in sizes.items()
        for rows in {case[1] for case in cases}
    }

    def compiled(case: tuple) -> Any:
        layer, rows, name, tile = case
        how = by_xla
        if tile is not None:
            how = functools.partial(gpu_codes.product, tile=tile, interpret=interpret)
            if (
                jax.eval_shape(lambda x, k: how(x, k), xs[layer, rows], weights[layer][name])
                is None
            ):
                return "no such tile"
        try:
            return program(how, xs[layer, rows], copies[layer, name])
        except Exception as error:  # a size that a device cannot run is a result
            return f"{type(error).__name__}: {str(error)[:200]}"

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        programs = list(pool.map(compiled, cases))
    found = []
    for case, run in zip(cases, programs):
        layer, rows, name, tile = case
        row = {"layer": layer, "rows": rows, "kernel": name, "tile": str(tile or "xla")}
        found.append(row)
        if isinstance(run, str):
            row["failed"] = run
            continue
        x = xs[layer, rows]
        try:
            row["us"] = microseconds(run, x, copies[layer, name])
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        got = run(x, copies[layer, name])[0]
        plain = copies[layer, name][0]
        plain = nf4.decode(plain, jnp.float32) if isinstance(plain, nf4.NF4) else plain
        if isinstance(plain, quantize.Int8):
            plain = plain.codes * plain.scale
        want = jnp.matmul(x.astype(jnp.float32), plain.astype(jnp.float32), precision="highest")
        row["error"] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        moved = sum(a.nbytes for a in jax.tree.leaves(copies[layer, name][0]))
        row["gb_per_s"] = moved / row["us"] / 1e3
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def tiles(shape: str) -> list[dict[str, Any]]:
    sizes = LAYERS[shape]
    sizes = {n: sizes[n] for n in list(sizes)[1:3]}
    rows = (8, 64) if shape == "7b" else (8,)
    cases = [
        (n, r, k, None) for n, r, k in itertools.product(sizes, rows, ("bfloat16", "int8", "nf4"))
    ]
    cases += [
        (n, r, k, tile) for n, r, k, tile in itertools.product(sizes, rows, ("int8", "nf4"), TILES)
    ]
    return measure(cases, sizes)


def products(shape: str) -> list[dict[str, Any]]:
    sizes, cases = LAYERS[shape], []
    for n, r in itertools.product(list(sizes)[-2:], ROWS[shape]):
        cases += [(n, r, k, None) for k in ("bfloat16", "int8", "nf4")]
        cases += [(n, r, k, Tile()) for k in ("int8", "nf4")]
        cases += [(n, r, "nf4", Tile(warps=8))] * (r >= 128)
    return measure(cases, sizes)


def rollouts(shape: str, bases: str, prompts: str, seconds: str = "1") -> list[dict[str, Any]]:
    """Tokens a second of rollouts of full length, in processes of their own, for each base."""
    found = []
    for base, number in itertools.product(bases.split(","), prompts.split(",")):
        command = [sys.executable, __file__, "one", shape, base, number]
        env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"} | os.environ
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        print(done.stderr[-1500:], file=sys.stderr, flush=True)
        lines = done.stdout.strip().splitlines()
        ok = done.returncode == 0 and lines
        found.append(json.loads(lines[-1]) if ok else {"base": base, "failed": done.stderr[-300:]})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def one(shape: str, base: str, prompts: str) -> None:
    """Prints one row of `rollouts`. `base`: "full" for no adapters; "nf4+update" updates too."""
    import timing
    import workload

    from grpo_jax.devices import memory

    base, _, more = base.partition("+")
    sizes = {"prompts": int(prompts), "group": 8, "prompt_tokens": 256, "completion_tokens": 256}
    if shape == "tiny":
        sizes |= {"prompts": 2, "group": 2, "prompt_tokens": 8, "completion_tokens": 8}
        kinds = {"model": "tiny", "dtype": "float32"}
    else:
        kinds = {"model": "qwen2.5-7b", "dtype": "bfloat16", "decoding": "auto"}
        kinds |= {"attention": "cudnn", "remat": "full", "microbatch": 1}
    if base == "full":
        kinds |= {"param_dtype": "bfloat16", "moments": "int8", "kl": False}
    else:
        kinds |= {"lora": 16, "base": "auto" if base == "bfloat16" else base}
    if more == "xla":  # without the kernels for few rows
        from grpo_jax.kernels import choice

        choice.choose_frozen_product = lambda mesh, dtype: quantize.frozen_product
    began = time.monotonic()
    runner = workload.Step(workload.Work(**kinds | sizes))
    jax.block_until_ready(runner.weights)
    made_s = time.monotonic() - began
    runner.rollout(0, mean=-4)
    first_s = time.monotonic() - began - made_s
    print(f"{made_s:.1f} s to make, {first_s:.1f} s to compile", file=sys.stderr, flush=True)
    runner.rollout(0, mean=-4)
    drawn, seconds = timing.timed(lambda: runner.rollout(1))
    row = {"base": base, "how": more, "rows": int(drawn.length_PG.size)}
    row |= {"tokens_per_s": int(drawn.length_PG.sum()) / seconds}
    row |= {"made_s": made_s, "compiled_s": first_s}
    row["rollout_gib"] = memory.usage().get("memory/device_peak_gib")
    if more == "update":
        experience, _ = timing.timed(lambda: runner.prepare(drawn))
        experience, row["reference_s"] = timing.timed(lambda: runner.prepare(drawn))
        timing.timed(lambda: runner.update(experience))
        _, row["update_s"] = timing.timed(lambda: runner.update(experience))
    print(json.dumps(row | memory.usage()))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| layer | rows | kernel | how | us | GB/s | error |", "| --- " * 7 + "|"]
    for row in rows:
        us = row.get("failed") or f"{row['us']:.1f} | {row['gb_per_s']:.0f} | {row['error']:.1e}"
        lines.append(f"| {row['layer']} | {row['rows']} | {row['kernel']} | {row['tile']} | {us} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tiles", "products", "rollouts", "one"])
    parser.add_argument("with_what", nargs="*")
    parser.add_argument("--shape", choices=list(LAYERS), default="7b")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_intermixed_args()
    if args.what == "one":
        return one(*args.with_what)
    found = globals()[args.what](args.shape, *args.with_what)
    (args.out / f"{args.what}.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.what != "rollouts":
        return print(table(found))
    for row in found:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
