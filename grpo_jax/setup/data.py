"""Reads, checks and encodes a config's problems."""

from __future__ import annotations

import time
from datetime import datetime

from ml_collections import ConfigDict

from grpo_jax.data import notes, prompts, subset, tasks
from grpo_jax.data import problems as problems_lib
from grpo_jax.environments.questions import Questions
from grpo_jax.messages.console import say
from grpo_jax.models import policy as policy_lib
from grpo_jax.rewards import registry
from grpo_jax.rewards.registry import Reward


def load_problems(config: ConfigDict) -> tuple[list, list]:
    """Problems of GRPO, and held-out ones, of the config's task or files; the second may be []."""
    data = config.data
    if data.task:
        train, held_out = tasks.load(data.task).generate(data.num_train, data.num_eval, config.seed)
    else:
        train, held_out = problems_lib.load_train(data), problems_lib.load_held_out(data)
    return subset.take(train, data.subset), held_out


def load_split(config: ConfigDict, split: str) -> list:
    """The problems of the split "train" or "eval"; [] if the config has no held-out problems.

    For "train" the held-out file is not read and may be missing. Prints notes like `tell_of`.
    """
    if split == "train" and not config.data.task:
        train, held_out = subset.take(problems_lib.load_train(config.data), config.data.subset), []
    else:
        train, held_out = load_problems(config)
    tell_of(config, train, held_out)
    return train if split == "train" else held_out


def tell_of(config: ConfigDict, train: list, held_out: list) -> None:
    """Prints notes on the problems, such as duplicates."""
    for note in notes.of_problems(train, held_out, problems_lib.form_of(config.data)):
        say(f"warning: {note}")


def tell_of_few(config: ConfigDict, train: list) -> None:
    """Prints a warning if a step must ask a problem more than once."""
    if len(train) * config.data.repeat < config.batch.prompts:
        count = (
            "is 1 training problem" if len(train) == 1 else f"are {len(train)} training problems"
        )
        say(
            f"warning: a step asks batch.prompts = {config.batch.prompts}, and there {count}: each "
            "step asks some of them several times. If it is meant to, set data.repeat = "
            f"{-(-config.batch.prompts // len(train))}."
        )


def answerable(config: ConfigDict, rewards: list[Reward], problems: list) -> list:
    """The problems that all rewards can score.

    Raises ValueError if there are others and `rewards.bad_rows` refuses them, if none is left, or
    if a column is missing.
    """
    registry.refuse_columns(rewards, problems)
    faults = registry.faulty_rows(rewards, problems)
    if not faults:
        return problems
    first = next(iter(faults.values()))
    if config.rewards.bad_rows == "refuse" or len(faults) == len(problems):
        raise ValueError(
            f"{first} {len(faults)} of {len(problems)} rows are such. Mend them, or leave them out "
            'with rewards.bad_rows = "drop".'
        )
    say(f"{len(faults)} of {len(problems)} problems are left out. The first: {first}")
    return [problem for i, problem in enumerate(problems) if i not in faults]


def encode(
    problems: list,
    policy: policy_lib.Policy,
    config: ConfigDict,
    noun: str,
    now: datetime,
) -> prompts.Encoded:
    """The problems' prompts as tokens; prints how many were dropped or truncated.

    `now`: the date for chat templates.
    """
    limit, overlong = config.data.max_prompt_tokens, config.data.overlong
    encoded = prompts.encode(
        problems, policy.tokenizer, limit, overlong, now=now, on_text=Slow().tell
    )
    for problem, ids in zip(encoded.problems, encoded.prompt_ids):
        policy.refuse_unknown(ids, f"The prompt of {problem.where or 'an unnamed problem'}")
    form = problems_lib.form_of(config.data)
    for note in notes.of_template(encoded.problems, encoded.reads, form):
        say(f"warning: {note}")
    number = encoded.num_dropped or encoded.num_truncated
    if number:
        done = "dropped" if encoded.num_dropped else "truncated"
        say(
            f"{number:,} of {len(problems):,} {noun} have prompts of more than "
            f"data.max_prompt_tokens = {limit} tokens: {done}."
        )
    return encoded


class Slow:
    """Reports the progress of a slow chat template."""

    _EVERY_S = 10.0

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > self._EVERY_S:
            self._last = time.monotonic()
            say(f"The chat template has written {done:,} of {total:,} prompts.")


def questions(
    problems: list,
    policy: policy_lib.Policy,
    config: ConfigDict,
    noun: str,
    now: datetime,
) -> Questions:
    """The problems as the policy reads them; prompts that are too long are dropped or truncated.

    `now` as for `encode`.
    """
    encoded = encode(problems, policy, config, noun, now)
    texts = [
        p.prompt if isinstance(p.prompt, str) else policy.tokenizer.decode(ids)
        for p, ids in zip(encoded.problems, encoded.prompt_ids)
    ]
    return Questions(encoded.problems, encoded.prompt_ids, texts)
