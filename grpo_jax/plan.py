"""What a run needs and costs on devices that are not there.

    python -m grpo_jax.plan --config configs/gsm8k.py --topology v5e:8x8

The programs of one step, and of an evaluation, are compiled ahead of time for TPUs (`pip install -e
".[plan]"` brings the compiler), for GPUs of one machine, `h100:8` (`".[gpu]"`), or for simulated
CPU devices, `cpu:8`; nothing is allocated. The report says whether they fit, what lies in each
device's memory, and how long each program takes at least. Where they do not fit, changes of the
config are compiled until one does.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from grpo_jax import parts, program, sharding
from grpo_jax.metrics import console, print_title, say
from grpo_jax.models import families
from grpo_jax.planning import advice, chips, fit
from grpo_jax.planning import step as step_lib
from grpo_jax.structs import ModelConfig

_GIB = 2**30


def main(argv: list[str]) -> None:
    args, overrides = _arguments(argv)
    config = program.load_config(args.config, overrides)
    chip, devices = chips.devices(args.topology)
    model = read_shape(args.model_shape) if args.model_shape else parts.model_shape(config)
    known: step_lib.Known = {}

    def lengths_of(config: ConfigDict) -> step_lib.Lengths:
        return step_lib.Lengths.of(config, args.prompt_tokens, args.mean_tokens)

    def make(config: ConfigDict) -> step_lib.Plan:
        mesh, lengths = sharding.make_mesh(**config.mesh, devices=devices), lengths_of(config)
        fitted = fit.choose(config, model, mesh, lengths, chip.usable, chip, known)
        return step_lib.plan(
            config, model, args.topology, chip, devices, lengths, fitted, known=known
        )

    def held(config: ConfigDict) -> dict[str, float]:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        return step_lib.Step(config, model, mesh, lengths_of(config)).held()

    began = time.monotonic()
    plan = make(config)
    show(plan)
    report: dict[str, Any] = plan.as_json()
    config = advice.changed(config, advice.mesh_options(plan.mesh))
    trial = advice.Trial(config, model, make, held, plan.room)
    if args.longest:
        most = model.max_position - (args.prompt_tokens or config.data.max_prompt_tokens)
        own = advice.Tried({"rollout.max_tokens": config.rollout.max_tokens}, plan)
        tried = [own, *_told(advice.longest(trial, plan, most))]
        _show_tried("Completions, the shortest first", sorted(tried, key=lambda t: t.tokens))
        fitting = max((t.tokens for t in tried if t.fits), default=0)
        say(f"Completions of {fitting:,} tokens fit." if fitting else "None of them fits.")
        report["longest"] = [_tried_json(t) for t in tried]
    elif not plan.fits:
        tried = _told(advice.smallest_fit(trial, plan))
        _show_tried("Changes tried until one fits", tried)
        fitting = [t for t in tried if t.fits]
        say(f"It fits with {fitting[-1].words}." if fitting else "None of them makes it fit.")
        report["tried"] = [_tried_json(t) for t in tried]
    if args.search:
        own = advice.Tried(advice.mesh_options(plan.mesh), plan)
        ranked = advice.ranked([own, *_told(advice.search(trial, args.search))])
        _show_tried("Meshes, the best first", ranked)
        report["search"] = [_tried_json(t) for t in ranked]
    say(f"Compiled in {time.monotonic() - began:.0f} s.")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Plans a run on devices that are not there.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a file as in configs/")
    parser.add_argument(
        "--topology", required=True, help="such as v5e:16x16, v5p:4x4x4, h100:8, b200:1, or cpu:8"
    )
    parser.add_argument(
        "--model-shape",
        metavar="FILE",
        help="a config.json, or a folder with one, as in configs/shapes/; default: the config's",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=0, help="the longest prompt; default: its limit"
    )
    parser.add_argument(
        "--mean-tokens", type=int, default=0, help="mean of a completion; default: all at the limit"
    )
    parser.add_argument(
        "--search", nargs="?", type=int, const=6, default=0, metavar="N", help="ranks N meshes (6)"
    )
    parser.add_argument(
        "--longest", action="store_true", help="looks for the longest completion that fits"
    )
    parser.add_argument("--json", metavar="FILE", help="writes the plan there too")
    parser.usage = f"{parser.prog} --config FILE --topology NAME [...] [--config.NAME=VALUE ...]"
    args, overrides = parser.parse_known_args(program.joined(argv))
    for name in ("prompt_tokens", "mean_tokens", "search"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be below 0.")
    return args, overrides


def read_shape(path: str) -> ModelConfig:
    """The model of a Hugging Face config.json; ValueError where it is none."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        known = sorted(str(p) for p in Path("configs/shapes").glob("*.json"))
        hint = f" Shapes that are there: {', '.join(known)}." if known else ""
        raise ValueError(f"--model-shape: there is no file {file}.{hint}")
    try:
        keys = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--model-shape: {file} is not JSON: {error}") from error
    return families.model_config(keys, str(file))


# --- What is printed ------------------------------------------------------------------------------


def show(plan: step_lib.Plan) -> None:
    """Prints the plan: what lies in memory, and the programs of a step."""
    devices = math.prod(plan.mesh.values())
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    print_title(f"{plan.num_params:,} parameters on {devices} devices of {plan.topology}: {mesh}")
    memory = Table(title="Memory of each device", title_justify="left")
    memory.add_column("held for")
    memory.add_column("GiB", justify="right")
    for name, size in (*plan.held.items(), ("activations", plan.activations), ("peak", plan.peak)):
        memory.add_row(name, _gib(size))
    console.print(memory)
    title = "Programs of a step, on each device; an evaluation is not run in it"
    table = Table(title=title, title_justify="left")
    names = "program", "runs", "peak GiB", "TFLOP", "GB", "sent GB", "least s", "bound", "in turn"
    for name in names:
        table.add_column(name, justify="left" if name == "program" else "right", no_wrap=True)
    for p in plan.programs:
        seconds = p.seconds(plan.chip)
        name, least = step_lib.bound(seconds)
        table.add_row(
            p.name,
            str(p.runs),
            _gib(p.peak),
            f"{p.cost.flops / 1e12:,.2f}",
            f"{p.cost.bytes / 1e9:,.0f}",
            f"{sum(p.cost.sent.values()) / 1e9:,.2f}",
            f"{least:,.3f}" if seconds else "",
            name,
            f"{seconds['in turn']:,.3f}" if seconds else "",
        )
    console.print(table)
    sent = Table(title="Sent by each device in a step, GB", title_justify="left")
    sent.add_column("kind")
    sent.add_column("mesh axes")
    sent.add_column("GB", justify="right")
    sent.add_column("waited for, s", justify="right")
    waited = plan.waited
    for key, size in sorted(plan.cost.sent.items(), key=lambda item: -item[1]):
        kind, axes = key
        seconds = f"{waited[key]:,.3f}" if waited else ""
        sent.add_row(kind, " ".join(axes), f"{size / 1e9:,.3f}", seconds)
    console.print(sent)
    if plan.chip.memory is None:
        say("Simulated devices have no limits: whether it fits is not known.")
        return
    verdict = "fits" if plan.fits else "does not fit"
    say(
        f"It {verdict}: {_gib(plan.peak)} GiB at its peak, {_gib(plan.room)} GiB usable of a "
        f"{plan.chip.name}. A step takes at least {plan.step_s:,.1f} s, and {plan.in_turn_s:,.1f} "
        "s at these rates where one kernel follows another."
    )


def _told(tries: Iterator[advice.Tried]) -> list[advice.Tried]:
    """All of them, each told of as it comes: compiling takes a while."""
    found, began = [], time.monotonic()
    for tried in tries:
        found.append(tried)
        took_s, began = time.monotonic() - began, time.monotonic()
        say(f"{tried.words}: {_verdict(tried)} ({took_s:.0f} s)")
    return found


def _verdict(tried: advice.Tried) -> str:
    if tried.plan is None:
        return tried.refusal
    return f"{'fits' if tried.fits else 'does not fit'}, {_gib(tried.plan.peak)} GiB at its peak"


def _show_tried(title: str, tried: list[advice.Tried]) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("change", "fits", "peak GiB", "least s a step"):
        table.add_column(name, justify="left" if name == "change" else "right")
    for t in tried:
        if t.plan is None:
            arrays = f"over {_gib(t.arrays)}" if math.isfinite(t.arrays) else ""
            table.add_row(t.words, "no" if arrays else "refused", arrays, "")
        else:
            fits = "yes" if t.fits else "no"
            table.add_row(t.words, fits, _gib(t.plan.peak), f"{t.plan.step_s:,.1f}")
    console.print(table)


def _tried_json(tried: advice.Tried) -> dict[str, Any]:
    plan = tried.plan.as_json() if tried.plan else None
    return {"change": tried.change, "plan": plan, "refusal": tried.refusal}


def _gib(size: float) -> str:
    return f"{size / _GIB:,.2f}" if math.isfinite(size) else "too much"


if __name__ == "__main__":
    program.main(main)
