"""Every objective against its paper written out in PyTorch, float64, value and gradient."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import objective_campaign
import papers
import pytest

from grpo_jax import config as config_lib
from grpo_jax.algorithm import losses
from grpo_jax.algorithm.objective import OPTIONS, Objective
from grpo_jax.algorithm.presets import PRESETS
from grpo_jax.config import loading, options, rules

B, T = 12, 9


def batch(seed: int = 0, drift: float = 0.4) -> dict:
    """Completions of 1 to T tokens, one of none, with tokens between that are no actions."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.0, (B, T)) - 1e-3
    near = lambda: np.minimum(logp + rng.normal(0, drift, (B, T)), -1e-4)  # noqa: E731
    length = rng.integers(1, T + 1, B)
    length[3] = 0
    action = (np.arange(T) < length[:, None]) & ((rng.random((B, T)) > 0.2) | (np.arange(T) == 0))
    return {
        "logp": logp, "old": near(), "ref": near(), "sampler": near(),
        "entropy": rng.uniform(0, 2, (B, T)), "action": action,
        "advantage": rng.normal(0, 1.5, B),
    }  # fmt: skip


BATCH = batch()


def ours(chosen, given=BATCH, **changes):
    given = {**given, **changes}
    return losses.evaluate(
        chosen, logp_BT=given["logp"], old_logp_BT=given["old"], ref_logp_BT=given["ref"],
        sampler_logp_BT=given["sampler"], entropy_BT=given["entropy"],
        advantage_B=given["advantage"], action_BT=given["action"],
    )  # fmt: skip


def assert_equal(got, want, tolerance=1e-6):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance, atol=1e-9)
    np.testing.assert_allclose(
        got[1], want[1], rtol=tolerance, atol=tolerance * np.abs(want[1]).max()
    )
    assert np.abs(want[1]).max() > 1e-4


CASES = {
    **{name: dict(row) for name, row in PRESETS.items()},
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.5},
    "dual clip of the ratio": {"dual_clip_ratio": 1.5},
    "dual clip of the loss": {"dual_clip_loss": 1.3},
    "gspo with dual clip": {"ratio": "sequence", "dual_clip_ratio": 1.3, "clip_high": 0.1},
    "cispo by sequence": {"surrogate": "cispo", "ratio": "sequence", "ratio_cap": 1.1},
    "cispo with a cap": {"surrogate": "cispo", "ratio_cap": 1.2},
    "sapo by sequence": {"surrogate": "sapo", "ratio": "sequence"},
    "sapo, hard": {"surrogate": "sapo", "sapo_positive": 3.0, "sapo_negative": 5.0},
    "tv mask": {"surrogate": "tv_mask", "mask_threshold": 0.05},
    "kl mask": {"surrogate": "kl_mask", "mask_threshold": 0.01},
    "sampler mask": {"surrogate": "sampler_mask", "mask_threshold": 0.1},
    "gmpo, one-sided": {"ratio": "geometric", "clip_low": 0.1, "clip_high": 0.3},
    "no ratio": {"surrogate": "reinforce"},
    "sequence drift": {"max_sequence_drift": 0.05},
    **{f"kl {k}": {"kl_coef": 0.7, "kl_estimator": k} for k in ("k1", "k2", "k3", "k3_ratio")},
    "kl of gspo": {"ratio": "sequence", "kl_coef": 0.7, "kl_estimator": "k3_ratio"},
    "entropy": {"entropy_coef": 0.3, "normalizer": "sequence"},
    **{
        f"{level} {bound}": {
            "rollout_correction.level": level, "rollout_correction.bound": bound,
            "rollout_correction.cap": 1.4, "rollout_correction.floor": 0.6,
        }
        for level, bound in itertools.product(("token", "sequence"), ("truncate", "mask"))
    },
    "vespo, corrected": {"surrogate": "vespo", "rollout_correction.level": "token"},
    "luspo of half the limit": {"normalizer": "constant", "rollout.max_tokens": 20},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_paper(name):
    chosen = CASES[name]
    want = papers.loss(chosen, **BATCH, limit=chosen.get("rollout.max_tokens"))
    assert_equal(ours(chosen), want)
    if name in PRESETS:
        assert_equal(ours(name), want)


def test_each_case_is_another_objective():
    """No two of them give one gradient but those that differ in their advantage alone."""
    found = {}
    for name, chosen in CASES.items():
        if name == "entropy":  # a constant here
            continue
        key = tuple(np.round(ours(chosen)[1].ravel(), 9))
        others = found.setdefault(key, [])
        others.append(name)
    doubles = [names for names in found.values() if len(names) > 1]
    assert doubles == [["bnpo", "reinforce_pp", "ppo"], ["rloo", "reinforce", "maxrl"]]


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_every_preset_has_the_gradient_of_its_normalizer(name):
    """At ratio 1 it is -A under the normalizer: what a preset adds acts off-policy alone."""
    logp, row = BATCH["logp"], PRESETS[name]
    action = BATCH["action"]
    length = np.maximum(action.sum(1, keepdims=True), 1)
    count, sequences = action.sum(), (action.sum(1) > 0).sum()
    weight = {
        "token": action / count, "sequence": action / length / sequences,
        "sequence_sum": action / sequences, "constant": action / action.size,
    }[row["normalizer"]]  # fmt: skip
    want = -BATCH["advantage"][:, None] * weight

    for old in (None, logp):
        _, slope = ours(name, old=old, sampler=logp)
        np.testing.assert_allclose(slope, want, rtol=1e-9, atol=1e-12)


def test_the_advantage_may_differ_by_token():
    advantage = np.random.default_rng(1).normal(size=(B, T))
    for chosen in ("dapo", "cispo", "dppo", {"surrogate": "sapo"}):
        want = papers.loss(
            dict(PRESETS[chosen]) if isinstance(chosen, str) else chosen,
            **{**BATCH, "advantage": advantage},
        )
        assert_equal(ours(chosen, advantage=advantage), want)


def test_accepted_combinations_are_those_of_the_papers():
    """Some of them, value and gradient; objective_campaign.py, a program, checks all."""
    rng, refused, found = np.random.default_rng(0), collections.Counter(), []
    for surrogate in objective_campaign.PARTS["surrogate"]:
        parts = [*(objective_campaign.PARTS | {"surrogate": [surrogate]}).values()]
        some = (tuple(p[rng.integers(len(p))] for p in parts) for _ in itertools.count())
        found += itertools.islice(objective_campaign.accepted(some, refused), 5)
    assert len(refused) > 4
    for i, chosen in enumerate(found):
        assert objective_campaign.difference(chosen, with_old=i % 4 > 0) == "", chosen


def test_float32_stays_float32_and_is_near():
    given = {k: v if v.dtype == bool else np.float32(v) for k, v in BATCH.items()}
    for name in PRESETS:
        value, slope = ours(name, given)
        assert slope.dtype == np.float32
        assert_equal((value, slope), ours(name), 2e-5)


def test_far_tokens_and_empty_completions_stay_finite():
    logp = BATCH["logp"] - 80.0 * (np.random.default_rng(2).random((B, T)) < 0.2)
    for name, chosen in CASES.items():
        for given in (
            {"logp": logp},
            {"old": logp, "sampler": logp},
            {"ref": logp, "action": BATCH["action"] & (np.arange(B) != 5)[:, None]},
        ):
            value, slope = ours(chosen, **given)
            assert np.isfinite(value) and np.isfinite(slope).all(), name
            assert not slope[~given.get("action", BATCH["action"])].any(), name


@pytest.mark.parametrize(
    ("chosen", "missing", "words"),
    [
        ("grppo", (), "'grppo' is none of grpo, dr_grpo"),
        ({"clip": 1}, (), "'clip' is no option of an objective: clip_low"),
        ({"kl_coef": 1.0}, ("ref",), "ref_logp_BT is missing, and kl_coef"),
        ({"entropy_coef": 1.0}, ("entropy",), "entropy_BT is missing"),
        ({"surrogate": "sampler_mask"}, ("sampler",), "sampler_logp_BT is missing"),
    ],
)
def test_what_evaluate_refuses(chosen, missing, words):
    with pytest.raises(ValueError, match=words):
        ours(chosen, **dict.fromkeys(missing))


def test_options_have_the_names_and_defaults_of_a_config():
    flat = {o.name.removeprefix("algorithm."): o.default for o in options.TABLE}
    for option, field in OPTIONS.items():
        if option != "rollout.max_tokens":
            assert getattr(Objective(), field) == flat[option], option
    for row in PRESETS.values():
        assert not set(row) - set(flat)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_has_its_default_and_nothing_else(name):
    base = ["--config.data.task=arithmetic", "--config.sft.num_steps=1"]
    config = loading.read(None, [*base, f"--config.algorithm.preset={name}"])
    rules.check(config)
    default = config_lib.default().algorithm
    for option in default:
        want = PRESETS[name].get(option, name if option == "preset" else default[option])
        assert config.algorithm[option] == want, option
    normalizer = "constant" if PRESETS[name]["normalizer"] != "constant" else "sequence"
    config = loading.read(
        None, [f"--config.algorithm.preset={name}", f"--config.algorithm.normalizer={normalizer}"]
    )
    assert config.algorithm.normalizer == normalizer


# --- TRL itself -----------------------------------------------------------------------------------

_TRL = {
    **{n: {"loss_type": n} for n in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")},
    "clip-higher": {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.5},
    "dual clip": {"loss_type": "bnpo", "delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    "luspo by token": {"loss_type": "luspo"},
    "drift": {"loss_type": "bnpo", "off_policy_mask_threshold": 0.05},
    "kl": {"loss_type": "bnpo", "beta": 0.7},
    "kl alone": {"loss_type": "dr_grpo", "beta": 0.7, "use_bias_correction_kl": False},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.3},
    "corrected": {
        "loss_type": "bnpo", "use_vllm": True, "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 1.4, "vllm_importance_sampling_clip_min": 0.6,
    },
    "corrected, by completion": {
        "loss_type": "grpo", "use_vllm": True, "vllm_importance_sampling_clip_max": 1.4,
    },
    "vespo, corrected": {
        "loss_type": "vespo", "use_vllm": True, "vllm_importance_sampling_clip_max": 1.4,
        "vllm_importance_sampling_mode": "token_truncate",
    },
}  # fmt: skip


def of_trl(trl, arguments: dict, given: dict):
    """`GRPOTrainer._compute_loss` of TRL, on given log-probabilities; value and gradient."""
    import torch

    args = trl.GRPOConfig(bf16=False, max_completion_length=T, **arguments)
    tensor = lambda x: torch.tensor(np.float64(x))  # noqa: E731
    logp, mask = tensor(given["logp"]).requires_grad_(), tensor(given["action"])
    accelerator = mock.MagicMock(num_processes=1, sync_gradients=True)
    accelerator.gather = accelerator.gather_for_metrics = lambda x: x
    accelerator.reduce = lambda x, reduction: x
    trainer = SimpleNamespace(
        args=args, accelerator=accelerator, model=SimpleNamespace(training=True),
        _metrics={"train": mock.MagicMock()}, aux_loss_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, tensor(given["entropy"]), None),
        epsilon_low=args.epsilon, current_gradient_accumulation_steps=1,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        _entropy_bonus_enabled=args.entropy_coef != 0,
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        **{name: getattr(args, name) for name in (
            "beta", "loss_type", "top_entropy_quantile", "off_policy_mask_threshold", "use_vllm",
            "importance_sampling_level", "max_completion_length", "entropy_coef",
            "use_adaptive_entropy", "vllm_importance_sampling_correction",
        )},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros((B, 1), dtype=torch.int64), "prompt_mask": torch.ones((B, 1)),
        "completion_ids": torch.zeros((B, T), dtype=torch.int64), "completion_mask": mask,
        "advantages": tensor(given["advantage"]), "old_per_token_logps": tensor(given["old"]),
        "ref_per_token_logps": tensor(given["ref"]), "num_items_in_batch": mask.sum(),
        "sampling_per_token_logps": tensor(given["sampler"]),
    }  # fmt: skip
    args.steps_per_generation = 1
    if args.use_vllm:
        inputs["importance_sampling_ratio"] = _trl_ratio(args, given)
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return float(loss), logp.grad.numpy()


def _trl_ratio(args, given):
    """As `_generate_and_score_completions` has it, which samples and cannot be called alone."""
    import torch

    difference = (given["old"] - given["sampler"]) * given["action"]
    if args.vllm_importance_sampling_mode.startswith("sequence"):
        difference = difference.sum(-1, keepdims=True)
    ratio = torch.exp(torch.tensor(difference))
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if args.vllm_importance_sampling_mode.endswith("truncate"):
        return torch.clamp(ratio, low, high)
    outside = (ratio > high) | (ratio < (low or 0.0))
    return ratio.masked_fill(outside, 0.0)


@pytest.mark.parametrize("name", _TRL)
def test_trl_itself_gives_the_same(name):
    """TRL 1.16, where it is installed; its arguments become options as `grpo_jax.trl` says."""
    trl = pytest.importorskip("trl", reason="needs trl")
    from grpo_jax.trl import GRPOConfig
    from grpo_jax.trl.config import options_of

    arguments = _TRL[name]
    # TRL counts a completion without an action as a loss of 0; docs/definitions.md.
    keep = BATCH["action"].any(1)
    given = {key: value[keep] for key, value in BATCH.items()}
    found = options_of(GRPOConfig(**arguments), 64, 1)
    chosen = {n.removeprefix("algorithm."): v for n, v in found.items()}
    chosen = {n: v for n, v in chosen.items() if n in OPTIONS} | {"rollout.max_tokens": T}
    with mock.patch(f"{__name__}.B", len(given["logp"])):
        want = of_trl(trl, arguments, given)
    got = ours(chosen, given)
    if name == "entropy":  # the bonus of TRL is the mean over tokens, as with "token" here
        assert chosen["normalizer"] == "token"
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-9)


# --- The page -------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def rows_of_the_page() -> list[str]:
    """The table at the end of docs/objectives.md."""
    rows = []
    for name in PRESETS:
        loss, slope = losses.evaluate(
            name,
            logp_BT=np.log([[0.5, 0.6, 0.9], [0.2, 0.8, 1.0]]),
            old_logp_BT=np.log([[0.4, 0.6, 0.9], [0.25, 0.5, 1.0]]),
            advantage_B=np.array([1.0, -1.0]),
            action_BT=np.array([[True, True, True], [True, True, False]]),
        )
        told = [", ".join(f"{x + 0:.4f}" for x in row) for row in (slope[0], slope[1, :2])]
        rows.append(f"| `{name}` | {loss:.4f} | {told[0]} | {told[1]} |")
    return rows


def test_the_page_has_the_numbers_and_every_preset():
    text = PAGE.read_text()
    assert text.rstrip("\n").splitlines()[-len(PRESETS) :] == rows_of_the_page()
    for name, row in PRESETS.items():
        told = next(line for line in text.splitlines() if line.startswith(f"| `{name}` | `"))
        stated = {"clip_low": "clip", "clip_high": "clip", "scale_by": "`"}  # also told in words
        assert all(stated.get(option, f"`{option}=") in told for option in row), name
