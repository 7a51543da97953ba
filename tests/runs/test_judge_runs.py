"""Runs with an LLM judge: they finish whatever it does, and continue with the verdicts they had."""

from __future__ import annotations

import json
import zlib

import pytest
import stub_judge
from driving import drive
from kill_and_resume import log_differences, state_differences
from mistakes import TINY, make_model, refusal
from stub_judge import StubJudge, completion, response

from grpo_jax import train
from grpo_jax.metrics.names import METRICS, is_known
from grpo_jax.run.append_log import read_jsonl

RUBRIC = """
mode = "MODE"
task = "An answer to a sum."
[[criteria]]
name = "good"
ask = "Is it right?"
"""
BAD = (b"", None, response(400), response(302, b"", "Location: http://other"),
       response(200, b"x" * 20_000), b"garbage\r\n", completion("Well."))  # fmt: skip


def arguments(tmp_path, name, url, model, mode="single", **more):
    rubric = tmp_path / f"{mode}.toml"
    rubric.write_text(RUBRIC.replace("MODE", mode))
    options = {
        "model.path": model,
        "rewards.names": f"['exact_answer','judge:{rubric} as judge']",
        "rewards.weights": "[0.1,1.0]",
        "rewards.max_failed_share": 0.9,
        "judge.base_url": url,
        "judge.model": "stub",
        "evaluation.num_problems": 0,
        "loop.num_steps": 3,
        "checkpoint.every_steps": 2,
        **more,
    }
    argv = ["--config", str(TINY), "--workdir", str(tmp_path / name)]
    return [*argv, *(f"--config.{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("judge") / "model")


def fault_of(text: str) -> bytes | bool | None:
    """How the judge fails on a text; False: it judges it."""
    n = zlib.crc32(text.encode())
    return BAD[n // 2 % len(BAD)] if n % 2 else False


def half_broken(body, i):
    fault = fault_of(stub_judge.answers(body)[0])
    return completion(stub_judge.by_length(body)) if fault is False else fault


def test_a_run_survives_its_judge(tmp_path, model, one_device):
    """Half of the texts fail, in every way; they are unknown, and the run learns from the rest."""
    more = {"judge.timeout_s": 0.2, "judge.retries": 1, "judge.deadline_s": 3,
            "judge.max_response_kib": 10, "logging.num_samples": 16}  # fmt: skip
    with StubJudge(half_broken) as stub:
        argv = arguments(tmp_path, "run", stub.url, model, **more)
        status, message = refusal(train.main, argv)
    assert status is None, message
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    names = {name for row in rows for name in row} - {"step"}
    assert all(is_known(name) for name in names)
    failed = {name for name in names if name.startswith("judge/failed_by_")}
    assert {"judge/failed_by_connection", "judge/failed_by_timeout"} <= failed
    told = {name for name in METRICS if name.startswith("judge/") and "failed" not in name}
    found = {name.removesuffix("/judge") for name in names if name.startswith("judge/")}
    assert {name.removesuffix("/NAME") for name in told} - {"judge/flip_share"} <= found
    for row in rows:
        assert 0 < row["rewards/unknown_share"] == row["rewards/failed/judge"] / 16 < 1
    samples = list(read_jsonl(tmp_path / "run" / "samples.jsonl"))
    for sample in samples:
        is_bad = fault_of(sample["completion"].strip()) is not False
        assert (sample["rewards"]["judge"] is None) == is_bad
        assert not (is_bad and sample["advantage"])
    assert any(sample["advantage"] for sample in samples)
    assert "Traceback" not in message


def test_a_judge_that_is_away_ends_the_run_and_costs_little(tmp_path, model, one_device):
    more = {"judge.timeout_s": 0.2, "judge.retries": 0, "judge.deadline_s": 1}
    with StubJudge(lambda body, i: None) as stub:
        argv = arguments(tmp_path, "run", stub.url, model, **more)
        status, message = refusal(train.main, argv)
    assert status == 1 and "no completion has got the reward 'judge' since the start" in message
    assert "did not answer in judge.timeout_s = 0.2 s" in message
    # Nor does a run begin without an address.
    argv = arguments(tmp_path, "other", "$NO_SUCH_VARIABLE", model)
    status, message = refusal(train.main, argv)
    assert status == 1 and "the environment variable NO_SUCH_VARIABLE is not set" in message
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_killed_run_continues_with_the_verdicts_it_had(tmp_path, model, alone):
    """Bit for bit, though the judge says something else each time that it is asked."""

    def whimsical(body, i):
        told = "2 > 1 > 3 > 4" if i % 2 else "4 > 3 = 1 > 2"
        return completion(f"VERDICT-{stub_judge.number(body)}: {told}")

    with StubJudge(whimsical) as stub:

        def job(name, **how):
            return {"argv": arguments(tmp_path, name, stub.url, model, "listwise"), **how}

        # 4 updates a step: killed while it waits for the rewards of the third.
        drive([job("killed", **{"in": "rewards", "after": 8, "killed": True})], alone, -9)
        file = tmp_path / "killed" / "judgements.jsonl"
        before = file.read_bytes()
        with file.open("ab") as opened:
            opened.write(b'{"key": "torn')
        assert drive([job("killed")], alone) == ["finished"]
        lines = file.read_bytes().splitlines()
        assert lines[: before.count(b"\n")] == before.splitlines()
        keys = [json.loads(line)["key"] for line in lines if not line.endswith(b"torn")]
        assert len(set(keys)) == len(keys) > before.count(b"\n") * 2 // 3  # none was asked twice
        verdicts = {tuple(json.loads(x)["verdict"]) for x in lines if not x.endswith(b"torn")}
        assert len(verdicts) >= 2
        # A run that was not stopped, with the same verdicts: it asks for none.
        whole, asked = tmp_path / "whole", len(stub.requests)
        whole.mkdir()
        (whole / file.name).write_bytes(file.read_bytes())
        assert drive([job("whole")], alone) == ["finished"]
        assert len(stub.requests) == asked
    assert not state_differences(whole, tmp_path / "killed")
    assert not log_differences(whole, tmp_path / "killed")
