"""Runs whose reward model learns by adapters: continued exactly, read by peft in both forms."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import TINY, make_model
from safetensors.numpy import load_file

import grpo_jax
from grpo_jax import export, score
from grpo_jax.config import loading
from grpo_jax.metrics import calibration
from grpo_jax.models import lora
from grpo_jax.models.hf import peft
from grpo_jax.models.hf.tokenizer import load_tokenizer
from grpo_jax.setup import examples
from grpo_jax.setup.model import find_model

STEPS = 3
OPTIONS = [
    "--config.lora.rank=4",
    "--config.lora.alpha=8",
    f"--config.reward_model.num_steps={STEPS}",
    "--config.reward_model.batch=6",
    "--config.reward_model.max_tokens=56",
    "--config.reward_model.learning_rate=3e-2",
    "--config.reward_model.checkpoint_every_steps=2",
    "--config.logging.tensorboard=False",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory, drive_here):
    """A model; a run left alone, and one that was stopped and went on."""
    root = tmp_path_factory.mktemp("runs")
    make_model(root / "model")

    def of_run(name, **how):
        given = ["--config", str(TINY), "--workdir", str(root / name), *OPTIONS]
        given += [f"--config.model.path={root / 'model'}"]
        return {"argv": given, "program": "reward_model", **how}

    jobs = [of_run("whole"), of_run("stopped", after=2, of="sft"), of_run("stopped")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "draw", lambda *drawn: None)
        ends = drive_here(jobs)
    assert ends[1].startswith("Stopped by SIGTEST at step 2;")
    assert [ends[0], ends[2]] == ["finished"] * 2
    return root


def test_a_stopped_run_goes_on_exactly_from_a_small_checkpoint(root):
    assert not state_differences(root / "whole", root / "stopped")
    assert not log_differences(root / "whole", root / "stopped")
    state = final_state(root / "whole")
    names = [name for name in state if "/params/" in name or "/mu/" in name]
    assert names and all(re.search(r"lora_[ab]$|/score/kernel$", name) for name in names)
    assert sum("score" in name for name in names) == 2
    model = find_model(f"{root / 'whole'}@{STEPS}", may_score=True).policy.model
    assert sum(x.nbytes for x in state.values()) < 3 * 4 * lora.num_trained(model) + 100
    found = [line.get("reward_model/eval_loss") for line in logged(root / "whole")]
    assert found[-1] < found[0]


@pytest.mark.parametrize("form", ["export", "export/adapter"])
def test_either_form_scores_as_the_run_and_as_transformers(root, form, one_device):
    """Held-out pairs, whose rewards the run has written; an adapter with peft on its base."""
    folder = root / "whole"
    file = folder / "evaluations" / f"step_{STEPS:06d}_pairs.jsonl"
    want = [json.loads(line) for line in file.open()]
    config = loading.load(str(TINY), [])
    pairs = examples.preferences_of_task(config, "pair", "held_out")[: len(want)]
    judge = grpo_jax.load_reward_model(folder / form)
    texts = [text for pair in pairs for text in pair.completions]
    got = judge.score([pair.prompt for pair in pairs], texts, group=2).reshape(-1, 2)
    np.testing.assert_allclose(got, [[w["chosen"], w["rejected"]] for w in want], rtol=1e-4)

    read = transformers.AutoModelForSequenceClassification.from_pretrained
    model = read(folder / "export")
    if form != "export":
        peft_lib = pytest.importorskip("peft")
        pad_id = model.config.pad_token_id
        model = read(root / "model", num_labels=1, pad_token_id=pad_id)
        model = peft_lib.PeftModel.from_pretrained(model, folder / form).eval()
        kept = json.loads((folder / form / peft.CONFIG).read_text())
        assert (kept["task_type"], kept["modules_to_save"]) == ("SEQ_CLS", ["score"])
        assert kept["base_model_name_or_path"] == str(root / "model")
    tokenizer = load_tokenizer(folder / "export")
    for pair, rewards in zip(pairs, got):
        for text, reward in zip(pair.completions, rewards):
            ids = tokenizer(pair.prompt + text)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                theirs = model(torch.tensor([ids])).logits.item()
            assert reward == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert got.std() > 0.01


def test_a_checkpoint_is_exported_in_both_forms(root, tmp_path, one_device):
    """The last one: the tensors of the run's own export."""
    folder, out = root / "whole", tmp_path / "out"
    export.main(["--workdir", str(folder), "--step", str(STEPS), "--out", str(out)])
    for file in ("model.safetensors", f"adapter/{peft.WEIGHTS}"):
        ours, own = load_file(out / file), load_file(folder / "export" / file)
        assert ours.keys() == own.keys() and any("score" in name for name in ours)
        for name, value in ours.items():
            np.testing.assert_array_equal(value, own[name])


def test_score_takes_an_adapter(root, tmp_path, one_device):
    """Worked solutions have the rewards of the whole model, by the run's name."""
    out, export = tmp_path / "rows.jsonl", root / "whole" / "export"
    names = f"model:{export} as merged", f"model:{export / 'adapter'}"
    given = [f"--config.rewards.names={names}", "--config.rewards.weights=(1.0,1.0)"]
    score.main(["--config", str(TINY), *given, "--limit", "4", "--out", str(out)])
    found = [json.loads(line)["rewards"] for line in out.open()]
    for row in found:
        assert row["whole"] == pytest.approx(row["merged"], abs=1e-5)
    assert len({row["whole"] for row in found}) > 2
