"""The results of a run: evaluations, and at its end the export, the curves and the summary."""

from __future__ import annotations

import functools
import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from grpo_jax import keys
from grpo_jax.config.dotted import flatten
from grpo_jax.evaluation import held_out
from grpo_jax.hosts import processes
from grpo_jax.messages import console, events
from grpo_jax.metrics import curves
from grpo_jax.run import claim, workdir
from grpo_jax.run import stop as stop_lib
from grpo_jax.run.checkpoints import NotSaved
from grpo_jax.run.whole_files import write_json
from grpo_jax.trainers import exporting, model_card
from grpo_jax.trainers.monitor import Monitor
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Run


def evaluate(run: Run, state: RunState, monitor: Monitor, *, final: bool) -> dict[str, float]:
    """Metrics of held-out data: of completions that are sampled, and of those that are given.

    Completions are greedy; with `final`, also of samples if the config asks for them. Raises
    `RewardError` if rewards fail so often that the metrics mean nothing.
    """
    began = time.monotonic()
    after = f"after {run.course.step} {state.step}" if state.step else "at the start"
    values = _answers(run, state, monitor, after, final=final) if run.held_out else {}
    state.accuracy, state.held_out_reward = values.get("eval/accuracy"), values.get("eval/reward")
    if run.measure is not None:
        values |= run.measure(run, state, monitor.alive)
    seconds = time.monotonic() - began
    told = f"Evaluation {after}: {_told(run, state, values)}, {seconds:.0f} s"
    if console.is_json():
        events.happened("evaluation", told, step=state.step, **values)
    else:
        console.say(told, always=True)
    return values | {"time/evaluation_s": seconds}


def _answers(
    run: Run, state: RunState, monitor: Monitor, after: str, *, final: bool
) -> dict[str, float]:
    """Metrics of the policy's completions of the held-out problems."""
    asked = run.config.evaluation
    values: dict[str, float] = {}
    for num_samples in (0, asked.num_samples) if final and asked.num_samples else (0,):
        kind = f"sampled_{num_samples}" if num_samples else "greedy"
        values |= held_out.run(
            run.evaluator,
            run.evaluator.publish(run.weights(state.train)),
            run.policy,
            run.held_out,
            run.rewards,
            num_samples=num_samples,
            temperature=asked.temperature,
            key=keys.key_for(run.config.seed, "evaluate", state.step),
            file=run.folder / "evaluations" / f"step_{state.step:06d}_{kind}.jsonl",
            drawing=run.drawing,
            on_harvest=monitor.alive,
            on_scores=functools.partial(monitor.evaluated, f"The evaluation {after}"),
        )
    return values


def quality(run: Run, evaluated: dict[str, float]) -> float | None:
    """What the best checkpoint has most of: accuracy, else reward, else the negated loss."""
    for name in ("eval/accuracy", "eval/reward"):
        if name in evaluated:
            return evaluated[name]
    loss = evaluated.get(run.course.held_out_loss)
    return None if loss is None else -loss


def _told(run: Run, state: RunState, values: dict[str, float]) -> str:
    """The result of an evaluation, in one line."""
    facts = []
    if state.accuracy is not None:
        facts.append(f"accuracy {state.accuracy:.1%}")
        if state.accuracy_before is not None:
            facts[0] += f" ({100 * (state.accuracy - state.accuracy_before):+.1f})"
    elif state.held_out_reward is not None:
        facts.append(f"reward {state.held_out_reward:.3f}")
        if state.held_out_reward_before is not None:
            facts[0] += f" ({state.held_out_reward - state.held_out_reward_before:+.3f})"
    k = run.config.evaluation.num_samples
    for name in (f"pass@{k}", f"maj@{k}"):
        if f"eval/{name}" in values:
            facts.append(f"{name} {values[f'eval/{name}']:.1%}")
    if run.held_out:
        facts.append(f"{len(run.held_out.problems):,} problems")
    if run.course.held_out_loss in values:
        facts.append(f"loss {values[run.course.held_out_loss]:.4f}")
    return ", ".join(facts)


def finish(run: Run, state: RunState, stop: stop_lib.StopSignal, wall_s: float) -> dict[str, Any]:
    """Exports the model, draws the curves, and writes the summary, which it returns."""
    unsaved = None
    try:
        run.checkpoints.close()
    except NotSaved as error:  # the model is still available
        unsaved = error
    waiting = nullcontext() if unsaved else stop.nothing_to_lose(stop_lib.PATIENCE_S)
    with waiting:
        claim.check()
        summary = _summary(run, state, wall_s)
    if unsaved:
        raise unsaved
    return summary


def _summary(run: Run, state: RunState, wall_s: float) -> dict[str, Any]:
    export = run.folder / "export"
    summary = {
        "accuracy_before": state.accuracy_before,
        "accuracy_after": state.accuracy,
        "held_out_reward_before": state.held_out_reward_before,
        "held_out_reward_after": state.held_out_reward,
        "train_wall_s": round(wall_s, 1),
        "seed": run.config.seed,
        "steps": state.step,
        "generated_tokens": state.tokens,
        "skipped_updates": int(state.train.num_skipped),
        "roll_backs": state.history.roll_backs,
        "parameters": run.policy.model.num_params,
    }
    if run.config.checkpoint.export:
        dtype = run.config.checkpoint.export_dtype
        exporting.export(run.policy, export, state.train, dtype, run.frozen)
        if run.critic is not None:
            exporting.export_critic(run.critic.policy, export, state.train.critic)
        workdir.note_export(export, step=state.step, updates=int(state.train.num_updates))
        model_card.write(
            export, run.policy, flatten(run.config), step=state.step, method="grpo",
            summary=summary,
        )  # fmt: skip
        summary["export"] = str(export)
        summary["ask"] = _command_to_ask(run, export)
    if processes.is_first():
        summary["generated_tokens_per_s"] = round(curves.mean_throughput(run.folder), 1)
        summary["curves"] = str(curves.curves(run.folder))
        write_json(run.folder / "summary.json", summary)
    return summary


def _command_to_ask(run: Run, export: Path) -> str:
    """The command that asks the trained model a question, if possible one not trained on."""
    questions = run.held_out or run.train
    prompt = questions.problems[0].prompt
    chat = "" if isinstance(prompt, str) else " --chat"
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    model, prompt = shlex.quote(str(export)), shlex.quote(text)
    return f"python -m grpo_jax.generate --model {model}{chat} --prompt {prompt}"
