"""Tries rewards on a dataset: `python -m grpo_jax.score --config configs/gsm8k.py`.

A column of the dataset, or a file of completions, is scored in place of a model's completions: a
gold solution that does not earn its reward is found before anything is trained. The rewards run as
in training, in worker processes with the config's limits. `--list` shows all that can be named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.table import Table

from grpo_jax import cli
from grpo_jax.config import arguments, parsers
from grpo_jax.data import prompts, sources, tasks
from grpo_jax.data.problems import Problem
from grpo_jax.data.streams import stream
from grpo_jax.messages import console
from grpo_jax.messages.console import say
from grpo_jax.messages.values import shown
from grpo_jax.metrics import distributions
from grpo_jax.metrics.samples import print_samples
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.hf.tokenizer import load_tokenizer
from grpo_jax.rewards import listing, registry, relations, trial
from grpo_jax.rewards.answers import extract_answer
from grpo_jax.rewards.scores import Scores
from grpo_jax.run.whole_files import write_whole
from grpo_jax.setup import inputs, reward_models
from grpo_jax.setup.data import load_split
from grpo_jax.setup.rewards import load_rewards, start_rewards

_MAX_FAILURES = 20  # shown
_READ_ANSWERS = {"exact_answer", "math_answer"}  # rewards of the answer in a completion


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    parser = parsers.score()
    args, overrides = arguments.parse(parser, argv)
    if args.lists:
        arguments.print_and_exit(_listing())
    if not args.config:
        parser.error("--config FILE is required; --list shows the rewards that can be named")
    if args.picture and Path(args.picture).suffix not in (".png", ".svg"):
        raise ValueError(f"--picture {args.picture} must end in .png or .svg.")
    for name, least in (("limit", 0), ("batch", 1), ("samples", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}.")
    return args, arguments.load_config(args.config, overrides)


def _listing() -> str:
    """Every reward that can be named in rewards.names, with its arguments."""
    width, lines = min(shutil.get_terminal_size().columns, 100), []
    for title, entries in (
        ("built in", listing.built_in()),
        ("of other rewards", listing.forms()),
        ("by prefix", listing.prefixes()),
    ):
        lines.append(f"{title}:")
        for call, reads, gives in entries:
            lines += textwrap.wrap(call, width, initial_indent="  ", subsequent_indent=" " * 10)
            lines += [f"      reads {reads}"] * bool(reads)
            indent = {"initial_indent": " " * 6, "subsequent_indent": " " * 6}
            lines += textwrap.wrap(gives, width, **indent)
    return "\n".join(lines)


# --- What is scored -------------------------------------------------------------------------------


def _problems(config: ConfigDict, split: str, limit: int) -> list[Problem]:
    problems = load_split(config, split)
    if not problems:
        raise ValueError(
            "--split eval: the config has no held-out problems. Set data.eval_split or "
            "data.eval_path, or take --split train."
        )
    return problems[: limit or None]


def _worked(config: ConfigDict, problems: list[Problem]) -> list[str]:
    """A task's worked solutions, right and wrong ones, as in its supervised start."""
    task, rng = tasks.load(config.data.task), stream(config.seed, "solutions")
    return [tasks.whole(task.worked_solution(problem, rng)) for problem in problems]


def _column(problems: list[Problem], name: str) -> list[str]:
    """The texts of a column; numbers become text."""
    for problem in problems:
        if name not in problem.columns:
            raise ValueError(
                f"--completion-column {name}: {problem.where} has no such column; it has "
                f"{', '.join(problem.columns) or 'none'} beside the prompt."
            )
        if isinstance(problem.columns[name], bool) or not isinstance(
            problem.columns[name], (str, int, float)
        ):
            raise ValueError(
                f"--completion-column {name}: {problem.where} holds "
                f"{shown(problem.columns[name], 80)} there, not a text or a number."
            )
    return [str(problem.columns[name]) for problem in problems]


def _file(path: str, num_problems: int) -> list[str]:
    texts = []
    for number, line in sources.lines(Path(path), "--completions"):
        try:
            text = json.loads(line)["completion"]
            assert isinstance(text, str)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise ValueError(
                f"--completions: {path}, line {number} is not a JSON object with a text "
                f'"completion": {shown(line, 80)}.'
            ) from None
        texts.append(text)
    if len(texts) != num_problems:
        raise ValueError(
            f"--completions: {path} has {len(texts)} completions, and there are {num_problems} "
            "problems; it needs one for each (--limit takes the first problems alone)."
        )
    return texts


def _labels(problems: list[Problem], column: str) -> list[bool]:
    """People's labels: true or false, 1 or 0, or these and yes, no, good and bad as texts."""
    known = {"true": True, "1": True, "yes": True, "good": True}
    known |= {"false": False, "0": False, "no": False, "bad": False}
    found = []
    for problem in problems:
        label = known.get(str(problem.columns.get(column)).strip().lower().removesuffix(".0"))
        if label is None:
            raise ValueError(
                f"--human {column}: {problem.where} has "
                f"{shown(problem.columns[column], 80) if column in problem.columns else 'no value'}"
                " there. Labels are true or false, 1 or 0, yes or no, good or bad."
            )
        found.append(label)
    return found


def _token_ids(config: ConfigDict, rewards, texts: list[str]) -> list[list[int]] | None:
    """The completions' tokens, by the tokenizer of `model.path`, if a reward reads them."""
    if not registry.reads(rewards, "completion_ids") or not config.model.path:
        return None
    tokenizer = load_tokenizer(folder_lib.resolve(config.model.path))
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _rendered(config: ConfigDict, rewards, problems: list[Problem]) -> list[str] | None:
    """The prompts as the model of `model.path` reads them, if a reward asks for them.

    None if that model is not available, or its chat template does not take the prompts. Scoring
    needs no model, but only the rendered prompt tells whether it leaves thinking open.
    """
    if not registry.reads(rewards, "rendered_prompts"):
        return None
    if all(isinstance(p.prompt, str) for p in problems):
        return [p.prompt for p in problems]
    folder = folder_lib.at_hand(config.model.path)
    if folder is None:
        return None
    tokenizer = load_tokenizer(folder)
    try:
        now = inputs.date(config.data.date)
        encoded = prompts.encode(problems, tokenizer, sys.maxsize, now=now)
    except ValueError as error:
        say(f"The rewards do not see the prompts as the model reads them: {error}")
        return None
    return [tokenizer.decode(ids) for ids in encoded.prompt_ids]


# --- What comes of it -----------------------------------------------------------------------------


def _show(
    args, rewards, problems: list[Problem], texts: list[str], scores: Scores, found: dict
) -> None:
    console.console.print(_table(found))
    _show_relations(found)
    order = np.argsort(np.nan_to_num(scores.reward_B, nan=-np.inf), kind="stable")
    low = order[: -(-args.samples // 2)]
    high = [i for i in order[::-1][: args.samples // 2] if i not in low]
    rows = [
        trial.item(i, problems[i], texts[i], scores)
        | {"columns": registry.columns_read(rewards, problems[i].columns)}
        for i in [*low, *high]
    ]
    if rows:
        print_samples("The lowest and the highest", rows)
    for name, seconds_B in scores.seconds.items():
        slowest = np.argsort(-seconds_B, kind="stable")[:3]
        rows = [f"{seconds_B[i]:.3f} s {problems[i].where}" for i in slowest]
        say(f"Slowest of {name}: {'; '.join(rows)}.")
    for failure in scores.failures[:_MAX_FAILURES]:
        message = failure.message if len(failure.message) < 300 else f"{failure.message[:300]}..."
        say(f"Failed at {problems[failure.row].where}: {message}")
    if len(scores.failures) > _MAX_FAILURES:
        say(f"... and {len(scores.failures) - _MAX_FAILURES:,} more (--out).")
    say(f"{found['rows_per_second']:,.0f} rows per second")


def _table(found: dict) -> Table:
    """The rewards' figures; names and numbers stay whole, and counts of 0 everywhere are left out.

    On a narrow terminal only the longest names break, over several lines.
    """
    table = Table(title=f"Rewards of {found['rows']:,} rows", title_justify="left")
    numbers = ("mean", "std", "min", "median", "max")
    counts = {"gives 1": "ones", "failed": "failed", "none": "none"}
    rewards = found["rewards"]
    for heading in ("failed", "none"):
        if not any(of[heading] for of in rewards.values()):
            del counts[heading]
    table.add_column("reward", overflow="fold", min_width=min(10, max(map(len, rewards))))
    for heading in (*numbers, *counts, "s/1k"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, of in rewards.items():
        values = ("-" if of[key] is None else f"{of[key]:.4g}" for key in numbers)
        counted = (f"{of[key]:,}" for key in counts.values())
        table.add_row(name, *values, *counted, f"{of['seconds_per_1000']:.3g}")
    return table


def _show_relations(found: dict) -> None:
    """Correlations of the rewards with each other and with length, what they logged, agreement."""
    names = list(found["correlations"])
    if len(names) > 2:
        table = Table(title="Correlations", title_justify="left")
        table.add_column("", overflow="fold", min_width=min(20, max(map(len, names))))
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for one in names:
            row = found["correlations"][one].values()
            table.add_row(one, *("-" if v is None else f"{v:.2f}" for v in row))
        console.console.print(table)
    for name, number in found["per_1000"].items():
        say(f"{name}: {number:,.4g} per 1,000 rows")
    for name, mean in found["logged"].items():
        say(f"{name}: {mean:.4g} (mean of what rewards logged)")
    for name, of in found.get("agreement", {}).items():
        say(
            f"Agreement of {name} with people's labels: kappa {of['kappa']:.3f}, "
            f"{of['share']:.1%} alike, from {of['threshold']:.4g} on counted as good."
        )


def _agreement(scores: Scores, labels: list[bool]) -> dict[str, dict[str, float]]:
    """Cohen's kappa of each reward with labels."""
    keys = ("kappa", "share", "threshold")
    each = {n: relations.agreement(v, labels) for n, v in scores.by_name.items()}
    return {n: dict(zip(keys, v)) for n, v in each.items() if not np.isnan(v[2])}


def _hint(column: str, texts: list[str], scores: Scores) -> None:
    """Prints why the dataset's own answers may earn nothing: a bare answer is no completion."""
    bare = sum(extract_answer(text) is None for text in texts)
    if 2 * bare > len(texts) and _READ_ANSWERS & scores.by_name.keys():
        say(
            f"{bare:,} of the {len(texts):,} texts of the column `{column}` state no answer: a "
            "bare one earns nothing. A completion states its answer after ####, in \\boxed{} or in "
            "<answer>. Score worked solutions (--completion-column), or write the answers so "
            "(--completions)."
        )


def main(argv: list[str]) -> None:
    args, config = _arguments(argv)
    rewards = load_rewards(config)
    # Rows that a reward cannot read are not refused here: this program is meant to find them.
    problems = _problems(config, args.split, args.limit)
    if args.completions:
        texts = _file(args.completions, len(problems))
    elif config.data.task and not args.completion_column:
        texts = _worked(config, problems)
    else:
        args.completion_column = args.completion_column or "answer"
        texts = _column(problems, args.completion_column)
    registry.refuse_columns(rewards, problems)
    labels = _labels(problems, args.human) if args.human else []
    ids = _token_ids(config, rewards, texts)
    rendered = _rendered(config, rewards, problems)
    models = reward_models.load_all(config, rewards, None, inputs.date(config.data.date))
    with start_rewards(config, rewards, device_is_busy=False, models=models) as pool:
        scores, seconds = trial.score(pool, problems, texts, ids, rendered, args.batch)
    lengths = [len(text) for text in texts]
    found = trial.figures(scores, seconds, lengths)
    if labels:
        found["agreement"] = _agreement(scores, labels)
    _show(args, rewards, problems, texts, scores, found)
    if args.completion_column:
        _hint(args.completion_column, texts, scores)
    if args.picture:
        os.makedirs(Path(args.picture).parent, exist_ok=True)
        columns = trial.related(scores, lengths)
        distributions.draw(columns, relations.correlations(columns), Path(args.picture))
        say(f"Distributions and correlations: {args.picture}")
    for path, text in (
        (args.json, json.dumps(found, indent=1)),
        (args.out, "\n".join(
            json.dumps(trial.item(i, *row, scores)) for i, row in enumerate(zip(problems, texts))
        ) if args.out else ""),
    ):  # fmt: skip
        if path:
            os.makedirs(Path(path).parent, exist_ok=True)
            write_whole(Path(path), text + "\n")


if __name__ == "__main__":
    cli.main(main)
