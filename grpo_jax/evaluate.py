"""Evaluates models side by side: `python -m grpo_jax.evaluate --config FILE --model DIR_OR_ID ...`.

A config's held-out problems (or, with `--split train`, its training problems) are answered once
greedily and, with `--num-samples`, several times by sampling. Each metric comes with a 95 %
interval over problems; of several models, with the paired difference to the first. A model is a
Hugging Face folder or hub id, or the folder of a run. Prompts, rewards and all defaults are the
config's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.table import Table

from grpo_jax import cli, keys
from grpo_jax.config import arguments, parsers, rules
from grpo_jax.data.problems import Problem
from grpo_jax.devices import sharding
from grpo_jax.environments import single_turn
from grpo_jax.environments.drawing import ONE_TURN, OneTurn
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.rewarding import FailureReports
from grpo_jax.evaluation import compare, estimates, text_metrics
from grpo_jax.evaluation import held_out as held_out_lib
from grpo_jax.evaluation import tallies as tallies_lib
from grpo_jax.evaluation.compare import Counter, Evaluated
from grpo_jax.hosts import processes
from grpo_jax.messages.console import console, print_title, say
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.scores import RewardError
from grpo_jax.run.whole_files import write_json
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import data, inputs, reward_models
from grpo_jax.setup import environment as environment_lib
from grpo_jax.setup.data import answerable, load_split
from grpo_jax.setup.model import Found, find_model, load_params
from grpo_jax.setup.rewards import load_rewards, refuse_samples, start_rewards
from grpo_jax.structs import Sampling

_NUM_SLOTS = 256  # completions decoded at once if rollout.num_slots is 0


# --- The command line -----------------------------------------------------------------------------


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The arguments, with defaults from the config, and the config."""
    parser = parsers.evaluate()
    args, overrides = arguments.parse(parser, argv)
    config = arguments.load_config(args.config, overrides)
    for name, value in {
        "num_problems": config.evaluation.num_problems or math.inf,
        "num_samples": config.evaluation.num_samples,
        "temperature": config.evaluation.temperature,
        "top_p": config.rollout.top_p,
        "top_k": config.rollout.top_k,
        "max_tokens": config.rollout.max_tokens,
        "seed": config.seed,
        "dtype": config.model.dtype,
        "out": str(Path("evaluations") / Path(args.config).stem),
    }.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    cli.join_processes(config, arguments.processes(args))
    return args, config


def check(args: argparse.Namespace) -> None:
    """Raises ValueError if an argument is out of its range."""
    for name, fine, needed in (
        ("num_problems", args.num_problems >= 1, "at least 1"),
        ("num_samples", 0 <= args.num_samples <= 1000, "from 0, greedy only, to 1000"),
        ("max_tokens", args.max_tokens > 0, "above 0"),
        ("seed", 0 <= args.seed <= rules.LARGEST, f"from 0 to {rules.LARGEST}"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("temperature", args.temperature >= 0 and math.isfinite(args.temperature), "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
    ):
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be {needed}.")
    if args.num_samples and args.temperature == 0:
        raise ValueError(
            f"--num-samples {args.num_samples} at --temperature 0 would repeat the greedy "
            "completion. Set --temperature above 0, or --num-samples to 0: that one is always made."
        )
    again = [m for i, m in enumerate(args.models) if Path(m) in map(Path, args.models[:i])]
    if again:
        raise ValueError(f"--model {again[0]} is given twice.")


# --- Problems -------------------------------------------------------------------------------------


def _problems(args: argparse.Namespace, config: ConfigDict) -> list[Problem]:
    problems = load_split(config, args.split)
    if not problems:
        raise ValueError(
            f"{args.config} has no {parsers.SPLITS[args.split]} problems. Set data.eval_split or "
            "data.eval_path (with data.path) or data.num_eval (with data.task), or evaluate on "
            "--split train."
        )
    return problems[: min(args.num_problems, len(problems))]


def _references(config: ConfigDict, problems: list[Problem]) -> list[str] | None:
    """The reference text of each problem; None if the config names no column for them."""
    column = config.evaluation.reference
    if not column:
        return None
    text_metrics.require()
    names = sorted(problems[0].columns)
    if column not in names:
        raise ValueError(
            f"evaluation.reference = {column!r} is no column of the problems, which have "
            f"{', '.join(names) or 'none'}."
        )
    for i, problem in enumerate(problems):
        if not isinstance(problem.columns[column], str):
            kind = type(problem.columns[column]).__name__
            raise ValueError(
                f"evaluation.reference = {column!r} holds a {kind} in problem {i}; it needs a text."
            )
    return [problem.columns[column] for problem in problems]


# --- Evaluating -----------------------------------------------------------------------------------


def _evaluate(
    args: argparse.Namespace,
    config: ConfigDict,
    mesh: Mesh,
    found: Found,
    path: str,
    name: str,
    questions: Questions,
    references: list[str] | None,
    pool: Pool,
    drawing: OneTurn,
) -> Evaluated:
    """Evaluates one model: samples, rewards, and writes its answers."""
    dtype = jnp.dtype(args.dtype)
    policy, params = found.policy, load_params(found, mesh, dtype)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    decoder = decode.decoder_for(
        policy.model, mesh, sampling, policy.stop_ids, args.max_tokens, dtype
    )
    num_slots = config.rollout.num_slots or _NUM_SLOTS
    engine = Engine(decoder, num_slots=num_slots, compact=config.rollout.compact)
    params = engine.publish(params)
    tallies, files, reports = {}, {}, FailureReports()
    for num_samples in (0, args.num_samples) if args.num_samples else (0,):
        with Counter(len(questions.problems), num_samples) as counter:
            answered = single_turn.answer(
                engine,
                params,
                policy,
                questions,
                pool,
                num_samples=num_samples,
                temperature=args.temperature,
                key=keys.key_for(args.seed, "evaluate"),
                drawing=drawing,
                on_answer=counter.add,
            )
        reports.tell(f"{name}, {'sampled' if num_samples else 'greedy'}", answered.scores)
        further = {}
        if num_samples:
            tallies |= tallies_lib.sampled_tallies(answered, compare.powers(num_samples))
        else:
            tallies |= tallies_lib.greedy_tallies(answered, args.max_tokens)
            if references:
                scores = text_metrics.score(answered.completions, references)
                tallies |= scores.tallies()
                further = scores.by_name
        kind = f"sampled_{num_samples}" if num_samples else "greedy"
        files[kind] = Path(args.out) / f"{compare.file_name(name)}_{args.split}_{kind}.jsonl"
        if processes.is_first():
            held_out_lib.write_items(files[kind], answered, further)
        for text in answered.scores.broken(config.rewards.max_failed_share).values():
            raise RewardError(f"{name}: {text}")
    asked_P = estimates.groups([problem.question for problem in questions.problems])
    tallies = {name: tally.grouped(asked_P) for name, tally in tallies.items()}
    return Evaluated(path, name, tallies, files)


# --- Showing --------------------------------------------------------------------------------------


def _report(
    args: argparse.Namespace, problems: list[Problem], models: list[Evaluated]
) -> tuple[str, Table, dict[str, Any]]:
    """Title and table for the terminal, and the same values for a file."""
    num_problems, num_prompts = len(problems), len({p.question for p in problems})
    first, *others = models
    metrics = [{n: estimates.estimate(t) for n, t in m.tallies.items()} for m in models]
    differences = [
        {
            n: estimates.estimate(estimates.difference(t, first.tallies[n]))
            for n, t in m.tallies.items()
        }
        for m in others
    ]
    title = f"{num_problems} {parsers.SPLITS[args.split]} problems of {args.config}"
    if num_prompts < num_problems:
        title += f", {num_prompts} different"
    if args.num_samples:
        title += f"; {args.num_samples} samples of each at temperature {args.temperature:g}"
    options = "config split num_samples temperature top_p top_k max_tokens seed dtype".split()
    values: dict[str, Any] = {name: getattr(args, name) for name in options}
    values |= {"num_problems": num_problems, "num_prompts": num_prompts}
    values |= {"confidence": estimates.CONFIDENCE, "models": []}
    for i, model in enumerate(models):
        row = {"model": model.path, "name": model.name, "metrics": compare.as_json(metrics[i])}
        if i:
            row["difference_to_first"] = compare.as_json(differences[i - 1])
        row["items"] = {kind: str(file) for kind, file in model.files.items()}
        values["models"].append(row)
    return title, compare.table([m.name for m in models], metrics, differences), values


def evaluate(args: argparse.Namespace, config: ConfigDict) -> tuple[list[Problem], list[Evaluated]]:
    """The problems, and the evaluation of each model of the arguments."""
    cli.show_devices()
    if config.compile_cache:
        cli.use_compile_cache(config.mesh)
    mesh = sharding.make_mesh(**config.mesh)
    rewards = load_rewards(config)
    environment = environment_lib.read(config, rewards)
    rewards = rewards if environment is None else environment.rewards
    refuse_samples(rewards, args.num_samples, "--num-samples")
    problems = answerable(config, rewards, _problems(args, config))
    if environment is not None:
        problems = environment.asked(problems, config.environment.tool_timeout_s)
    _references(config, problems)  # only to check them
    questions, models, now = [], [], inputs.date(config.data.date)
    for path in args.models:  # check all models before evaluating the first
        limit = config.data.max_prompt_tokens
        found = find_model(path)
        policy = found.policy.within(limit + args.max_tokens)
        models.append(dataclasses.replace(found, policy=policy))
        questions.append(data.questions(problems, policy, config, "problems", now))
        policy.check_length(questions[-1].prompt_ids, args.max_tokens, "--max-tokens")
        first, this = questions[0].problems, questions[-1].problems
        if this != first:
            raise ValueError(
                f"--model {path}: its tokenizer leaves {len(this)} prompts within "
                f"data.max_prompt_tokens = {limit}, that of {args.models[0]} {len(first)}, and "
                "models are compared on the same problems. Raise the limit."
            )
    for folder in [Path(args.out), Path(args.json).parent] if args.json else [Path(args.out)]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder} cannot be made: {error.strerror}.") from error
    evaluated = []
    world = environment_lib.live(config, environment)
    scored_by = reward_models.load_all(config, rewards, mesh, now)
    folder = Path(args.out)
    with start_rewards(config, rewards, models=scored_by, folder=folder) as pool, world:
        for found, path, name, asked in zip(
            models, args.models, compare.names(args.models), questions
        ):
            references = _references(config, asked.problems)
            print_title(f"{name}: {len(asked.problems)} problems")
            if found.said:
                say(f"{found.said} answers.")
            drawing = ONE_TURN
            if environment is not None:
                how = config, environment, found.policy, asked.problems, now
                dialogues = environment_lib.dialogues(*how)
                drawing = environment_lib.conversations(config, world, dialogues)
            evaluated.append(
                _evaluate(args, config, mesh, found, path, name, asked, references, pool, drawing)
            )
            drawing.close_dialogues()
    return questions[0].problems, evaluated


def main(argv: list[str]) -> None:
    args, config = _arguments(argv)
    problems, evaluated = evaluate(args, config)
    title, table, values = _report(args, problems, evaluated)
    say(f"\n{title}")  # not the table's title, which would be folded to its width
    console.print(table)
    say("In brackets: the 95 % bootstrap interval over problems, equal prompts drawn together.")
    say(f"Every completion: {args.out}")
    if args.json and processes.is_first():
        write_json(Path(args.json), values)
        say(f"All values: {args.json}")


if __name__ == "__main__":
    cli.main(main)
