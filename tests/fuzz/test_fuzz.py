"""Random input of every kind ends in a run or one clear message; the same cases each time.

`python tests/fuzz/campaign.py --cases 10000` reads more, and others with another `--seed`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import campaign
import jax
import pytest
from hypothesis import strategies as st
from kinds import KINDS, Kind

from grpo_jax.config import options
from grpo_jax.config.dotted import flatten

CASES = 300


@pytest.mark.parametrize("kind", KINDS, ids=[k.name.replace(" ", "-") for k in KINDS])
def test_every_case_runs_or_is_refused(kind):
    count = campaign.run(kind, max(3, round(CASES * kind.share)), seed=None)
    assert not count.failures, "\n".join(f"{p}: {s[:3000]}" for p, s in count.failures.items())
    assert count.runs and count.refusals and count.cases == count.runs + count.refusals


@pytest.mark.slow
def test_what_the_config_accepts_runs(monkeypatch):
    """Once on a mesh of eight devices, once on one device."""
    from steps import STEPS

    devices, numbers = jax.devices(), iter((8, 1))

    def read(options, folder):
        seen = devices[: next(numbers)]
        with monkeypatch.context() as here:
            here.setattr(jax, "devices", lambda *backend: seen)
            here.setattr(jax, "clear_caches", lambda: None)  # which many runs need, not two
            STEPS.read(options, folder)

    # Hypothesis begins with no options, which other tests run: two of many options in its place.
    cases = STEPS.cases.filter(lambda options: len(options) > 4)
    many = dataclasses.replace(STEPS, cases=cases, read=read)
    count = campaign.run(many, 2, seed=None, limit_s=campaign.STEP_LIMIT_S)
    assert count.runs and count.cases == 2
    assert not count.failures, "\n".join(f"{p}: {s[:3000]}" for p, s in count.failures.items())


def test_steps_name_options_that_there_are():
    """One that there is not is refused, as if its value did not fit."""
    from steps import OPTIONS_OF_STEPS

    assert OPTIONS_OF_STEPS <= flatten(options.default()).keys()


def _fails(value: int, folder: Path) -> None:
    if value == 0:
        raise KeyError("not for the user")
    if value == 1:
        json.loads("{")  # a ValueError, but not of ours
    if value == 2:
        (folder.parent / "elsewhere").touch()


def test_what_is_no_clear_message_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign.tempfile, "tempdir", str(tmp_path))
    count = campaign.run(Kind("bad", 1.0, st.integers(0, 2), _fails), 20, seed=None)
    places = sorted(count.failures)
    assert len(places) == 3 and count.runs == count.refusals == 0
    assert places[0].startswith("JSONDecodeError at ") and places[1].startswith("KeyError at ")
    assert places[2] == f"wrote {tmp_path.resolve() / 'elsewhere'}"


def test_a_case_that_does_not_end_is_counted():
    def endless(value, folder):
        while True:
            pass

    count = campaign.run(Kind("endless", 1.0, st.just(0), endless), 1, seed=None, limit_s=1)
    assert [place.partition(" ")[0] for place in count.failures] == ["TooSlow"]
