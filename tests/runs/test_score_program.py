"""python -m grpo_jax.score: rewards tried on a dataset without a model."""

from __future__ import annotations

import json
import sys

import pytest
from mistakes import make_model, refusal

from grpo_jax import score
from grpo_jax.models.hf.tokenizer import load_tokenizer
from grpo_jax.rewards import ensembles, registry

ROWS = [
    {"prompt": "1+1=", "answer": "#### 2", "guess": "#### 2", "level": 1, "right": True},
    {"prompt": "2+2=", "answer": "#### 4", "guess": "5", "level": 2, "right": False},
    {"prompt": "3+3=", "answer": "so #### 6", "guess": "?", "level": 3, "right": False},
]


@pytest.fixture
def config(tmp_path):
    """A config file over three rows; the model is never opened."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "sums.py"
    file.write_text(
        "from grpo_jax.config import options as config_lib\n"
        "def get_config():\n"
        "    c = config_lib.default()\n"
        f"    c.data.path = {str(data)!r}\n"
        "    c.model.path = 'no/model'\n"
        "    c.rewards.names = ('exact_answer', 'answer_format')\n"
        "    c.rewards.weights = (1.0, 0.5)\n"
        "    c.rewards.num_workers = 1\n"
        "    return c\n"
    )
    return file


def run(capsys, config, *more):
    score.main(["--config", str(config), *more])
    return capsys.readouterr().out


def test_a_column_is_scored(config, tmp_path, capsys):
    out = run(capsys, config, "--json", str(tmp_path / "new" / "f.json"))
    found = json.loads((tmp_path / "new" / "f.json").read_text())
    more = {"correlations", "per_1000", "logged"}
    assert found.keys() == {"rows", "rewards", "rows_per_second"} | more
    assert found["rows"] == 3 and found["rows_per_second"] > 0
    seconds = found["rewards"]["exact_answer"].pop("seconds_per_1000")
    assert found["rewards"]["exact_answer"] == {
        "mean": 1.0, "std": 0.0, "min": 1.0, "median": 1.0, "max": 1.0,
        "ones": 3, "failed": 0, "none": 0,
    }  # fmt: skip
    assert 0 < seconds < 1000 * 3
    for words in ("Rewards of 3 rows", "exact_answer", "rows per second", "sums.jsonl, line"):
        assert words in out


def test_another_column_and_the_first_rows(config, tmp_path, capsys):
    files = ["--json", str(tmp_path / "f.json"), "--out", str(tmp_path / "rows.jsonl")]
    run(capsys, config, "--completion-column", "guess", "--limit", "2", *files)
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["rows"] == 2 and found["rewards"]["exact_answer"]["mean"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["rewards"]["exact_answer"] for row in rows] == [1, 0]
    assert [row["completion"] for row in rows] == ["#### 2", "5"]
    assert rows[1]["where"].endswith("sums.jsonl, line 2") and rows[1]["failed"] == []


def test_numbers_are_the_texts_that_a_person_would_write(config, tmp_path, capsys):
    run(capsys, config, "--completion-column", "level", "--out", str(tmp_path / "rows.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["1", "2", "3"]


def test_a_task_is_scored_by_its_worked_solutions(tmp_path, capsys):
    """Some of which guess, or slip, by design: not all are right, and most have the form."""
    score.main(["--config", "quickstart", "--limit", "200", "--json", str(tmp_path / "f.json"),
                "--config.rewards.num_workers=1"])  # fmt: skip
    capsys.readouterr()
    found = json.loads((tmp_path / "f.json").read_text())["rewards"]
    assert 0.3 < found["exact_answer"]["mean"] < 0.7
    assert found["answer_format"]["mean"] == 1.0


def test_a_file_of_completions(config, tmp_path, capsys):
    """A line feed ends a line, as in data files; no other separator does."""
    file = tmp_path / "given.jsonl"
    texts = ["2", "a\u2028\u0085b\x0b\r #### 4", ""]
    lines = [json.dumps({"completion": text}, ensure_ascii=False) for text in texts]
    file.write_text("\ufeff" + lines[0] + "\r\n\n" + "\n".join(lines[1:]))
    files = ["--json", str(tmp_path / "f.json"), "--out", str(tmp_path / "rows.jsonl")]
    out = run(capsys, config, "--completions", str(file), *files)
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["rewards"]["exact_answer"]["ones"] == 1
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["completion"] for row in rows] == texts
    assert "state no answer" not in out


def test_bare_answers_are_told(config, capsys):
    """Two of three guesses are bare, or none at all."""
    out = run(capsys, config, "--completion-column", "guess").replace("\n", " ")
    assert "2 of the 3 texts of the column `guess` state no answer" in out
    assert "state no answer" not in run(capsys, config).replace("\n", " ")
    out = run(
        capsys, config, "--completion-column", "guess", "--config.rewards.names=answer_format",
        "--config.rewards.weights=1.0",
    )  # fmt: skip
    assert "state no answer" not in out.replace("\n", " ")


def test_failures_are_shown(config, tmp_path, capsys, monkeypatch):
    (tmp_path / "hanging.py").write_text(
        "import time\n"
        "def waits(completions, level, **columns):\n"
        "    time.sleep(1000 * (level[0] == 2))\n"
        "    return [None if n == 3 else 1.0 for n in level]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])  # it lies beside the config
    out = run(
        capsys, config, "--json", str(tmp_path / "f.json"),
        "--config.rewards.names=hanging:waits", "--config.rewards.weights=1.0",
        "--config.rewards.timeout_s=0.5",
    )  # fmt: skip
    found = json.loads((tmp_path / "f.json").read_text())["rewards"]["waits"]
    counts = {"mean": 1.0, "std": 0.0, "ones": 1, "failed": 1, "none": 1}
    assert {name: found[name] for name in counts} == counts
    assert "longer than rewards.timeout_s" in out.replace("\n", " ")
    assert "sums.jsonl, line 2" in out.replace("\n", "")
    slowest = out.replace("\n", "").partition("Slowest of waits: ")[2].split(";")
    assert slowest[0].endswith("sums.jsonl, line 2")


def test_a_reward_gets_the_tokens_and_the_prompts_as_the_model_reads_them(
    config, tmp_path, capsys, monkeypatch
):
    model = make_model(tmp_path / "model")
    (tmp_path / "reading.py").write_text(
        "def tokens(completions, completion_ids, **columns):\n"
        "    return [len(ids) for ids in completion_ids]\n"
        "def prompt(completions, rendered_prompts, **columns):\n"
        "    return [float(text[0]) for text in rendered_prompts]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])  # it lies beside the config
    run(
        capsys, config, "--out", str(tmp_path / "rows.jsonl"), f"--config.model.path={model}",
        "--config.rewards.names=['reading:tokens','reading:prompt']",
        "--config.rewards.weights=[1.0,1.0]",
    )  # fmt: skip
    rows = [json.loads(x)["rewards"] for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lengths = [len(load_tokenizer(model)(row["answer"])["input_ids"]) for row in ROWS]
    assert [row["tokens"] for row in rows] == lengths
    assert [row["prompt"] for row in rows] == [1, 2, 3]


def test_training_problems_are_scored_where_there_are_no_others(config, capsys):
    """As where a config whose dataset has splits is given a file."""
    assert "Rewards of 3 rows" in run(capsys, config, "--config.data.eval_split=test")
    argv = ["--config", str(config), "--config.data.eval_split=test", "--split", "eval"]
    status, message = refusal(score.main, argv)
    assert status == 1 and "data.eval_split = 'test'" in message


def _given(tmp_path, *lines):
    file = tmp_path / "given.jsonl"
    file.write_text("\n".join(lines))
    return ["--completions", str(file)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda tmp: ["--completion-column", "gold"], ["gold", "no such column", "answer, guess"]),
        (lambda tmp: ["--completion-column", "right"], ["line 1", "holds True", "not a text or a"]),
        (lambda tmp: ["--split", "eval"], ["no held-out problems", "data.eval"]),
        (lambda tmp: ["--limit", "-1"], ["--limit -1"]),
        (lambda tmp: ["--batch", "0"], ["--batch 0"]),
        (lambda tmp: ["--completions", "none.jsonl"], ["cannot read none.jsonl"]),
        (lambda tmp: _given(tmp, '{"completion": "a"}'), ["has 1 completions", "3 problems"]),
        (lambda tmp: _given(tmp, '{"text": "a"}'), ["line 1", "not a JSON object", "completion"]),
        (lambda tmp: _given(tmp, "{"), ["line 1", "not a JSON object"]),
        (lambda tmp: ["--config.rewards.name=x"], ["no option rewards.name", "rewards.names"]),
    ],
)
def test_mistakes(config, tmp_path, arguments, words):
    status, message = refusal(score.main, ["--config", str(config), *arguments(tmp_path)])
    assert status == (2 if "There is no option" in message else 1)
    for word in words:
        assert word in message


def test_distributions_correlations_and_agreement(config, tmp_path, capsys):
    """The guesses are "#### 2", "5" and "?"; an ensemble is scored like the others."""
    names = "('exact_answer as right','answer_format as form',"
    names += "\"ensemble:minimum(of=['right','form']) as both\")"
    out = run(
        capsys, config, "--completion-column", "guess", "--human", "right",
        "--picture", str(tmp_path / "new" / "rewards.png"), "--json", str(tmp_path / "f.json"),
        f"--config.rewards.names={names}", "--config.rewards.weights=(0, 0, 1)",
    )  # fmt: skip
    found = json.loads((tmp_path / "f.json").read_text())
    assert list(found["rewards"]) == ["right", "form", "both"]
    assert found["rewards"]["both"]["mean"] == pytest.approx(1 / 3)
    assert found["agreement"]["both"] == {"kappa": 1.0, "share": 1.0, "threshold": 1.0}
    # lengths 6, 1, 1, and rewards 1, 0, 0
    assert found["correlations"]["both"]["length"] == pytest.approx(1.0)
    assert (tmp_path / "new" / "rewards.png").read_bytes()[:4] == b"\x89PNG"
    for words in ("Correlations", "kappa 1.000, 100.0% alike", "s/1k", "rewards.png"):
        assert words in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--human", "guess"],
            "--human guess: ... sums.jsonl, line 1 has '#### 2' there. Labels are",
        ),
        (["--human", "no"], "--human no: ... sums.jsonl, line 1 has no value there"),
        (["--picture", "a.pdf"], "--picture a.pdf must end in .png or .svg"),
    ],
)
def test_labels_and_pictures_that_are_none(config, more, words):
    status, told = refusal(score.main, ["--config", str(config), *more])
    assert status == 1 and all(part in told for part in words.split(" ... "))


def test_the_list_names_every_reward_with_its_arguments(capsys):
    with pytest.raises(SystemExit):
        score.main(["--list"])
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    heads = {line.partition("(")[0] for line in lines}
    assert {*registry.BUILT_IN, *(f"ensemble:{form}" for form in ensembles.FORMS)} <= heads
    for line in (
        "numeric_answer(relative=0.001, absolute=0.0)",
        "similarity(folder=...)",
        "ensemble:gate(of=..., where=..., at_least=..., otherwise=0.0)",
        "reads answer, choices?",
        "model:...",
    ):
        assert line in lines
    assert "Share of a completion's steps before the first wrong one" in " ".join(lines)
    status, told = refusal(score.main, [])
    assert status == 2 and "--config FILE is required" in told
