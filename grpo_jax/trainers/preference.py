"""Training on preferences: DPO and its relatives on pairs, KTO on labelled completions.

The rows `PAIRS` and `UNPAIRED` of `given.py`, of the data that `preference_rows.py` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.algorithm import preferences
from grpo_jax.algorithm.preference_losses import PairLoss, PreferenceTerms, UnpairedLoss
from grpo_jax.devices import transfer
from grpo_jax.learner import experience as experience_lib
from grpo_jax.messages.console import print_title
from grpo_jax.run.stop import StopSignal
from grpo_jax.structs import Array, Experience, Rollouts
from grpo_jax.trainers import given, preference_rows, rollout, sft
from grpo_jax.trainers.given import Given
from grpo_jax.trainers.preference_rows import Row, in_batches, preference_of, rollouts
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run


def nll_weight(config: ConfigDict) -> float:
    """Weight of the mean nll of chosen completions beside the loss of pairs; ORPO has it whole."""
    return 1.0 if config.preference.loss == "orpo" else config.preference.nll_weight


def component(config: ConfigDict) -> PairLoss | UnpairedLoss:
    preference = preference_of(config)
    made = PairLoss if preference.is_of_pairs else UnpairedLoss
    return made(preference, config.logging.token_metrics)


def run(config: ConfigDict, folder: Path, stop: StopSignal) -> Path:
    """Trains, or continues the training in `folder`; returns the exported Hugging Face folder.

    A new model (`model.path` "") first learns the form of answers from worked solutions. Raises as
    `given.run`.
    """
    path = config.model.path
    if not path:
        print_title("Supervised start: updates on worked solutions")
        path = str(sft.run(config, folder / "bootstrap", stop, is_start=True))
        print_title(f"Preferences: {config.preference.loss}")
    return given.run(row_of(config), config, folder, stop, model_path=path)


def row_of(config: ConfigDict) -> Given:
    """The row of the config's loss."""
    return PAIRS if preference_of(config).is_of_pairs else UNPAIRED


# --- A step ---------------------------------------------------------------------------------------


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


def _divergence(run: Run, state: RunState, rows: Sequence[Row]) -> Array:
    """KTO's reference point of a step, alike for all its completions, [P, 1]."""
    others = preference_rows.mismatched(rows, given.num_shards(run), run.config)
    others = rollout.device_rows(run, others)
    prepare = dataclasses.replace(run.prepare, with_old=True)
    found = prepare.log_probs(run.weights(state.train), None, others)
    ref_P1 = np.zeros(others.length_PG.shape, np.float32)
    ref_P1[: len(rows), 0] = [row.other_ref_logp for row in rows]
    if found.order_P is not None:
        ref_P1 = ref_P1[found.order_P]
    ref_P1 = transfer.shard_rows(run.mesh, ref_P1)
    return experience_lib.divergence(run.mesh)(found.rollouts, found.old_logp_PGC, ref_P1)


# --- Held-out data --------------------------------------------------------------------------------


def measure(
    run: Run, state: RunState, rows: Sequence[Row], alive: Callable[[], None]
) -> dict[str, float]:
    """The loss and its metrics on held-out rows."""
    config, preference = run.config, preference_of(run.config)
    loss = dataclasses.replace(component(config), of_tokens=False)
    signal, groups = _signal(config, rows, len(rows)), preference_rows.groups_at_once(run)
    if preference.reads_divergence:
        point = _held_out_divergence(run, state, rows, alive)
        signal["divergence_PG"] = np.full((len(rows), 1), point, np.float32)
    total, done = {}, 0
    for some in in_batches(run, rows):
        alive()
        completions = rollouts(some, groups, config)
        logp_PGC, _ = given.log_probs(run, state, completions)
        number, tokens = len(some), logp_PGC.shape[-1]
        action_PGC = completions.chosen_PGC[:number, :, :tokens]
        of_some = {name: x[done : done + number] for name, x in signal.items()}
        sums = _loss_sums(loss, np.where(action_PGC, logp_PGC[:number], 0), action_PGC, of_some)
        total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
        done += number
    found = {loss.metric: total.pop("loss") / total.pop("divisor")}
    found |= loss.means({name: np.float64(value) for name, value in total.items()})
    return {
        name.replace("/", "/eval_"): float(value)
        for name, value in found.items()
        if not np.isnan(value)
    }


def _held_out_divergence(
    run: Run, state: RunState, rows: Sequence[Row], alive: Callable[[], None]
) -> Array:
    """KTO's reference point of all held-out rows."""
    ratios, groups = [], preference_rows.groups_at_once(run)
    for some in in_batches(run, rows):
        alive()
        completions = preference_rows.mismatched(some, groups, run.config)
        logp_PGC, _ = given.log_probs(run, state, completions)
        there_PGC = completions.chosen_PGC[..., : logp_PGC.shape[-1]]
        logp_P = np.where(there_PGC, logp_PGC, 0.0).sum((1, 2))[: len(some)]
        ratios.append(logp_P - np.float32([row.other_ref_logp for row in some]))
    ratio = np.concatenate(ratios)
    return preferences.reference_point(ratio, np.ones(len(ratio), bool))


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


def _fields(config: ConfigDict) -> dict[str, str]:
    """Dtypes of what `experience` puts beside the usual fields."""
    preference = preference_of(config)
    read = {
        "ref_logp_PG": preference.reads_reference and "float32",
        "nll_weight_PG": preference.is_of_pairs and nll_weight(config) > 0 and "float32",
        "desirable_PG": not preference.is_of_pairs and "bool",
        "divergence_PG": preference.reads_divergence and "float32",
    }
    return {name: dtype for name, dtype in read.items() if dtype}


PAIRS = Given(
    name="dpo",
    section="preference",
    step="step",
    loss=PairLoss.metric,
    phase="preference",
    read=preference_rows.read,
    rollouts=rollouts,
    component=component,
    samples=_samples,
    experience=experience,
    measure=measure,
    fields=_fields,
    held_out_loss="preference/eval_loss",
    group=2,
    begin=preference_rows.with_reference,
)
UNPAIRED = dataclasses.replace(PAIRS, group=1)
