"""Training a reward model on pairs, by Bradley and Terry: the row `REWARD_MODEL` of `given.py`.

The model is a decoder with a scalar head; where adapters learn, the head learns whole beside them.
Its reward of a text is the head's value after the last
token, or after the last that is not the pad token, as transformers reads it. Both texts of a pair
are computed in one row, what they begin with in common once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.algorithm.scalar_losses import BradleyTerryLoss, bradley_terry
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.data.examples import Pair
from grpo_jax.hosts import processes
from grpo_jax.learner import scalars
from grpo_jax.messages.console import print_title
from grpo_jax.metrics import calibration
from grpo_jax.models.policy import Policy
from grpo_jax.run.stop import StopSignal
from grpo_jax.run.whole_files import write_whole
from grpo_jax.setup import examples, inputs, lora
from grpo_jax.structs import Experience, Rollouts
from grpo_jax.trainers import given, rollout, sft
from grpo_jax.trainers.given import Data, Given, Place
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run

PICTURE = "calibration.png"  # in a run's folder


class Row(NamedTuple):
    """A pair, and both of its texts up to the token after which its reward is read."""

    pair: Pair
    texts: tuple[list[int], list[int]]  # chosen, rejected


def run(config: ConfigDict, folder: Path, stop: StopSignal) -> Path:
    """Trains, or continues the training in `folder`; returns the exported Hugging Face folder.

    A new model (`model.path` "") first learns to write from worked solutions, with all of its
    weights. Raises as `given.run`.
    """
    path = config.model.path
    if not path:
        print_title("Supervised start: updates on worked solutions")
        path = str(sft.run(config, folder / "bootstrap", stop, is_start=True))
        print_title("Reward model")
    return given.run(REWARD_MODEL, config, folder, stop, model_path=path)


def new_policy(config: ConfigDict) -> Policy:
    """The new model of `model.path` "", with a scalar head, as a check of the config plans it."""
    made = sft.SFT.new_policy(config)
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, head="scalar"))
    return lora.adapted_policy(made, config)


# --- The data -------------------------------------------------------------------------------------


def read(config: ConfigDict, policy: Policy, now: datetime, evaluates: bool) -> Data:
    """The pairs of the config's dataset, or those that its task writes."""
    if config.data.task:
        return _of_task(config, policy, now, evaluates)
    where = config, policy, "reward_model", "pair", now
    data, held_out = given.rows(*where), given.held_out(*where) if evaluates else []

    def draw(number: int, place: Place) -> tuple[list[Row], Place]:
        pairs, place = data.draw(number, place)
        return _rows(pairs, policy), place

    rows = _rows(data.rows, policy)
    return dataclasses.replace(data, draw=draw, rows=rows, held_out=_rows(held_out, policy))


def _of_task(config: ConfigDict, policy: Policy, now: datetime, evaluates: bool) -> Data:
    def part(name: str, most: int | None = None) -> list[Pair]:
        written = examples.preferences_of_task(config, "pair", name)[:most]
        return examples.encode(config, policy, "reward_model", "pair", written, now).examples

    train, held_out, most = part("train"), [], config.evaluation.num_problems
    if evaluates and most:
        held_out = _rows(part("held_out", most), policy)
    rows = _rows(train, policy)

    def draw(number: int, place: Place) -> tuple[list[Row], Place]:
        batch = config.reward_model.batch
        index = prompts_lib.prompt_indices(config.seed, number, len(rows), batch)
        return [rows[i] for i in index], place

    return Data(draw, len(rows), inputs.of_examples(train), held_out, rows=rows)


def _rows(pairs: Sequence[Pair], policy: Policy) -> list[Row]:
    return [_row(pair, policy.pad_id) for pair in pairs]


def _row(pair: Pair, pad_id: int | None) -> Row:
    whole = lambda ids: scalars.without_end([*pair.prompt_ids, *ids], pad_id)  # noqa: E731
    return Row(pair, (whole(pair.chosen_ids), whole(pair.rejected_ids)))


# --- A step ---------------------------------------------------------------------------------------


def rollouts(rows: Sequence[Row], shards: int, config: ConfigDict) -> Rollouts:
    """The pairs as groups of two, with fillers so that groups split over shards."""
    limits = config.data.max_prompt_tokens, config.reward_model.max_tokens + 1
    return scalars.as_rollouts([row.texts for row in rows], None, shards, limits)


def experience(run: Run, state: RunState, rows: list[Row], completions: Rollouts) -> Experience:
    """The experience of a step; the margin of a pair is the signal of the chosen one."""
    signal_PG = np.zeros(completions.length_PG.shape, np.float32)
    signal_PG[: len(rows), 0] = [row.pair.margin for row in rows]
    return given.experience(run, state, completions, signal_PG)


def _samples(rows: list[Row], run: Run) -> list[dict[str, Any]]:
    """A few completions, as rows of the samples table."""
    decode, most = run.policy.tokenizer.decode, run.config.logging.num_samples
    return [
        {
            "prompt": decode(row.pair.prompt_ids),
            "columns": {"preference": name},
            "completion": decode(ids),
            "rewards": {},
            "extras": {},
            "length": len(ids),
        }
        for row in rows[:most]
        for name, ids in (("chosen", row.pair.chosen_ids), ("rejected", row.pair.rejected_ids))
    ][:most]


# --- Held-out data --------------------------------------------------------------------------------


def rewards(
    run: Run, state: RunState, rows: Sequence[Row], alive: Callable[[], None]
) -> np.ndarray:
    """The rewards of pairs, float32 [pairs, 2], chosen and rejected."""
    batch, found = run.config.reward_model.batch, []
    shards = given.num_shards(run)
    groups = -(-batch // shards) * shards  # batches of one size share their programs
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        laid_out = rollouts(some, groups, run.config)
        on_device = rollout.device_rows(run, laid_out)
        weights = run.weights(state.train)
        scored = run.measuring.log_probs(None, None, on_device, weights)
        value_PGC = scored.in_order(scored.value_PGC)
        place_PGC = laid_out.chosen_PGC[..., : value_PGC.shape[-1]]
        found.append(np.where(place_PGC, value_PGC, 0).sum(-1, dtype=np.float32)[: len(some)])
        alive()
    return np.concatenate(found)


def measure(
    run: Run, state: RunState, rows: Sequence[Row], alive: Callable[[], None]
) -> dict[str, float]:
    """The loss and its metrics on held-out pairs; the first process writes their rewards.

    After the last step it also draws how well the probabilities hold.
    """
    reward_N2 = rewards(run, state, rows, alive)
    chosen_N, rejected_N = reward_N2.T.astype(np.float64)
    margin_N = np.array([row.pair.margin for row in rows])
    difference_N = chosen_N - rejected_N
    loss_N = bradley_terry(chosen_N, rejected_N, margin_N, run.config.reward_model.centre_coef)
    if processes.is_first():
        _write(run, state.step, reward_N2)
        if state.step == run.course.num_steps:
            calibration.draw(difference_N, run.folder / PICTURE)
    return {
        "reward_model/eval_loss": float(np.mean(loss_N)),
        "reward_model/eval_accuracy": float((difference_N > 0).mean()),
        "reward_model/eval_margin": float(difference_N.mean()),
        "reward_model/eval_mean": float(reward_N2.mean()),
        "reward_model/eval_std": float(reward_N2.std()),
        "reward_model/eval_calibration_error": calibration.bins(difference_N).error,
    }


def _write(run: Run, step: int, reward_N2: np.ndarray) -> None:
    """Writes the rewards of the held-out pairs, in their order."""
    folder = run.folder / "evaluations"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"chosen": float(a), "rejected": float(b)}) for a, b in reward_N2]
    write_whole(folder / f"step_{step:06d}_pairs.jsonl", "\n".join(lines) + "\n")


REWARD_MODEL = Given(
    name="reward_model",
    section="reward_model",
    step="step",
    loss=BradleyTerryLoss.metric,
    phase="reward_model",
    read=read,
    rollouts=rollouts,
    component=lambda config: BradleyTerryLoss(config.reward_model.centre_coef),
    row_of=lambda prompt, completions: _row(Pair(prompt, *completions), None),
    samples=_samples,
    experience=experience,
    measure=measure,
    held_out_loss="reward_model/eval_loss",
    group=2,
    head="scalar",
)
