"""The options as text: `--help` and docs/options.md say what the table says."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path

import pytest

from grpo_jax import cli, sft, train
from grpo_jax.config import options, reference, schema
from grpo_jax.setup import model

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def words(text: str) -> str:
    """The text without line breaks, and without the marks of a table."""
    return " ".join(text.replace("<br>", " ").replace("\\|", "|").replace("`", "").split())


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == reference.page(), "python -m grpo_jax.config.reference > docs/options.md"
    assert "docs/options.md" in (ROOT / "README.md").read_text()


def test_pages_name_options_that_exist():
    """README, docs, launch scripts and the numbers of benchmarks; names of files aside."""
    sections = "|".join(name for name in options.SECTIONS if name)
    pattern = re.compile(rf"(?<![\w/])({sections})\.(?!md\b|py\b|txt\b)([a-z_0-9]+)\b(?!\.)")
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*")]
    files += [ROOT / "benchmarks" / "RESULTS.md"]
    files.remove(ROOT / "docs" / "from_verl.md")  # verl's names; test_docs.py reads ours there
    texts = {file.name: re.sub("^::: .*", "", file.read_text(), flags=re.M) for file in files}
    found = {(name, m[0]) for name, text in texts.items() for m in pattern.finditer(text)}
    assert len(found) > 100
    others = {"reward_model.ground_truth"}  # a column of verl's data
    known = {*options.BY_NAME, *others}
    assert {(file, name) for file, name in found if name not in known} == set()


@functools.cache
def pages() -> tuple[str, str]:
    return words(reference.page()), words(reference.listing(options.default()))


@pytest.mark.parametrize("option", options.TABLE, ids=lambda option: option.name)
def test_the_page_and_the_help_agree(option):
    page, listing = pages()
    default, free = schema.written(option.default), option.free
    unit = f" {option.unit}" if option.within and option.unit else ""
    meaning = words(" ".join([option.explanation(), *option.details()]))
    assert f"| {option.name}{' ↻' * free} | {default}{unit} | {meaning} |" in page
    assert f"{option.name} = {default}{unit} (default){' [r]' * free} {meaning}" in listing


def test_an_entry_by_hand():
    """A choice, a number with special values, and a text, where a file has changed them."""
    config = options.default()
    config.data.overlong, config.batch.microbatch, config.data.path = "drop", -1, "a.jsonl"
    text = reference.listing(config, 72)
    assert (
        """
* data.overlong = "drop"  (default "refuse")
      What is done with a longer prompt.
        "refuse": do not start
        "drop": leave the problem out
        "truncate": cut the start of the prompt
"""
        in text
    )
    assert (
        """
* batch.microbatch = -1 prompts  (default 0)  [r]
      Prompts computed at once in an update; more of them where they are
      short. At least 1.
        0: the usual number of tokens
        -1: as many tokens as fit into memory
"""
        in text
    )
    assert (
        """
* data.path = "a.jsonl"  (default "")
      A dataset. Set this or data.task. File (JSONL, Parquet, Arrow,
      CSV, JSON), folder or hub id.
"""
        in text
    )
    assert text.count("\n* ") == 3 and "\n  batch.prompts = 32 prompts  (default)\n" in text
    assert max(map(len, text.splitlines())) <= 79  # heads of entries are not broken


@pytest.fixture
def told(monkeypatch, capsys):
    """What a program says to `--help`, which must start nothing, in its seconds of CPU."""

    def fail(*args):
        raise AssertionError("--help starts the run")

    monkeypatch.setattr(cli, "join_processes", fail)
    monkeypatch.setattr(model, "model_shape", fail)
    monkeypatch.setenv("COLUMNS", "100")

    def run(program, *argv):
        began = time.process_time()
        with pytest.raises(SystemExit) as ended:
            program.main([*argv, "--help"])
        assert not ended.value.code
        assert time.process_time() - began < 0.5
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("program", [train, sft], ids=["train", "sft"])
def test_help_lists_the_options_in_force(program, told):
    text = told(program)
    assert text.endswith(f"{reference.listing(options.default())}\n")
    assert "--workdir DIR" in text and "\n* " not in text
    text = told(program, "--config", QUICKSTART, "--config.optim.learning_rate=0.5")
    assert "\n* optim.learning_rate = 0.5  (default 1e-06)\n" in text
    assert "\n* rollout.max_tokens = 40 tokens  (default 256)\n" in text
    assert "\n  optim.beta1 = 0.9  (default)\n" in text


def test_help_of_a_config_that_could_not_run(told):
    """So that one sees what to change; but a name that is no option is refused here too."""
    assert "* batch.group = 1 completions  (default 8)" in told(train, "--config.batch.group=1")
    with pytest.raises(ValueError, match=r"There is no option optim\.zzz"):
        train.main(["--config.optim.zzz=1", "--help"])


def test_a_config_is_required(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--workdir", "x"])
    assert ended.value.code == 2
    assert "--config FILE is required; --help lists all options" in capsys.readouterr().err
