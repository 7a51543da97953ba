"""Progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich import progress
from rich.table import Column
from rich.text import Text

from grpo_jax.messages import console
from grpo_jax.messages.console import say

_WIDE = 110  # columns of a terminal that has room for a bar
_LONGEST_S = 60.0  # between two lines, if there is no bar
_FIRST_TO_GO = (
    "speed",
    "accuracy",
    "elapsed",
    "left",
    "phase",
)  # left out first on a narrow terminal


def show_progress(noun: str, state: Callable[[], tuple[int, int]]) -> None:
    """Waits until `state()`, (done, total), is complete; on a terminal it shows a bar."""
    bar = progress.Progress(
        progress.TextColumn(noun),
        progress.MofNCompleteColumn(),
        progress.BarColumn(),
        progress.TimeRemainingColumn(),
        console=console.console,
        transient=True,
        disable=not (console.console.is_terminal and console.is_full()),
    )
    with bar:
        task = bar.add_task(noun, total=None)
        while (now := state())[0] < now[1]:
            bar.update(task, completed=now[0], total=now[1])
            time.sleep(0.02)


class Progress:
    """Shows a run's progress: a bar on a terminal, elsewhere a line every `every_steps` steps.

    If steps are slow, it prints at least one line a minute. With `every_s`, for very short steps,
    it prints a line after that many seconds and at the end. As JSON it prints a line for each step,
    with all metrics. A context manager; `update` is called after each step.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        every_steps: int = 10,
        every_s: float | None = None,
        noun: str = "step",
    ):
        self._total, self._first, self._every = total_steps, first_step, every_steps
        self._every_s, self._noun = every_s, noun
        self._bar, self._phase = None, ""

    def __enter__(self) -> Progress:
        self._start = self._said = time.monotonic()
        self._after_first: float | None = None
        self._done, self._values = self._first, None
        if console.console.is_terminal and console.is_full():
            # On a narrow terminal there is no bar, and facts are left out, but for the step.
            self._is_wide = console.console.width >= _WIDE
            facts = _Facts(self._told, Column(no_wrap=True, overflow="ellipsis"))
            bar = (
                progress.TextColumn(self._noun),
                progress.MofNCompleteColumn(),
                progress.BarColumn(bar_width=None),
            )
            self._bar = progress.Progress(
                *(bar if self._is_wide else ()),
                facts,
                console=console.console,
                expand=self._is_wide,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first)
            self._bar.start()
        return self

    def begin(self, phase: str) -> None:
        """Names what is done now; that is shown until the first step is done."""
        self._phase = phase

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, num_steps_done: int, values: Mapping[str, float]) -> None:
        """Shows that `num_steps_done` of the run's steps are done, with the metrics of the last."""
        now = time.monotonic()
        # The first step compiles, and says nothing about the time of the others.
        if self._after_first is None:
            self._after_first, self._done_first = now, num_steps_done
        self._done, self._values, self._updated = num_steps_done, values, now
        if console.is_json():
            console.line(
                {"event": self._noun, "step": num_steps_done, "steps": self._total, **values}
            )
        elif self._bar:
            self._bar.update(self._task, completed=num_steps_done)
        elif self._is_due(num_steps_done, now):
            facts = "  ".join(self._facts(now).values())
            say(f"{self._noun} {num_steps_done}/{self._total}  {facts}")
            self._said = now

    def _is_due(self, done: int, now: float) -> bool:
        if self._every_s is not None:
            return done == self._total or now - self._said >= self._every_s
        if now - self._said >= _LONGEST_S:
            return True
        return done % self._every == 0 or done in (self._first + 1, self._total)

    def _told(self) -> str:
        """The text beside the bar; without a bar, the step and the text. It follows the clock."""
        facts = self._facts(time.monotonic())
        if self._is_wide:
            return "  ".join(facts.values())
        told = {"step": f"{self._noun} {self._done}/{self._total}"} | facts
        for name in _FIRST_TO_GO:
            if len("  ".join(told.values())) <= console.console.width:
                break
            told.pop(name, None)
        return "  ".join(told.values())

    def _facts(self, now: float) -> dict[str, str]:
        facts, values = {}, self._values or {}
        if self._values is None:
            facts["phase"] = f"compiling {self._phase}".strip()
        for name in ("reward", "accuracy", "sft/loss", "preference/loss", "reward_model/loss"):
            if name in values:
                facts[name] = f"{name.rpartition('/')[2]} {values[name]:.3f}"
        if "throughput/generated_tokens_per_s" in values:
            facts["speed"] = f"{values['throughput/generated_tokens_per_s']:,.0f} tokens/s"
        facts["elapsed"] = f"elapsed {_duration(now - self._start)}"
        if self._after_first is not None and self._done > self._done_first:
            per_step_s = (self._updated - self._after_first) / (self._done - self._done_first)
            facts["left"] = f"left {_duration(per_step_s * (self._total - self._done))}"
        return facts


class _Facts(progress.ProgressColumn):
    """A column whose text is computed each time it is drawn."""

    def __init__(self, text: Callable[[], str], column: Column):
        super().__init__(table_column=column)
        self._text = text

    def render(self, task: progress.Task) -> Text:
        return Text(self._text())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
