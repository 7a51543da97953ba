"""The plan of an update on given completions: rows at their limits, and what it tells."""

from __future__ import annotations

import json

import numpy as np
import pytest
from valid_config import valid

from grpo_jax import plan
from grpo_jax.config import loading
from grpo_jax.planning.given_programs import GivenStep
from grpo_jax.setup import model as model_lib
from grpo_jax.trainers import given_plan

PROMPT, TOKENS = 6, 5


def config(**options):
    sizes = {f"{name}__batch": 3 for name in ("sft", "preference", "reward_model")}
    limits = {f"{name}__max_tokens": TOKENS for name in ("sft", "preference", "reward_model")}
    return valid(data__max_prompt_tokens=PROMPT, **sizes, **limits, **options)


@pytest.mark.parametrize(
    ("program", "options", "prompt", "lengths"),
    [
        ("sft", {}, 0, [[PROMPT + TOKENS] * 2] * 2),  # a text each; the fourth is filler
        ("dpo", {}, PROMPT, [[TOKENS] * 2] * 3),
        ("dpo", {"preference__loss": "kto"}, PROMPT, [[TOKENS]] * 3),
        ("reward_model", {}, PROMPT, [[TOKENS + 1] * 2] * 3),  # with the place of the reward
    ],
)
def test_rows_stand_at_their_limits(program, options, prompt, lengths):
    made = config(**options)
    row = given_plan.row_of(program, made)
    rows = given_plan.laid_out_rows(row, made, shards=2)
    assert set(rows.prompt_length_P[: len(lengths)].tolist()) == {prompt}
    real = np.array(rows.length_PG).reshape(-1)
    assert sorted(real)[-np.size(lengths) + (program == "sft"):] == sorted(np.ravel(lengths))[
        (program == "sft"):]  # fmt: skip
    assert len(rows.length_PG) % 2 == 0 and rows.chosen_PGC.any()
    shorter = given_plan.laid_out_rows(row, made, 2, prompt_tokens=2, mean_tokens=2)
    assert shorter.length_PG.sum() < rows.length_PG.sum()
    assert shorter.prompt_PQ.shape[1] <= rows.prompt_PQ.shape[1]


def test_a_plan_is_told_and_written(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["--program", "reward_model", "--config", "tests/helpers/tiny_config.py"]
    arguments += ["--topology", "cpu:8", "--json", str(file)]
    plan.main([*arguments, "--config.reward_model.batch=8", "--config.reward_model.max_tokens=16"])
    assert "8,512 parameters on 8 devices" in capsys.readouterr().out  # 32 of them are the head
    told = json.loads(file.read_text())
    assert told["mesh"]["data"] == 8 and told["peak_bytes"] > told["bytes_per_device"]["weights"]
    assert [p["name"] for p in told["programs"]] == ["zero_gradient", "gradient", "optimizer_step"]
    with pytest.raises(ValueError, match="--search looks for changes of a step of GRPO"):
        plan.main([*arguments, "--search"])


def test_a_plan_of_adapters_counts_what_learns_and_what_does_not(monkeypatch):
    """Adapters of the layer's seven kernels and the head's 32 numbers, of 4 bytes."""
    monkeypatch.setattr(GivenStep, "compile", lambda step: [])
    held = {}
    for rank in (0, 4):
        made = loading.load("tests/helpers/tiny_config.py", [f"--config.lora.rank={rank}"])
        model = model_lib.model_shape(made, head="scalar")
        held[rank] = given_plan.plan("reward_model", made, model, "cpu:8").held
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    learned = 4 * (32 + sum(4 * (i + o) for i, o in sizes))
    assert held[4]["gradients"] == learned < held[0]["gradients"]
    assert held[4]["weights"] == held[0]["weights"] - 4 * 32 + learned
    assert held[4]["optimizer"] < held[0]["optimizer"]
