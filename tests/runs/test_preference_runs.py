"""Whole runs of `grpo_jax.dpo`: killed and continued, with adapters, and what they refuse."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from driving import drive
from kill_and_resume import log_differences, logged, state_differences

from grpo_jax import dpo

TINY = Path(__file__).parents[1] / "helpers" / "tiny_config.py"
STEPS = 5
OPTIONS = [
    f"--config.preference.num_steps={STEPS}",
    "--config.preference.batch=6",
    "--config.preference.max_tokens=56",
    "--config.preference.learning_rate=1e-3",
    "--config.preference.checkpoint_every_steps=2",
    "--config.preference.evaluate_every_steps=2",
    "--config.logging.token_metrics=True",
]
KTO = ["--config.preference.loss=kto", "--config.preference.beta=0.5"]


def argv(folder: Path, *more: str) -> list[str]:
    return ["--config", str(TINY), "--workdir", str(folder), *OPTIONS, *more]


def model_of(folder: Path) -> str:
    return f"--config.model.path={folder / 'bootstrap' / 'export'}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    """Runs that were left alone; one that was stopped, and one that was killed, both continued."""
    root = tmp_path_factory.mktemp("runs")
    job = lambda name, *more, **how: {"argv": argv(root / name, *more), "program": "dpo", **how}  # noqa: E731
    model = model_of(root / "dpo")
    first = [
        job("dpo"),
        job("kto", model, *KTO),
        job("kto, stopped", model, *KTO, after=3, of="sft"),
        job("dpo, killed", model, after=3, of="sft", killed=True, **{"in": "update"}),
    ]
    ends = drive(first, alone, status=-signal.SIGKILL)
    kept = (root / "dpo, killed" / "reference.npz").read_bytes()
    ends += drive([job("dpo, killed", model), job("kto, stopped", model, *KTO)], alone)
    return root, ends, kept


def test_a_killed_or_stopped_run_continues_bit_for_bit(runs):
    root, ends, kept = runs
    assert ends[:2] == ["finished"] * 2 and ends[3:] == ["finished"] * 2
    assert ends[2].startswith("Stopped by SIGTEST at step 3;")
    for whole, name in (("dpo", "dpo, killed"), ("kto", "kto, stopped")):
        assert not state_differences(root / whole, root / name)
        assert not log_differences(root / whole, root / name)
    assert (root / "dpo, killed" / "reference.npz").read_bytes() == kept


def test_a_run_begins_at_the_reference_and_leaves_it(runs):
    root, *_ = runs
    for name, at_start in (("dpo", np.log(2)), ("kto", 0.5)):
        lines = logged(root / name)
        assert lines[0]["preference/eval_loss"] == pytest.approx(at_start, abs=1e-5)
        assert abs(lines[0]["preference/eval_reward_margin"]) < 1e-4
        updates = [line for line in lines if "preference/loss" in line]
        assert updates[0]["preference/loss"] == pytest.approx(at_start, abs=1e-5)
        assert all(0 < line["preference/entropy"] < np.log(50) for line in updates)
        assert lines[-1]["preference/eval_reward_margin"] > 0.01
        assert lines[-1]["preference/eval_loss"] < at_start
        measured = [line["step"] for line in lines if "preference/eval_loss" in line]
        assert measured == [0, 2, 4, STEPS]
        assert all("eval/accuracy" in lines[step] for step in measured)
    shown = [json.loads(line) for line in (root / "kto" / "samples.jsonl").open()]
    assert "desirable" in json.dumps(shown)


def test_adapters_begin_at_the_model_without_them(runs, tmp_path, one_device):
    root, *_ = runs
    dpo.main(argv(tmp_path / "run", model_of(root / "dpo"), "--config.lora.rank=4"))
    lines = logged(tmp_path / "run")
    assert lines[0]["preference/eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[-1]["preference/loss"] < np.log(2)
    kept, full = (dict(np.load(f / "reference.npz")) for f in (tmp_path / "run", root / "dpo"))
    np.testing.assert_allclose(kept["train"], full["train"], rtol=1e-5)


@pytest.mark.parametrize("loss", ["robust", "kto", "orpo"])
def test_a_check_compiles_what_a_run_would_and_writes_nothing(tmp_path, one_device, capsys, loss):
    options = [f"--config.preference.loss={loss}"]
    dpo.main(argv(tmp_path / "run", *options, "--check"))
    told = capsys.readouterr().out
    assert told.count("Nothing speaks against this run.") == 2  # the supervised start, and this
    rows = 80 if loss == "kto" else 40
    assert f"Rows: {rows} to train on, {rows // 5} held out" in told
    assert f"The run: {STEPS} updates of 6 rows" in told and "GiB of each device" in told
    assert not (tmp_path / "run").exists()


def rows(*lines: dict) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


PAIR = {"prompt": "1+2=", "chosen": "#### 3", "rejected": "#### 4"}
REFUSALS = {
    "a pair without its second half": (
        rows(PAIR, {**PAIR, "rejected": None}), [], ("data.path", "line 2", "rejected"),
    ),
    "a pair that is longer than its limit": (
        rows(PAIR, {**PAIR, "chosen": "1" * 60}), [],
        ("preference.max_tokens = 56", "line 2", "61 tokens", "preference.too_long"),
    ),
    "a label that is none": (
        rows({"prompt": "1+2=", "completion": "3", "label": 7}), KTO, ("line 1", "`label` is 7"),
    ),
    "one prompt alone, for KTO": (rows(PAIR), KTO, ("preference.loss", "one prompt")),
    "an option that the loss does not read": (
        rows(PAIR), ["--config.preference.loss=hinge", "--config.preference.label_smoothing=0.1"],
        ("preference.label_smoothing = 0.1", "'hinge'", "sigmoid, robust"),
    ),
    "labels that are mostly wrong": (
        rows(PAIR), ["--config.preference.label_smoothing=0.5"],
        ("preference.label_smoothing = 0.5", "below 0.5"),
    ),
    "a stream, which the reference would have to read first": (
        rows(PAIR), ["--config.data.streaming=True"], ("data.streaming = True", '"orpo"'),
    ),
    "no updates": (rows(PAIR), ["--config.preference.num_steps=0"], ("nothing to train",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused_in_one_message(runs, tmp_path, name, one_device):
    text, options, words = REFUSALS[name]
    (tmp_path / "data.jsonl").write_text(text)
    given = ["--config.data.task=", f"--config.data.path={tmp_path / 'data.jsonl'}"]
    with pytest.raises(ValueError) as refused:
        dpo.main(argv(tmp_path / "run", model_of(runs[0] / "dpo"), *given, *options))
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
