"""The rows of preferences: pairs or labelled completions, and what the reference makes of them.

A row is a group of one or two completions. What the reference, the policy as it begins, makes of
the data is computed once (`reference_table.py`), so that it takes no memory while the policy
learns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.algorithm.preferences import Preference
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.data.examples import Pair, Unpaired
from grpo_jax.devices import transfer
from grpo_jax.learner import scoring
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.messages.console import say
from grpo_jax.messages.values import shown
from grpo_jax.models.policy import Policy
from grpo_jax.setup import examples, inputs
from grpo_jax.structs import Params, Rollouts, pad_rows
from grpo_jax.trainers import given, reference_table, rollout, sft
from grpo_jax.trainers.given import Data, Place
from grpo_jax.trainers.runs import Run


class Row(NamedTuple):
    """A row of data, and what the reference makes of it, in nats summed over a completion."""

    example: Pair | Unpaired
    ref_logp: tuple[float, ...] = ()  # of its completions; (): the loss reads none
    other_ids: Sequence[int] = ()  # a completion of another prompt, for KTO
    other_ref_logp: float = 0.0

    @property
    def completions(self) -> tuple[Sequence[int], ...]:
        """The chosen and the rejected one; or that with a label."""
        if isinstance(self.example, Pair):
            return self.example.chosen_ids, self.example.rejected_ids
        return (self.example.completion_ids,)


def preference_of(config: ConfigDict) -> Preference:
    """The config's loss."""
    return Preference(
        loss=config.preference.loss,
        beta=config.preference.beta,
        label_smoothing=config.preference.label_smoothing,
        reference=config.preference.reference,
        margin=config.preference.margin,
        log_ratio=config.preference.log_ratio,
        desirable_weight=config.preference.desirable_weight,
        undesirable_weight=config.preference.undesirable_weight,
    )


def rollouts(
    rows: Sequence[Row], multiple: int, config: ConfigDict, completions: Callable | None = None
) -> Rollouts:
    """The rows as groups, and fillers that are not trained on, up to a multiple of groups.

    Prompts are padded to about the longest. `completions(row)`: None for the row's own.
    """
    of_row = completions or (lambda row: row.completions)
    groups = [of_row(row) for row in rows]
    fillers = -len(rows) % multiple
    prompts = [list(row.example.prompt_ids) for row in rows] + [[0]] * fillers
    groups += [tuple([0] for _ in groups[0])] * fillers
    limit, longest = config.data.max_prompt_tokens, max(map(len, prompts))
    prompt_PQ, prompt_length_P = pad_rows(prompts, scoring.cut_to(limit, longest))
    tokens = config.preference.max_tokens
    text_BC, length_B = pad_rows([list(ids) for group in groups for ids in group], tokens)
    by_group = lambda x: x.reshape(len(groups), -1, *x.shape[1:])  # noqa: E731
    chosen_PGC = np.arange(tokens) < by_group(length_B)[..., None]
    chosen_PGC[len(rows) :] = False
    return Rollouts(
        prompt_PQ=prompt_PQ,
        prompt_length_P=prompt_length_P,
        completion_PGC=by_group(text_BC),
        logp_PGC=np.zeros(chosen_PGC.shape, np.float32),
        length_PG=by_group(length_B),
        stopped_PG=np.ones(chosen_PGC.shape[:2], bool),
        chosen_PGC=chosen_PGC,
    )


def mismatched(rows: Sequence[Row], multiple: int, config: ConfigDict) -> Rollouts:
    """The prompts of rows, each with a completion of another prompt."""
    return rollouts(rows, multiple, config, lambda row: (row.other_ids,))


# --- Reading -------------------------------------------------------------------------------------


def others(rows: Sequence[Unpaired]) -> np.ndarray:
    """For each row the number of the nearest row before it with another prompt, int [rows].

    Rows before the first are those at the end. ValueError if all prompts are equal.
    """
    prompts = [tuple(row.prompt_ids) for row in rows]
    differ = (j for j in reversed(range(len(rows))) if prompts[j] != prompts[0])
    if (first := next(differ, None)) is None:
        raise ValueError(
            'preference.loss = "kto" compares with completions of other prompts, and all '
            f"{len(rows)} rows of the data have one prompt. Give rows of several prompts, or set "
            'preference.loss = "apo_zero_unpaired".'
        )
    found = np.full(len(rows), first)
    for i in range(1, len(rows)):
        found[i] = i - 1 if prompts[i] != prompts[i - 1] else found[i - 1]
    return found


def read(config: ConfigDict, policy: Policy, now: datetime, evaluates: bool) -> Data:
    """The preferences of the config's dataset, or those that its task writes."""
    preference = preference_of(config)
    kind = "pair" if preference.is_of_pairs else "unpaired"
    if config.data.streaming and preference.reads_reference:
        raise ValueError(
            "data.streaming = True reads rows while it trains, and preference.loss = "
            f"{shown(preference.loss)} needs what the reference makes of them before. Set "
            'data.streaming = False, or preference.loss = "orpo" or preference.reference = "none", '
            "which have no reference."
        )
    if config.data.task:
        return _of_task(config, policy, kind, now, evaluates)
    where = config, policy, "preference", kind, now
    data, with_partners = given.rows(*where), functools.partial(with_others, preference)
    held_out = with_partners(given.held_out(*where) if evaluates else [])
    if config.data.streaming:
        return dataclasses.replace(data, draw=_as_rows(data.draw), held_out=held_out)
    return _in_memory(config, data, with_partners(data.rows), held_out)


def _of_task(config: ConfigDict, policy: Policy, kind: str, now: datetime, evaluates: bool) -> Data:
    """The preferences that the config's task writes, and its held-out problems."""

    def part(name: str, most: int | None = None) -> list[Any]:
        written = examples.preferences_of_task(config, kind, name)[:most]
        return examples.encode(config, policy, "preference", kind, written, now).examples

    train, held_out, problems, rewards = part("train"), [], None, []
    if evaluates and config.evaluation.num_problems:
        held_out = part("held_out", config.evaluation.num_problems)
        problems, rewards = sft.held_out_problems(config, policy, now)
    preference = preference_of(config)
    rows = with_others(preference, train)
    return Data(
        functools.partial(_draw, config, rows),
        len(rows),
        inputs.of_examples(train),
        with_others(preference, held_out),
        problems,
        rewards,
        rows=rows,
    )


def with_others(preference: Preference, found: Sequence[Pair | Unpaired]) -> list[Row]:
    """The rows, each with a completion of another prompt if the loss reads one."""
    if not preference.reads_divergence or not found:
        return [Row(example) for example in found]
    return [Row(row, other_ids=found[j].completion_ids) for row, j in zip(found, others(found))]


def _in_memory(
    config: ConfigDict, data: Data, rows: Sequence[Row], held_out: Sequence[Row]
) -> Data:
    draw = functools.partial(_draw, config, rows)
    return dataclasses.replace(data, draw=draw, rows=rows, held_out=held_out)


def _as_rows(draw: Callable[[int, Place], tuple[list[Any], Place]]) -> Callable:
    """A stream's draw, of rows."""

    def drawn(number: int, place: Place) -> tuple[list[Row], Place]:
        found, place = draw(number, place)
        return [Row(example) for example in found], place

    return drawn


# --- The reference --------------------------------------------------------------------------------


def with_reference(run: Run, data: Data, reference: Callable[[], Params]) -> Data:
    """The data with what the reference makes of them, which is scored or found in the folder."""
    preference, groups = preference_of(run.config), groups_at_once(run)
    if not preference.reads_reference:
        return data
    parts = {"train": data.rows} | ({"held_out": data.held_out} if data.held_out else {})
    shapes = {}
    for part, rows in parts.items():
        shapes[part] = len(rows), len(data.rows[0].completions)
        if preference.reads_divergence:
            shapes[f"{part}_others"] = len(rows), 1

    def compute() -> reference_table.Table:
        say(f"The reference reads {sum(map(len, parts.values())):,} rows.")
        params = transfer.to_device_memory(reference())
        place = functools.partial(rollout.device_rows, run)
        prepare = dataclasses.replace(run.prepare, with_old=True, sizes=CompiledSizes())
        table = {}
        for name in shapes:
            layout = mismatched if name.endswith("_others") else rollouts
            rows = parts[name.removesuffix("_others")]
            batches = (
                (len(some), layout(some, groups, run.config)) for some in in_batches(run, rows)
            )
            table[name] = reference_table.scored(prepare, params, batches, len(rows), place)
        return table

    key = reference_table.key_of(
        read=run.read,
        held_out=reference_table.rows_sum([_tokens_of(row) for row in data.held_out]),
        dtype=run.config.model.dtype,
    )
    table = reference_table.kept(run.folder, key, shapes, compute)
    found = {part: _with_table(rows, table, part) for part, rows in parts.items()}
    return _in_memory(run.config, data, found["train"], found.get("held_out", ()))


def _tokens_of(row: Row) -> list[Sequence[int]]:
    return [row.example.prompt_ids, *row.completions, row.other_ids]


def _with_table(rows: Sequence[Row], table: reference_table.Table, part: str) -> list[Row]:
    of_others = table.get(f"{part}_others")
    return [
        row._replace(
            ref_logp=tuple(map(float, ref_G)),
            other_ref_logp=0.0 if of_others is None else float(of_others[i, 0]),
        )
        for i, (row, ref_G) in enumerate(zip(rows, table[part]))
    ]


def groups_at_once(run: Run) -> int:
    """Groups of a batch, fillers included."""
    batch, shards = run.config.preference.batch, given.num_shards(run)
    return -(-batch // shards) * shards


def in_batches(run: Run, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The rows in order, as many at a time as in an update."""
    batch = run.config.preference.batch
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch]


def _draw(
    config: ConfigDict, rows: Sequence[Row], number: int, place: Place
) -> tuple[list[Row], Place]:
    """The rows of a draw."""
    index = prompts_lib.prompt_indices(config.seed, number, len(rows), config.preference.batch)
    return [rows[i] for i in index], place
