"""The completions of a step: sampling, keeping them on the host until the updates, showing them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_jax import keys
from grpo_jax.config import derived
from grpo_jax.devices import transfer
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.rewarding import RewardCollector
from grpo_jax.environments.single_turn import GivenUp, Rollout
from grpo_jax.learner import scoring
from grpo_jax.messages import console
from grpo_jax.messages.console import cut_middle
from grpo_jax.metrics import writers as writers_lib
from grpo_jax.metrics.samples import print_samples
from grpo_jax.rewards import registry
from grpo_jax.rewards import scores as scores_lib
from grpo_jax.rewards.scores import Scores
from grpo_jax.sampling.early_stop import FirstGroups
from grpo_jax.structs import Array, Params, Rollouts
from grpo_jax.trainers import prompt_choice
from grpo_jax.trainers.listeners import Listeners
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run
from grpo_jax.trainers.step_metrics import StepLog

_MAX_COLUMN_CHARS = 400  # of a problem's column, shown with a sample
# What rollouts have for each token, if they have it
_BY_TOKEN = "completion_PGC", "logp_PGC", "chosen_PGC", "given_PGC", "begin_PGC"


def sample(
    run: Run, state: RunState, log: StepLog, on_harvest: Callable[[], None], *, ahead: int = 0
) -> Rollout:
    """Samples the completions of a step: the state's step plus `ahead`.

    Once the device is busy, it writes the open metrics line. `on_harvest` is called whenever some
    completions have finished, on all processes alike.
    """
    started, step = time.monotonic(), state.step + ahead
    weights = run.engine.publish(run.weights(state.train))
    drawn = draw(run, state, step, state.draw_of(step), weights, log, on_harvest)
    return dataclasses.replace(drawn, seconds=time.monotonic() - max(started, log.closed_at))


def draw(
    run: Run,
    state: RunState,
    step: int,
    number: int,
    weights: Params,
    log: StepLog,
    on_harvest: Callable[[], None],
) -> Rollout:
    """Samples the completions of one draw for a step, as `sample`; its time is not set.

    `number` is that of the draw, and `weights` come from `engine.publish`.
    """
    config, problem_P = run.config, prompt_choice.problems(run, state, number)
    questions, rewards = _begin(run, step, number, problem_P)
    given = run.demonstrations.of(problem_P, step, number, questions.prompt_ids)
    first = None
    if config.prompts.oversample > 1:
        group, wanted = config.batch.group, derived.prompts_per_draw(config)
        first = FirstGroups(wanted, len(problem_P), group)
    completions, told = run.drawing.draw(
        run.engine,
        weights,
        questions,
        given.prompt_ids,
        given.to(rewards.add),
        group=config.batch.group,
        key=keys.key_for(config.seed, "rollout", number),
        temperature=config.rollout.temperature,
        numbers=problem_P,
        draw=number,
        first=first,
        meanwhile=log.close,
        on_harvest=on_harvest,
    )
    drawn = Rollout(questions, rewards, given.joined(completions), 0.0, problem_P=problem_P)
    if first is not None:
        drawn = _finished(run, drawn, first)
    greedy = _sample_greedy(run, step, number, drawn.problem_P, weights, on_harvest)
    drawn = dataclasses.replace(drawn, greedy=greedy)
    return drawn if told is None else dataclasses.replace(drawn, told=(told,))


def _finished(run: Run, drawn: Rollout, first: FirstGroups) -> Rollout:
    """The part of a draw that `first` keeps."""
    kept_P, whole = np.array(first.kept), drawn.completions
    left_N = np.setdiff1d(np.arange(len(first.length_PG)), kept_P)
    drawn.rewards.keep(first.kept)
    return dataclasses.replace(
        drawn,
        questions=drawn.questions.take(kept_P),
        completions=of_groups(run, [whole], kept_P),
        problem_P=np.asarray(drawn.problem_P)[kept_P],
        given_up=GivenUp(whole.prompt_length_P[left_N], first.length_PG[left_N]),
    )


def of_groups(run: Run, drawn: list[Rollouts], chosen_P: np.ndarray) -> Rollouts:
    """Some groups of several draws, whose prompts may be padded differently.

    `chosen_P`: their numbers when the draws follow each other.
    """
    width = max(x.prompt_PQ.shape[1] for x in drawn)
    padded = [np.pad(x.prompt_PQ, ((0, 0), (0, width - x.prompt_PQ.shape[1]))) for x in drawn]
    pick = lambda xs: np.concatenate(xs)[chosen_P]  # noqa: E731
    length_P = pick([x.prompt_length_P for x in drawn])
    has = [name for name in _BY_TOKEN if getattr(drawn[0], name) is not None]
    by_token = transfer.select_rows(
        run.mesh, [tuple(getattr(x, name) for name in has) for x in drawn], chosen_P
    )
    return Rollouts(
        prompt_PQ=pick(padded)[:, : run.engine.padded(int(length_P.max()))],
        prompt_length_P=length_P,
        length_PG=pick([x.length_PG for x in drawn]),
        stopped_PG=pick([x.stopped_PG for x in drawn]),
        **dict(zip(has, by_token)),
    )


def _sample_greedy(
    run: Run,
    step: int,
    number: int,
    problem_P: Sequence[int],
    weights: Params,
    on_harvest: Callable[[], None],
) -> RewardCollector | None:
    """Samples one greedy completion of each prompt of a draw, if the advantages read its reward."""
    if run.config.algorithm.baseline != "greedy":
        return None
    questions, rewards = _begin(run, step, number, problem_P, group=1)
    run.drawing.draw(
        run.engine,
        weights,
        questions,
        questions.prompt_ids,
        rewards.add,
        group=1,
        key=keys.key_for(run.config.seed, "rollout", number),  # draws nothing
        temperature=0.0,
        numbers=problem_P,
        draw=number,
        on_harvest=on_harvest,
    )
    return rewards


def sampled_before(run: Run, state: RunState, completions: Rollouts) -> Rollout:
    """A rollout of completions from a checkpoint, passed to the rewards as if just sampled.

    Greedy completions are sampled again: the weights are those that they were sampled with.
    """
    problem_P, step = np.array(state.next_problems, np.int64), state.sampled
    number = state.draw_of(step)
    questions, rewards = _begin(run, step, number, problem_P)
    for p, (completion_GC, length_G) in enumerate(
        zip(completions.completion_PGC, completions.length_PG)
    ):
        rewards.add(p, [ids[:n].tolist() for ids, n in zip(completion_GC, length_G)])
    greedy = None
    if run.config.algorithm.baseline == "greedy":
        weights = run.engine.publish(run.weights(state.train))
        greedy = _sample_greedy(run, step, number, problem_P, weights, lambda: None)
    sampled = Rollout(questions, rewards, completions, state.next_rollout_s, greedy, problem_P)
    if not state.next_given_up:
        return sampled
    given_up = GivenUp(*(np.array(x, np.int32) for x in state.next_given_up))
    return dataclasses.replace(sampled, given_up=given_up)


def device_rows(run: Run, completions: Rollouts) -> Rollouts:
    """The completions on the device, cut to about the longest."""
    return transfer.shard_rows(run.mesh, cut(completions))


def cut_length(completions: Rollouts) -> int:
    """The tokens to which `cut` cuts."""
    limit = completions.completion_PGC.shape[-1]
    return scoring.cut_to(limit, int(completions.length_PG.max()))


def cut(completions: Rollouts) -> Rollouts:
    """The completions, on the host, cut to about the longest."""
    longest = cut_length(completions)
    by_token = {name: getattr(completions, name) for name in _BY_TOKEN}
    shorter = {name: x[..., :longest] for name, x in by_token.items() if x is not None}
    return completions.replace(**shorter)


def device_rewards(
    run: Run, sampled: Rollout, scores: Scores, greedy: Scores | None
) -> tuple[Array, Array | None, Array | None]:
    """The step's rewards on the device, as `Prepare` takes them: `reward`, `greedy` and `known_PG`.

    `greedy`: of greedy completions; None: none were sampled.
    """

    def of(scores: Scores) -> np.ndarray:
        if run.config.algorithm.aggregate == "sum":
            return scores.reward_B
        return scores_lib.by_function(run.rewards.rewards, scores)

    reward, shape, known_PG = of(scores), sampled.completions.length_PG.shape, None
    reward = reward.reshape(*shape, *reward.shape[1:])
    if scores.unknown_B.any():
        known_PG = ~scores.unknown_B.reshape(shape)
    given = reward, None if greedy is None else of(greedy), known_PG
    return transfer.shard_rows(run.mesh, given)


def show(
    run: Run,
    writers: writers_lib.Writers,
    listeners: Listeners,
    step: int,
    rollout: Rollout,
    scores: Scores,
    advantage_PG: Callable[[], np.ndarray],
) -> None:
    """Writes and prints completions of the step, if logging.samples_every_steps asks for it."""
    show_rows(run, writers, listeners, step, lambda: _rows(run, rollout, scores, advantage_PG()))


def _rows(
    run: Run, rollout: Rollout, scores: Scores, advantage_PG: np.ndarray
) -> list[dict[str, Any]]:
    """The best and the worst completions of the group with the largest spread of rewards."""
    group = rollout.completions.length_PG.shape[1]
    reward_PG = np.nan_to_num(scores.reward_B, nan=0.0).reshape(-1, group)
    # The group with the largest spread has the most to learn from.
    p = int(reward_PG.std(1).argmax())
    texts = rollout.rewards.texts([p])
    best_first = np.argsort(-reward_PG[p], kind="stable")
    num_best = -(-run.config.logging.num_samples // 2)
    num_worst = min(run.config.logging.num_samples - num_best, group - num_best)
    read = registry.columns_read(run.rewards.rewards, rollout.questions.problems[p].columns)
    columns = {name: cut_middle(str(value), _MAX_COLUMN_CHARS) for name, value in read.items()}
    rows = []
    for g in [*best_first[:num_best], *best_first[group - max(num_worst, 0) :]]:
        row = p * group + g
        by_name = {n: float(v[row]) for n, v in scores.by_name.items()}
        rows.append(
            {
                "prompt": _prompt(run, rollout, p),
                "columns": columns,
                "completion": texts[g],
                "rewards": {n: None if np.isnan(v) else v for n, v in by_name.items()},
                "extras": {n: v[row] for n, v in scores.extras.items()},
                "advantage": _of_completion(rollout, advantage_PG, p, g),
                "length": int(rollout.completions.length_PG[p, g]),
            }
        )
    return rows


def _prompt(run: Run, rollout: Rollout, p: int) -> str:
    """The text of a prompt, with what its environment said at its reset."""
    if not rollout.told:
        return rollout.questions.texts[p]
    n = int(rollout.completions.prompt_length_P[p])
    return run.policy.tokenizer.decode(rollout.completions.prompt_PQ[p, :n].tolist())


def _of_completion(rollout: Rollout, advantage: np.ndarray, p: int, g: int) -> float:
    """The advantage of a completion; of one with advantages of tokens, their mean."""
    length = int(rollout.completions.length_PG[p, g])
    return float(advantage[p, g] if advantage.ndim == 2 else advantage[p, g, :length].mean())


def show_rows(
    run: Run,
    writers: writers_lib.Writers,
    listeners: Listeners,
    step: int,
    rows: Callable[[], list[dict[str, Any]]],
) -> None:
    """Writes and prints `rows()`, in the form of `writers.samples`, if asked for.

    Listeners get them at each step.
    """
    is_shown = _is_shown(run, step)
    made = rows() if is_shown or listeners else []
    listeners.sampled(step, made)
    if is_shown:
        writers.samples(step, made)
        if console.is_full():
            print_samples(f"Completions of {run.course.step} {step}", made)


def _is_shown(run: Run, step: int) -> bool:
    every = run.course.samples_every
    return bool(every) and (step - 1) % every == 0


def _begin(
    run: Run, step: int, number: int, problem_P: Sequence[int], group: int | None = None
) -> tuple[Questions, RewardCollector]:
    """The questions of a step's draw, and the collector of the rewards of `group` completions each.

    None: as many as a group has, given ones too.
    """
    questions, asked = run.train.take(problem_P), derived.prompts_begun(run.config)
    seen = {
        "global_step": step,
        "max_steps": run.course.num_steps,
        "epoch": number * asked / (len(run.train.problems) * run.config.data.repeat),
    }
    group = group or derived.completions_per_prompt(run.config)
    rewards = RewardCollector(
        run.rewards, run.policy, questions.problems, questions.texts, group, seen
    )
    return questions, rewards
