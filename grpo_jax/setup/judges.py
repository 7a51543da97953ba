"""The LLM judges among a config's rewards: entries "judge:RUBRIC.toml" of `rewards.names`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.hosts import processes
from grpo_jax.messages.console import say
from grpo_jax.rewards import kinds
from grpo_jax.rewards.judging import rubric as rubric_lib
from grpo_jax.rewards.judging.cache import Cache
from grpo_jax.rewards.judging.client import Limits
from grpo_jax.rewards.judging.judges import Judges, Settings
from grpo_jax.rewards.registry import Reward
from grpo_jax.run.append_log import Log

_FILES = "judgements*.jsonl"  # one for each process: resumed, another may get a group


def read(config: ConfigDict, rewards: Sequence[Reward]) -> dict[str, Settings]:
    """The judges among the rewards, by name; ValueError for what a judge lacks."""
    return {r.name: _settings(config, r) for r in rewards if r.runs == kinds.HOST}


def _settings(config: ConfigDict, reward: Reward) -> Settings:
    path, options = kinds.split(reward.spec)[1], config.judge
    rubric = rubric_lib.read(path)
    own, where = rubric.server, f"the rubric {path}"
    base_url = _value(own.base_url or options.base_url, "base_url", where, bool(own.base_url))
    model = _value(own.model or options.model, "model", where, bool(own.model))
    name = own.key_env or options.key_env
    return Settings(rubric, base_url, model, os.environ.get(name, "").strip() if name else "")


def _value(text: str, name: str, where: str, is_own: bool) -> str:
    """A text, or the environment variable that it names after $."""
    told = f"{where}: server.{name}" if is_own else f"judge.{name}"
    if not text.startswith("$"):
        if not text:
            raise ValueError(f"{told} is empty, and {where} needs it.")
        return text
    value = os.environ.get(text[1:], "").strip()
    if not value:
        raise ValueError(
            f'{told} = "{text}": the environment variable {text[1:]} is not set, and {where} needs '
            f"it. Set it, or write the {'address' if name == 'base_url' else 'name'} itself."
        )
    return value


def start(config: ConfigDict, rewards: Sequence[Reward], folder: Path | None) -> Judges:
    """The judges of this process; their verdicts are kept in the run's `folder`. None: nowhere."""
    options = config.judge
    limits = Limits(
        concurrency=options.concurrency,
        attempt_s=options.timeout_s,
        deadline_s=options.deadline_s,
        retries=options.retries,
        max_calls=options.max_calls,
        max_tokens=options.max_tokens,
        response_bytes=options.max_response_kib << 10,
    )
    return Judges(read(config, rewards), limits, _cache(folder))


def _cache(folder: Path | None) -> Cache:
    if folder is None:
        return Cache()
    number = processes.number()
    own = folder / ("judgements.jsonl" if number == 0 else f"judgements-{number}.jsonl")
    log = Log(own, say)  # there is a file now
    # Several processes may have judged one text, each with its own verdict: here this one's counts.
    others = sorted(file for file in folder.glob(_FILES) if file != own)
    return Cache([*others, own], log.append)
