"""The page of a run holds its curves, options and texts, and runs nothing that a model wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from grpo_jax import report

ATTACK = "</script><script>steal()</script><img src=x onerror=steal()> & \x1b[2J"


class Elements(HTMLParser):
    """The elements of a page, and what stands in its scripts."""

    def __init__(self, text):
        super().__init__()
        self.names, self.scripts, self._within = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self._within = tag

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within == "script":
            self.scripts.append(data)


def lines(file, *rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    lines(tmp_path / "metrics.jsonl", *({"step": n, "reward": n / 4} for n in range(1, 4)))
    about = {"prompt": "1+1=", "columns": {"answer": ATTACK}, "rewards": {"exact": 1.0, "b": None}}
    sample = about | {"step": 2, "completion": ATTACK, "length": 3, "advantage": 0.0}
    lines(tmp_path / "samples.jsonl", sample)
    for step in (0, 3):
        answer = about | {"completion": f"#### {step}", "correct": step == 3, "sample": 0}
        lines(tmp_path / "evaluations" / f"step_{step:06}_greedy.jsonl", answer)
    options = {"seed": 0, "batch.group": 4, "data.prompt_template": "<b>{prompt}</b>"}
    (tmp_path / "config.json").write_text(json.dumps({"options": options}))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "train_wall_s": 1.23456789}))
    return tmp_path


def test_the_page_of_a_run(folder, capsys):
    report.main([str(folder), "--html"])
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    text = (folder / "report.html").read_text()
    page = Elements(text)
    assert page.names.count("svg") == 2 and page.names.count("script") == 2
    assert "img" not in page.names and "\x1b" not in text
    data = json.loads(page.scripts[0])
    assert data["samples"][0]["completion"] == ATTACK.replace("\x1b", "\\x1b")
    assert data["samples"][0]["rewards"] == {"exact": 1.0, "b": None}
    assert {step: rows[0]["correct"] for step, rows in data["evaluations"].items()} == {
        "0": False, "3": True,
    }  # fmt: skip
    assert "<tr><td>batch.group</td><td>4</td><td>8</td></tr>" in text
    assert "&lt;b&gt;{prompt}&lt;/b&gt;" in text and "<td>seed</td>" not in text
    assert "<tr><td>train_wall_s</td><td>1.235</td></tr>" in text
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert used and set(used) <= set(names)
    loaded = re.findall(r'(?:src|href)="(?!#)([^"]*)"', text)
    assert not loaded, loaded


def test_a_page_of_little(tmp_path):
    lines(tmp_path / "metrics.jsonl", {"step": 1, "sft/loss": 1.0})
    report.main([str(tmp_path), "--html"])
    page = Elements((tmp_path / "report.html").read_text())
    assert json.loads(page.scripts[0]) == {"samples": [], "evaluations": {}}
    for more in (["--dark"], [str(tmp_path / "other")]):
        with pytest.raises(SystemExit):
            report.main([str(tmp_path), "--html", *more])
