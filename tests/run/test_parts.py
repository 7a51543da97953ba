"""A file that is written in parts: continued after a kill, without lost or repeated rows."""

from __future__ import annotations

import json
import shutil

import pytest

from grpo_jax.run import parts as parts_lib
from grpo_jax.run.parts import Parts

ROWS = [[{"prompt": f"p{i}", "n": j} for j in range(i)] for i in range(4)]
SETTINGS = {"seed": 0, "names": ("a", "b")}


def _write(parts: Parts, numbers) -> None:
    for i in numbers:
        parts.write(i, ROWS[i], {"equal": i, **({"odd": 1} if i % 2 else {})})


def test_parts_become_a_file(tmp_path):
    parts = Parts(tmp_path / "rows.jsonl", SETTINGS)
    _write(parts, [2, 0, 3, 1])  # in any order
    assert parts.finish(4) == (6, {"equal": 6, "odd": 2})
    lines = parts.out.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row for rows in ROWS for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    with pytest.raises(ValueError, match=r"rows\.jsonl exists"):
        Parts(parts.out, SETTINGS)


def test_parquet(tmp_path):
    from datasets import Dataset

    parts = Parts(tmp_path / "rows.parquet", SETTINGS)
    chat = [{"role": "user", "content": "ü?"}]
    parts.write(0, [{"prompt": chat, "chosen": "a", "score": None}], {})
    parts.write(1, [{"prompt": chat, "chosen": "b", "score": 0.5}], {})
    assert parts.finish(2) == (2, {})
    rows = Dataset.from_parquet(str(parts.out), cache_dir=str(tmp_path / "cache")).to_list()
    assert rows == [
        {"prompt": chat, "chosen": "a", "score": None},
        {"prompt": chat, "chosen": "b", "score": 0.5},
    ]


def test_a_kill_loses_and_repeats_nothing(tmp_path, monkeypatch):
    """At each place: between parts, within one, and while the file is made."""
    out = tmp_path / "rows.jsonl"
    _write(Parts(out, SETTINGS), [0, 1])
    (parts_lib._folder(out) / "00000002.jsonl.new").write_text('{"told": {}}\n{"prom')  # cut off
    parts = Parts(out, json.loads(json.dumps(SETTINGS)))
    assert [parts.has(i) for i in range(4)] == [True, True, False, False]
    _write(parts, [2, 3])

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:  # before the file is in its place
        m.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.finish(4)
    assert not out.exists()
    with monkeypatch.context() as m:  # the file is there, and the parts are not removed yet
        m.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            Parts(out, SETTINGS).finish(4)
    assert len(out.read_text().splitlines()) == 6
    with pytest.raises(ValueError, match="exists"):
        Parts(out, SETTINGS)


def test_other_settings_and_endings_are_refused(tmp_path):
    _write(Parts(tmp_path / "rows.jsonl", SETTINGS), [0])
    with pytest.raises(ValueError, match=r"other settings: names, seed, share\. Go on"):
        Parts(tmp_path / "rows.jsonl", {"seed": 1, "share": 2, "names": ["a"]})
    with pytest.raises(ValueError, match=r"rows\.txt must end in \.jsonl or \.parquet"):
        Parts(tmp_path / "rows.txt", SETTINGS)
    assert parts_lib.settings_of(tmp_path / "rows.jsonl") == {"seed": 0, "names": ["a", "b"]}
    assert parts_lib.settings_of(tmp_path / "none.jsonl") == {}
