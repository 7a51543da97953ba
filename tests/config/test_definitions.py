"""What a run says of its own formulas, and that the docs say it too."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_jax import cli, train
from grpo_jax.config import definitions, rules
from grpo_jax.config import options as options_lib
from grpo_jax.config.dotted import override
from grpo_jax.setup import model
from grpo_jax.trainers import grpo

DOCS = Path(__file__).resolve().parents[2] / "docs" / "definitions.md"


def lines(**options) -> list[str]:
    config = options_lib.default()
    for name, value in options.items():
        override(config, name.replace("__", "."), str(value))
    return definitions.in_force(config)


def test_the_defaults():
    assert lines() == [
        "Advantage A: (reward - mean of its group) / the group's standard deviation, 0 where that "
        "is <= 1e-4",
        "Loss: -min(r A, clip(r, 0.8, 1.2) A), mean over an update's tokens",
        "AdamW(0.9, 0.99), learning rate 1e-06",
    ]


def test_everything_that_differs_is_told():
    told = lines(
        algorithm__scale_by="sample_std", algorithm__clip_low=0.1, algorithm__clip_high=0.28,
        algorithm__kl_coef=0.04, algorithm__kl_estimator="k3_ratio",
        algorithm__entropy_coef=0.01, algorithm__normalizer="constant", rollout__max_tokens=64,
        rollout_correction__level="sequence", rollout_correction__bound="mask",
        rollout_correction__cap=3.0,
        algorithm__mask_truncated=True, rollout__top_k=20, rollout__top_p=0.95,
        optim__beta2=0.999, optim__warmup_steps=5, optim__schedule="linear",
        optim__end_fraction=0.1, optim__learning_rate=2e-4, loop__num_steps=30,
        batch__minibatches=2,
    )  # fmt: skip
    assert told == [
        "Advantage A: (reward - mean of its group) / (the group's sample standard deviation + "
        "1e-4)",
        "Loss: -w min(r A, clip(r, 0.9, 1.28) A) + 0.04 (r k3, gradient of KL(policy || "
        "reference)) - 0.01 entropy, sum over an update's tokens / (completions x 64); w = policy "
        "/ sampler of each sequence, 0 above 3; completions that were cut are left out; "
        "probabilities within top_k 20 and top_p 0.95",
        "AdamW(0.9, 0.999), learning rate 0.0002 after 5 updates, linear to 2e-05 at update 60",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"baseline": "leave_one_out", "scale_by": "none", "kl_in": "reward", "kl_coef": 0.05},
            "reward - 0.05 sum of log(policy / reference) - mean of the others of its group",
        ),
        (
            {"scale_by": "mean"},
            "(reward - mean of its group) / mean of its group, 0 where that is <= 0",
        ),
        (
            {"baseline": "length_weighted", "scale_by": "batch_std"},
            "(reward - mean of its group weighted by length) / (the sample standard deviation of "
            "the step's rewards + 1e-4)",
        ),
        (
            {"baseline": "none", "scale_by": "none", "whiten": "tokens"},
            "reward; then minus the mean of the step's tokens, / their standard deviation",
        ),
        (
            {"baseline": "greedy", "scale_by": "none"},
            "reward - reward of the greedy completion",
        ),
        (
            {"credit": "best", "scale_by": "none"},
            "reward - second best of its group for the best, 0 for the others",
        ),
        (
            {"credit": "rank", "scale_by": "none", "kl_in": "reward", "kl_coef": 0.5},
            "rank of (reward - 0.5 sum of log(policy / reference)) - mean of its group",
        ),
        (
            {"aggregate": "each", "scale_by": "sample_std"},
            "weighted sum over the rewards of [(reward - mean of its group) / (the group's sample "
            "standard deviation + 1e-4)]; then minus the mean of the step's completions, / (their "
            "sample standard deviation + 1e-4)",
        ),
    ],
    ids=str,
)
def test_the_advantage_is_told(options, expected):
    told = lines(**{f"algorithm__{name}": value for name, value in options.items()})
    assert told[0] == f"Advantage A: {expected}"
    assert "k3" not in told[1]  # the KL counts once


def test_a_critic_is_told():
    told = lines(
        algorithm__critic=True, algorithm__baseline="none", algorithm__scale_by="none",
        algorithm__whiten="tokens", algorithm__kl_in="reward", algorithm__kl_coef=0.05,
        algorithm__discount=0.99, algorithm__gae_length_scale=0.05,
        critic__gae_lambda=1.0, critic__first_steps=3,
    )  # fmt: skip
    assert told[0] == (
        "Advantage A: d + 0.99 (1 - 1 / (0.05 tokens of its completion), at least 0) next A of "
        "each token, d = r + 0.99 next V - V, r = the reward at the last token - 0.05 log(policy "
        "/ reference) at each; then minus the mean of the step's tokens, / their standard deviation"
    )
    assert told[2] == (
        "Critic's loss: 0.25 max((V - R)^2, (clip(V, old V +- 0.2) - R)^2), R = V + advantage "
        "with lambda 1, mean over an update's tokens; learning rate 1e-05; alone for 3 steps"
    )
    plain = lines(algorithm__critic=True, critic__clip=0.0)
    assert plain[0] == (
        "Advantage A: d + 0.95 next A of each token, d = r + next V - V, r = the reward at the "
        "last token"
    )
    assert "Critic's loss: 0.25 (V - R)^2, R" in plain[2]


def test_what_changes_during_the_run_is_told():
    told = lines(
        algorithm__kl_coef=0.02, algorithm__kl_target=0.1, algorithm__kl_horizon=5000,
        algorithm__entropy_target=0.5, algorithm__entropy_coef_delta=0.002,
        algorithm__entropy_coef_max=0.1, algorithm__reference_refresh_steps=512,
        algorithm__top_entropy_share=0.2, batch__prompts=32, batch__group=8,
    )  # fmt: skip
    assert told[1:3] == [
        "Loss: -min(r A, clip(r, 0.8, 1.2) A) + b (k3, gradient of KL(reference || policy)) - c "
        "entropy, mean over an update's tokens; A = 0 but for the 20 % of a rollout's tokens that "
        "have the highest entropy",
        "After each step: b from 0.02, times 1 + 0.0512 clip(KL / 0.1 - 1, -0.2, 0.2); c from 0, "
        "0.002 up if the entropy is <= 0.5, else down and left out of the next step, within [0, "
        "0.1]; reference = 0.6 policy + 0.4 reference every 512 steps",
    ]
    assert len(told) == 4


def test_a_run_begins_with_them(monkeypatch, tmp_path, capsys):
    """Before anything of it is computed."""

    def begun(config, *rest, **more):
        raise KeyboardInterrupt

    config = tmp_path / "config.py"
    config.write_text(
        "from grpo_jax.config import options\n\n\ndef get_config():\n    c = options.default()\n"
        '    c.data.task = "arithmetic"\n    c.model.path = "some/model"\n    return c\n'
    )
    monkeypatch.setattr(grpo, "run", begun)
    monkeypatch.setattr(cli, "use_all_cores", lambda *given: None)
    monkeypatch.setattr(cli, "use_compile_cache", lambda *given, **more: None)
    monkeypatch.setattr(model, "model_shape", lambda *given: _Shape())
    with pytest.raises(KeyboardInterrupt):
        train.main(["--config", str(config), "--workdir", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert all(line in shown for line in lines())


class _Shape:
    num_params = 0


ADVANTAGE = ("baseline", "scale_by", "aggregate", "credit", "whiten", "kl_in")


@pytest.mark.parametrize("option", [*ADVANTAGE, "kl_estimator", "normalizer"])
def test_every_choice_is_told_and_documented(option):
    """Another line for each, and none that is refused."""
    text, told = DOCS.read_text(), set()
    choices = options_lib.BY_NAME[f"algorithm.{option}"].choices
    assert len(choices) > 1
    for choice in choices:
        given = {"algorithm__kl_coef": 0.1, f"algorithm__{option}": choice}
        if choice in ("greedy", "none"):
            given["algorithm__scale_by"] = "none"
        config = options_lib.default()
        config.data.task, config.model.path = "arithmetic", "some/model"
        for name, value in given.items():
            override(config, name.replace("__", "."), str(value))
        rules.check(config)
        told.add(tuple(lines(**given)))
        assert f'"{choice}"' in text
    assert len(told) == len(choices)
    assert f"algorithm.{option}" in text
