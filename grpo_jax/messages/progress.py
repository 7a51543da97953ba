"""Progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich import progress
from rich.table import Column

from grpo_jax.messages import console
from grpo_jax.messages.console import say

_WIDE = 110  # columns of a terminal that has room for a bar
_LONGEST_S = 60.0  # between two lines, if there is no bar


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
        self._bar = None

    def __enter__(self) -> Progress:
        self._start = self._said = time.monotonic()
        self._after_first: float | None = None
        if console.console.is_terminal and console.is_full():
            # On a narrow terminal there is no bar, and long metrics are cut, not the step.
            line = Column(no_wrap=True, overflow="ellipsis")
            bar = (
                progress.TextColumn(self._noun),
                progress.MofNCompleteColumn(),
                progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[facts]}", markup=False),
            )
            self._is_wide = console.console.width >= _WIDE
            narrow = (progress.TextColumn("{task.fields[facts]}", markup=False, table_column=line),)
            self._bar = progress.Progress(
                *(bar if self._is_wide else narrow),
                console=console.console,
                expand=self._is_wide,
            )
            self._task = self._bar.add_task(
                "",
                total=self._total,
                completed=self._first,
                facts=self._told(self._first, "compiling"),
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, num_steps_done: int, values: Mapping[str, float]) -> None:
        """Shows that `num_steps_done` of the run's steps are done, with the metrics of the last."""
        now = time.monotonic()
        facts = self._facts(num_steps_done, values, now)
        if console.is_json():
            console.line(
                {"event": self._noun, "step": num_steps_done, "steps": self._total, **values}
            )
        elif self._bar:
            told = self._told(num_steps_done, facts)
            self._bar.update(self._task, completed=num_steps_done, facts=told)
        elif self._is_due(num_steps_done, now):
            say(f"{self._noun} {num_steps_done}/{self._total}  {facts}")
            self._said = now

    def _is_due(self, done: int, now: float) -> bool:
        if self._every_s is not None:
            return done == self._total or now - self._said >= self._every_s
        if now - self._said >= _LONGEST_S:
            return True
        return done % self._every == 0 or done in (self._first + 1, self._total)

    def _told(self, done: int, facts: str) -> str:
        """The text beside the bar; without a bar, the step and the text."""
        return facts if self._is_wide else f"{self._noun} {done}/{self._total}  {facts}"

    def _facts(self, done: int, values: Mapping[str, float], now: float) -> str:
        facts = []
        for name in ("reward", "accuracy", "sft/loss"):
            if name in values:
                facts.append(f"{name.removeprefix('sft/')} {values[name]:.3f}")
        if "throughput/generated_tokens_per_s" in values:
            facts.append(f"{values['throughput/generated_tokens_per_s']:,.0f} tokens/s")
        facts.append(f"elapsed {_duration(now - self._start)}")
        # The first step compiles, so the time left is estimated without it.
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
