"""python -m grpo_jax.label: a model's completions, compared by rewards, become training data."""

from __future__ import annotations

import json

import pytest
from mistakes import TINY, make_model, refusal

from grpo_jax import cli, label
from grpo_jax.data import examples, sources
from grpo_jax.data.problems import Form
from grpo_jax.data.sources import Source
from grpo_jax.run.parts import Parts

MORE = (
    "--config.rewards.names=('odd_rewards:letters', 'answer_format')",
    "--config.rewards.weights=(1.0, 0.5)",
    "--config.rewards.num_workers=1",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(cli, "use_compile_cache", lambda *_: None)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Pairs that were made without an interruption."""
    out = tmp_path_factory.mktemp("labelled") / "whole.jsonl"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cli, "use_compile_cache", lambda *_: None)
        label.main(command(model, out))
    return out


def command(model, out, *more) -> list[str]:
    argv = ["--config", str(TINY), "--model", str(model), "--out", str(out)]
    return [*argv, "--num-problems", "6", "--batch", "2", *MORE, *more]


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_killed_program_goes_on(model, whole, tmp_path, monkeypatch, capsys):
    """Killed after one of three parts; the file is that of a run that was not, bit for bit."""
    rows = rows_of(whole)
    assert 1 <= len(rows) <= 6 and len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:  # letters, and half a point for the form
        for which in ("chosen", "rejected"):
            length, score = len(row[which]), row[f"score_{which}"]
            assert score - length in (0, 0.5)
        assert row["score_chosen"] > row["score_rejected"]

    write, written = Parts.write, []

    def killed(self, number, *given):
        if number == 1 and not written:
            written.append(number)
            raise KeyboardInterrupt
        write(self, number, *given)

    again = tmp_path / "again.jsonl"
    monkeypatch.setattr(Parts, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        label.main(command(model, again))
    assert not again.exists()
    status, told = refusal(label.main, command(model, again, "--seed", "1"))
    assert status == 1 and "other settings: seed." in told
    label.main(command(model, again))
    out = capsys.readouterr().out
    assert "1 of 3 parts are there already" in out and "rows of 6 prompts are in" in out
    assert again.read_bytes() == whole.read_bytes()
    assert not again.with_name("again.jsonl.parts").exists()
    status, told = refusal(label.main, command(model, again))
    assert status == 1 and "again.jsonl exists" in told


def test_what_is_written_is_what_the_trainers_read(model, whole, tmp_path):
    """Pairs by the reader of training data; of the same draws, every score."""
    scores = tmp_path / "scores.parquet"
    label.main(command(model, scores, "--kind", "scores"))
    rows = [row for _, row in sources.read(Source(str(scores)))]
    assert len(rows) == 24 and len({row["prompt"] for row in rows}) == 6
    by_prompt: dict[str, dict[str, float]] = {}
    for row in rows:
        each = row["rewards"]
        assert row["score"] == each["letters"] + 0.5 * each["answer_format"]
        by_prompt.setdefault(row["prompt"], {})[row["completion"]] = row["score"]
    pairs = list(examples.load(Source(str(whole)), Form(), "pair"))
    assert pairs
    for pair in pairs:
        drawn = by_prompt[pair.prompt]
        chosen, rejected = (drawn[text] for text in pair.completions)
        assert chosen == max(drawn.values()) > min(drawn.values()) == rejected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num-samples", "1"], "--num-samples 1 must be at least 2 for pairs"),
        (["--temperature", "0"], "--temperature 0.0 must be above 0"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--margin", "-1"], "--margin -1.0 must be 0 or more"),
        (["--out", "rows.csv"], "--out rows.csv must be a name in .jsonl or .parquet"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    status, told = refusal(label.main, command("no/model", "rows.jsonl", *more))
    assert status == 1 and words in told
