"""The algorithm: sample groups of completions, reward them, move the policy to the better ones.

`run` is Group Relative Policy Optimization as a host loop over three calls: the engine samples, the
rewards judge, and a jitted update learns. Everything that a step computes follows from the config,
the step's number and the state before it, so a run that was stopped anywhere continues as if it had
not been.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from grpo_jax import chips, evaluation, floor, hosts, keys, memory, report, sharding, workdir
from grpo_jax import config as config_lib
from grpo_jax import metrics as metrics_lib
from grpo_jax import parts as parts_lib
from grpo_jax.algorithm import update as update_lib
from grpo_jax.compiling import Compiling
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.judge import Complaints, Judge
from grpo_jax.models import hf
from grpo_jax.parts import Parts, Position
from grpo_jax.phases import Trace, phase
from grpo_jax.rewards import score as score_lib
from grpo_jax.structs import Experience, Rollouts, TrainState
from grpo_jax.watchdog import Watchdog


class Diverged(ValueError):  # noqa: N818
    """Too many updates in a row were not finite."""


def run(
    config: ConfigDict, folder: Path, model_path: str, *, spent_s: float = 0.0
) -> dict[str, Any]:
    """Trains the model at `model_path`, or goes on with the run in `folder`; returns its summary.

    `spent_s`: seconds that went into making the model, counted as part of the run. Raises
    ValueError for what a user can mend, `Diverged` when updates stay non-finite, and
    `workdir.Stopped` once the run was asked to stop and has saved.
    """
    began = time.monotonic() - spent_s
    with phase("start"):
        parts = parts_lib.build(config, folder, model_path)
    with parts.rewards:
        return _run(parts, began)


def _run(parts: Parts, began: float) -> dict[str, Any]:
    config, folder = parts.config, parts.folder
    with phase("start"):
        state, at, experience, ahead = parts_lib.start(parts)
    began -= at.wall_s
    writers = metrics_lib.Writers(
        folder,
        first_step=at.step + 1 if at.step else 0,
        first_sample_step=at.step + 1 + bool(at.update),  # shown before a rollout's first update
        tensorboard=config.logging.tensorboard,
        wandb_project=config.logging.wandb_project,
        config=config_lib.flatten(config),
        enabled=hosts.is_first(),
    )
    num_steps, updates = config.loop.num_steps, config_lib.num_updates_per_step(config)
    with (
        workdir.StopSignal() as stop,
        metrics_lib.Progress(num_steps, first_step=at.step) as bar,
        Compiling() as compiling,
        Watchdog(config.loop.stall_limit_s) as watchdog,
        Trace(folder, config.profile.steps) as trace,
    ):
        if at.step == 0:
            if parts.held_out and not at.update and not at.first_evaluation:
                watchdog.phase("The evaluation before the first step")
                at.first_evaluation = _evaluate(parts, state, at, watchdog, final=True)
                at.accuracy_before = at.first_evaluation["eval/accuracy"]
            if at.first_evaluation:  # again where the run was stopped in its first step
                writers.scalars(0, at.first_evaluation)
        lines = _Lines(parts, at, writers, bar, compiling)
        complaints = Complaints()
        times: dict[str, float] = {}
        if ahead is not None:
            ahead = _drawn_before(parts, at, ahead)
        while at.step < num_steps:
            trace.begin(at.step + 1, lines.close)
            started, now = time.monotonic(), f"step {at.step + 1}"
            if experience is None:
                watchdog.phase(f"The rollout of {now}")
                drawn, ahead = ahead or _draw(parts, state, at.step, lines, watchdog), None
                if config.loop.async_rollouts and at.step + 1 < num_steps:
                    # With the weights from before this step's updates; meanwhile this step's
                    # rewards are computed, and the next one's while the device updates.
                    ahead = _draw(parts, state, at.step + 1, lines, watchdog)
                lines.close()  # the last step may have sampled nothing
                started = time.monotonic() - drawn.seconds  # of this step, whenever it was sampled
                times["time/rollout_s"] = drawn.seconds
                if stop.asked():
                    _stop(parts, state, at, None, drawn, stop, began)
                watchdog.phase(f"The rewards of {now}")
                scored = functools.partial(_score, parts, state, at, drawn, began, times)
                with phase("scoring"):
                    experience, scores = _prepare(parts, state, drawn.rollouts, scored)
                complaints.note(now, scores)
                at.rollout_metrics = _rollout_metrics(parts, drawn.rollouts, scores, times)
                _show_samples(parts, writers, at.step + 1, drawn, scores)
            learning = time.monotonic()
            while at.update < updates:
                watchdog.phase(f"Update {at.update + 1} of {now}")
                index = at.update % config.batch.minibatches
                with phase("update"):
                    state, values = parts.update(state, experience, index)
                lines.learned(values)
                at.update += 1
                if at.update < updates and stop.asked():
                    lines.read()
                    _stop(parts, state, at, experience, ahead, stop, began)
            rollouts = experience.rollouts
            lengths = sharding.to_host((rollouts.prompt_length_P, rollouts.length_PG))
            at.tokens += int(lengths[1].sum())
            at.prompts += config.batch.prompts
            lines.open(state, lengths, started, learning, times)
            at.step, at.update, experience = at.step + 1, 0, None
            at.rollout_metrics, at.update_metrics, times = {}, [], {}
            stops = stop.asked()
            if stops or _saves(parts, at) or _evaluates(parts, at):
                lines.read()
                watchdog.phase(f"The evaluation after {now}")
                evaluated = _evaluate_if_due(parts, state, at, watchdog)
                lines.close(evaluated)  # before saving: a resumed run finds the line there
                watchdog.phase(f"The checkpoint after {now}")
                with phase("checkpoint"), _timed(times, "time/checkpoint_s"):
                    if _saves(parts, at):  # its time stands in the next step's line
                        accuracy = evaluated.get("eval/accuracy")
                        _save(parts, state, at, None, ahead, began, accuracy)
                if stops and at.step < num_steps:
                    _stop(parts, state, at, None, ahead, stop, began)
    writers.close()
    with Watchdog(config.loop.stall_limit_s) as watchdog:
        watchdog.phase("The end of the run")
        return _finish(parts, state, at, time.monotonic() - began)


# --- The pieces of a step -------------------------------------------------------------------------


def _indices(parts: Parts, step: int) -> np.ndarray:
    config = parts.config
    return prompts_lib.prompt_indices(
        config.seed, step, len(parts.train.problems), config.batch.prompts
    )


def _judge(parts: Parts, questions, step: int) -> Judge:
    config = parts.config
    seen = {
        "global_step": step,
        "max_steps": config.loop.num_steps,
        "epoch": step * config.batch.prompts / len(parts.train.problems),
    }
    return Judge(parts.rewards, parts.policy, questions.problems, config.batch.group, seen)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The completions of one step, on the host, and their judge."""

    questions: evaluation.Questions
    judge: Judge
    rollouts: Rollouts
    seconds: float  # that sampling took


def _draw(parts: Parts, state: TrainState, step: int, lines: _Lines, watchdog: Watchdog) -> _Drawn:
    """Samples a step's completions, and writes the line that is open once the device is busy."""
    started = time.monotonic()
    questions = parts.train.take(_indices(parts, step))
    judge = _judge(parts, questions, step)
    with phase("rollout"):
        rollouts = parts.engine.generate(
            parts.engine.publish(state.params),
            questions.prompt_ids,
            group=parts.config.batch.group,
            key=keys.key_for(parts.config.seed, "rollout", step),
            temperature=parts.config.rollout.temperature,
            on_group=judge.add,
            meanwhile=lines.close,
            on_harvest=watchdog.alive,
        )
    seconds = time.monotonic() - max(started, lines.closed_at)
    return _Drawn(questions, judge, rollouts, seconds)


def _drawn_before(parts: Parts, at: Position, rollouts: Rollouts) -> _Drawn:
    """Completions that a checkpoint held, given to a judge as if just sampled."""
    step = at.step + bool(at.update)
    questions = parts.train.take(_indices(parts, step))
    judge = _judge(parts, questions, step)
    for number, (completion_GC, length_G) in enumerate(
        zip(rollouts.completion_PGC, rollouts.length_PG)
    ):
        judge.add(number, [ids[:n].tolist() for ids, n in zip(completion_GC, length_G)])
    return _Drawn(questions, judge, rollouts, at.ahead_s)


def _score(
    parts: Parts, state: TrainState, at: Position, drawn: _Drawn, began: float, times: dict
) -> score_lib.Scores:
    """The rewards of a step's completions; failing too often, they end the run, with all saved."""
    try:
        with phase("rewards"), _timed(times, "time/reward_s"):
            scores = drawn.judge.scores()
        for name, failed_B in scores.failed.items():
            if failed_B.mean() > parts.config.rewards.max_failed_share:
                first = next(f for f in scores.failures if f.reward == name)
                raise score_lib.RewardError(
                    f"{failed_B.sum()} of {len(failed_B)} completions of step {at.step + 1} have "
                    f"no reward {name!r}, more than rewards.max_failed_share = "
                    f"{parts.config.rewards.max_failed_share}. The first: {first.message}"
                )
    except score_lib.RewardError:
        if at.step:
            _save(parts, state, at, None, drawn, began)
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


class _Lines:
    """The metrics of updates, and of them and their rollout the line of each step.

    The loop does not wait for them: an update's are read once the next one is under way, and those
    of a step's last, with which its line is closed, while the next rollout is.
    """

    def __init__(self, parts: Parts, at: Position, writers, bar, compiling: Compiling):
        self._parts, self._at, self._compiling = parts, at, compiling
        self._writers, self._bar = writers, bar
        self._unread: tuple[dict, list, int] | None = None  # an update's, where they go, its step
        self._line: Callable[[dict], tuple[int, dict[str, float]]] | None = None
        self.closed_at = 0.0  # time.monotonic() when the newest line was written

    def learned(self, values: dict) -> None:
        """Takes an update's metrics, on the device, and reads those of the update before."""
        self.read()
        self._unread = values, self._at.update_metrics, self._at.step + 1

    def read(self) -> None:
        """Waits for the newest update; ends the run when too many in a row were refused."""
        if self._unread is None:
            return
        (values, learned, step), self._unread = self._unread, None
        with phase("update"):
            values = {name: float(value) for name, value in jax.device_get(values).items()}
        at, parts = self._at, self._parts
        at.skipped_in_row = at.skipped_in_row + 1 if values.pop("skipped") else 0
        if at.skipped_in_row >= parts.config.optim.max_skipped:
            parts.checkpoints.wait()
            raise Diverged(
                f"{at.skipped_in_row} updates in a row had a loss or gradient that is not finite "
                f"(loss {values['policy/loss']}, gradient norm {values['policy/grad_norm']} at "
                f"step {step}). They were refused, so the policy is the one from before. Lower "
                "optim.learning_rate, set optim.clip_norm, or use model.dtype = float32; "
                f"{parts.folder / 'checkpoints'} holds the last checkpoint."
            )
        learned.append(values)
        self._read_at = time.monotonic()

    def open(
        self, state: TrainState, lengths: tuple, started: float, learning: float, times: dict
    ) -> None:
        """Begins the line of the step that `at` stands in; `started`, `learning`: since when.

        `lengths`: of its prompts [P] and completions [P, G].
        """
        at, parts = self._at, self._parts
        step, known, learned = at.step + 1, at.rollout_metrics, at.update_metrics
        counters = {"tokens/generated": at.tokens} | memory.usage()

        def line(evaluated: dict[str, float]) -> tuple[int, dict[str, float]]:
            times["time/update_s"] = self._read_at - learning
            times["time/step_s"] = time.monotonic() - started
            values = known | _combined(learned) | counters | evaluated | times
            values |= self._compiling.since_last() | {
                "policy/skipped_updates": int(state.num_skipped),
                "policy/learning_rate": float(parts.schedule(max(int(state.num_updates) - 1, 0))),
            }
            if "time/rollout_s" in times:  # not where the run was stopped after the rollout
                step_s = self._read_at - started
                values |= _rates(parts, lengths, times["time/rollout_s"], step_s)
            return step, values

        self._line = line

    def close(self, evaluated: dict[str, float] | None = None) -> None:
        """Writes the line that is open, if one is, with what an evaluation found beside it."""
        if self._line is None:
            return
        self.read()
        (step, values), self._line = self._line(evaluated or {}), None
        self._writers.scalars(step, values)
        self._bar.update(step, values)
        self.closed_at = time.monotonic()


def _combined(learned: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step's updates as one: the largest of maxima, the mean of the rest."""
    names = learned[0] if learned else ()
    return {
        n: float((max if n.endswith("_max") else np.mean)([v[n] for v in learned])) for n in names
    }


def _rollout_metrics(parts: Parts, rollouts: Rollouts, scores, times: dict) -> dict[str, float]:
    """What there is to know of a rollout before anything is learned from it."""
    length_PG, stopped_PG = rollouts.length_PG, rollouts.stopped_PG
    reward_PG = scores.reward_B.reshape(length_PG.shape)
    values: dict[str, Any] = {}
    if not np.isnan(reward_PG).all():
        values = {"reward": np.nanmean(reward_PG), "reward_std": np.nanstd(reward_PG)}
    accuracy = scores.accuracy(parts.rewards.names[0])
    if not np.isnan(accuracy):
        values["accuracy"] = accuracy
    values |= {
        "groups/equal_share": (_spread(reward_PG) < 1e-4).mean(),
        "rewards/unscored": np.isnan(reward_PG).sum(),
        "completion/length": length_PG.mean(),
        "completion/length_min": length_PG.min(),
        "completion/length_max": length_PG.max(),
        "completion/truncated_share": 1 - stopped_PG.mean(),
        "throughput/generated_tokens_per_s": length_PG.sum() / times["time/rollout_s"],
    }
    if stopped_PG.any():
        values["completion/stopped_length"] = length_PG[stopped_PG].mean()
    for name, value_B in scores.by_name.items():
        if not np.isnan(value_B).all():
            values[f"reward/{name}"] = np.nanmean(value_B)
            values[f"reward/{name}_std"] = np.nanstd(value_B)
        values[f"rewards/failed/{name}"] = scores.failed[name].sum()
    for kind in {failure.kind for failure in scores.failures}:
        values[f"rewards/failed_by_{kind}"] = scores.num_failed(kind)
    for name, (total, count) in scores.metrics.items():
        values[f"reward_log/{name}"] = total / count
    return {name: float(value) for name, value in values.items()}


def _spread(reward_PG: np.ndarray) -> np.ndarray:
    """Largest minus smallest known reward of each group; 0 where none is known."""
    known_PG = ~np.isnan(reward_PG)
    high_P = np.where(known_PG, reward_PG, -np.inf).max(axis=1)
    low_P = np.where(known_PG, reward_PG, np.inf).min(axis=1)
    return np.where(known_PG.any(axis=1), high_P - low_P, 0.0)


def _rates(
    parts: Parts, lengths: tuple[np.ndarray, np.ndarray], rollout_s: float, step_s: float
) -> dict[str, float]:
    """Tokens per second of a step, and beside what the devices could do where that is known.

    `lengths`: of its prompts [P] and completions [P, G]. `step_s` ends with the last update.
    """
    config, model, mesh = parts.config, parts.policy.model, parts.mesh
    learning_s, generated = step_s - rollout_s, lengths[1].sum()
    iterations = config.algorithm.num_iterations
    rates = {
        "throughput/step_tokens_per_s": generated / step_s,
        "throughput/learned_tokens_per_s": iterations * (lengths[0].sum() + generated) / learning_s,
    }
    chip = chips.chip(mesh.devices.flat[0].device_kind)
    if chip:
        itemsize = np.dtype(parts.engine.decoder.dtype).itemsize
        sampling = floor.rollout(model, *lengths, itemsize, weight_shards=mesh.shape["tensor"])
        passes = 3 * iterations + (parts.ref_params is not None)
        passes += config_lib.needs_old_pass(config)
        learning = floor.forward(model, *lengths).times(passes)
        least = [
            w.seconds(chip.bf16_flops, chip.hbm_bytes_per_s, mesh.size)
            for w in (sampling, learning)
        ]
        done = sampling.flops + learning.flops
        rates |= {
            "throughput/mfu": done / (step_s * chip.bf16_flops * mesh.size),
            "floor/rollout_share": least[0] / rollout_s,
            "floor/learning_share": least[1] / learning_s,
            "floor/step_share": sum(least) / step_s,
        }
    return {name: float(value) for name, value in rates.items()}


def _show_samples(parts: Parts, writers, step: int, drawn: _Drawn, scores) -> None:
    every = parts.config.logging.samples_every_steps
    if not every or (step - 1) % every:
        return
    group = parts.config.batch.group
    # Of rewards that are unknown, this shows what a 0 would be worth.
    reward_PG = np.nan_to_num(scores.reward_B, nan=0.0).reshape(-1, group)
    relative_PG = reward_PG - reward_PG.mean(1, keepdims=True)
    if parts.config.algorithm.scale_by_std:
        relative_PG /= np.maximum(reward_PG.std(1, keepdims=True), 1e-4)
    # Of the most divided group: what the policy is about to learn from.
    p = int(reward_PG.std(1).argmax())
    texts = drawn.judge.texts([p])
    best_first = np.argsort(-reward_PG[p], kind="stable")
    num_best = -(-parts.config.logging.num_samples // 2)
    num_worst = min(parts.config.logging.num_samples - num_best, group - num_best)
    rows = []
    for g in [*best_first[:num_best], *best_first[group - max(num_worst, 0) :]]:
        row = p * group + g
        by_name = {n: float(v[row]) for n, v in scores.by_name.items()}
        rows.append(
            {
                "prompt": drawn.questions.texts[p],
                "completion": texts[g],
                "rewards": {n: None if np.isnan(v) else v for n, v in by_name.items()},
                "extras": {n: v[row] for n, v in scores.extras.items()},
                "advantage": float(relative_PG[p, g]),
                "length": int(drawn.rollouts.length_PG[p, g]),
            }
        )
    writers.samples(step, rows)
    metrics_lib.print_samples(f"Completions of step {step}", rows)


# --- Evaluation, checkpoints, the end -------------------------------------------------------------


def _evaluate(
    parts: Parts, state: TrainState, at: Position, watchdog: Watchdog, *, final: bool
) -> dict[str, float]:
    """Greedy accuracy, and with `final` the sampled metrics too where the config asks for them."""
    options = parts.config.evaluation
    values: dict[str, float] = {}
    for num_samples in (1, options.num_samples if final else 0):
        if num_samples:
            kind = "greedy" if num_samples == 1 else f"sampled_{num_samples}"
            values |= evaluation.run(
                parts.evaluator,
                parts.evaluator.publish(state.params),
                parts.policy,
                parts.held_out,
                parts.rewards,
                num_samples=num_samples,
                temperature=options.temperature,
                key=keys.key_for(parts.config.seed, "evaluate", at.step),
                file=parts.folder / "evaluations" / f"step_{at.step:06d}_{kind}.jsonl",
                on_answer=watchdog.alive,
            )
    at.accuracy = values["eval/accuracy"]
    return values


def _evaluate_if_due(
    parts: Parts, state: TrainState, at: Position, watchdog: Watchdog
) -> dict[str, float]:
    final = at.step == parts.config.loop.num_steps
    return _evaluate(parts, state, at, watchdog, final=final) if _evaluates(parts, at) else {}


def _evaluates(parts: Parts, at: Position) -> bool:
    """Whether the policy is evaluated after the step that was just done."""
    every, last = parts.config.evaluation.every_steps, at.step == parts.config.loop.num_steps
    return bool(parts.held_out) and (last or bool(every and at.step % every == 0))


def _saves(parts: Parts, at: Position) -> bool:
    """Whether a checkpoint is due after the step that was just done."""
    every, last = parts.config.checkpoint.every_steps, at.step == parts.config.loop.num_steps
    return last or bool(every and at.step % every == 0)


def _save(
    parts: Parts,
    state: TrainState,
    at: Position,
    experience: Experience | None,
    ahead: _Drawn | None,
    began: float,
    accuracy: float | None = None,
) -> None:
    """Saves where the run stands; `ahead`: what was sampled and is not in `experience` yet."""
    at.wall_s = time.monotonic() - began
    at.ahead_s = 0.0 if ahead is None else ahead.seconds
    rollouts = None if ahead is None else sharding.shard_rows(parts.mesh, ahead.rollouts)
    facts = {"position": dataclasses.asdict(at), "config": config_lib.fingerprint(parts.config)}
    parts.checkpoints.save(state, facts, experience=experience, ahead=rollouts, accuracy=accuracy)


def _stop(parts: Parts, state, at: Position, experience, ahead, stop, began: float) -> None:
    """Saves, and raises `workdir.Stopped`."""
    _save(parts, state, at, experience, ahead, began)
    parts.checkpoints.close()
    middle = f", after {at.update} of its updates" if at.update else ""
    raise workdir.Stopped(
        f"Stopped by {stop.name} at step {at.step}{middle}; all is saved in {parts.folder}. "
        "The same command continues the run."
    )


def _finish(parts: Parts, state: TrainState, at: Position, wall_s: float) -> dict[str, Any]:
    """Exports the model, draws the curves, and writes and shows the summary."""
    parts.checkpoints.close()
    export = parts.folder / "export"
    summary = {
        "accuracy_before": at.accuracy_before,
        "accuracy_after": at.accuracy,
        "train_wall_s": round(wall_s, 1),
        "seed": parts.config.seed,
        "steps": at.step,
        "generated_tokens": at.tokens,
        "skipped_updates": int(state.num_skipped),
        "parameters": parts.policy.model.num_params,
    }
    if parts.config.checkpoint.export:
        hf.save(
            export,
            state.params,
            parts.policy.model,
            source=parts.policy.source,
            dtype=hf.stored_dtype(parts.policy.source),
            tokenizer=parts.policy.tokenizer,
        )
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
    return f"python -m grpo_jax.generate --model {export}{chat} --prompt {shlex.quote(text)}"


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    times[name] = times.get(name, 0.0) + time.monotonic() - start
