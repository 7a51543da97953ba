"""How many of its cases a program passes. The program runs in a sandbox, the judge does not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_jax.rewards.sandbox import plain
from grpo_jax.rewards.sandbox.cases import Call, Cases, Checks, Script
from grpo_jax.rewards.sandbox.client import Ended, Limits, Running, Sandbox, SandboxError
from grpo_jax.rewards.sandbox.comparing import same_output, same_value


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How many cases a program passed, and what the first other one said."""

    passed: int
    total: int
    fault: str = ""  # of the first case that it did not pass; partly the program's own words
    stopped: str = ""  # the first limit that a case was stopped at; see `client.Ended`

    def __str__(self) -> str:
        return f"{self.passed} of {self.total} passed" + (f": {self.fault}" if self.fault else "")


class Judge:
    """Judges programs. A context manager."""

    def __init__(self, limits: Limits, preload: Sequence[str] = ()):
        self.limits = limits
        self.programs = Sandbox(limits, tuple(preload))
        self._tests: Sandbox | None = None  # a second one, for tests; started when it is needed

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        self.programs.close()
        if self._tests is not None:
            self._tests.close()

    def verdict(
        self, code: str, cases: Cases, total_s: float, *, stop_early: bool = False
    ) -> Verdict:
        """How many of the cases the code passes, with `total_s` for all together.

        `stop_early`: the first case that fails decides. Raises SandboxError if a sandbox itself
        fails; whatever the code does is its own fault.
        """
        end = time.monotonic() + total_s
        if isinstance(cases, Checks):
            return self._of_tests(code, cases, end)
        faults: list[tuple[str, str]] = []
        passed = 0
        each = self._scripts(code, cases, end) if isinstance(cases[0], Script) else None
        with contextlib.closing(each or self._calls(code, cases, end)) as outcomes:
            for number, (fault, stopped) in enumerate(outcomes):
                passed += not fault
                if fault:
                    faults.append((f"case {number}: {fault}", stopped))
                    if stop_early:
                        break
        fault, _ = faults[0] if faults else ("", "")
        stopped = next((s for _, s in faults if s), "")
        return Verdict(passed, len(cases), fault, stopped)

    def _seconds(self, end: float) -> float:
        return min(self.limits.seconds, max(end - time.monotonic(), 0.01))

    # --- Whole programs ---

    def _scripts(self, code: str, cases: Sequence[Script], end: float) -> Iterator[tuple[str, str]]:
        for case in cases:
            if time.monotonic() >= end:
                yield "no time was left", "time"
                continue
            done = self.programs.script(code, case.stdin, self._seconds(end))
            if done.stopped or done.status:
                yield _fault(done), done.stopped
            elif same_output(done.output.decode("utf-8", "replace"), case.stdout):
                yield "", ""
            else:
                yield "it printed something else", ""

    # --- Functions ---

    def _calls(self, code: str, cases: Sequence[Call], end: float) -> Iterator[tuple[str, str]]:
        """The cases one after the other in one process; in a new one after it has ended."""
        todo = list(cases)
        while todo:
            if time.monotonic() >= end:
                yield from [("no time was left", "time")] * len(todo)
                return
            left_s = end - time.monotonic()
            how = {"seconds": self._seconds(end), "cpu_s": left_s}
            with self.programs.running("calls", code, **how) as running:
                first = _message(running)
                if first is None or "error" in first:
                    fault = _ended(running) if first is None else str(first["error"])[:300]
                    yield from [(fault, running.stopped)] * len(todo)
                    return
                while todo:
                    case = todo.pop(0)
                    running.deadline = time.monotonic() + self._seconds(end)
                    answer = self._answer(running, case)
                    if answer is None:  # it ended
                        yield _ended(running), running.stopped
                        break
                    yield answer, ""

    @staticmethod
    def _answer(running: Running, case: Call) -> str | None:
        """The fault of one call, "" if there is none; None if the program ended."""
        running.send({"name": case.name, "args": plain.packed(case.args),
                      "kwargs": plain.packed(case.kwargs)})  # fmt: skip
        said = _message(running)
        if said is None:
            return None
        if "error" in said:
            return str(said["error"])[:300]
        try:
            value = plain.unpacked(said["value"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return "it returned something that cannot be read"
        try:
            return "" if any(same_value(value, x) for x in case.results) else "another result"
        except RecursionError:
            return "it returned something that nests too deeply"

    # --- Test code ---

    def _of_tests(self, code: str, tests: Checks, end: float) -> Verdict:
        if self._tests is None:
            preload = ("pytest", "_pytest.assertion.rewrite") if tests.style == "pytest" else ()
            self._tests = Sandbox(self.limits, preload)
        asked = {"style": tests.style, "setup": tests.setup, "entry": tests.entry,
                 "parts": tests.parts}  # fmt: skip
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        seconds = max(end - time.monotonic(), 0.01)
        with contextlib.ExitStack() as running:
            begin = running.enter_context
            begin(one), begin(other)
            served = begin(self.programs.running("served", code, seconds=seconds, peer=one))
            test = begin(
                self._tests.running("tests", json.dumps(asked), seconds=seconds, peer=other)
            )
            one.close()
            other.close()
            return _report(test, served, len(tests.parts))


def _report(test: Running, served: Running, least: int) -> Verdict:
    """What the tests' process says; that of the program says nothing here."""
    total, passed, fault, is_done = 0, 0, "", False
    while (said := _message(test)) is not None:
        total += said.get("total", 0)
        if "failed" in said:
            fault = fault or str(said["failed"])
        if "passed" in said:
            passed += said["passed"]
            fault = fault or str(said["error"])
        if "done" in said:
            is_done = True
            break
    total = max(total, least)
    if not is_done and not fault:
        fault = _ended(served if served.stopped else test)
    return Verdict(min(passed, total), total, fault[:300], served.stopped or test.stopped)


def _message(running: Running) -> dict[str, Any] | None:
    """The next line of a program; None for its end, {"error"} for what is no such line."""
    line = running.line()
    if line is None:
        return None
    try:
        said = json.loads(line)
        return said if isinstance(said, dict) else {"error": "it said something unreadable"}
    except (ValueError, RecursionError):
        return {"error": "it said something unreadable"}


def _ended(running: Running) -> str:
    if running.end is None:
        running.until_end()
    return _fault(running.until_end())


def _fault(done: Ended) -> str:
    if done.stopped:
        return f"it was stopped at the limit of {done.stopped}"
    return done.error[:300] or f"it ended with status {done.status}"


__all__ = ["Judge", "SandboxError", "Verdict"]
