"""What a run measures: the names with their units, the files they go to, and the terminal.

A run's folder holds `metrics.jsonl` and `samples.jsonl`, one JSON object a line with its "step",
and TensorBoard events in `tensorboard/`. A sample is a dict with `prompt` and `completion` (texts),
`rewards` (by reward, None where none was given), `advantage`, `length` (tokens) and `extras` (what
reward functions added).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import progress
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from grpo_jax.credentials import hidden
from grpo_jax.logs import EventLog, Log
from grpo_jax.messages import cut


class Metric(NamedTuple):
    unit: str  # "": a plain number
    meaning: str


# NAME stands for the name of a reward, K for a number of samples per problem.
METRICS: dict[str, Metric] = {
    "reward": Metric("", "mean over completions of the weighted sum of the rewards"),
    "reward_std": Metric("", "standard deviation of that sum over all completions of the step"),
    "reward/NAME": Metric("", "mean of one reward over the completions it was given to"),
    "rewards/failed/NAME": Metric(
        "completions", "of the step for which one reward failed, worth the least of the step, or 0"
    ),
    "rewards/failed_by_timeout": Metric("completions", "rewards that took too long"),
    "rewards/failed_by_error": Metric("completions", "rewards that raised"),
    "rewards/failed_by_values": Metric("completions", "rewards that returned no fitting numbers"),
    "rewards/failed_by_memory": Metric("completions", "rewards that asked for too much memory"),
    "rewards/failed_by_died": Metric("completions", "rewards whose process ended"),
    "rewards/unscored": Metric(
        "completions", "to which no reward function gave a number; nothing is learned from them"
    ),
    "reward_log/NAME": Metric("", "what a reward function logged by log_metric, mean over calls"),
    "reward/NAME_std": Metric("", "standard deviation of one reward over those completions"),
    "accuracy": Metric(
        "share", "completions to which rewards.accuracy gives 1, of those that it applies to"
    ),
    "groups/equal_share": Metric(
        "share", "groups whose rewards are all equal, from which nothing is learned"
    ),
    "completion/length": Metric("tokens", "mean length, stop token included"),
    "completion/length_min": Metric("tokens", "shortest completion"),
    "completion/length_max": Metric("tokens", "longest completion"),
    "completion/stopped_length": Metric(
        "tokens", "mean length of those that stopped by themselves"
    ),
    "completion/truncated_share": Metric("share", "completions cut at the token limit"),
    "policy/loss": Metric(
        "", "the objective, negated; no sign of progress, since advantages of a group sum to 0"
    ),
    "policy/entropy": Metric("nats/token", "mean entropy of the policy at the tokens it chose"),
    "policy/kl": Metric("nats/token", "mean divergence from the frozen reference (k3)"),
    "policy/clip_low_share": Metric("share", "tokens whose ratio was clipped from below"),
    "policy/clip_high_share": Metric("share", "tokens whose ratio was clipped from above"),
    "policy/ratio_max": Metric("", "largest ratio of policy to old policy at a token"),
    "policy/grad_norm": Metric("", "global norm of the gradient, before clipping"),
    "policy/learning_rate": Metric("", "learning rate of the last update that was made"),
    "policy/drift_mean": Metric(
        "nats",
        "mean absolute change of log-probabilities by the updates before on the same rollout",
    ),
    "policy/drift_max": Metric("nats", "largest such change"),
    "policy/sampler_gap_mean": Metric(
        "nats",
        "mean absolute difference of the sampler's and the scorer's log-probability, the latter of "
        "the policy before the step's updates",
    ),
    "policy/sampler_gap_max": Metric("nats", "largest such difference"),
    "policy/importance_mean": Metric(
        "", "mean weight that corrects for the sampler's distribution; 1 without a correction"
    ),
    "policy/importance_capped_share": Metric(
        "share", "tokens whose ratio of policy to sampler was above algorithm.importance_cap"
    ),
    "policy/skipped_updates": Metric("updates", "refused so far, as not finite or by a guard"),
    "guards/roll_backs": Metric("", "times so far that a guard went back to a checkpoint"),
    "time/rollout_s": Metric("s", "sampling the completions"),
    "time/reward_s": Metric("s", "waiting for rewards after the last completion"),
    "time/update_s": Metric("s", "updating the policy"),
    "time/evaluation_s": Metric("s", "evaluating on held-out problems"),
    "time/checkpoint_s": Metric("s", "writing a checkpoint"),
    "time/step_s": Metric("s", "the whole step, with the evaluation after it"),
    "memory/device_gib": Metric("GiB", "in use on the fullest device after the step's updates"),
    "memory/device_peak_gib": Metric("GiB", "most that was in use there since the program began"),
    "memory/process_gib": Metric("GiB", "main memory that the process holds (resident)"),
    "time/compile_s": Metric(
        "s", "compiling programs, or reading them from the cache, of the step"
    ),
    "programs": Metric("", "compiled programs since the program was started"),
    "throughput/generated_tokens_per_s": Metric("tokens/s", "sampled, over the rollout's time"),
    "throughput/step_tokens_per_s": Metric("tokens/s", "sampled, over the whole step's time"),
    "throughput/learned_tokens_per_s": Metric(
        "tokens/s",
        "prompts and completions learned from, over the time from the last completion to the last "
        "update",
    ),
    "throughput/mfu": Metric(
        "share", "of the devices' published peak arithmetic that the step used (bfloat16)"
    ),
    "floor/rollout_share": Metric(
        "share", "the least time that sampling can take on these devices, of what it took"
    ),
    "floor/learning_share": Metric(
        "share", "the same of reference and updates, of the time after the last completion"
    ),
    "floor/step_share": Metric("share", "the same of all of these, of the step's time"),
    "tokens/generated": Metric("tokens", "sampled since the run began"),
    "eval/accuracy": Metric("share", "the same of one greedy completion of each held-out problem"),
    "eval/reward": Metric("", "mean over these of the weighted sum of the rewards"),
    "eval/reward/NAME": Metric("", "mean over these of one reward"),
    "eval/answer_found_share": Metric("share", "greedy completions in which an answer was found"),
    "eval/truncated_share": Metric("share", "greedy completions cut at the token limit"),
    "eval/length": Metric("tokens", "mean length of greedy completions"),
    "eval/failed_rewards": Metric("completions", "rewards that failed, each counted as wrong"),
    "eval/pass@K": Metric("share", "held-out problems that at least one of K samples solves"),
    "eval/maj@K": Metric("share", "held-out problems that the commonest answer of K solves"),
    "eval/mean@K": Metric("share", "mean accuracy of K samples per held-out problem"),
    "sft/loss": Metric("nats/token", "mean cross-entropy of the worked solutions"),
    "sft/tokens_per_s": Metric("tokens/s", "trained on, prompts and padding left out"),
}


def _pattern(name: str) -> str:
    return re.escape(name).replace("NAME", r"[\w.:\-]+").replace("@K", "@[0-9]+")


_KNOWN = re.compile("|".join(_pattern(name) for name in METRICS))


def is_known(name: str) -> bool:
    """Whether METRICS describes a metric of this name."""
    return _KNOWN.fullmatch(name) is not None


# --- Files ----------------------------------------------------------------------------------------


class Writers:
    """Writes a run's metrics and samples to its folder, to TensorBoard and to Weights & Biases.

    `first_step` is the first step that this process will write. What an earlier process wrote at
    that step or later, before it was killed, is dropped: a resumed run has no step twice. For
    samples, `first_sample_step` where it is given. With `enabled` False nothing is written or read
    (of many processes, only the first writes).

    Raises ValueError when `wandb_project` is set and W&B is not installed or has no key.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        tensorboard: bool,
        wandb_project: str,
        config: dict[str, Any],
        first_sample_step: int | None = None,
        enabled: bool = True,
    ):
        self._enabled = enabled
        self._metrics = self._samples = self._board = self._wandb = None
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if wandb_project:  # first: it may refuse
            self._wandb = _start_wandb(workdir, wandb_project, config)
        self._metrics = _reopen(workdir / "metrics.jsonl", first_step)
        self._samples = _reopen(
            workdir / "samples.jsonl",
            first_step if first_sample_step is None else first_sample_step,
        )
        if tensorboard:
            self._board = EventLog(workdir / "tensorboard", first_step, say)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics of a step, each of a name in METRICS. JSON gets null for NaN and inf."""
        unknown = [name for name in values if not is_known(name)]
        assert not unknown, f"METRICS does not describe {unknown}"
        if not self._enabled:
            return
        floats = {name: float(value) for name, value in values.items()}
        finite = {n: v if math.isfinite(v) else None for n, v in floats.items()}
        self._metrics.line({"step": int(step)} | finite)
        if self._board:
            for name, value in floats.items():
                self._board.scalar(name, value, step)
        if self._wandb:
            # W&B ignores steps below its newest: those that a resumed run computes again, alike.
            self._wandb.log(floats, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes some completions of a step (the keys stand at the top of this module)."""
        if not self._enabled:
            return
        for row in rows:
            self._samples.line({"step": int(step)} | row)
        if self._board:
            self._board.text("samples", _markdown(rows), step)

    def close(self) -> None:
        """Closes the files; further writing fails."""
        for file in (self._metrics, self._samples, self._board):
            if file:
                file.close()
        if self._wandb:
            self._wandb.finish()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log with their "step"; what a crash left of a line is passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _reopen(path: Path, first_step: int) -> Log:
    """The log opened for appending, without its lines of `first_step` or later."""
    if path.exists():
        kept = path.with_name(path.name + ".new")
        with kept.open("w", encoding="utf-8") as file:
            for row in read_jsonl(path):
                if row["step"] < first_step:
                    file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(kept, path)
    return Log(path, say)


def _markdown(rows: list[dict[str, Any]]) -> str:
    """Samples for TensorBoard, their texts as indented code: no character of them is markup."""
    parts = []
    for row in rows:
        parts.append("**" + " · ".join(_facts(row)) + "**")
        texts = {title: row[title] for title in ("prompt", "completion")} | row.get("extras", {})
        for title, text in texts.items():
            title = re.sub(r"[^\w .-]", "?", title)  # of an extra column, by a reward function
            lines = visible(str(text)).split("\n")
            parts.append(f"{title}:\n\n" + "\n".join("    " + line for line in lines))
    return "\n\n".join(parts)


def _start_wandb(workdir: Path, project: str, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"logging.wandb_project = {project!r} needs Weights & Biases, which is not installed: "
            "pip install grpo_jax[wandb], or set logging.wandb_project to ''."
        ) from error
    needs_key = os.environ.get("WANDB_MODE", "online") == "online"
    if needs_key and not os.environ.get("WANDB_API_KEY"):
        raise ValueError(
            f"logging.wandb_project = {project!r} needs a key in the environment variable "
            "WANDB_API_KEY, or WANDB_MODE=offline."
        )
    id_file = workdir / "wandb_id.txt"  # a resumed run goes on in the same curves
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    run_id = id_file.read_text().strip()
    return wandb.init(project=project, id=run_id, resume="allow", dir=str(workdir), config=config)


# --- Terminal -------------------------------------------------------------------------------------


class _Output:
    """Standard output as it is now; what it does not take is lost, and ends no run.

    As where a disk that a log goes to is full, or whoever read a pipe has gone.
    """

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


console = Console(file=_Output(), highlight=False)
_MAX_EXTRA_CHARS = 40  # of what a reward function added to a sample: texts keep their width


def say(text: str) -> None:
    """Prints one line as it stands: no markup, no wrapping, no keys or passwords."""
    console.print(Text(_printable(hidden(text))), soft_wrap=True)


def one_line(text: str, limit: int = 2000) -> str:
    """A message as a program ends with it: like what `say` prints, in one line, long ones cut.

    Names in files and data stand in messages; they may hold what a terminal would obey.
    """
    return _cut(" ".join(_printable(hidden(text)).split()), limit)


def print_title(text: str) -> None:
    """Prints a heading across the terminal."""
    console.print(Rule(Text(_printable(text), style="bold"), align="left"))


def print_samples(title: str, rows: list[dict[str, Any]], max_chars: int = 600) -> None:
    """Prints a table of completions (the keys stand at the top of this module).

    Texts are shown as they are, with control characters spelled out, and cut in their middle to
    `max_chars`: beginning and answer stay. What reward functions added is cut to a line of its own.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=4, overflow="fold")
    table.add_column("", no_wrap=True)  # one column of facts leaves the texts their width
    for row in rows:
        texts = [Text(_printable(_cut(row[t], max_chars))) for t in ("prompt", "completion")]
        extras = [
            cut(" ".join(f"{name} {value}".split()), _MAX_EXTRA_CHARS)
            for name, value in row.get("extras", {}).items()
        ]
        table.add_row(*texts, Text(_printable("\n".join(_facts(row) + extras))))
    console.print(table)


def _facts(row: dict[str, Any]) -> list[str]:
    """What a sample earned, in words."""
    facts = [f"{name} {_number(value)}" for name, value in row["rewards"].items()]
    if "advantage" in row:
        facts += [f"advantage {_number(row['advantage'])}", f"{row['length']} tokens"]
    return facts


def show_progress(noun: str, state: Callable[[], tuple[int, int]]) -> None:
    """A bar on a terminal until `state()`, (done, total), is done; elsewhere it only waits."""
    bar = progress.Progress(
        progress.TextColumn(noun),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(noun, total=None)
        while (now := state())[0] < now[1]:
            bar.update(task, completed=now[0], total=now[1])
            time.sleep(0.02)


class Progress:
    """Shows how far a run is: a bar on a terminal, elsewhere a line every `every_steps` steps.

    A context manager; `update` is called after each step.
    """

    def __init__(
        self, total_steps: int, *, first_step: int = 0, every_steps: int = 10, noun: str = "step"
    ):
        self._total, self._first, self._every = total_steps, first_step, every_steps
        self._noun = noun
        self._bar = None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        self._after_first: float | None = None
        if console.is_terminal:
            self._bar = progress.Progress(
                progress.TextColumn(self._noun),
                progress.MofNCompleteColumn(),
                progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[facts]}", markup=False),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=self._total, completed=self._first, facts="compiling"
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, num_steps_done: int, values: Mapping[str, float]) -> None:
        """Shows that `num_steps_done` of the run's steps are done, with metrics of the newest."""
        now = time.monotonic()
        facts = self._facts(num_steps_done, values, now)
        if self._bar:
            self._bar.update(self._task, completed=num_steps_done, facts=facts)
        elif num_steps_done % self._every == 0 or num_steps_done in (self._first + 1, self._total):
            say(f"{self._noun} {num_steps_done}/{self._total}  {facts}")

    def _facts(self, done: int, values: Mapping[str, float], now: float) -> str:
        facts = []
        for name in ("reward", "accuracy", "sft/loss"):
            if name in values:
                facts.append(f"{name.removeprefix('sft/')} {values[name]:.3f}")
        if "throughput/generated_tokens_per_s" in values:
            facts.append(f"{values['throughput/generated_tokens_per_s']:,.0f} tokens/s")
        facts.append(f"elapsed {_duration(now - self._start)}")
        # The first step compiles, and says nothing about the time of the others.
        if self._after_first is None:
            self._after_first, self._done_first = now, done
        elif done > self._done_first:
            per_step_s = (now - self._after_first) / (done - self._done_first)
            facts.append(f"left {_duration(per_step_s * (self._total - done))}")
        return "  ".join(facts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


# What a terminal or a page obeys: controls, the order of writing, and invisible marks; not tabs,
# nor the joiners of Persian, of Indic scripts and of emoji.
_OBEYED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with the characters spelled out that a terminal would obey; ends of lines remain."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _printable(text: str) -> str:
    """`visible`, and what the terminal's encoding lacks spelled out as well."""
    encoding = console.encoding
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)
