"""The algorithm: sample groups of completions, reward them, move the policy to the better ones.

`run` is Group Relative Policy Optimization as a host loop over three calls: the engine samples, the
rewards judge, and a jitted update learns. Everything that a step computes follows from the config,
the step's number and the state before it, so a run that was stopped anywhere continues as if it had
not been.
"""

from __future__ import annotations

import functools
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import claim as claim_lib
from grpo_jax import (
    drawing,
    evaluation,
    hosts,
    keys,
    options,
    position,
    report,
    rules,
    sharding,
    workdir,
)
from grpo_jax import guards as guards_lib
from grpo_jax import lines as lines_lib
from grpo_jax import metrics as metrics_lib
from grpo_jax import parts as parts_lib
from grpo_jax import policy as policy_lib
from grpo_jax import stop as stop_lib
from grpo_jax.algorithm import update as update_lib
from grpo_jax.checkpoints import NotSaved
from grpo_jax.compiling import Compiling
from grpo_jax.drawing import Drawn
from grpo_jax.judge import Complaints
from grpo_jax.lines import Lines
from grpo_jax.parts import Parts
from grpo_jax.phases import Trace, phase
from grpo_jax.planning import fit
from grpo_jax.position import Position
from grpo_jax.rewards import score as score_lib
from grpo_jax.saving import Saver
from grpo_jax.structs import Experience, Rollouts, TrainState
from grpo_jax.watchdog import Watchdog


def run(
    config: ConfigDict,
    folder: Path,
    model_path: str,
    *,
    spent_s: float = 0.0,
    stop: stop_lib.StopSignal | None = None,
) -> dict[str, Any]:
    """Trains the model at `model_path`, or goes on with the run in `folder`; returns its summary.

    `spent_s`: seconds that went into making the model, counted as part of the run. `stop`: as the
    caller hears of it; without, the run listens itself. Raises ValueError for what a user can mend,
    `guards.Diverged` where a guard ends the run, and `stop.Stopped` once the run was asked to stop
    and has saved.
    """
    began = time.monotonic() - spent_s
    with claim_lib.held(), stop or stop_lib.StopSignal(config.checkpoint.save_before_s) as stop:
        with phase("start"), stop.nothing_to_lose():
            parts = parts_lib.build(config, folder, model_path, fit.of_run)
        with parts.rewards:
            return _run(parts, stop, began)


def _run(parts: Parts, stop: stop_lib.StopSignal, began: float) -> dict[str, Any]:
    with phase("start"), stop.nothing_to_lose():
        at = position.newest(parts)
    began -= at.wall_s
    with Compiling() as compiling:
        while True:
            try:
                state = _train(parts, at, stop, compiling, began)
                break
            except guards_lib.RollBack as order:
                metrics_lib.say(f"warning: {order}")
                undone = order.step
            except guards_lib.Diverged:
                parts.checkpoints.close()
                raise
            with phase("start"):  # the state that went wrong has made room
                at = position.roll_back(parts, at, undone)
    with Watchdog(parts.config.loop.stall_limit_s) as watchdog:
        watchdog.phase("The end of the run")
        return _finish(parts, state, at, stop, time.monotonic() - began)


def _train(
    parts: Parts, at: Position, stop: stop_lib.StopSignal, compiling: Compiling, began: float
) -> TrainState:
    """The state after the last step; `at` goes along. Raises `guards.RollBack` beside the rest."""
    config, folder = parts.config, parts.folder
    with phase("start"), stop.nothing_to_lose():
        state, experience, ahead = position.load(parts, at)
    writers = metrics_lib.Writers(
        folder,
        first_step=at.step + (not at.unevaluated) if at.step else 0,
        first_sample_step=at.step + 1 + bool(at.update),  # shown before a rollout's first update
        tensorboard=config.logging.tensorboard,
        wandb_project=config.logging.wandb_project,
        config=options.flatten(config),
        enabled=hosts.is_first(),
    )
    num_steps, updates = config.loop.num_steps, rules.num_updates_per_step(config)
    with (
        closing(writers),
        metrics_lib.Progress(num_steps, first_step=at.step) as bar,
        Watchdog(config.loop.stall_limit_s) as watchdog,
        Trace(folder, config.profile.steps) as trace,
    ):
        alive = functools.partial(_alive, watchdog, stop)
        if at.step == 0:
            if parts.held_out and not at.update and not at.first_evaluation:
                watchdog.phase("The evaluation before the first step")
                with stop.nothing_to_lose():
                    at.first_evaluation = _evaluate(parts, state, at, alive, final=True)
                at.accuracy_before = at.accuracy
                at.held_out_reward_before = at.held_out_reward
            if at.first_evaluation:  # again where the run was stopped in its first step
                writers.scalars(0, at.first_evaluation)
        guards = guards_lib.Guards(config, at.history, parts.checkpoints.folder)
        lines = Lines(parts, at, guards, writers, bar, compiling)
        saver = Saver(parts, at, stop, lines, guards, began)
        end_step = functools.partial(_end_step, parts, at, saver, lines, watchdog, alive)
        complaints = Complaints()
        times: dict[str, float] = {}
        if ahead is not None:
            ahead = drawing.drawn_before(parts, at, ahead)
        if at.unevaluated:
            lines.reopen(at.step, at.unevaluated)
            end_step(state, ahead, times)
        while at.step < num_steps:
            trace.begin(at.step + 1, lines.close)
            started, now = time.monotonic(), f"step {at.step + 1}"
            if experience is None:
                watchdog.phase(f"The rollout of {now}")
                drawn, ahead = ahead, None
                if drawn is None:
                    with saver.may_stop(state, None, None):
                        drawn = drawing.draw(parts, state, at, lines, alive)
                if config.loop.async_rollouts and at.step + 1 < num_steps:
                    # With the weights from before this step's updates; meanwhile this step's
                    # rewards are computed, and the next one's while the device updates.
                    with saver.may_stop(state, None, drawn):
                        ahead = drawing.draw(parts, state, at, lines, alive, ahead=1)
                lines.close()  # the last step may have sampled nothing
                guards.obey()
                started = time.monotonic() - drawn.seconds  # of this step, whenever it was sampled
                times["time/rollout_s"] = drawn.seconds
                if stop.asked():
                    saver.stop(state, None, drawn)
                watchdog.phase(f"The rewards of {now}")
                with phase("scoring"), saver.may_stop(state, None, drawn) as over:
                    scored = functools.partial(
                        _score, parts, guards, saver, state, at, drawn, times
                    )
                    scored = functools.partial(scored, over)
                    experience, scores = _prepare(parts, state, drawn.rollouts, scored)
                complaints.note(now, scores)
                at.rollout_metrics = lines_lib.of_rollout(parts, drawn.rollouts, scores, times)
                drawing.show(parts, writers, at.step + 1, drawn, scores)
                guards.look_at_rollout(at.step + 1, at.rollout_metrics)
                if guards.leaves_out:
                    state, at.update = update_lib.refuse(state, updates), updates
                    guards.left_out(at.step + 1, updates)
                guards.obey()
            learning = time.monotonic()
            while at.update < updates:
                watchdog.phase(f"Update {at.update + 1} of {now}")
                index = at.update % config.batch.minibatches
                with phase("update"), saver.may_stop_update(state, experience, ahead) as donates:
                    state, values = parts.update(state, experience, index, donates)
                lines.learned(values)
                guards.obey()
                at.update += 1
                if at.update < updates and stop.asked():
                    lines.read()
                    guards.obey()
                    saver.stop(state, experience, ahead)
            rollouts = experience.rollouts
            lengths = sharding.to_host((rollouts.prompt_length_P, rollouts.length_PG))
            at.tokens += int(lengths[1].sum())
            at.prompts += config.batch.prompts
            lines.open(state, lengths, started, learning, times)
            at.step, at.update, experience = at.step + 1, 0, None
            at.rollout_metrics, at.update_metrics, times = {}, [], {}
            stops = stop.asked() and at.step < num_steps
            parts.checkpoints.poll()
            if stops or _saves(parts, at) or _evaluates(parts, at):
                lines.read()
                guards.obey(before=lines.close)  # before anything is saved
            if stops:
                at.unevaluated = lines.values() if _evaluates(parts, at) else {}
                saver.stop(state, None, ahead)
            end_step(state, ahead, times)
    return state


def _alive(watchdog: Watchdog, stop: stop_lib.StopSignal) -> None:
    """Notes that what is done gets on, and gives it up where the run is to stop."""
    watchdog.alive()
    stop.look()


# --- The pieces of a step -------------------------------------------------------------------------


def _score(
    parts: Parts,
    guards: guards_lib.Guards,
    saver: Saver,
    state: TrainState,
    at: Position,
    drawn: Drawn,
    times: dict,
    before_saving: Callable[[], None],
) -> score_lib.Scores:
    """The rewards of a step's completions; failing too often, they end the run, with all saved."""
    try:
        with phase("rewards"), _timed(times, "time/reward_s"):
            scores = drawn.judge.scores()
        guards.look_at_scores(at.step + 1, scores)
    except score_lib.RewardError:
        before_saving()
        if at.step:
            saver.save(state, None, drawn)
        parts.checkpoints.close()
        raise
    return scores


def _prepare(
    parts: Parts, state: TrainState, rollouts: Rollouts, scored: Callable[[], score_lib.Scores]
) -> tuple[Experience, score_lib.Scores]:
    """The rollout on the device, cut to its longest completion, with what its updates need.

    `scored` waits for the rewards; meanwhile the device computes the reference.
    """
    limit = rollouts.completion_PGC.shape[-1]
    longest = update_lib.cut_to(limit, int(rollouts.length_PG.max()))
    rollouts = rollouts.replace(
        completion_PGC=rollouts.completion_PGC[..., :longest],
        logp_PGC=rollouts.logp_PGC[..., :longest],
    )
    scores: list[score_lib.Scores] = []

    def reward_PG():  # noqa: N802
        scores.append(scored())
        return sharding.shard_rows(parts.mesh, scores[0].reward_B.reshape(rollouts.length_PG.shape))

    placed = sharding.shard_rows(parts.mesh, rollouts)
    reference = sharding.to_device_memory(parts.ref_params)  # a copy only of one that is elsewhere
    experience = parts.prepare(state.params, reference, placed, reward_PG)
    return experience, scores[0]


# --- Evaluation, checkpoints, the end -------------------------------------------------------------


def _evaluate(
    parts: Parts, state: TrainState, at: Position, alive: Callable[[], None], *, final: bool
) -> dict[str, float]:
    """Metrics of greedy completions, and with `final` of samples where the config asks for them."""
    asked, began = parts.config.evaluation, time.monotonic()
    values: dict[str, float] = {}
    for num_samples in (0, asked.num_samples) if final and asked.num_samples else (0,):
        kind = f"sampled_{num_samples}" if num_samples else "greedy"
        values |= evaluation.run(
            parts.evaluator,
            parts.evaluator.publish(state.params),
            parts.policy,
            parts.held_out,
            parts.rewards,
            num_samples=num_samples,
            temperature=asked.temperature,
            key=keys.key_for(parts.config.seed, "evaluate", at.step),
            file=parts.folder / "evaluations" / f"step_{at.step:06d}_{kind}.jsonl",
            on_harvest=alive,
        )
    at.accuracy, at.held_out_reward = values.get("eval/accuracy"), values.get("eval/reward")
    return values | {"time/evaluation_s": time.monotonic() - began}


def _end_step(
    parts: Parts,
    at: Position,
    saver: Saver,
    lines: Lines,
    watchdog: Watchdog,
    alive: Callable[[], None],
    state: TrainState,
    ahead: Drawn | None,
    times: dict[str, float],
) -> None:
    """Evaluates and saves, as is due after the step that was just done, and writes its line."""
    evaluated: dict[str, float] = {}
    if _evaluates(parts, at):
        watchdog.phase(f"The evaluation after step {at.step}")
        at.unevaluated = lines.values()
        with saver.may_stop(state, None, ahead):
            final = at.step == parts.config.loop.num_steps
            evaluated = _evaluate(parts, state, at, alive, final=final)
        at.unevaluated = {}
    if not evaluated and not _saves(parts, at):
        return
    lines.close(evaluated)  # before saving: a resumed run finds the line there
    watchdog.phase(f"The checkpoint after step {at.step}")
    with phase("checkpoint"), _timed(times, "time/checkpoint_s"):
        if _saves(parts, at):  # its time stands in the next step's line
            quality = evaluated.get("eval/accuracy", evaluated.get("eval/reward"))
            saver.save(state, None, ahead, quality)


def _evaluates(parts: Parts, at: Position) -> bool:
    """Whether the policy is evaluated after the step that was just done."""
    every, last = parts.config.evaluation.every_steps, at.step == parts.config.loop.num_steps
    return bool(parts.held_out) and (last or bool(every and at.step % every == 0))


def _saves(parts: Parts, at: Position) -> bool:
    """Whether a checkpoint is due after the step that was just done."""
    every, last = parts.config.checkpoint.every_steps, at.step == parts.config.loop.num_steps
    return last or bool(every and at.step % every == 0)


def _finish(
    parts: Parts, state: TrainState, at: Position, stop: stop_lib.StopSignal, wall_s: float
) -> dict[str, Any]:
    """Exports the model, draws the curves, and writes and shows the summary."""
    unsaved = None
    try:
        parts.checkpoints.close()
    except NotSaved as error:  # the model is at hand still
        unsaved = error
    waiting = nullcontext() if unsaved else stop.nothing_to_lose(stop_lib.PATIENCE_S)
    with waiting:
        claim_lib.check()
        summary = _results(parts, state, at, wall_s)
    if unsaved:
        raise unsaved
    return summary


def _results(parts: Parts, state: TrainState, at: Position, wall_s: float) -> dict[str, Any]:
    """The summary; writes it, with the export and the curves."""
    export = parts.folder / "export"
    summary = {
        "accuracy_before": at.accuracy_before,
        "accuracy_after": at.accuracy,
        "held_out_reward_before": at.held_out_reward_before,
        "held_out_reward_after": at.held_out_reward,
        "train_wall_s": round(wall_s, 1),
        "seed": parts.config.seed,
        "steps": at.step,
        "generated_tokens": at.tokens,
        "skipped_updates": int(state.num_skipped),
        "roll_backs": at.history.roll_backs,
        "parameters": parts.policy.model.num_params,
    }
    if parts.config.checkpoint.export:
        policy_lib.export(parts.policy, export, state, parts.config.checkpoint.export_dtype)
        workdir.note_export(export, step=at.step, updates=int(state.num_updates))
        summary["export"] = str(export)
        summary["ask"] = _ask(parts, export)
    if hosts.is_first():
        summary["generated_tokens_per_s"] = round(report.mean_throughput(parts.folder), 1)
        summary["curves"] = str(report.curves(parts.folder))
        workdir.write_json(parts.folder / "summary.json", summary)
    return summary


def _ask(parts: Parts, export: Path) -> str:
    """The command that asks the trained model a question, one it was not trained on if there is."""
    questions = parts.held_out or parts.train
    prompt = questions.problems[0].prompt
    chat = "" if isinstance(prompt, str) else " --chat"
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    model, prompt = shlex.quote(str(export)), shlex.quote(text)
    return f"python -m grpo_jax.generate --model {model}{chat} --prompt {prompt}"


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    times[name] = times.get(name, 0.0) + time.monotonic() - start
