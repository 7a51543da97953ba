"""Dynamic sampling: prompts are drawn until every group of the batch has a gradient.

Yu et al. 2025, "DAPO", arXiv:2503.14476, section 3.2: a group whose rewards are all equal has
advantages of 0, so it only makes the batch smaller. Such groups are dropped, and further draws of
`prompts.per_draw` prompts follow until `batch.prompts` other groups are there. The first ones are
learned from, in the order of the draws; those left over are dropped too, since the policy changes
before the next step.

A step's draws follow from the run's state before it: `RunState.draw_of` counts them. So a run that
was stopped between two draws of a step samples the step again, with the same result.
"""

from __future__ import annotations

import time

import numpy as np

from grpo_jax.devices import transfer
from grpo_jax.devices.phases import phase
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.rewarding import SelectedRewards
from grpo_jax.environments.single_turn import Draws, Rollout
from grpo_jax.rewards import groups
from grpo_jax.rewards import scores as scores_lib
from grpo_jax.rewards.scores import Scores
from grpo_jax.structs import Rollouts
from grpo_jax.trainers import rollout
from grpo_jax.trainers.guards import TooFewGroups
from grpo_jax.trainers.monitor import Monitor
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run


def sample(run: Run, state: RunState, monitor: Monitor) -> Rollout:
    """Samples the state's next step in as many draws as its batch needs.

    Raises TooFewGroups if prompts.max_draws are not enough and prompts.if_short is "stop".
    """
    began, config = time.monotonic(), run.config
    weights = run.engine.publish(run.weights(state.train))
    drawn: list[Rollout] = []
    scores: list[Scores] = []
    has_N = np.zeros(0, bool)  # whether each group so far has a gradient
    while has_N.sum() < config.batch.prompts and len(drawn) < config.prompts.max_draws:
        number = state.draw_of(state.step) + len(drawn)
        drawn.append(
            rollout.draw(run, state, state.step, number, weights, monitor.log, monitor.alive)
        )
        with phase("rewards"):
            scores.append(drawn[-1].rewards.scores())
        monitor.alive()
        has_N = np.append(has_N, _with_gradient(run, drawn[-1], scores[-1]))
    every = [np.arange(len(s.reward_B)) for s in scores]
    draws = Draws(
        number=len(drawn),
        problem_N=np.concatenate([d.problem_P for d in drawn]),
        prompt_length_N=np.concatenate([d.completions.prompt_length_P for d in drawn]),
        length_NG=np.concatenate([d.completions.num_trained_PG for d in drawn]),
        stopped_NG=np.concatenate([d.completions.stopped_PG for d in drawn]),
        scores=scores_lib.select([*zip(scores, every)]),
        num_equal=int((~has_N).sum()),
    )
    chosen = np.flatnonzero(has_N)[: config.batch.prompts]
    if len(chosen) < config.batch.prompts:
        monitor.check_rewards(state, draws.scores)  # failed rewards may be the reason
        if config.prompts.if_short == "stop":
            raise TooFewGroups(_too_few(run, state, draws))
        rest = np.flatnonzero(~has_N)[: config.batch.prompts - len(chosen)]
        chosen = np.sort(np.concatenate([chosen, rest]))
    seconds = time.monotonic() - max(began, monitor.log.closed_at)
    return _selected(run, drawn, scores, draws, chosen, seconds)


def _with_gradient(run: Run, drawn: Rollout, scores: Scores) -> np.ndarray:
    config, stopped_PG = run.config, drawn.completions.stopped_PG
    return groups.with_gradient(
        scores,
        config.batch.group,
        each=config.algorithm.aggregate == "each",
        trained_PG=stopped_PG if config.algorithm.mask_truncated else None,
    )


def _selected(
    run: Run,
    drawn: list[Rollout],
    scores: list[Scores],
    draws: Draws,
    chosen_P: np.ndarray,
    seconds: float,
) -> Rollout:
    """The rollout of the groups with these numbers among all that were drawn."""
    group, size = run.config.batch.group, len(drawn[0].problem_P)
    in_draw = [chosen_P[chosen_P // size == d] - d * size for d in range(len(drawn))]
    rows = [(p_D[:, None] * group + np.arange(group)).ravel() for p_D in in_draw]
    parts = [d.questions.take(p_D) for d, p_D in zip(drawn, in_draw)]
    questions = Questions(
        [x for part in parts for x in part.problems],
        [x for part in parts for x in part.prompt_ids],
        [x for part in parts for x in part.texts],
    )
    return Rollout(
        questions=questions,
        rewards=SelectedRewards(
            [(d.rewards, int(p)) for d, p_D in zip(drawn, in_draw) for p in p_D],
            scores_lib.select([*zip(scores, rows)]),
        ),
        completions=_completions(run, [d.completions for d in drawn], chosen_P),
        seconds=seconds,
        problem_P=draws.problem_N[chosen_P],
        draws=draws,
        told=tuple(told for d in drawn for told in d.told),
    )


def _completions(run: Run, drawn: list[Rollouts], chosen_P: np.ndarray) -> Rollouts:
    """The completions of some groups of several draws, whose prompts may be padded differently."""
    width = max(x.prompt_PQ.shape[1] for x in drawn)
    padded = [np.pad(x.prompt_PQ, ((0, 0), (0, width - x.prompt_PQ.shape[1]))) for x in drawn]
    pick = lambda xs: np.concatenate(xs)[chosen_P]  # noqa: E731
    length_P = pick([x.prompt_length_P for x in drawn])
    has = ["completion_PGC", "logp_PGC"]
    has += [name for name in ("chosen_PGC", "begin_PGC") if getattr(drawn[0], name) is not None]
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


def _too_few(run: Run, state: RunState, draws: Draws) -> str:
    """The message if a step cannot fill its batch."""
    total, reward_B = len(draws.problem_N), draws.scores.reward_B
    wanted = f"batch.prompts = {run.config.batch.prompts} are needed"
    told = "All rewards are unknown."
    if not np.isnan(reward_B).all():
        low, high = np.nanmin(reward_B), np.nanmax(reward_B)
        told = f"Rewards lie between {low:g} and {high:g}, with a mean of {np.nanmean(reward_B):g}."
    return (
        f"Step {state.step + 1}: prompts.max_draws = {draws.number} draws of "
        f"{total // draws.number} prompts gave {total - draws.num_equal} groups whose rewards "
        f"differ, and {wanted}. In the other {draws.num_equal} all rewards are equal, so that they "
        f"teach nothing. {told} Choose problems that the policy solves sometimes, or raise "
        'batch.group or prompts.max_draws, or set prompts.if_short = "fill".'
    )
