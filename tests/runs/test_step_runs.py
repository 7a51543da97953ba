"""A run whose reward tells of steps: what each token's advantage is, and resuming bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import TINY, make_model

from grpo_jax.models.hf.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

OPTIONS = {
    "rewards.names": ("plain_rewards:short", "plain_rewards:digits"),
    "rewards.weights": (1.0, 0.5),  # as others have it, whose programs these then are
    "rewards.by_step": ("digits",),
    "evaluation.num_problems": 0,
    "sft.num_steps": 0,
    "loop.num_steps": 2,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, drive_here):
    """The folder of two runs: one left alone, and one stopped between two updates of step 2."""
    root = tmp_path_factory.mktemp("steps")
    options = {"model.path": str(make_model(root / "model")), **OPTIONS}
    argv = ["--config", str(TINY), *(f"--config.{name}={x}" for name, x in options.items())]
    job = lambda name, **stop: {"argv": [*argv, "--workdir", str(root / name)]} | stop  # noqa: E731
    ends = drive_here([job("whole"), job("stopped", after=6)])
    kept = final_state(root / "stopped", "experience")
    return root, [*ends, *drive_here([job("stopped")])], kept


def relative(values):
    """Values less their mean, in their population deviation."""
    values = np.array(values, np.float64)
    return (values - values.mean()) / values.std() if values.std() > 1e-4 else 0 * values


def test_each_token_has_what_the_steps_from_it_on_are_worth(runs):
    root, ends, arrays = runs
    assert ends[1].startswith("Stopped by SIGTEST")
    ids_PGC, length_PG = arrays["/rollouts/completion_PGC"], arrays["/rollouts/length_PG"]
    decode = load_tokenizer(root / "model").decode
    several = 0
    for ids_GC, length_G, got_GC in zip(ids_PGC, length_PG, arrays["/advantage"]):
        rows = [ids[:n].tolist() for ids, n in zip(ids_GC, length_G)]
        texts = [decode(row, skip_special_tokens=True) for row in rows]
        outcome_G = relative([-len(text) for text in texts])
        step = relative([float(c.isdigit()) for text in texts for c in text])
        for g, (row, text, got_C) in enumerate(zip(rows, texts, got_GC)):
            own, step = step[: len(text)], step[len(text) :]
            for t in range(len(row)):
                before = len(decode(row[:t], skip_special_tokens=True))
                want = outcome_G[g] + 0.5 * own[before:].sum()
                assert got_C[t] == pytest.approx(want, abs=2e-5)
            several += len(set(got_C[: len(row)].tolist())) > 2
    assert several > 4


def test_a_stopped_run_continues_as_if_it_had_not_been(runs):
    root, ends, _ = runs
    assert ends[0] == ends[2] == "finished"
    assert not state_differences(root / "whole", root / "stopped")
    assert not log_differences(root / "whole", root / "stopped")
    rows = [row for row in logged(root / "whole") if "reward" in row]
    assert len(rows) == 2 and min(row["policy/grad_norm"] for row in rows) > 1e-3
