"""Reads random input of every kind, and counts what comes of it.

    python tests/fuzz/campaign.py --cases 10000 [--seed N] [--kind NAME]
    python tests/fuzz/campaign.py --steps 30

A case runs, or is refused by one clear ValueError of our own; anything else is a failure, is shown
on standard error, and ends the program with status 1: another exception, one of a library, a
message with control characters, a case that takes longer than its limit, a file written outside of
the case's folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest has conftest.py for this
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "tests" / "helpers"), str(root)]
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import audit
import hypothesis
from kinds import KINDS, Kind

import grpo_jax
from grpo_jax.messages.console import one_line

OURS = Path(grpo_jax.__file__).parent
LIMIT_S = 60  # of a case, on a machine that may have other work; most take milliseconds
STEP_LIMIT_S = 600  # of a case that compiles


# What a terminal obeys, or no file can hold; all else stands in messages as it is.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclasses.dataclass
class Count:
    """What became of the cases of one kind."""

    cases: int = 0
    runs: int = 0
    refusals: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # by place; the first case


class TooSlow(BaseException):
    """Raised in a case when its time is over; a BaseException, which nothing catches."""


def run(kind: Kind, cases: int, seed: int | None, limit_s: int = LIMIT_S) -> Count:
    """Reads `cases` random cases; the same ones each time where `seed` is None.

    `limit_s`: of one case.
    """
    count = Count()

    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(kind.cases)
    def one(case: Any) -> None:
        count.cases += 1
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                outcome(kind.read, case, Path(folder), count, limit_s)
        finally:
            spent = time.monotonic() - start
            count.seconds += spent
            count.slowest_s = max(count.slowest_s, spent)

    (one if seed is None else hypothesis.seed(seed)(one))()
    return count


def outcome(
    read: Callable[[Any, Path], None], case: Any, folder: Path, count: Count, limit_s: int
) -> None:
    """Reads one case and adds what came of it."""
    before = signal.signal(signal.SIGALRM, _time_is_over)
    signal.alarm(limit_s)
    faulthandler.dump_traceback_later(3 * limit_s, exit=True)  # where no signal is heard
    place, shown, refused = "", "", False
    try:
        with audit.writes() as written:
            read(case, folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is one
        refused = isinstance(error, ValueError)
        name = type(error).__name__
        place = unclear(error) if refused else f"{name} at {_last_frame(error)}"
        shown = "".join(traceback.format_exception(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    elsewhere = audit.outside(written, folder.resolve())
    if elsewhere and not place:
        place = f"wrote {elsewhere[0]}"
    if place:
        if place not in count.failures:
            print(f"--- {place}\n{repr(case)[:2000]}\n{shown}", file=sys.stderr, flush=True)
        count.failures.setdefault(place, f"{repr(case)[:2000]}\n{shown}")
    else:
        count.refusals += refused
        count.runs += not refused


def unclear(error: ValueError) -> str:
    """What is wrong with a refusal; "" where it is one clear message of our own."""
    message = one_line(str(error))
    if not Path(_last_frame(error).partition(":")[0]).is_relative_to(OURS):
        return f"{type(error).__name__} at {_last_frame(error)}: {message[:200]}"
    if type(error).__name__ not in ("ValueError", "TemplateError", "Usage"):
        return f"{type(error).__name__} is passed on: {message[:200]}"
    if not 20 <= len(message) <= 2100 or _OBEYED.search(message):
        return f"a message of {len(message)} characters at {_last_frame(error)}: {message[:200]}"
    return ""


def _last_frame(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def _time_is_over(number: int, frame: Any) -> None:
    raise TooSlow("longer than its limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only this one, by the beginning of its name")
    parser.add_argument("--steps", type=int, help="in place of these, so many runs of one step")
    args = parser.parse_args()
    kinds = [k for k in KINDS if k.name.startswith(args.kind or "")]
    if args.steps:
        from steps import STEPS

        kinds, args.cases = [STEPS], args.steps
    limit_s = STEP_LIMIT_S if args.steps else LIMIT_S
    whole = sum(k.share for k in kinds)
    total = Count()
    print("| kind | cases | runs | refusals | failures | seconds | slowest s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in kinds:
        count = run(kind, round(args.cases * kind.share / whole), args.seed, limit_s)
        print(_row(kind.name, count), flush=True)
        for field in ("cases", "runs", "refusals", "seconds"):
            setattr(total, field, getattr(total, field) + getattr(count, field))
        total.slowest_s = max(total.slowest_s, count.slowest_s)
        total.failures |= count.failures
    print(_row("all", total))
    sys.exit(bool(total.failures))


def _row(name: str, count: Count) -> str:
    failed = count.cases - count.runs - count.refusals
    cells = (name, count.cases, count.runs, count.refusals, failed)
    return f"| {' | '.join(map(str, cells))} | {count.seconds:.0f} | {count.slowest_s:.1f} |"


if __name__ == "__main__":
    main()
