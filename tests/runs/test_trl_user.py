"""A dataset and reward functions written for TRL, as they are: chat messages in, messages out."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from datetime import datetime

import pytest
from datasets import Dataset, DatasetDict
from mistakes import TINY, make_model, refusal
from transformers import AutoTokenizer

from grpo_jax import train
from grpo_jax.run.append_log import read_jsonl

# As in TRL's documentation of GRPOTrainer: a reward of texts, one of a column, one that declines,
# one that is asynchronous and logs, one that reads token ids and the trainer's state.
REWARDS = """
import asyncio

def reward_num_unique_chars(completions, **kwargs):
    return [float(len(set(c))) for c in [completion[0]["content"] for completion in completions]]

def correctness_reward_func(prompts, completions, solution, **kwargs):
    assert all(p[-1]["role"] == "user" for p in prompts)
    responses = [completion[0]["content"] for completion in completions]
    return [2.0 if r == s else 0.0 for r, s in zip(responses, solution)]

def math_reward_func(prompts, completions, task, **kwargs):
    return [1.0 if t == "math" else None for t in task]

async def async_reward_func(prompts, completions, log_metric=None, log_extra=None, **kwargs):
    await asyncio.sleep(0.001)
    log_metric("mean_chars", sum(len(c[0]["content"]) for c in completions) / len(completions))
    log_extra("first_char", [c[0]["content"][:1] for c in completions])
    return [0.5] * len(completions)

client = {}

async def asks_a_client(completions, **kwargs):
    client.setdefault("lock", asyncio.Lock())  # of the event loop in which it was first waited for
    async with client["lock"]:
        waiting = asyncio.create_task(client["lock"].acquire())
        await asyncio.sleep(0)
    await waiting
    client["lock"].release()
    return [1.0] * len(completions)

def array_reward(completions, **kwargs):
    import jax.numpy as jnp
    return jnp.ones(len(completions))

def tensor_rewards(completions, **kwargs):
    import torch
    return [torch.tensor(1.0, requires_grad=True) for _ in completions]

def length_reward(completion_ids, trainer_state, **kwargs):
    assert 0 <= trainer_state.global_step < trainer_state.max_steps == 2
    return [-float(len(ids)) for ids in completion_ids]
"""
OWN = (
    "reward_num_unique_chars",
    "correctness_reward_func",
    "math_reward_func",
    "async_reward_func",
    "asks_a_client",
    "array_reward",
    "tensor_rewards",
    "length_reward",
)
SHIPPED = (
    "trl.rewards:accuracy_reward",
    "trl.rewards:think_format_reward",
    "trl.rewards:get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)",
)


@pytest.fixture
def chat_model(tmp_path):
    """A tiny model whose tokenizer has a chat template."""
    folder = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '#' + m['content'] }}{% endfor %}#{{ tools | length }}"
        "#{{ strftime_now('%M%S') }}{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def dataset(tmp_path):
    """Saved by the `datasets` library, with columns of several types."""
    rows = [
        {
            "prompt": [{"role": "system", "content": "1"}, {"role": "user", "content": f"{i}+1"}],
            "solution": str(i + 1),
            "task": "math" if i % 2 else "other",
            "tools": [{"name": "f"}, {"name": "g"}],
            "extra_info": {"index": i},
        }
        for i in range(12)
    ]
    folder = tmp_path / "dataset"
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder)
    return folder


def _rewards(names):
    return [
        f"--config.rewards.names={list(names)}",
        f"--config.rewards.weights={[1.0] * len(names)}",
        "--config.loop.num_steps=2", "--config.rewards.timeout_s=120",
    ]  # fmt: skip


def _train(tmp_path, chat_model, dataset, names):
    folder = tmp_path / "run"
    status, message = refusal(
        train.main,
        [
            "--config", str(TINY), "--workdir", str(folder), f"--config.model.path={chat_model}",
            "--config.data.task=", f"--config.data.path={dataset}",
            *_rewards(names),
        ],
    )  # fmt: skip
    assert status is None, message
    return list(read_jsonl(folder / "metrics.jsonl")), folder


def test_own_rewards(tmp_path, chat_model, dataset, monkeypatch, one_device):
    (tmp_path / "user_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"user_rewards:{name}" for name in OWN]
    rows, folder = _train(tmp_path, chat_model, dataset, names)
    assert len(rows) == 2
    for row in rows:
        assert not any(value for key, value in row.items() if key.startswith("rewards/failed"))
        assert row["reward/async_reward_func"] == 0.5
        for name in ("asks_a_client", "array_reward", "tensor_rewards"):
            assert row[f"reward/{name}"] == 1.0
        assert row["reward/length_reward"] == -row["completion/length"]
        assert row["reward_log/mean_chars"] > 0
        assert row.get("reward/math_reward_func", 1.0) == 1.0  # None elsewhere
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all(s["extras"]["first_char"] == s["completion"][:1] for s in samples)
    record = json.loads((folder / "config.json").read_text())
    now = datetime.fromisoformat(record["date"])
    for sample in samples:  # system and user, tools and the run's date, by the template
        assert re.fullmatch(rf"#1#\d+\+1#2#{now:%M%S}=", sample["prompt"])
    read = record["read"]
    assert read["training problems"]["number"] == 12 and "user_rewards" in read["reward modules"]
    _refuses_other_files(folder, chat_model, dataset, names)
    sys.modules.pop("user_rewards")


def _refuses_other_files(folder, chat_model, dataset, names):
    """The run goes on with what it has read, and with nothing else."""
    saved = DatasetDict.load_from_disk(dataset)
    other = dataset.parent / "other"
    saved.map(lambda row: {"solution": row["solution"] + "0"}).save_to_disk(other)
    shutil.rmtree(dataset)
    other.rename(dataset)
    argv = [
        "--config", str(TINY), "--workdir", str(folder), f"--config.model.path={chat_model}",
        "--config.data.task=", f"--config.data.path={dataset}",
    ]  # fmt: skip
    status, message = refusal(train.main, [*argv, *_rewards(names)])
    assert status == 1 and "read something else: columns of the training problems." in message
    accepted = "--config.checkpoint.accept_changes=data.path"
    status, message = refusal(train.main, [*argv, *_rewards(names), accepted])
    assert status is None, message


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl")
def test_the_rewards_that_trl_ships(tmp_path, chat_model, dataset, one_device):
    rows, _ = _train(tmp_path, chat_model, dataset, SHIPPED)
    for row in rows:
        assert not any(value for key, value in row.items() if key.startswith("rewards/failed"))
        assert row["reward/think_format_reward"] == 0.0
        assert -1.0 <= row["reward/get_soft_overlong_punishment"] <= 0.0
