"""Training on preferences: DPO and its relatives on pairs, KTO on labelled completions.

The rows `PAIRS` and `UNPAIRED` of `given.py`. A row of data is a pair, whose completions form a
group of two, or a completion with its label. What the reference, the policy as it begins, makes of
the data is computed once (`reference_table.py`), so that it takes no memory while the policy
learns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.algorithm import preferences
from grpo_jax.algorithm.preference_losses import PairLoss, PreferenceTerms, UnpairedLoss
from grpo_jax.algorithm.preferences import Preference
from grpo_jax.data import problems as problems_lib
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.data.examples import Pair, Unpaired
from grpo_jax.devices import transfer
from grpo_jax.learner import experience as experience_lib
from grpo_jax.learner import scoring
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.messages.console import print_title, say
from grpo_jax.models.policy import Policy
from grpo_jax.run.stop import StopSignal
from grpo_jax.setup import examples, inputs
from grpo_jax.structs import Array, Experience, Params, Rollouts, pad_rows
from grpo_jax.trainers import given, reference_table, rollout, sft
from grpo_jax.trainers.given import Data, Given, Place
from grpo_jax.trainers.run_state import RunState
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
        log_ratio=config.preference.log_ratio,
        desirable_weight=config.preference.desirable_weight,
        undesirable_weight=config.preference.undesirable_weight,
    )


def nll_weight(config: ConfigDict) -> float:
    """Weight of the mean nll of chosen completions beside the loss of pairs; ORPO has it whole."""
    return 1.0 if config.preference.loss == "orpo" else config.preference.nll_weight


def component(config: ConfigDict) -> PairLoss | UnpairedLoss:
    preference = preference_of(config)
    return (PairLoss if preference.is_of_pairs else UnpairedLoss)(preference)


def run(config: ConfigDict, folder: Path, stop: StopSignal) -> Path:
    """Trains, or continues the training in `folder`; returns the exported Hugging Face folder.

    A new model (`model.path` "") first learns the form of answers from worked solutions. Raises as
    `given.run`.
    """
    row, path = PAIRS if preference_of(config).is_of_pairs else UNPAIRED, config.model.path
    if not path:
        print_title("Supervised start: updates on worked solutions")
        path = str(sft.run(config, folder / "bootstrap", stop, is_start=True))
        print_title(f"Preferences: {config.preference.loss}")
    return given.run(row, config, folder, stop, model_path=path)


# --- A step ---------------------------------------------------------------------------------------


def rollouts(
    rows: Sequence[Row], shards: int, config: ConfigDict, completions: Callable | None = None
) -> Rollouts:
    """The rows as groups, and fillers that are not trained on so that groups split over shards.

    Prompts are padded to about the longest. `completions(row)`: None for the row's own.
    """
    of_row = completions or (lambda row: row.completions)
    groups = [of_row(row) for row in rows]
    fillers = -len(rows) % shards
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


def experience(run: Run, state: RunState, rows: list[Row], completions: Rollouts) -> Experience:
    """The experience of a step: its completions, with what their losses read."""
    signal = _signal(run.config, rows, len(completions.length_PG))
    beside = transfer.shard_rows(run.mesh, signal)
    if preference_of(run.config).reads_divergence:
        beside["divergence_PG"] = _divergence(run, state, rows)
    log_probs = run.prepare.log_probs(None, None, completions)
    no_reward = transfer.shard_rows(run.mesh, np.zeros(completions.length_PG.shape, np.float32))
    return run.prepare(log_probs, no_reward, beside=beside)


def _signal(config: ConfigDict, rows: Sequence[Row], number: int) -> dict[str, np.ndarray]:
    """Fields of the experience of rows, [P, G], with fillers up to `number`."""
    preference, signal = preference_of(config), {}
    fill = lambda x_PG: np.pad(x_PG, [(0, number - len(rows)), (0, 0)])  # noqa: E731
    if preference.reads_reference:
        signal["ref_logp_PG"] = fill(np.array([row.ref_logp for row in rows], np.float32))
    if not preference.is_of_pairs:
        signal["desirable_PG"] = fill(np.array([[row.example.label] for row in rows], bool))
    elif nll_weight(config):
        # The mean over tokens, of a sum that is divided by the number of pairs.
        tokens = sum(len(row.completions[0]) for row in rows)
        weight = nll_weight(config) * len(rows) / tokens
        signal["nll_weight_PG"] = fill(np.tile(np.float32([weight, 0]), (len(rows), 1)))
    return signal


def _mismatched(rows: Sequence[Row], shards: int, config: ConfigDict) -> Rollouts:
    """The prompts of rows, each with a completion of another prompt."""
    return rollouts(rows, shards, config, lambda row: (row.other_ids,))


def _divergence(run: Run, state: RunState, rows: Sequence[Row]) -> Array:
    """KTO's reference point of a step, alike for all its completions, [P, 1]."""
    others = rollout.device_rows(run, _mismatched(rows, given.num_shards(run), run.config))
    prepare = dataclasses.replace(run.prepare, with_old=True)
    found = prepare.log_probs(run.weights(state.train), None, others)
    ref_P1 = np.zeros(others.length_PG.shape, np.float32)
    ref_P1[: len(rows), 0] = [row.other_ref_logp for row in rows]
    if found.order_P is not None:
        ref_P1 = ref_P1[found.order_P]
    ref_P1 = transfer.shard_rows(run.mesh, ref_P1)
    return experience_lib.divergence(run.mesh)(found.rollouts, found.old_logp_PGC, ref_P1)


# --- The data -------------------------------------------------------------------------------------


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
    load = functools.partial(_load, config, policy, now)
    train, held_out = load("train", "rows to train on"), []
    examples.check_length(policy, [row.example for row in train], "preference")
    problems, rewards = None, []
    if evaluates:
        held_out = load("held_out", "held-out rows")
        if config.data.task:
            problems, rewards = sft.held_out_problems(config, policy, now)
    return Data(
        functools.partial(_draw, config, train),
        len(train),
        inputs.of_examples([row.example for row in train]),
        rows=train,
        held_out=held_out,
        problems=problems,
        rewards=rewards,
    )


def _load(config: ConfigDict, policy: Policy, now: datetime, part: str, noun: str) -> list[Row]:
    """The rows "train" or "held_out", each with a completion of another prompt if one is read."""
    preference = preference_of(config)
    kind = "pair" if preference.is_of_pairs else "unpaired"
    most = config.evaluation.num_problems if part == "held_out" else None
    if config.data.task:
        written = examples.preferences_of_task(config, kind, part)[:most]
        found = examples.encode(config, policy, "preference", kind, written, now).examples
    else:
        of_part = {
            "train": problems_lib.train_source,
            "held_out": problems_lib.held_out_source,
        }
        source = of_part[part](config.data)
        if source is None or most == 0:
            return []
        found = examples.load(config, policy, "preference", kind, source, noun, now, most)
    if not preference.reads_divergence or not found:
        return [Row(row) for row in found]
    return [Row(row, other_ids=found[j].completion_ids) for row, j in zip(found, others(found))]


def with_reference(run: Run, data: Data, reference: Callable[[], Params]) -> Data:
    """The data with what the reference makes of them, which is scored or found in the folder."""
    preference, batch = preference_of(run.config), run.config.preference.batch
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
        shards, place = given.num_shards(run), functools.partial(rollout.device_rows, run)
        prepare = dataclasses.replace(run.prepare, with_old=True, sizes=CompiledSizes())
        table = {}
        for name in shapes:
            layout = _mismatched if name.endswith("_others") else rollouts
            rows = parts[name.removesuffix("_others")]
            batches = (
                (len(some), layout(some, shards, run.config)) for some in in_batches(rows, batch)
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
    return dataclasses.replace(
        data,
        draw=functools.partial(_draw, run.config, found["train"]),
        rows=found["train"],
        held_out=found.get("held_out", ()),
    )


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


def in_batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """The rows in order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _draw(
    config: ConfigDict, rows: Sequence[Row], number: int, place: Place
) -> tuple[list[Row], Place]:
    """The rows of a draw."""
    index = prompts_lib.prompt_indices(config.seed, number, len(rows), config.preference.batch)
    return [rows[i] for i in index], place


# --- Held-out data --------------------------------------------------------------------------------


def measure(
    run: Run, state: RunState, rows: Sequence[Row], alive: Callable[[], None]
) -> dict[str, float]:
    """The loss and its metrics on held-out rows."""
    config, preference, loss = run.config, preference_of(run.config), component(run.config)
    batch, shards = config.preference.batch, given.num_shards(run)
    signal = _signal(config, rows, len(rows))
    if preference.reads_divergence:
        ratios = []
        for some in in_batches(rows, batch):
            others_PGC = _mismatched(some, shards, config)
            logp_PG = _sums(run, state, others_PGC)[: len(some)]
            ratios.append(logp_PG[:, 0] - np.float32([row.other_ref_logp for row in some]))
            alive()
        ratio = np.concatenate(ratios)
        point = preferences.reference_point(ratio, np.ones(len(ratio), bool))
        signal["divergence_PG"] = np.full((len(rows), 1), point, np.float32)
    total: dict[str, float] = {}
    for start, some in zip(range(0, len(rows), batch), in_batches(rows, batch)):
        alive()
        completions = rollouts(some, shards, config)
        logp_PGC, _ = given.log_probs(run, state, completions)
        number, tokens = len(some), logp_PGC.shape[-1]
        action_PGC = completions.chosen_PGC[:number, :, :tokens]
        of_some = {name: x[start : start + number] for name, x in signal.items()}
        sums = _loss_sums(loss, np.where(action_PGC, logp_PGC[:number], 0), action_PGC, of_some)
        total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    found = {loss.metric: total.pop("loss") / total.pop("divisor")}
    found |= loss.means({name: np.float64(value) for name, value in total.items()})
    return {
        name.replace("/", "/eval_"): float(value)
        for name, value in found.items()
        if not np.isnan(value)
    }


def _sums(run: Run, state: RunState, completions: Rollouts) -> np.ndarray:
    """Summed log-probabilities of completions under the policy, [P, G]."""
    logp_PGC, _ = given.log_probs(run, state, completions)
    return experience_lib.completion_sums(
        completions.replace(chosen_PGC=completions.chosen_PGC[..., : logp_PGC.shape[-1]]), logp_PGC
    )


def _loss_sums(
    loss: PairLoss | UnpairedLoss,
    logp_PGC: np.ndarray,
    action_PGC: np.ndarray,
    signal: dict[str, np.ndarray],
) -> dict[str, Array]:
    """The summed loss with its divisor, and the sums of its metrics."""
    fields = dict.fromkeys(("ref_logp_PG", "nll_weight_PG", "desirable_PG", "divergence_PG"))
    terms = PreferenceTerms(action_PGC, **(fields | signal))
    weight, divisor = loss.weights(action_PGC)
    total = (weight * loss.loss(logp_PGC, None, terms)).sum()
    sums, _ = loss.diagnostics(logp_PGC, None, terms, action_PGC)
    return sums | {"loss": total, "divisor": divisor, "tokens": action_PGC.sum()}


def _samples(rows: list[Row], run: Run) -> list[dict[str, Any]]:
    """A few completions, as rows of the samples table."""
    decode, most = run.policy.tokenizer.decode, run.config.logging.num_samples
    both = ("chosen", "rejected")
    return [
        {
            "prompt": decode(row.example.prompt_ids),
            "columns": {"preference": both[g] if len(row.completions) == 2 else _label(row)},
            "completion": decode(ids),
            "rewards": {},
            "extras": {},
            "length": len(ids),
        }
        for row in rows[:most]
        for g, ids in enumerate(row.completions)
    ][:most]


def _label(row: Row) -> str:
    return "desirable" if row.example.label else "undesirable"


PAIRS = Given(
    name="dpo",
    section="preference",
    step="step",
    loss=PairLoss.metric,
    phase="preference",
    read=read,
    rollouts=rollouts,
    component=component,
    samples=_samples,
    experience=experience,
    measure=measure,
    held_out_loss="preference/eval_loss",
    group=2,
    begin=with_reference,
)
UNPAIRED = dataclasses.replace(PAIRS, group=1)
