"""`train --check`: reads, checks and compiles all that a run would, reports, and ends.

It writes nothing and reads no weights, so it can check the workdir of a run in progress.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import definitions, record, reference
from grpo_jax.data import streams, tasks
from grpo_jax.hosts import processes
from grpo_jax.messages.console import say
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.policy import Policy
from grpo_jax.planning import fit, topologies
from grpo_jax.planning import plan as plan_lib
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.plan import Plan
from grpo_jax.rewards import kinds, trial
from grpo_jax.setup import inputs, lora, model
from grpo_jax.setup.rewards import start_rewards
from grpo_jax.trainers import grpo_run
from grpo_jax.trainers.grpo_run import Inputs

_TRIED = 8  # completions to try the rewards on
_GIB = 2**30


def check(config: ConfigDict, folder: Path) -> None:
    """Reports what a run of the config in `folder` would do; ValueError if it could not start.

    Every process must call it.
    """
    say(f"The config, what is not the default:\n\n{reference.as_file(config)}\n")

    def get_policy() -> Policy:
        if config.model.path:
            return policy_lib.read(config.model.path, kept=folder / "source")
        return model.new_policy(config)

    found = grpo_run.read(config, get_policy, lambda: date_of(config, folder), folder / lora.KEPT)
    if goes_on(folder):
        before = record.read(folder / "config.json").get("read", {})
        inputs.refuse_other(
            before, found.sums, f"--workdir {folder}", config.checkpoint.accept_changes
        )
    config = grpo_run.settled(config, len(found.train.problems))
    for line in (*grpo_run.told(config, found), *_sizes(config, found)):
        say(line)
    say(f"Seed {config.seed}, workdir {folder}: {'goes on' if goes_on(folder) else 'begins'}")
    for line in definitions.in_force(config):
        say(line)
    if processes.is_first():
        _try_rewards(config, found)
    say("The programs of a step are compiled, which may take minutes.")
    plan = _plan(config, found)
    for line in _costs(plan, found):
        say(line)
    if not plan.fits:
        raise ValueError(
            f"a step needs {plan.peak / _GIB:,.2f} GiB of each device, and programs may use "
            f"{plan.room / _GIB:,.2f}. Lower batch.microbatch, rollout.num_slots or "
            "rollout.max_tokens, set model.remat = full, or split the model by mesh.fsdp; "
            "python -m grpo_jax.plan tries such changes and says what fits."
        )
    say("Nothing speaks against this run.")


def goes_on(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "config.json").exists()


def date_of(config: ConfigDict, folder: Path) -> datetime:
    """The date for chat templates; ValueError if the folder holds a run of another config."""
    if goes_on(folder):
        record.continued(folder / "config.json", config)
        began = record.read(folder / "config.json").get("date", "")
        return inputs.date(config.data.date or began)
    return inputs.date(config.data.date)


# --- What is said ---------------------------------------------------------------------------------


def _sizes(config: ConfigDict, found: Inputs) -> list[str]:
    """Reports the lengths of prompts and the tokens of a step."""
    lengths = np.array([*map(len, found.train.prompt_ids)])
    parts = ", ".join(
        f"{name} {value:,.0f}"
        for name, value in zip(
            ("shortest", "tenth percentile", "median", "ninetieth percentile", "longest"),
            np.quantile(lengths, (0.0, 0.1, 0.5, 0.9, 1.0)),
        )
    )
    rows = config.batch.prompts * config.batch.group
    sampled = rows * config.rollout.max_tokens
    return [
        f"Tokens of a prompt: {parts}",
        f"Tokens of a step: {rows:,} completions, at most {sampled:,} sampled and "
        f"{sampled + config.batch.prompts * int(lengths.max()):,} trained on",
    ]


def _try_rewards(config: ConfigDict, found: Inputs) -> None:
    """Computes the rewards of a few completions; reports values and failures."""
    if not found.rewards:
        return
    problems = found.train.problems[:_TRIED]
    if config.data.task:
        task, rng = tasks.load(config.data.task), streams.stream(config.seed, "solutions")
        texts, kind = (
            [tasks.whole(task.worked_solution(p, rng)) for p in problems],
            "worked solutions, right and wrong",
        )
    else:
        texts, kind = [""] * len(problems), "empty completions"
    ids = found.policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    functions = [r for r in found.rewards if r.runs in (kinds.WORKERS, kinds.HOST)]
    if not functions:
        return
    with start_rewards(config, functions) as pool:
        scores, _ = trial.score(
            pool, problems, texts, ids, found.train.texts[:_TRIED], len(problems)
        )
    means = ", ".join(f"{name} {_mean(value_B)}" for name, value_B in scores.by_name.items())
    say(f"Rewards of {len(problems)} {kind}, the mean: {means}")
    for failure in scores.failures:
        where = problems[failure.row].where or f"problem {failure.row}"
        say(f"warning: a reward fails at {where}: {failure.message}")


def _mean(value_B: Sequence[float]) -> str:
    known_B = [value for value in value_B if not math.isnan(value)]
    return f"{np.mean(known_B):.3f}" if known_B else "none"


def _plan(config: ConfigDict, found: Inputs) -> Plan:
    """Reports memory and least time of a step with completions of maximal length."""
    devices, limit = list(found.mesh.devices.flat), fit.limit_of_all()
    chip = topologies.of_device(devices[0]) or topologies.CPU
    chip = dataclasses.replace(chip, usable=limit)
    shape, lengths = found.policy.model, Lengths.of(config, found.longest)
    fitted = fit.choose(config, shape, found.mesh, lengths, limit, chip)
    topology = f"{len(devices)} x {jax.devices()[0].device_kind}"
    return plan_lib.plan(config, shape, topology, chip, devices, lengths, fitted)


def _costs(plan: Plan, found: Inputs) -> list[str]:
    room = f", of {plan.room / _GIB:,.2f}" if math.isfinite(plan.room) else ""
    lines = [f"Memory: {plan.peak / _GIB:,.2f} GiB of each device{room} (at the longest rows)"]
    if plan.chip.flops:
        lines.append(
            f"Time: a step of the longest completions takes at least {plan.step_s:,.1f} s on "
            f"{plan.topology}, and {plan.in_turn_s:,.1f} s if kernels run one after the other"
        )
    else:
        lines.append(f"Time: no least time is known for {plan.topology}, whose rates are unknown")
    return lines
