"""Whole runs of `grpo_jax.reward_model`, and of PPO and GRPO with such a model as reward."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from driving import drive
from kill_and_resume import final_state, log_differences, logged, state_differences

import grpo_jax
from grpo_jax import export, reward_model, score, train
from grpo_jax.config import loading
from grpo_jax.models.hf.tokenizer import load_tokenizer
from grpo_jax.rewards import registry
from grpo_jax.rewards.scores import RewardError
from grpo_jax.setup import examples
from grpo_jax.setup import model as model_lib

TINY = Path(__file__).parents[1] / "helpers" / "tiny_config.py"
STEPS = 5
OPTIONS = [
    f"--config.reward_model.num_steps={STEPS}",
    "--config.reward_model.batch=6",
    "--config.reward_model.max_tokens=56",
    "--config.reward_model.learning_rate=1e-2",
    "--config.reward_model.checkpoint_every_steps=2",
    "--config.reward_model.evaluate_every_steps=2",
    "--config.reward_model.centre_coef=0.01",
]
PPO = [
    "--config.algorithm.preset=ppo",
    "--config.critic.learning_rate=1e-3",
    "--config.critic.first_steps=1",
    "--config.batch.minibatches=1",
    "--config.evaluation.every_steps=4",
]


def argv(folder: Path, *more: str) -> list[str]:
    return ["--config", str(TINY), "--workdir", str(folder), *more]


def model_of(folder: Path) -> str:
    return f"--config.model.path={folder / 'bootstrap' / 'export'}"


def rewarded_by(folder: Path) -> list[str]:
    names = [f"model:{folder / 'export'}", "answer_format"]
    return [f"--config.rewards.names={names}", "--config.rewards.weights=(1.0,0.5)"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    """Runs that were left alone; others that were stopped or killed, and went on.

    Two updates to a step of PPO; its critic begins from the reward model.
    """
    root = tmp_path_factory.mktemp("runs")
    whole = root / "rm"

    def of_model(name, *more, **how):
        return {"argv": argv(root / name, *OPTIONS, *more), "program": "reward_model", **how}

    def of_ppo(name, **how):
        more = [f"--config.critic.path={whole / 'export'}", *rewarded_by(whole), *PPO]
        return {"argv": argv(root / name, model_of(whole), *more), **how}

    first = [
        of_model("rm"),
        of_model("rm, stopped", model_of(whole), after=3, of="sft"),
        of_ppo("ppo"),
        of_ppo("ppo, stopped", after=1),  # the critic alone has learned, from half of its data
        of_ppo("ppo, left", after=4, **{"in": "rewards"}),
        of_ppo("ppo, killed", after=5, killed=True, **{"in": "update"}),
    ]
    ends = drive(first, alone, status=-signal.SIGKILL)
    then = [of_model("rm, stopped", model_of(whole))]
    then += [of_ppo(f"ppo, {how}") for how in ("stopped", "left", "killed")]
    return root, ends, drive(then, alone)


def test_stopped_and_killed_runs_continue_bit_for_bit(runs):
    root, ends, then = runs
    assert ends[0] == ends[2] == "finished" and then == ["finished"] * 4
    assert all(end.startswith("Stopped by SIGTEST") for end in (ends[1], ends[3], ends[4]))
    for whole, names in (("rm", ("stopped",)), ("ppo", ("stopped", "left", "killed"))):
        for name in names:
            assert not state_differences(root / whole, root / f"{whole}, {name}"), name
            assert not log_differences(root / whole, root / f"{whole}, {name}"), name
    arrays = final_state(root / "ppo")
    assert any(name.startswith("/critic/opt_state") and "mu" in name for name in arrays)
    assert int(arrays["/critic/num_updates"]) == int(arrays["/num_updates"]) == 8
    assert int(arrays["/num_skipped"]) == 2  # those of the critic's first step


def test_a_reward_model_learns_and_is_measured(runs):
    folder = runs[0] / "rm"
    lines = logged(folder)
    measured = {n["step"]: n for n in lines if "reward_model/eval_loss" in n}
    assert [*measured] == [0, 2, 4, STEPS]
    assert measured[STEPS]["reward_model/eval_loss"] < measured[0]["reward_model/eval_loss"]
    updates = [line for line in lines if "reward_model/loss" in line]
    assert updates[-1]["reward_model/loss"] < updates[0]["reward_model/loss"]
    file = folder / "evaluations" / f"step_{STEPS:06d}_pairs.jsonl"
    pairs = [json.loads(line) for line in file.open()]
    right = np.mean([pair["chosen"] > pair["rejected"] for pair in pairs])
    assert measured[STEPS]["reward_model/eval_accuracy"] == pytest.approx(right)
    assert (folder / "calibration.png").stat().st_size > 5000
    assert "text-classification" in (folder / "export" / "README.md").read_text()


def test_rewards_of_a_run_are_those_of_transformers(runs):
    """Of the samples that a run has shown, written as the reward model's training wrote texts."""
    export = runs[0] / "rm" / "export"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(export)
    tokenizer = load_tokenizer(export)
    shown = [json.loads(line) for line in (runs[0] / "ppo" / "samples.jsonl").open()][:6]
    for row in shown:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            want = model(torch.tensor([ids])).logits.item()
        assert row["rewards"]["rm"] == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert len({row["rewards"]["rm"] for row in shown}) > 3


def test_a_critic_learns_with_the_policy(runs):
    lines = [line for line in logged(runs[0] / "ppo") if "value/loss" in line]
    assert [line["policy/grad_norm"] > 0 for line in lines] == [False, True, True, True]
    assert all(line["value/grad_norm"] > 0 for line in lines)
    assert all(0 <= line["value/clip_share"] <= 1 for line in lines)
    first = json.loads((runs[0] / "ppo" / "samples.jsonl").open().readline())
    assert isinstance(first["advantage"], float)


def test_score_scores_with_a_reward_model(runs, tmp_path, one_device, capsys):
    """The program of rewards; a worked solution in place of a completion."""
    out = tmp_path / "rows.jsonl"
    given = ["--config", str(TINY), *rewarded_by(runs[0] / "rm"), "--limit", "4"]
    score.main([*given, "--out", str(out)])
    found = [json.loads(line)["rewards"] for line in out.open()]
    assert len(found) == 4 and all(set(row) == {"rm", "answer_format"} for row in found)
    assert len({row["rm"] for row in found}) > 2


def test_a_checkpoint_is_exported_as_a_reward_model(runs, tmp_path, one_device):
    """The last one, whose weights are those of the run's own export; no program writes with it."""
    folder = runs[0] / "rm"
    export.main(["--workdir", str(folder), "--step", str(STEPS), "--out", str(tmp_path / "out")])
    files = [place / "model.safetensors" for place in (tmp_path / "out", folder / "export")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="is the run of a reward model: it scores texts"):
        model_lib.find_model(f"{folder}@{STEPS}")


def test_from_python_the_scores_are_those_of_the_run(runs, compile_cache):
    """On all devices of this process; of held-out pairs, whose rewards the run has written."""
    folder = runs[0] / "rm"
    file = folder / "evaluations" / f"step_{STEPS:06d}_pairs.jsonl"
    want = [json.loads(line) for line in file.open()]
    config = loading.load(str(TINY), [])
    pairs = examples.preferences_of_task(config, "pair", "held_out")[: len(want)]
    judge = grpo_jax.load_reward_model(folder / "export")
    texts = [text for pair in pairs for text in pair.completions]
    got = judge.score([pair.prompt for pair in pairs], texts, group=2).reshape(-1, 2)
    np.testing.assert_allclose(got, [[w["chosen"], w["rejected"]] for w in want], rtol=1e-4)
    with pytest.raises(RewardError, match="cannot score"):
        judge.score(["1" * 2000], ["2"])


def test_a_check_says_that_it_can_run(tmp_path, one_device, capsys):
    """Of a new model, which is first trained on worked solutions."""
    reward_model.main([*argv(tmp_path / "run", *OPTIONS), "--check"])
    assert capsys.readouterr().out.count("Nothing speaks against this run.") == 2
    assert not (tmp_path / "run").exists()


PAIR = {"prompt": "1+2=", "chosen": "#### 3", "rejected": "#### 4"}
REFUSALS = {
    "no updates": (["--config.reward_model.num_steps=0"], ("nothing to train",)),
    "half a pair": (
        ["--config.data.task=", "--config.data.path=DATA"], ("line 2", "no `rejected`"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_trained_is_refused(runs, tmp_path, name, one_device):
    options, words = REFUSALS[name]
    data = tmp_path / "data.jsonl"
    half = PAIR | {"rejected": None}
    data.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, half)))
    options = [option.replace("DATA", str(data)) for option in options]
    model = model_of(runs[0] / "rm")
    with pytest.raises(ValueError) as refused:
        reward_model.main(argv(tmp_path / "run", *OPTIONS, model, *options))
    assert all(word in str(refused.value) for word in words), refused.value


OF_RUNS = {
    "a language model as reward": (
        ["--config.rewards.names=('model:LM',)", "--config.rewards.weights=(1.0,)"],
        ("rewards.names", "is a language model", "grpo_jax.reward_model"),
    ),
    "a reward model as policy": (
        ["--config.model.path=RM"], ("model.path", "is a reward model"),
    ),
    "no such folder": (
        ["--config.rewards.names=('model:/none/there',)", "--config.rewards.weights=(1.0,)"],
        ("rewards.names = '/none/there'", "there is no such folder"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_RUNS)
def test_models_of_the_wrong_kind_are_refused(runs, tmp_path, name, one_device):
    options, words = OF_RUNS[name]
    root = runs[0]
    places = {"LM": root / "rm" / "bootstrap" / "export", "RM": root / "rm" / "export"}
    for key, folder in places.items():
        options = [option.replace(f"={key}", f"={folder}") for option in options]
        options = [option.replace(f"model:{key}", f"model:{folder}") for option in options]
    with pytest.raises(ValueError) as refused:
        train.main(argv(tmp_path / "run", model_of(root / "rm"), *options))
    assert all(word in str(refused.value) for word in words), refused.value


def test_two_models_of_one_name_are_refused():
    assert registry.short_name("model:runs/rm/export") == "rm"
    assert registry.short_name("model:/a/b c/") == "b_c"
    assert registry.short_name("model:owner/name") == "name"
    with pytest.raises(ValueError, match="two rewards called 'rm'"):
        registry.load(("model:a/rm", "model:b/rm/export"), (1.0, 1.0))
