"""Supervised training: the row `SFT` of `given.py`.

It trains the config's model or a new one on a task's worked solutions, or on a dataset of texts,
chats, or prompts with completions (`data/examples.py`). The completions of a step are given. The
loss is the mean cross-entropy of the tokens that are trained on, stop token included, or that of
DFT. `grpo_jax.train` runs it first when `model.path` is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.algorithm.components import NLLLoss
from grpo_jax.config.derived import has_environment
from grpo_jax.data import problems as problems_lib
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.data import streams, tasks
from grpo_jax.data.examples import Example
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import Encoded
from grpo_jax.data.tasks import Piece
from grpo_jax.environments.questions import Questions
from grpo_jax.messages.console import say
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.registry import Reward
from grpo_jax.run.stop import StopSignal
from grpo_jax.setup import inputs, model
from grpo_jax.setup.data import answerable, encode, questions
from grpo_jax.setup.rewards import load_rewards, refuse_samples
from grpo_jax.structs import Rollouts, pad_rows
from grpo_jax.trainers import given
from grpo_jax.trainers.given import Data, Given, Place
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run

_FILLER = Example(np.zeros(1, np.int32), np.zeros(0, np.int32))  # is not trained on


def run(
    config: ConfigDict, folder: Path, stop: StopSignal | None = None, *, is_start: bool = False
) -> Path:
    """Trains, or continues the training in `folder`; as `given.run`."""
    return given.run(SFT, config, folder, stop, is_start=is_start)


# --- Data -----------------------------------------------------------------------------------------


def read(config: ConfigDict, policy: Policy, now: datetime, evaluates: bool) -> Data:
    """The worked solutions of the config's task, or the rows of its dataset."""
    if config.data.task:
        return _of_task(config, policy, now, evaluates)
    data = given.rows(config, policy, "sft", "example", now)
    held_out: list[Example] = []
    problems, rewards = None, []
    if evaluates:
        held_out = given.held_out(config, policy, "sft", "example", now)
        problems, rewards = held_out_problems(config, policy, now, bool(held_out))
    return dataclasses.replace(data, held_out=held_out, problems=problems, rewards=rewards)


def held_out_problems(
    config: ConfigDict, policy: Policy, now: datetime, has_loss: bool = False
) -> tuple[Questions | None, list[Reward]]:
    """The held-out problems that the rewards can score, or None; and the rewards.

    `has_loss`: there is a loss of held-out rows, so that it needs no warning if there are none.
    Conversations are not held: only training and `evaluate` have their environments.
    """
    if has_environment(config):
        say(
            "Of held-out problems the loss alone is measured, since their answers are "
            "conversations with an environment: python -m grpo_jax.evaluate holds them."
        )
        return None, []
    rewards = load_rewards(config)
    refuse_samples(rewards, config.evaluation.num_samples, "evaluation.num_samples")
    try:
        if config.data.task:
            data = config.data
            task = tasks.load(data.task)
            problems = task.generate(data.num_train, data.num_eval, config.seed)[1]
        else:
            problems = problems_lib.load_held_out(config.data)
        problems = answerable(config, rewards, problems[: config.evaluation.num_problems])
    except ValueError as error:
        told = "Of held-out rows the loss alone is measured" if has_loss else ""
        say(f"{told or 'warning: The model is not evaluated'}: {error}")
        return None, rewards
    if not problems:
        return None, rewards
    return questions(problems, policy, config, "held-out problems", now), rewards


def _of_task(config: ConfigDict, policy: Policy, now: datetime, evaluates: bool) -> Data:
    """The worked solutions of a task; those of a draw are written for it."""
    task = tasks.load(config.data.task)
    problems, further = task.generate(config.data.num_train, config.data.num_eval, config.seed)
    encoded = encode(problems, policy, config, "training problems", now)
    policy.check_length(encoded.prompt_ids, config.sft.max_tokens, "sft.max_tokens")
    held_out: list[Example] = []
    asked, rewards = None, []
    if evaluates:
        most = config.evaluation.num_problems
        kept = encode(further[:most], policy, config, "held-out problems", now)
        rng = streams.stream(config.seed, "held_out")
        index = range(len(kept.problems))
        held_out = _solved(config, policy, task.worked_solution, kept, index, rng)
        asked, rewards = held_out_problems(config, policy, now)

    def draw(number: int, place: Place) -> tuple[list[Example], Place]:
        index = prompts_lib.prompt_indices(
            config.seed, number, len(encoded.problems), config.sft.batch
        )
        rng = streams.stream(config.seed, "solutions", number)
        return _solved(config, policy, task.worked_solution, encoded, index, rng), place

    sums = inputs.of_problems(encoded.problems, encoded.prompt_ids)
    return Data(draw, len(encoded.problems), sums, held_out, asked, rewards)


def _solved(
    config: ConfigDict,
    policy: Policy,
    solution: Callable[[Problem, np.random.Generator], str | list[Piece]],
    encoded: Encoded,
    index: Sequence[int],
    rng: np.random.Generator,
) -> list[Example]:
    """Problems of a task by their numbers, with the worked solutions that `rng` draws.

    What an environment says in one is not trained on.
    """
    stop = policy.tokenizer.eos_token_id
    stop = policy.stop_ids[0] if stop is None else stop
    problems, limit = encoded.problems, config.sft.max_tokens
    drawn = [solution(problems[i], rng) for i in index]
    pieces = [[Piece(s)] if isinstance(s, str) else s for s in drawn]
    texts = [piece.text for some in pieces for piece in some]
    ids_of = iter(policy.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    examples = []
    for i, some in zip(index, pieces):
        parts = [(next(ids_of), piece.is_policy) for piece in some]
        ids = [token for part, _ in parts for token in part]
        policy.refuse_unknown(ids, f"The worked solution of {problems[i].where}")
        if len(ids) >= limit:
            raise ValueError(
                f"sft.max_tokens = {limit}, but the worked solution of {problems[i].where} has "
                f"{len(ids) + 1} tokens with its stop token. Raise the limit."
            )
        chosen = None
        if not all(piece.is_policy for piece in some):
            chosen = np.array([own for part, own in parts for _ in part] + [True])
        asked = np.array(encoded.prompt_ids[i], np.int32)
        examples.append(Example(asked, np.array([*ids, stop], np.int32), chosen))
    return examples


# --- Steps ----------------------------------------------------------------------------------------


def rollouts(rows: list[Example], shards: int, config: ConfigDict) -> Rollouts:
    """Examples as completions without prompts; only what is `chosen` of them is trained on.

    So the learner's rows hold them one after the other, whatever their lengths. Each shard has one
    group; groups have about equally many tokens. Filler completions of the last groups are not
    trained on.
    """
    rows = rows + [_FILLER] * (-len(rows) % shards)
    longest_first = sorted(rows, key=lambda row: -len(row.prompt_ids) - len(row.completion_ids))
    turns = [longest_first[i : i + shards] for i in range(0, len(rows), shards)]
    groups = zip(*(turn if i % 2 == 0 else turn[::-1] for i, turn in enumerate(turns)))
    rows = [row for group in groups for row in group]
    limit = config.data.max_prompt_tokens + config.sft.max_tokens
    whole = [np.concatenate([row.prompt_ids, row.completion_ids]) for row in rows]
    text_BC, length_B = pad_rows(whole, limit)
    given_B = np.array([len(row.prompt_ids) for row in rows])
    place_C = np.arange(limit)
    chosen_BC = (given_B[:, None] <= place_C) & (place_C < length_B[:, None])
    for i, row in enumerate(rows):
        if row.chosen is not None:
            chosen_BC[i, given_B[i] : length_B[i]] &= row.chosen
    by_group = lambda x: x.reshape(shards, -1, *x.shape[1:])  # noqa: E731
    return Rollouts(
        prompt_PQ=np.zeros((shards, 0), np.int32),
        prompt_length_P=np.zeros(shards, np.int32),
        completion_PGC=by_group(text_BC),
        logp_PGC=by_group(np.zeros(text_BC.shape, np.float32)),
        length_PG=by_group(length_B),
        stopped_PG=by_group(np.ones(length_B.shape, bool)),
        chosen_PGC=by_group(chosen_BC),
    )


def _samples(rows: list[Example], run: Run) -> list[dict[str, Any]]:
    """A few examples, as rows of the samples table."""
    return [
        {
            "prompt": run.policy.tokenizer.decode(row.prompt_ids),
            "completion": run.policy.tokenizer.decode(row.completion_ids),
            "rewards": {},
            "extras": {},
            "length": len(row.completion_ids),
        }
        for row in rows[: run.config.logging.num_samples]
    ]


def _measure(
    run: Run, state: RunState, rows: Sequence[Example], alive: Callable[[], None]
) -> dict[str, float]:
    """The mean cross-entropy of the tokens of held-out examples that would be trained on."""
    batch, total, count = run.config.sft.batch, 0.0, 0
    for first in range(0, len(rows), batch):
        some = list(rows[first : first + batch])
        some += [_FILLER] * (batch - len(some))  # batches of one size share their programs
        laid_out = rollouts(some, given.num_shards(run), run.config)
        logp_PGC, _ = given.log_probs(run, state, laid_out)
        chosen_PGC = laid_out.chosen_PGC[..., : logp_PGC.shape[-1]]
        total -= float(logp_PGC[chosen_PGC].sum(dtype=np.float64))
        count += int(chosen_PGC.sum())
        alive()
    return {"sft/eval_loss": total / count}


SFT = Given(
    name="sft",
    section="sft",
    step="supervised step",
    loss=NLLLoss.metric,
    phase="sft",
    read=read,
    rollouts=rollouts,
    component=lambda config: NLLLoss(config.sft.loss, config.logging.token_metrics),
    row_of=lambda prompt, completions: Example(prompt, *completions),
    samples=_samples,
    experience=lambda run, state, rows, completions: given.experience(run, state, completions),
    measure=_measure,
    held_out_loss="sft/eval_loss",
    new_policy=model.new_policy,
)
