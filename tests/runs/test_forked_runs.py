"""A run whose episodes fork: what is learned from and logged, and resuming bit for bit.

The template begins each turn with a thought and drops it later. The policy is untrained and seldom
ends one, so that each turn of the user forks.
"""

from __future__ import annotations

import json
import os

import chat_families
import jax
import numpy as np
import pytest
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import TINY

from grpo_jax.config import loading
from grpo_jax.devices import sharding
from grpo_jax.models import policy
from grpo_jax.models.hf.export import save
from grpo_jax.run.append_log import read_jsonl
from grpo_jax.setup import model

pytestmark = pytest.mark.slow

MODULE = '''
class Twice:
    """Answers twice; a long word is worth more."""

    def reset(self, **row):
        self.words = []

    def respond(self, messages):
        self.words.append(messages[-1].get("reasoning_content", ""))
        return f"{len(self.words)}?" if len(self.words) < 3 else None

    def get_reward(self):
        return max(map(len, self.words)) / 10
'''
OPTIONS = {
    "environment.classes": ("twice:Twice",),
    "environment.history": "fork",
    "environment.max_turns": 3,
    "environment.turn_tokens": 5,
    "rewards.names": (),
    "rewards.weights": (),
    "rollout.max_tokens": 96,
    "data.task": "",
    "data.chat": True,
    "data.max_prompt_tokens": 48,
    "data.num_eval": 0,
    "sft.num_steps": 0,
    "algorithm.kl_coef": 0.0,
    "loop.num_steps": 2,
    "prompts.drop_equal_groups": True,
    "prompts.if_short": "fill",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, drive_here):
    """The folder of two runs: one that was left alone, and one stopped between two updates."""
    root = tmp_path_factory.mktemp("forks")
    (root / "twice.py").write_text(MODULE)
    tokenizer, _ = chat_families.qwen(chat_families.QWEN3_XML)
    new = model.new(loading.load(str(TINY), []).model, tokenizer)
    params = policy.load_params(new, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
    save(root / "model", params, new.model, source=None, dtype="float32", tokenizer=tokenizer)
    asked = [{"prompt": [{"role": "user", "content": f"{n}+1?"}]} for n in range(1, 9)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    places = {"model.path": str(root / "model"), "data.path": str(root / "train.jsonl")}
    options = {**places, **OPTIONS}
    argv = ["--config", str(TINY), *(f"--config.{name}={x}" for name, x in options.items())]

    def job(name, **stop):
        return {"argv": [*argv, "--workdir", str(root / name)]} | stop

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
        ends = drive_here([job("whole"), job("stopped", after=6)])
        assert ends[0] == "finished", ends
        kept = final_state(root / "stopped", "experience")
        ends += drive_here([job("stopped")])
    return root, ends, kept


def test_parts_are_learned_from_and_logged(runs):
    root, ends, arrays = runs
    assert ends[0] == ends[2] == "finished" and ends[1].startswith("Stopped by SIGTEST")
    rows = [row for row in logged(root / "whole") if "reward" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["environment/forks"] > 1 and row["environment/rewritten_tokens"] > 20
        assert row["policy/sampler_gap_max"] < 1e-4  # each token in the context of its sampling
        assert row["environment/read_again"] > 0
    action_PGC, begin_PGC = arrays["/action_PGC"], arrays["/rollouts/begin_PGC"]
    np.testing.assert_array_equal(action_PGC, arrays["/rollouts/chosen_PGC"])
    assert (begin_PGC.max(-1) > 0).any() and arrays["/advantage"].shape == begin_PGC.shape[:2]


def test_a_stopped_run_continues_as_if_it_had_not_been(runs):
    root, _, _ = runs
    assert not state_differences(root / "whole", root / "stopped")
    assert not log_differences(root / "whole", root / "stopped")


def test_samples_show_the_conversation_once(runs):
    root, _, _ = runs
    texts = [row["completion"] for row in read_jsonl(root / "whole" / "samples.jsonl")]
    assert any("2?" in text for text in texts)
    assert max(text.count("1?") for text in texts) == 1
