"""The tests' process: it runs a test file, asserts or a check against a program in another process.

The report goes through a channel that the program's process does not have.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.rewards.sandbox import remote


def run(
    text: str,
    reader: Iterator[bytes],
    send: Callable[[Any], None],
    report: Callable[[Any], None],
    told: Callable[[BaseException], str],
) -> int:
    """Runs what `text` asks for, as JSON: {"style", "parts", "setup", "entry"}; reports in lines.

    A line is {"total": N}, {"passed": bool, "error": text}, {"failed": text} for a program that
    cannot be loaded, or {"done": true}.
    """
    asked = json.loads(text)
    module, failed = remote.module(reader, send)
    if failed:
        report({"failed": failed})
        return 0
    sys.modules["solution"] = module
    sys.dont_write_bytecode = True
    tempfile.tempdir = os.getcwd()
    if asked["style"] == "pytest":
        _pytest(asked["parts"][0], report)
    else:
        names = {n: v for n, v in vars(module).items() if not n.startswith("__")}
        _statements(asked["setup"], asked["parts"], asked["entry"], names, report, told)
    report({"done": True})
    return 0


def _statements(
    setup: str,
    parts: list[str],
    entry: str,
    names: dict[str, Any],
    report: Callable[[Any], None],
    told: Callable[[BaseException], str],
) -> None:
    """Each part as a test of its own; with an `entry`, its check(entry) too."""
    report({"total": len(parts)})
    exec(compile(setup, "setup", "exec"), names)
    for part in parts:
        try:
            exec(compile(part, "test", "exec"), names)
            if entry:
                exec(compile(f"check({entry})", "test", "exec"), names)
            error = ""
        except BaseException as fault:
            error = told(fault)
        report({"passed": not error, "error": error})


class _Told:
    """A plugin of pytest that reports each test's outcome."""

    def __init__(self, report: Callable[[Any], None]):
        self.report = report

    def pytest_collection_finish(self, session: Any) -> None:
        self.report({"total": len(session.items)})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.report({"total": 1})
            self.report({"passed": False, "error": _last_line(report.longreprtext)})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            error = "" if report.passed else _last_line(report.longreprtext) or "skipped"
            self.report({"passed": report.passed, "error": error})


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E")]
    return (lines or text.splitlines() or [""])[0].removeprefix("E").strip()[:300]


def _pytest(text: str, report: Callable[[Any], None]) -> None:
    import pytest

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with open("test_solution.py", "w") as file:
        file.write(text)
    here = os.getcwd()
    sys.path.insert(0, here)
    options = f"-q -c /dev/null --rootdir {here} --capture=sys -p no:cacheprovider".split()
    pytest.main([*options, "-p", "no:faulthandler", "test_solution.py"], plugins=[_Told(report)])
