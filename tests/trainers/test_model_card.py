"""The model card of an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from mistakes import make_model

from grpo_jax.models import policy as policy_lib
from grpo_jax.trainers import model_card


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return policy_lib.read(make_model(tmp_path_factory.mktemp("cards") / "tiny_model"))


def card(policy, folder: Path, options=(), **more) -> tuple[dict, str]:
    """The head of the card, and its text."""
    options = {"model.path": "given"} | dict(options)
    model_card.write(folder, policy, options, step=1200, **more)
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_it_says_what_was_trained_and_with_what_result(policy, tmp_path):
    summary = {
        "accuracy_before": 0.156, "accuracy_after": 0.9984,
        "held_out_reward_before": None, "held_out_reward_after": 1.25,
    }  # fmt: skip
    head, body = card(policy, tmp_path, method="grpo", summary=summary)
    assert head["tags"] == ["grpo", "grpo_jax"] and head["library_name"] == "transformers"
    assert "base_model" not in head  # a folder of this machine
    assert "tiny_model, trained with grpo_jax" in body and str(policy.source.parent) not in body
    assert f"{policy.model.num_params:,} parameters" in body and "1,200 steps" in body
    assert "Group Relative Policy Optimization" in body
    assert "| held-out accuracy | 15.6% | 99.8% |" in body
    assert "| held-out reward |  | 1.250 |" in body


def test_a_model_of_the_hub_is_the_base(policy, tmp_path):
    cached = tmp_path / "models--Owner--Name-1B" / "snapshots" / "0a1b"
    head, body = card(dataclasses.replace(policy, source=cached), tmp_path, method="sft")
    assert head["base_model"] == "Owner/Name-1B" and head["tags"] == ["sft", "grpo_jax"]
    assert "`Owner/Name-1B`" in body and "supervised fine-tuning" in body
    assert "| before |" not in body  # nothing was measured


def test_a_folder_is_no_id_of_the_hub(policy, tmp_path):
    head, body = card(dataclasses.replace(policy, source=Path("runs/a/export")), tmp_path)
    assert "base_model" not in head and "`export`" in body and "runs/a" not in body


def test_a_new_model_has_no_base(policy, tmp_path):
    """It was read from the run's own supervised start."""
    head, body = card(policy, tmp_path, {"model.path": ""})
    assert "base_model" not in head and head["tags"] == ["grpo_jax"]
    assert "A new model" in body and "tiny_model" not in body


def test_it_names_options_and_nothing_of_the_machine(policy, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("")
    monkeypatch.setenv("SOME_TOKEN", "sesame-3d7f0")
    options = {
        "algorithm.kl_coef": 0.25,
        "data.path": str(tmp_path / "data.jsonl"),
        "model.path": "/gone/since/llama",
        "rewards.names": ["exact_answer", f"{tmp_path}/data.jsonl"],
        "data.task": "sesame-3d7f0",
        "logging.wandb_project": "mine",
        "checkpoint.folder": "gs://bucket/runs",
        "loop.num_steps": 77,
    }
    _, body = card(policy, tmp_path, options)
    for line in (
        "algorithm.kl_coef = 0.25",
        "data.path = 'data.jsonl'",
        "model.path = 'llama'",
        "rewards.names = ('exact_answer', 'data.jsonl')",
        "loop.num_steps = 77",
    ):
        assert line in body.splitlines()
    for private in ("sesame", "mine", "bucket", str(tmp_path), "/gone"):
        assert private not in body
