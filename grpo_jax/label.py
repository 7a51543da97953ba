"""Makes preferences by rewards: `python -m grpo_jax.label --config FILE --model DIR --out FILE`.

Several completions are drawn for each prompt of a dataset. The config's rewards compare them: a
judge, a reward model, functions, or an ensemble of these (AI feedback, RLAIF). The rows that are
written train the next model: pairs for `grpo_jax.dpo` and `grpo_jax.reward_model`, scores, or
labels for KTO. The same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from grpo_jax import cli, keys
from grpo_jax.config import arguments, parsers, rules
from grpo_jax.config.dotted import flatten
from grpo_jax.data.problems import Problem
from grpo_jax.devices import sharding
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.rewarding import FailureReports, RewardCollector
from grpo_jax.evaluation import labels
from grpo_jax.messages.console import say
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.scores import RewardError
from grpo_jax.run import claim
from grpo_jax.run import parts as parts_lib
from grpo_jax.run.parts import Parts
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import data, inputs, reward_models
from grpo_jax.setup.model import find_model, load_params
from grpo_jax.setup.rewards import load_rewards, start_rewards
from grpo_jax.structs import Params, Sampling

_NUM_SLOTS = 256  # completions decoded at once if rollout.num_slots is 0
_READ = ("data", "rewards", "environment", "mesh", "rollout")  # sections that rows follow from


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The arguments, with defaults from the config, and the config."""
    args, overrides = arguments.parse(parsers.label(), argv)
    config = arguments.load_config(args.config, overrides)
    for name, value in {
        "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "top_k": config.rollout.top_k,
        "max_tokens": config.rollout.max_tokens,
        "seed": config.seed,
        "dtype": config.model.dtype,
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    return args, config


def check(args: argparse.Namespace) -> None:
    """Raises ValueError if an argument is out of its range."""
    for name, fine, needed in (
        ("out", Path(args.out).suffix in parts_lib.KINDS, "a name in .jsonl or .parquet"),
        ("num_problems", args.num_problems >= 0, "0, for all, or more"),
        ("num_samples", args.num_samples >= 1 + (args.kind == "pairs"), "at least 2 for pairs"),
        ("batch", args.batch >= 1, "at least 1"),
        ("max_tokens", args.max_tokens > 0, "above 0"),
        ("seed", 0 <= args.seed <= rules.LARGEST, f"from 0 to {rules.LARGEST}"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("temperature", 0 < args.temperature < math.inf, "above 0: equal texts have no order"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("margin", 0 <= args.margin < math.inf, "0 or more"),
        ("threshold", math.isfinite(args.threshold), "a finite number"),
    ):
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be {needed}.")


def _begin_of(problem: Problem) -> dict[str, Any]:
    """What the rows of a problem begin with: the prompt, and what its template is given."""
    given = dict(problem.arguments)
    row = {"prompt": problem.prompt}
    if "tools" in given:
        row["tools"] = given.pop("tools")
    return row | ({"chat_template_kwargs": given} if given else {})


def _label(
    args: argparse.Namespace,
    engine: Engine,
    params: Params,
    policy: Any,
    questions: Questions,
    pool: Pool,
    parts: Parts,
    max_failed_share: float,
) -> int:
    """Draws, compares and writes the parts that are missing; returns the number of all parts."""
    total, reports = len(questions.problems), FailureReports()
    starts = range(0, total, args.batch)
    done = sum(parts.has(number) for number in range(len(starts)))
    if done:
        say(f"{done} of {len(starts)} parts are there already: {parts.folder}")
    for number, start in enumerate(starts):
        if parts.has(number):
            continue
        some = questions.take(range(start, min(start + args.batch, total)))
        collector = RewardCollector(pool, policy, some.problems, some.texts, args.num_samples)
        engine.generate(
            params,
            some.prompt_ids,
            group=args.num_samples,
            key=keys.key_for(args.seed, "label", number),
            temperature=args.temperature,
            on_group=collector.add,
        )
        scores, texts = collector.scores(), collector.texts()
        reports.tell(f"part {number}", scores)
        for text in scores.broken(max_failed_share).values():
            raise RewardError(f"part {number}: {text}")
        begun = [_begin_of(problem) for problem in some.problems]
        how = {"margin": args.margin, "threshold": args.threshold}
        parts.write(number, *labels.rows(args.kind, begun, texts, scores, **how))
    return len(starts)


def _settings(args: argparse.Namespace, config: ConfigDict, found: inputs.Sums) -> dict[str, Any]:
    """What the rows follow from, as JSON."""
    values = {name: value for name, value in vars(args).items() if name not in ("out", "config")}
    values |= {n: v for n, v in flatten(config).items() if n.partition(".")[0] in _READ}
    return values | {f"sums of the {name}": sums for name, sums in found.items()}


def main(argv: list[str]) -> None:
    args, config = _arguments(argv)
    rewards = load_rewards(config)
    if not rewards:
        raise ValueError("rewards.names is empty: nothing tells which completion is better.")
    problems = data.load_split(config, args.split)
    problems = data.answerable(config, rewards, problems[: args.num_problems or None])
    if not problems:
        raise ValueError(f"--split {args.split}: the config has no such problems.")
    found, before = find_model(args.model), parts_lib.settings_of(Path(args.out))
    now = inputs.date(config.data.date or before.get("date", ""))
    policy = found.policy.within(config.data.max_prompt_tokens + args.max_tokens)
    questions = data.questions(problems, policy, config, "problems", now)
    policy.check_length(questions.prompt_ids, args.max_tokens, "--max-tokens")
    sums = inputs.of_run(questions.problems, questions.prompt_ids, [], policy, rewards)
    with claim.held():
        settings = _settings(args, config, sums) | {"date": now.isoformat()}
        parts = Parts(Path(args.out), settings)
        claim.take(parts.folder)
        cli.show_devices()
        if config.compile_cache:
            cli.use_compile_cache(config.mesh)
        mesh, dtype = sharding.make_mesh(**config.mesh), jnp.dtype(args.dtype)
        params = load_params(found, mesh, dtype)
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        decoder = decode.decoder_for(
            policy.model, mesh, sampling, policy.stop_ids, args.max_tokens, dtype
        )
        slots = config.rollout.num_slots or _NUM_SLOTS
        engine = Engine(decoder, num_slots=slots, compact=config.rollout.compact)
        models = reward_models.load_all(config, rewards, mesh, now)
        with start_rewards(config, rewards, models=models, folder=parts.folder) as pool:
            share = config.rewards.max_failed_share
            given = engine, engine.publish(params), policy, questions, pool, parts, share
            number = _label(args, *given)
        rows, told = parts.finish(number)
    for why, count in told.items():
        say(f"Left out: {count:,} {why}.")
    say(f"{rows:,} rows of {len(questions.problems):,} prompts are in {args.out}.", always=True)
    if not rows:
        raise ValueError(f"{args.out} has no rows. See above what was left out.")


if __name__ == "__main__":
    cli.main(main)
