"""A run whose episodes fork: what is learned from and logged, and resuming bit for bit.

The template begins each turn with a thought and drops it later. The policy is untrained and seldom
ends one, so that each turn of the user forks.
"""

from __future__ import annotations

import contextlib
import json
import os

import made_once
import numpy as np
import pytest
import torch
import transformers
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import TINY, make_chats

from grpo_jax import evaluate, generate
from grpo_jax.environments import episodes
from grpo_jax.rewards import keeper
from grpo_jax.run.append_log import read_jsonl

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


@contextlib.contextmanager
def finding(root):
    """The environment's module is found, by other processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
        yield patch


@pytest.fixture(scope="module")
def runs(tmp_path_factory, drive_here):
    """The folder of two runs: one that was left alone, and one stopped between two updates."""
    root = tmp_path_factory.mktemp("forks")
    (root / "twice.py").write_text(MODULE)
    folder, questions = make_chats(root / "model")
    places = {"model.path": str(folder), "data.path": str(questions)}
    options = {**places, **OPTIONS}
    argv = ["--config", str(TINY), *(f"--config.{name}={x}" for name, x in options.items())]

    def job(name, **stop):
        return {"argv": [*argv, "--workdir", str(root / name)]} | stop

    with finding(root):
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


@pytest.fixture(scope="module")
def talked(runs, runs_here):
    """What `generate` prints of a greedy conversation, and the processes that it left."""
    root, _, _ = runs
    options = generate._environment_options

    def short_turns(args):
        config = options(args)
        config.environment.update(turn_tokens=5, max_turns=3)
        return config

    argv = ["--model", str(root / "model"), "--chat", "--prompt", "1+1?", "--max-tokens", "96"]
    argv += ["--environment", "twice:Twice", "--history", "fork", "--json"]
    before = keeper.below(os.getpid())
    with finding(root) as patch:
        patch.setattr(generate, "_environment_options", short_turns)
        patch.setattr(generate, "Engine", made_once.engine)
        (line,) = runs_here("generate", argv).splitlines()
    return json.loads(line), set(keeper.below(os.getpid())) - set(before)


def test_generate_goes_on_from_what_the_template_writes(runs, talked):
    """Each turn is the most likely one after transformers' rendering of what was said before."""
    folder, (row, left) = runs[0] / "model", talked
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, logps = row["token_ids"], np.array(row["logprobs"])
    first = np.flatnonzero((logps != 0) & np.r_[True, logps[:-1] == 0])
    assert len(first) == 3 and not left
    messages = [{"role": "user", "content": "1+1?"}]
    for number, start in enumerate(first):
        turn = ids[start : start + 5]
        assert (logps[start : start + 5] < 0).all() and "</think>" not in tokenizer.decode(turn)
        context = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            found = network(torch.tensor([context + turn])).logits[0, len(context) - 1 : -1]
        assert found.argmax(-1).tolist() == turn
        want = found.log_softmax(-1).max(-1).values.numpy()
        np.testing.assert_allclose(logps[start : start + 5], want, atol=1e-4)
        said = {"role": "assistant", "content": ""}  # its thinking has no end, and is gone
        messages += [said, {"role": "user", "content": f"{number + 1}?"}]
    text = tokenizer.decode(ids)
    assert text.count("1?") == text.count("2?") == 1


def test_evaluate_holds_the_same_conversation(runs, talked, runs_here, tmp_path):
    root, (row, _) = runs[0], talked
    places = {"model.path": str(root / "model"), "data.path": str(root / "model.jsonl")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
    asked = [{"role": "user", "content": "1+1?"}]
    longest = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"])
    options = {**places, **OPTIONS, "data.max_prompt_tokens": longest}
    argv = ["--config", str(TINY), *(f"--config.{name}={x}" for name, x in options.items())]
    argv += ["--model", str(root / "model"), "--split", "train", "--num-problems", "1"]
    argv += ["--temperature", "0"]
    before = keeper.below(os.getpid())
    sampled, sample = [], episodes.sample
    with finding(root) as patch:
        keep = lambda *given, **more: sampled.append(sample(*given, **more)) or sampled[-1]  # noqa: E731
        patch.setattr(episodes, "sample", keep)
        patch.setattr(evaluate, "Engine", made_once.engine)  # with the programs of `talked`
        runs_here("evaluate", [*argv, "--out", str(tmp_path)])
    ((_, told),) = sampled
    assert told.parts_B.tolist() == [2]
    assert not set(keeper.below(os.getpid())) - set(before)
    (file,) = tmp_path.glob("*_greedy.jsonl")
    item = json.loads(file.read_text().splitlines()[0])
    assert item["completion"] == tokenizer.decode(row["token_ids"])
    assert item["length"] == 15 and not item["stopped"]  # its three turns, without what was said
