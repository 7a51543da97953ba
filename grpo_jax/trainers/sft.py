"""Supervised training on worked solutions, the usual start before reinforcement learning.

It trains the config's model or a new one on a task's demonstrations, or on a dataset with `prompt`
and `completion`. It uses the loop of `grpo.py`, but the completions of a step are given. The loss
is the mean cross-entropy of their tokens, stop token included. `grpo_jax.train` runs it first when
`model.path` is empty.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import derived, guard_rules, rules
from grpo_jax.config.dotted import flatten
from grpo_jax.data import problems as problems_lib
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.data import streams, tasks
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import Encoded
from grpo_jax.devices import sharding, transfer
from grpo_jax.devices.phases import phase
from grpo_jax.environments.questions import Questions
from grpo_jax.messages.console import say
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.registry import Reward
from grpo_jax.run import claim, workdir
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.run.stop import PATIENCE_S, Stopped, StopSignal
from grpo_jax.setup import inputs, lora, model
from grpo_jax.setup.data import answerable, encode, load_problems, questions
from grpo_jax.setup.engine import make_engine, make_evaluator
from grpo_jax.setup.learner import make_supervised_learner
from grpo_jax.setup.rewards import load_rewards, start_rewards
from grpo_jax.setup.run_folder import open_for
from grpo_jax.structs import Rollouts, pad_rows
from grpo_jax.trainers import exporting, grpo, model_card, restarts, rollout
from grpo_jax.trainers.monitor import Monitor
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Course, Run


class Demonstration(NamedTuple):
    """A completion to imitate, which ends with the stop token, and its prompt."""

    prompt_ids: list[int]
    completion_ids: list[int]


Demonstrations = Callable[[int], list[Demonstration]]
"""Those of a draw, by its number; they follow from that and the config's seed."""

Solution = Callable[[Problem, np.random.Generator], str]


def run(
    config: ConfigDict, folder: Path, stop: StopSignal | None = None, *, is_start: bool = False
) -> Path:
    """Trains, or continues the training in `folder`; returns the exported Hugging Face folder.

    `stop`: the caller's stop signal; None: the training installs its own. `is_start`: a later run
    evaluates the model. Raises ValueError for a user's mistake, `guards.Diverged` if a guard ends
    the training, and `stop.Stopped` after a requested stop has saved.
    """
    if config.lora.rank and not config.model.path and not is_start:
        raise ValueError(
            f"lora.rank = {config.lora.rank} trains adapters beside a model's weights, and "
            'model.path = "" makes a new model, whose weights say nothing yet. Set model.path, or '
            "lora.rank = 0."
        )
    began = time.monotonic()
    with claim.held(), stop or StopSignal(config.checkpoint.save_before_s) as stop:
        with phase("start"), stop.nothing_to_lose():
            open_for(config, folder)
            made, demonstrations = _build(config, folder, evaluates=not is_start)
            if made is None:
                return folder / "export"
        gather = functools.partial(_gather, demonstrations)
        train = functools.partial(grpo.train, gather=gather)
        try:
            return restarts.carry_out(made, stop, began, train, _finish)
        finally:
            if made.rewards is not None:
                made.rewards.close()


def _gather(demonstrations: Demonstrations, run: Run, state: RunState, monitor: Monitor) -> None:
    """Sets the state's experience to the demonstrations of its step."""
    rows = demonstrations(state.draw_of(state.step))
    monitor.given(state, lambda: _as_samples(rows, run))
    shards = sharding.num_row_shards(run.mesh)
    given = rollout.device_rows(run, _as_rollouts(rows, shards, run.config))
    no_reward = transfer.shard_rows(run.mesh, np.zeros(given.length_PG.shape, np.float32))
    log_probs = run.prepare.log_probs(run.weights(state.train), None, given)  # none are needed
    state.experience = run.prepare(log_probs, no_reward)


def _as_rollouts(rows: list[Demonstration], shards: int, config: ConfigDict) -> Rollouts:
    """Demonstrations as completions without prompts; only the answers' tokens are trained on.

    So the learner's rows hold them one after the other, whatever their lengths. Each shard has one
    group; groups have about equally many tokens. Filler completions of the last groups are not
    trained on.
    """
    rows = rows + [Demonstration([0], [])] * (-len(rows) % shards)
    longest_first = sorted(rows, key=lambda row: -len(row.prompt_ids) - len(row.completion_ids))
    turns = [longest_first[i : i + shards] for i in range(0, len(rows), shards)]
    groups = zip(*(turn if i % 2 == 0 else turn[::-1] for i, turn in enumerate(turns)))
    rows = [row for group in groups for row in group]
    limit = config.data.max_prompt_tokens + config.sft.max_tokens
    text_BC, length_B = pad_rows([row.prompt_ids + row.completion_ids for row in rows], limit)
    given_B = np.array([len(row.prompt_ids) for row in rows])
    place_C = np.arange(limit)
    chosen_BC = (given_B[:, None] <= place_C) & (place_C < length_B[:, None])
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


def _as_samples(rows: list[Demonstration], run: Run) -> list[dict[str, Any]]:
    """A few demonstrations, as rows of the samples table."""
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


def _finish(run: Run, state: RunState, stop: StopSignal, wall_s: float) -> Path:
    """Exports the model."""
    run.checkpoints.close()
    export = run.folder / "export"
    with stop.nothing_to_lose(PATIENCE_S):
        claim.check()
        dtype = run.config.checkpoint.export_dtype
        exporting.export(run.policy, export, state.train, dtype, run.frozen)
        workdir.note_export(export, step=state.step, updates=int(state.train.num_updates))
        given = flatten(run.config)
        model_card.write(export, run.policy, given, step=state.step, method="sft")
        if stop.asked():  # a later run is asked to stop, too
            raise Stopped(
                f"Stopped by {stop.name} at {run.course.step} {state.step}; all is saved in "
                f"{run.folder}. The same command continues the run."
            )
    return export


# --- What the run is made of ----------------------------------------------------------------------


def _build(
    config: ConfigDict, folder: Path, *, evaluates: bool
) -> tuple[Run | None, Demonstrations]:
    """The run, read and checked; None if the folder already has its export."""
    mesh = sharding.make_mesh(**config.mesh)
    now = inputs.date(config.data.date, folder)
    task = tasks.load(config.data.task) if config.data.task else None
    if config.model.path:
        policy = policy_lib.read(config.model.path, kept=folder / "source")
        policy = policy.within(derived.longest_row(config))
        policy = lora.adapted_policy(policy, config, folder / lora.KEPT)
    else:
        policy = model.new(config.model, task.make_tokenizer())
    rules.check_heads(policy.model.num_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    problems, solution = _solved(config, task)
    encoded = encode(problems, policy, config, "training problems", now)
    policy.check_length(encoded.prompt_ids, config.sft.max_tokens, "sft.max_tokens")
    sums = {
        "training problems": inputs.of_problems(encoded.problems, encoded.prompt_ids),
        "model": inputs.of_model(policy),
    } | inputs.of_adapter(config.lora.path)
    inputs.hold(folder, sums, config.checkpoint.accept_changes)
    demonstrations = functools.partial(_demonstrations, config, policy, encoded, solution)
    if (folder / "export" / "config.json").exists():
        return None, demonstrations
    policy = policy_lib.keep(policy, folder / "source")
    lora.keep(config, folder)
    course = _course(config, len(encoded.problems))
    learner = make_supervised_learner(config, policy.model, mesh, course.num_steps)
    held_out, rewards = _held_out(config, policy, now) if evaluates else (None, [])
    engine = None
    if held_out:
        engine = make_engine(config, policy.model, policy.stop_ids, mesh)
    return Run(
        config=config,
        course=course,
        folder=folder,
        mesh=mesh,
        policy=policy,
        train=Questions(encoded.problems, encoded.prompt_ids, []),
        held_out=held_out,
        engine=None,
        evaluator=None if engine is None else make_evaluator(config, engine),
        optimizer=learner.optimizer,
        learning_rate=learner.learning_rate,
        prepare=learner.prepare,
        update=learner.update,
        sizes=learner.sizes,
        frozen=lora.frozen_params(policy, mesh, config.model.dtype),
        checkpoints=Checkpoints(
            config.checkpoint.folder or folder / "checkpoints",
            keep=2,
            max_failed=config.checkpoint.max_failed,
            on_saved=functools.partial(workdir.note_saved, folder),
            due_every=guard_rules.may_roll_back(config) * course.save_every,
        ),
        read=sums,
        rewards=start_rewards(config, rewards) if held_out else None,  # last: no more checks follow
    ), demonstrations


def _course(config: ConfigDict, num_solutions: int) -> Course:
    """The schedule of the training, for a number of worked solutions."""
    num_steps = derived.num_supervised_steps(config, num_solutions)
    if config.sft.num_epochs:
        say(f"{config.sft.num_epochs:g} epochs are {num_steps} updates of {config.sft.batch}.")
    return Course(
        num_steps=num_steps,
        prompts=config.sft.batch,
        save_every=config.sft.checkpoint_every_steps,
        # Only those of the first step: given completions do not change.
        samples_every=num_steps if config.logging.samples_every_steps else 0,
        step="supervised step",
        bar="sft",
        shown_every=100,
        update_phase="sft",
        loss="sft/loss",
        learning_rate="sft.learning_rate",
    )


def _solved(config: ConfigDict, task: Any) -> tuple[list[Problem], Solution]:
    """The problems with a completion to imitate, and the function that returns it."""
    if task:
        problems, _ = task.generate(config.data.num_train, config.data.num_eval, config.seed)
        return problems, task.worked_solution
    problems = [_with_completion(problem) for problem in problems_lib.load_train(config.data)]
    return problems, lambda problem, rng: problem.columns["completion"]


def _with_completion(problem: Problem) -> Problem:
    """A problem whose column `completion` is a text.

    The column may be a list of one message of an assistant. Without the column, the prompt's last
    message is taken, if it is an assistant's.
    """
    completion, prompt = problem.columns.get("completion"), problem.prompt
    if isinstance(completion, str):
        return problem
    if completion is None and isinstance(prompt, list) and len(prompt) > 1:
        prompt, completion = prompt[:-1], prompt[-1:]
    if _is_answer(completion):
        columns = problem.columns | {"completion": completion[0]["content"]}
        return dataclasses.replace(problem, prompt=prompt, columns=columns)
    raise ValueError(
        f"data.path: {problem.where} has no text as column `completion` to train on, and no "
        "message of an assistant at the end; it has prompt, "
        f"{', '.join(problem.columns)}. data.columns can rename one, such as completion=solution."
    )


def _is_answer(messages: Any) -> bool:
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        return False
    return messages[0].get("role") == "assistant" and isinstance(messages[0].get("content"), str)


def _demonstrations(
    config: ConfigDict, policy: Policy, encoded: Encoded, solution: Solution, draw: int
) -> list[Demonstration]:
    """The demonstrations of a draw."""
    stop = policy.tokenizer.eos_token_id
    stop = policy.stop_ids[0] if stop is None else stop
    problems, limit = encoded.problems, config.sft.max_tokens
    index = prompts_lib.prompt_indices(config.seed, draw, len(problems), config.sft.batch)
    rng = streams.stream(config.seed, "solutions", draw)
    texts = [solution(problems[i], rng) for i in index]
    rows = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    for i, ids in zip(index, rows):
        policy.refuse_unknown(ids, f"The worked solution of {problems[i].where}")
        if len(ids) >= limit:
            raise ValueError(
                f"sft.max_tokens = {limit}, but the worked solution of {problems[i].where} has "
                f"{len(ids) + 1} tokens with its stop token. Raise the limit."
            )
    return [Demonstration(encoded.prompt_ids[i], [*ids, stop]) for i, ids in zip(index, rows)]


def _held_out(
    config: ConfigDict, policy: Policy, now: datetime
) -> tuple[Questions | None, list[Reward]]:
    """The held-out problems that the rewards can score, or None; and the rewards."""
    rewards = load_rewards(config)
    problems = load_problems(config)[1][: config.evaluation.num_problems]
    try:
        problems = answerable(config, rewards, problems)
    except ValueError as error:
        say(f"warning: The model is not evaluated: {error}")
        return None, rewards
    if not problems:
        return None, rewards
    return questions(problems, policy, config, "held-out problems", now), rewards
