"""Reads, checks and encodes a config's rows with given completions."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.data import examples, masks, notes, streams, tasks
from grpo_jax.data import problems as problems_lib
from grpo_jax.data.encoded import Encoded
from grpo_jax.data.examples import Pair, Written
from grpo_jax.data.masks import Limits
from grpo_jax.data.sources import Row, Source
from grpo_jax.data.streaming import Stream
from grpo_jax.data.templates import Renderer
from grpo_jax.messages.console import say
from grpo_jax.models.policy import Policy
from grpo_jax.setup.data import Slow

_AT_ONCE = 10_000  # rows that are texts at the same time


def load(
    config: ConfigDict,
    policy: Policy,
    section: str,
    kind: str,
    source: Source,
    noun: str,
    now: datetime,
    most: int | None = None,
) -> list[Any]:
    """The rows of a source as examples of a `kind` of `examples.KINDS`, in its order.

    `section`: that of the schedule, whose limit holds. `noun`: of the rows, for messages. `most`:
    the number of rows, None for all. Raises ValueError, naming the row, for data that do not fit;
    says how many rows were dropped or cut.
    """
    rows = examples.load(source, problems_lib.form_of(config.data), kind)
    encoded, names = Encoded([]), set()
    rows = itertools.islice(rows, most)
    with Renderer() as renderer:
        while some := list(itertools.islice(rows, _AT_ONCE)):
            encoded += encode(config, policy, section, kind, some, now, renderer)
            names.update(*(row.arguments for row in some))
    if not encoded.examples:
        raise ValueError(
            f"{source}: no row is left; each is longer than data.max_prompt_tokens = "
            f"{config.data.max_prompt_tokens} or {section}.max_tokens = "
            f"{config[section].max_tokens}. Raise them."
        )
    tell_of(config, section, encoded, noun, names)
    return encoded.examples


def preferences_of_task(config: ConfigDict, kind: str, part: str) -> list[Written]:
    """Rows of `kind` "pair" or "unpaired" that the config's task writes, "train" or "held_out".

    They follow from the seed. ValueError for a task that writes none.
    """
    task, data = tasks.load(config.data.task), config.data
    if not hasattr(task, "preference_pair"):
        raise ValueError(
            f"data.task = {data.task!r} writes no preferences. Take the task arithmetic, or set "
            "data.path to a dataset of them in place of data.task."
        )
    train, held_out = task.generate(data.num_train, data.num_eval, config.seed)
    rng = streams.stream(config.seed, "preferences", int(part == "held_out"))
    found = []
    for problem in train if part == "train" else held_out:
        both = task.preference_pair(problem, rng)
        pair = Written(problem.where, problem.prompt, both, value=0.0)
        found += [pair] if kind == "pair" else examples.labelled(pair)
    return found


def stream(
    config: ConfigDict, policy: Policy, section: str, kind: str, source: Source, now: datetime
) -> tuple[Stream, Renderer]:
    """The rows of a source as examples by draws, read while they are needed; as `load` else.

    And the process that renders their chats. As many rows as a draw has are checked at once.
    """
    form, renderer, told = problems_lib.form_of(config.data), Renderer(), _Told(config, section)
    own = copy.deepcopy(policy.tokenizer)  # no two threads may use one at the same time
    policy = dataclasses.replace(policy, tokenizer=own)

    def encoded(rows: Sequence[Row]) -> list[Any]:
        alike = problems_lib.alike([found.first, *rows], source)
        option = source.options[0]
        written = [
            one
            for where, row in itertools.islice(alike, 1, None)
            for one in examples.written(row, where, option, form, kind)
        ]
        some = encode(config, policy, section, kind, written, now, renderer)
        told.add(some, written)
        return some.examples

    found = Stream(
        source,
        encoded,
        seed=config.seed,
        size=config[section].batch,
        buffer=config.data.shuffle_buffer,
    )
    found.beginning(config[section].batch)
    told.begin()
    return found, renderer


class _Told:
    """Says what was done to the rows of a stream: at its first window, then ever more rarely."""

    def __init__(self, config: ConfigDict, section: str):
        self._config, self._section = config, section
        self.begin()

    def begin(self) -> None:
        """Counts from here on."""
        self._sum, self._windows, self._names = Encoded([]), 0, set()

    def add(self, some: Encoded, rows: Sequence[Written]) -> None:
        self._sum += dataclasses.replace(some, examples=[])
        self._names.update(*(row.arguments for row in rows))
        self._windows += 1
        if self._windows & (self._windows - 1) == 0:  # 1, 2, 4, 8
            tell_of(self._config, self._section, self._sum, "rows read so far", self._names)


def are_given(config: ConfigDict, kind: str, source: Source) -> bool:
    """Whether the rows of a source have completions, by the columns of the first."""
    return examples.is_of(source, problems_lib.form_of(config.data), kind)


def encode(
    config: ConfigDict,
    policy: Policy,
    section: str,
    kind: str,
    rows: Sequence[Written],
    now: datetime,
    renderer: Renderer | None = None,
) -> Encoded:
    """Rows as examples; ValueError as `masks.encode`, and for what the model does not take.

    That are tokens that it does not know, and rows that are longer than its own.
    `now`: the date for chat templates. `renderer`: as for `masks.encode`.
    """
    schedule = config[section]
    limits = Limits(
        config.data.max_prompt_tokens,
        schedule.max_tokens,
        config.data.overlong,
        schedule.too_long,
        ("data.max_prompt_tokens", f"{section}.max_tokens", f"{section}.too_long"),
    )
    encoded = masks.encode(
        rows,
        kind,
        policy.tokenizer,
        policy.stop_ids,
        limits,
        loss_on=config.sft.loss_on if kind == "example" else "completion",
        now=now,
        on_text=Slow().tell,
        renderer=renderer,
    )
    most = policy.model.max_position
    for where, example in zip(encoded.places, encoded.examples, strict=True):
        for ids in (example.prompt_ids, *_completions(example)):
            if len(ids) and ids.max() >= policy.model.vocab_size:
                policy.refuse_unknown(ids.tolist(), where)
        length = len(example.prompt_ids) + max(map(len, _completions(example)))
        if length > most:
            raise ValueError(
                f"{where} has {length} tokens, and the model takes {most}. Set "
                f"{section}.max_tokens and data.max_prompt_tokens so that both together are at "
                f'most {most}, and {section}.too_long to "drop" or "truncate".'
            )
    return dataclasses.replace(encoded, places=())


def _completions(example: Any) -> tuple[np.ndarray, ...]:
    if isinstance(example, Pair):
        return example.chosen_ids, example.rejected_ids
    return (example.completion_ids,)


def tell_of(
    config: ConfigDict, section: str, encoded: Encoded, noun: str, names: Collection[str]
) -> None:
    """Says what was done to the rows, and what about the chat template may not be meant.

    `names`: of the values that the rows give to the template.
    """
    total = encoded.num_rows
    for number, done in ((encoded.num_dropped, "dropped"), (encoded.num_truncated, "truncated")):
        if number:
            say(
                f"{number:,} of {total:,} {noun} are longer than data.max_prompt_tokens = "
                f"{config.data.max_prompt_tokens} or {section}.max_tokens = "
                f"{config[section].max_tokens}: {done}."
            )
    for note in encoded.odd.told(total, noun):
        say(f"warning: {note}")
    if encoded.num_ended:
        say(
            f"warning: The chat template ends {encoded.num_ended:,} of {total:,} {noun} without a "
            "token that ends a completion. One is added, so that the model learns to end."
        )
    if encoded.num_unmarked:
        say(
            "warning: The {% generation %} marks of the chat template leave out the token that "
            f"ends a turn, in {encoded.num_unmarked:,} of {total:,} {noun}. The model does not "
            "learn to end its turns."
        )
    form = problems_lib.form_of(config.data)
    for note in notes.of_names(names, (), encoded.reads, form):
        say(f"warning: {note}")
