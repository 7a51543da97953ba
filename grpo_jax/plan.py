"""What a run needs and costs on devices that are not there.

    python -m grpo_jax.plan --config configs/gsm8k.py --topology v5e:8x8

The programs of one step, and of an evaluation, are compiled ahead of time for TPUs (`pip install -e
".[plan]"` brings the compiler), for GPUs of one machine, `h100:8` (`".[cuda13]"`), or for simulated
CPU devices, `cpu:8`; nothing is allocated. The report says whether they fit, what lies in each
device's memory, and how long each program takes at least. Where they do not fit, changes of the
config are compiled until one does.

    python -m grpo_jax.plan --program dpo --config configs/dpo.py --topology h100:8

plans an update of `grpo_jax.sft`, `dpo` or `reward_model` with rows at their limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import cli
from grpo_jax.config import arguments, parsers
from grpo_jax.devices import sharding
from grpo_jax.messages.console import say
from grpo_jax.models.families import model_config
from grpo_jax.planning import advice, fit, topologies
from grpo_jax.planning import plan as plan_lib
from grpo_jax.planning import report as report_lib
from grpo_jax.planning.compiled import Known
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.plan import Plan
from grpo_jax.planning.programs import Step
from grpo_jax.setup import lora
from grpo_jax.setup import model as model_lib
from grpo_jax.structs import ModelConfig
from grpo_jax.trainers import given_plan


def main(argv: list[str]) -> None:
    args, overrides = _arguments(argv)
    config = arguments.load_config(args.config, overrides)
    chip, devices = topologies.devices(args.topology)
    head = None if args.program == "train" else given_plan.row_of(args.program, config).head
    if args.model_shape:
        model = read_shape(args.model_shape)
        model = dataclasses.replace(model, head=head or model.head)
        model = lora.adapted(model, config)
    else:
        model = model_lib.model_shape(config, head=head)
    if args.program != "train":
        return _plan_given(args, config, model)
    known: Known = {}

    def lengths_of(config: ConfigDict) -> Lengths:
        return Lengths.of(config, args.prompt_tokens, args.mean_tokens)

    def make(config: ConfigDict) -> Plan:
        mesh, lengths = sharding.make_mesh(**config.mesh, devices=devices), lengths_of(config)
        fitted = fit.choose(config, model, mesh, lengths, chip.usable, chip, known)
        return plan_lib.plan(
            config, model, args.topology, chip, devices, lengths, fitted, known=known
        )

    def held(config: ConfigDict) -> dict[str, float]:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        return Step(config, model, mesh, lengths_of(config)).held()

    began = time.monotonic()
    plan = make(config)
    report_lib.show(plan)
    report: dict[str, Any] = plan.as_json()
    config = advice.changed(config, advice.mesh_options(plan.mesh))
    trial = advice.Trial(config, model, make, held, plan.room)
    if args.longest:
        most = model.max_position - (args.prompt_tokens or config.data.max_prompt_tokens)
        own = advice.Tried({"rollout.max_tokens": config.rollout.max_tokens}, plan)
        tried = [own, *report_lib.told(advice.longest(trial, plan, most))]
        report_lib.show_tried(
            "Completions, the shortest first", sorted(tried, key=lambda t: t.tokens)
        )
        fitting = max((t.tokens for t in tried if t.fits), default=0)
        say(f"Completions of {fitting:,} tokens fit." if fitting else "None of them fits.")
        report["longest"] = [report_lib.tried_json(t) for t in tried]
    elif not plan.fits:
        tried = report_lib.told(advice.smallest_fit(trial, plan))
        report_lib.show_tried("Changes tried until one fits", tried)
        fitting = [t for t in tried if t.fits]
        say(f"It fits with {fitting[-1].words}." if fitting else "None of them makes it fit.")
        report["tried"] = [report_lib.tried_json(t) for t in tried]
    if args.search:
        own = advice.Tried(advice.mesh_options(plan.mesh), plan)
        ranked = advice.ranked([own, *report_lib.told(advice.search(trial, args.search))])
        report_lib.show_tried("Meshes, the best first", ranked)
        report["search"] = [report_lib.tried_json(t) for t in ranked]
    say(f"Compiled in {time.monotonic() - began:.0f} s.")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def _plan_given(args: argparse.Namespace, config: ConfigDict, model: ModelConfig) -> None:
    """Plans an update on given completions."""
    for name in ("search", "longest"):
        if getattr(args, name):
            raise ValueError(
                f"--{name} looks for changes of a step of GRPO, and --program is {args.program}. "
                "Leave it out, and change options by hand."
            )
    began = time.monotonic()
    lengths = args.prompt_tokens, args.mean_tokens
    plan = given_plan.plan(args.program, config, model, args.topology, lengths)
    report_lib.show(plan)
    if not plan.fits:
        say(given_plan.advice(args.program))
    say(f"Compiled in {time.monotonic() - began:.0f} s.")
    if args.json:
        Path(args.json).write_text(json.dumps(plan.as_json(), indent=1) + "\n")


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = parsers.plan()
    args, overrides = arguments.parse(parser, argv)
    for name in ("prompt_tokens", "mean_tokens", "search"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be below 0.")
    return args, overrides


def read_shape(path: str) -> ModelConfig:
    """The model of a Hugging Face config.json; ValueError if it is none."""
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
    return model_config(keys, str(file))


# --- What is printed ------------------------------------------------------------------------------


if __name__ == "__main__":
    cli.main(main)
