"""Runs a program that refuses its input: status and message; and makes a model for it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_families
import jax

from grpo_jax import cli
from grpo_jax.config import loading
from grpo_jax.data import tasks
from grpo_jax.devices import sharding
from grpo_jax.models import policy
from grpo_jax.models.hf.export import save
from grpo_jax.setup import model

TINY = Path(__file__).with_name("tiny_config.py")


_FILES: dict[str, bytes] = {}  # of the model, which is made once


def make_model(folder: Path) -> Path:
    """A random model of the tiny config's shape as a Hugging Face folder."""
    if not _FILES:
        _save_model(folder, tasks.load("arithmetic").make_tokenizer())
        _FILES.update({file.name: file.read_bytes() for file in folder.iterdir()})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _FILES.items():
        (folder / name).write_bytes(content)
    return folder


def make_chats(folder: Path) -> tuple[Path, Path]:
    """A random model in `folder` whose template drops earlier thinking, and questions beside it."""
    tokenizer, _ = chat_families.qwen(chat_families.QWEN3_XML)
    _save_model(folder, tokenizer)
    asked = [{"prompt": [{"role": "user", "content": f"{n}+1?"}]} for n in range(1, 9)]
    questions = folder.with_name(f"{folder.name}.jsonl")
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder, questions


def _save_model(folder: Path, tokenizer: Any) -> None:
    new = model.new(loading.load(str(TINY), []).model, tokenizer)
    params = policy.load_params(new, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
    save(folder, params, new.model, source=None, dtype="float32", tokenizer=tokenizer)


def refusal(run: Callable[[list[str]], None], argv: list[str]) -> tuple[int | None, str]:
    """Exit status and standard error of a program that runs in this process."""
    stderr, before = io.StringIO(), sys.argv
    sys.argv = ["program", *argv]
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            cli.main(run)
    except SystemExit as end:
        return end.code, stderr.getvalue()
    finally:
        sys.argv = before
    return None, stderr.getvalue()
