"""Reward for code that passes tests: it runs in a sandbox, and never beside what it must give."""

from __future__ import annotations

import atexit
import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.completions import after_thinking, begin_in_thinking, text_of
from grpo_jax.rewards.sandbox import cases as cases_lib
from grpo_jax.rewards.sandbox.client import Limits
from grpo_jax.rewards.sandbox.judging import Judge

_LANGUAGES = ("", "python", "python3", "py")


def code(
    prompts: list[Any],
    completions: list[Any],
    tests: list[Any],
    entry_point: list[str] | None = None,
    test_setup_code: list[str] | None = None,
    rendered_prompts: list[str] | None = None,
    log_metric: Callable | None = None,
    log_extra: Callable | None = None,
    *,
    partial: bool = True,
    timeout_s: float = 4.0,
    total_s: float = 8.0,
    memory_mib: int = 1024,
    processes: int = 16,
    disk_mib: int = 64,
    output_mib: int = 16,
    preload: Sequence[str] = (),
) -> list[float]:
    """The share of a row's tests that the code in each completion passes, from 0 to 1.

    The code is the last fenced block after thinking; without one the reward is 0. `tests` holds
    cases for stdin and stdout, calls of functions, or test code, in a format that
    `sandbox.cases.read` knows; `entry_point` and `test_setup_code` are further columns for it.
    `partial` False: 1 for all tests, else 0. `timeout_s` is for one case, `total_s` for a
    completion, the other limits for one program. `preload`: modules that are imported once for all
    programs. Raises ValueError for a row without tests, SandboxError if a sandbox fails.
    """
    memory, disk, output = (int(x * 2**20) for x in (memory_mib, disk_mib, output_mib))
    limits = Limits(timeout_s, memory, processes, disk, output)
    judge = _judge(limits, tuple(preload))
    inside = begin_in_thinking(prompts, rendered_prompts)
    rewards, told = [], []
    for i, completion in enumerate(completions):
        setup = "" if test_setup_code is None else test_setup_code[i] or ""
        entry = "" if entry_point is None else entry_point[i] or ""
        found = cases_lib.read(tests[i], setup, entry)
        text = last_block(text_of(completion), inside[i])
        if text is None:
            rewards.append(0.0)
            told.append("no code")
        else:
            verdict = judge.verdict(text, found, total_s, stop_early=not partial)
            share = verdict.passed / verdict.total
            rewards.append(share if partial else float(verdict.passed == verdict.total))
            told.append(str(verdict))
        if log_metric is not None:
            log_metric("code_missing", float(text is None))
            log_metric("code_stopped", float(text is not None and bool(verdict.stopped)))
    if log_extra is not None:
        log_extra("tests_passed", told)
    return rewards


code.options = (
    *("partial", "timeout_s", "total_s", "memory_mib", "processes", "disk_mib", "output_mib"),
    "preload",
)
code.column_faults = {"tests": cases_lib.fault_of}
code.right_or_wrong = True
code.one_by_one = True  # a call has one completion: each may take `total_s`
code.runs_programs = True  # the run asks first what this system can isolate


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if name == "preload":
            if isinstance(value, str) or not all(isinstance(x, str) for x in value):
                raise ValueError(f"preload = {value!r} must be a list of modules")
        elif name == "partial":
            if not isinstance(value, bool):
                raise ValueError(f"partial = {value!r} must be True or False")
        elif name in code.options and not (isinstance(value, (int, float)) and value > 0):
            raise ValueError(f"{name} = {value!r} must be a number above 0")


def _needs_of_worker(total_s: float = 8.0, memory_mib: int = 1024, **_: Any) -> tuple[float, float]:
    """What a reward worker must be allowed: seconds for a completion, and GiB."""
    return total_s + 1, 2 * memory_mib / 1024 + 0.5  # programs and tests


code.refuse, code.needs_of_worker = _refuse, _needs_of_worker


def last_block(text: str, thinking: bool = False) -> str | None:
    """The last closed block of Python, or of no language, between fences; None without one.

    `thinking`: whether the text begins inside of thinking, which is not read.
    """
    rest = after_thinking(text, thinking)
    found, opened, lines = None, None, []
    for line in (rest or "").splitlines():
        bare = line.strip()
        if opened is None:
            if bare.startswith("```"):
                opened, lines = bare.lstrip("`").strip().lower(), []
        elif bare == "```":
            if opened in _LANGUAGES:
                found = textwrap.dedent("\n".join(lines)) + "\n"
            opened = None
        else:
            lines.append(line)
    return found


@functools.cache
def _judge(limits: Limits, preload: tuple[str, ...]) -> Judge:
    """The process's only judge of these limits; its sandboxes start with their first program."""
    judge = Judge(limits, preload)
    atexit.register(judge.close)
    return judge
