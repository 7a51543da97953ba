"""Losses of preferences against their papers and against TRL, value and gradient in float64."""

from __future__ import annotations

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import preference_papers
import pytest

from grpo_jax.algorithm import preferences
from grpo_jax.algorithm.preference_losses import PairLoss, PreferenceTerms, UnpairedLoss
from grpo_jax.algorithm.preferences import Preference

P, C = 6, 7


def batch(group: int) -> dict:
    """Completions of 1 to C tokens; the last prompt is filler, without a token that counts."""
    rng = np.random.default_rng(group)
    logp = -rng.exponential(1.0, (P, group, C)) - 1e-3
    length = rng.integers(1, C + 1, (P, group))
    length[-1] = 0
    length[-2, 1:] = 0  # no pair, without its second half
    action = np.arange(C) < length[..., None]
    given = {"logp": np.where(action, logp, 0), "action": action}
    given["ref"] = np.where(action, np.minimum(logp + rng.normal(0, 0.6, logp.shape), -1e-4), 0)
    return given


PAIRS, COMPLETIONS = batch(2), batch(1)
DESIRABLE = np.array([[True], [False], [False], [True], [False], [True]])
MISMATCHED = np.array([0.9, -0.3, 0.8, 0.1, 0.7])  # log-ratios


def terms_of(given: dict, **signal) -> PreferenceTerms:
    put = {name: None if x is None else jnp.asarray(x) for name, x in signal.items()}
    ref = jnp.asarray(given["ref"].sum(-1))
    return PreferenceTerms(jnp.asarray(given["action"]), ref, put.pop("nll", None), **put)


def ours(component, given: dict, terms: PreferenceTerms) -> tuple[float, np.ndarray]:
    weight, divisor = component.weights(jnp.asarray(given["action"]))

    def loss(logp):
        return (weight * component.loss(logp, None, terms)).sum() / divisor

    value, slope = jax.value_and_grad(loss)(jnp.asarray(given["logp"]))
    return float(value), np.where(given["action"], slope, 0)


def pair_loss(options: dict, given: dict = PAIRS, nll: float = 0.0):
    with jax.enable_x64(True):
        there = given["action"].any(-1).all(-1)
        weight = nll * there.sum() / given["action"][there, 0].sum()
        nll_PG = np.tile([[weight, 0.0]], (len(there), 1)) if nll else None
        return ours(PairLoss(Preference(**options)), given, terms_of(given, nll=nll_PG))


def unpaired_loss(options: dict, given: dict = COMPLETIONS):
    with jax.enable_x64(True):
        z = preferences.reference_point(jnp.asarray(MISMATCHED), np.ones(5, bool))
        signal = {"desirable_PG": DESIRABLE, "divergence_PG": jnp.full((P, 1), z)}
        return ours(UnpairedLoss(Preference(**options)), given, terms_of(given, **signal))


def assert_equal(got, want, tolerance=1e-6):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    largest = np.abs(want[1]).max()
    assert largest > 1e-4
    np.testing.assert_allclose(got[1], want[1], rtol=tolerance, atol=tolerance * largest)


CASES = {
    "sigmoid": {},
    "sigmoid, smoothed": {"loss": "sigmoid", "label_smoothing": 0.2},
    "sigmoid of means": {"loss": "sigmoid", "log_ratio": "mean", "beta": 2.0},
    "ipo": {"loss": "ipo"},
    "ipo of sums": {"loss": "ipo", "log_ratio": "sum", "beta": 0.3},
    "hinge": {"loss": "hinge", "beta": 0.9},
    "robust": {"loss": "robust", "label_smoothing": 0.1, "beta": 0.5},
    "apo_zero": {"loss": "apo_zero", "beta": 0.4},
    "apo_down": {"loss": "apo_down", "beta": 0.4},
    "orpo": {"loss": "orpo"},
    "cpo": {"reference": "none"},
    "cpo, smoothed": {"reference": "none", "label_smoothing": 0.2},
    "cpo, hinge": {"loss": "hinge", "reference": "none", "beta": 0.4},
    "cpo, ipo": {"loss": "ipo", "reference": "none", "beta": 0.4},
    "simpo": {"reference": "none", "log_ratio": "mean", "beta": 2.0, "margin": 1.0},
}
_CPO = [name for name, options in CASES.items() if "reference" in options]


@pytest.mark.parametrize("nll", [0.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_pairs_as_the_papers_have_them(name, nll):
    options = {"loss": "sigmoid", **CASES[name]}
    want = preference_papers.of_pairs(options, **PAIRS, nll=nll)
    assert_equal(pair_loss(options, nll=nll), want)


UNPAIRED = {
    "kto": {"loss": "kto", "beta": 0.5},
    "kto, weighed": {"loss": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.6},
    "apo_zero_unpaired": {"loss": "apo_zero_unpaired", "beta": 0.5},
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_completions_as_the_papers_have_them(name):
    want = preference_papers.of_completions(
        UNPAIRED[name], **COMPLETIONS, desirable=DESIRABLE, mismatched=MISMATCHED
    )
    assert_equal(unpaired_loss(UNPAIRED[name]), want)


def test_ktos_point_is_not_negative_and_counts_what_is_there():
    at = lambda x, there: float(preferences.reference_point(jnp.float32(x), np.array(there)))  # noqa: E731
    assert at([-1.0, 0.5], [True, True]) == 0
    assert at([1.0, 9.0, 3.0], [True, False, True]) == 2
    assert at([5.0], [False]) == 0
    slope = jax.grad(lambda x: preferences.reference_point(x, np.ones(2, bool)))(jnp.ones(2))
    assert not np.any(slope)


def test_what_is_sure_or_far_off_has_finite_losses_and_gradients():
    """In float32: probabilities that round to 1, and log-ratios of a thousand nats."""
    for logp in (-1e-4, -0.3, -3.0):
        want = logp - np.log(-np.expm1(logp))
        np.testing.assert_allclose(preferences.log_odds(jnp.float32(logp)), want, rtol=1e-6)
    sure = jnp.float32([0.0, -1e-9, -40.0, -1000.0])
    for value in (preferences.log_odds(sure), jax.vmap(jax.grad(preferences.log_odds))(sure)):
        assert np.isfinite(value).all()
    far = jnp.float32([1e3, -1e3])
    for loss in ("sigmoid", "hinge", "robust", "apo_zero", "apo_down"):
        chosen = Preference(loss, beta=1.0, label_smoothing=0.1)
        of = lambda d, o=chosen: preferences.of_pair(o, d, -d)  # noqa: E731
        assert np.isfinite(of(far)).all() and np.isfinite(jax.vmap(jax.grad(of))(far)).all()


# --- TRL ------------------------------------------------------------------------------------------


def of_trl(trainer, given: dict, group: int, **settings):
    """Loss and gradient by a trainer's own `_compute_loss`, of a model that gives `logp`."""
    import torch

    there = given["action"].any(-1).all(-1)
    # Rows as in its batches: all chosen, then all rejected; one prompt token before each.
    rows = lambda x: torch.tensor(x[there].transpose(1, 0, 2).reshape(-1, C))  # noqa: E731
    logp, mask = rows(given["logp"]).requires_grad_(), rows(given["action"])
    zeros = torch.zeros_like(logp)
    outputs = SimpleNamespace(
        log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    ones = torch.ones(len(mask), C + 1, dtype=torch.long)
    inputs = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": torch.cat([torch.zeros(len(mask), 1), mask], 1).long(),
    }
    ref = rows(given["ref"]).sum(1)
    if group == 2:
        inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref.chunk(2)))
    else:
        inputs |= {"ref_logps": ref, "label": torch.tensor(DESIRABLE[there, 0])}
        inputs |= {"ref_KL_logps": torch.zeros(len(MISMATCHED), dtype=torch.float64)}
    same = lambda x: x  # noqa: E731
    theirs = SimpleNamespace(
        model=None,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )

    def model(**_):
        return outputs

    model.training = True
    theirs.model = model
    loss = trainer._compute_loss(theirs, model, inputs, False)
    loss.backward()
    slope = np.zeros(given["logp"].shape)
    slope[there] = logp.grad.numpy().reshape(group, -1, C).transpose(1, 0, 2)
    slope = np.where(given["action"], slope, 0)  # its model gives 0 in the padding
    metrics = {name: values[-1] for name, values in theirs._metrics["train"].items()}
    return float(loss.detach()), slope, metrics


def of_dpo(trl, options: dict, nll: float):
    loss = options["loss"]
    if options.get("log_ratio") == "mean":
        loss = "sigmoid_norm"
    settings = {"loss_types": [loss, "sft"], "loss_weights": [1.0, nll]}
    settings |= {"beta": options.get("beta", 0.1), "use_weighting": False, "ld_alpha": None}
    settings |= {"label_smoothing": options.get("label_smoothing", 0.0)}
    return of_trl(trl.DPOTrainer, PAIRS, 2, **settings, f_divergence_type="reverse_kl")


# TRL 1.16 has neither the smoothed "sigmoid" nor "ipo" of sums; docs/preference.md.
_NOT_IN_TRL = ("sigmoid, smoothed", "ipo of sums", "orpo", *_CPO)


@pytest.mark.parametrize("name", [name for name in CASES if name not in _NOT_IN_TRL])
def test_pairs_as_trl_has_them(name):
    trl = pytest.importorskip("trl", reason="needs trl")
    options = {"loss": "sigmoid", **CASES[name]}
    assert_equal(pair_loss(options, nll=0.7), of_dpo(trl, options, 0.7)[:2])


@pytest.mark.parametrize("name", UNPAIRED)
def test_completions_as_trl_has_them(name):
    trl = pytest.importorskip("trl", reason="needs trl")
    import torch

    options = UNPAIRED[name]
    want = of_trl(
        trl.KTOTrainer,
        COMPLETIONS,
        1,
        loss_type=options["loss"],
        calculate_KL=options["loss"] == "kto",
        beta=options.get("beta", 0.1),
        desirable_weight=options.get("desirable_weight", 1.0),
        undesirable_weight=options.get("undesirable_weight", 1.0),
        _compute_kl_logps=lambda model, batch: torch.tensor(MISMATCHED),
    )
    assert_equal(unpaired_loss(options), want[:2])
    assert_metrics(UnpairedLoss(Preference(**options)), COMPLETIONS, want[2])


def test_the_metrics_of_pairs_are_those_of_trl():
    trl = pytest.importorskip("trl", reason="needs trl")
    assert_metrics(PairLoss(Preference()), PAIRS, of_dpo(trl, {"loss": "sigmoid"}, 0.0)[2])


_TRLS = {
    "rewards/chosen": "preference/reward_chosen",
    "rewards/rejected": "preference/reward_rejected",
    "rewards/margins": "preference/reward_margin",
    "rewards/accuracies": "preference/reward_accuracy",
    "logps/chosen": "preference/logp_chosen",
    "logps/rejected": "preference/logp_rejected",
    "kl": "preference/kl",
}


def assert_metrics(component, given: dict, want: dict):
    with jax.enable_x64(True):
        z = preferences.reference_point(jnp.asarray(MISMATCHED), np.ones(5, bool))
        signal = {}
        if isinstance(component, UnpairedLoss):
            signal = {"desirable_PG": DESIRABLE, "divergence_PG": jnp.full((P, 1), z)}
        action = jnp.asarray(given["action"])
        sums, _ = component.diagnostics(
            jnp.asarray(given["logp"]), None, terms_of(given, **signal), action
        )
        assert set(sums) == set(component.sums)
        got = component.means(sums | {"tokens": action.sum()})
    known = {name: ours for name, ours in _TRLS.items() if name in want and ours in got}
    assert len(known) >= 5
    for name, ours in known.items():
        np.testing.assert_allclose(got[ours], want[name], rtol=1e-6, err_msg=name)


def test_orpo_is_that_of_trl():
    """Its odds ratio and the mean over tokens; TRL's nll counts the prompt too."""
    pytest.importorskip("trl", reason="needs trl")
    import torch
    from trl.experimental.orpo import orpo_trainer

    there = PAIRS["action"].any(-1).all(-1)
    logp = torch.tensor(PAIRS["logp"][there], requires_grad=True)
    mean = logp.sum(-1) / torch.tensor(PAIRS["action"][there]).sum(-1)
    theirs = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    # It computes in float32.
    losses = orpo_trainer.ORPOTrainer.odds_ratio_loss(theirs, mean[:, 0], mean[:, 1])[0]
    (-losses.mean()).backward()
    slope = np.zeros(PAIRS["logp"].shape)
    slope[there] = logp.grad.numpy()
    want = -float(losses.mean().detach()), np.where(PAIRS["action"], slope, 0)
    assert_equal(pair_loss({"loss": "orpo"}), want, 2e-6)


@pytest.mark.parametrize("name", _CPO)
def test_cpo_is_that_of_trl(name):
    """Its loss of pairs; the nll beside it is `preference.nll_weight`."""
    pytest.importorskip("trl", reason="needs trl")
    import torch
    from trl.experimental.cpo import cpo_trainer

    options = {"loss": "sigmoid", **CASES[name]}
    there = PAIRS["action"].any(-1).all(-1)
    logp = torch.tensor(PAIRS["logp"][there], requires_grad=True)
    x = logp.sum(-1)
    if name in ("simpo", "cpo, ipo"):  # it takes means there
        x = x / torch.tensor(PAIRS["action"][there]).sum(-1)
    theirs = SimpleNamespace(
        loss_type="simpo" if name == "simpo" else options["loss"],
        beta=options.get("beta", 0.1),
        simpo_gamma=options.get("margin", 0.0),
        label_smoothing=options.get("label_smoothing", 0.0),
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, rejected = cpo_trainer.CPOTrainer.cpo_loss(theirs, x[:, 0], x[:, 1])
    losses.mean().backward()
    slope = np.zeros(PAIRS["logp"].shape)
    slope[there] = logp.grad.numpy()
    want = float(losses.mean().detach()), np.where(PAIRS["action"], slope, 0)
    assert_equal(pair_loss(options), want)
    metrics = {"rewards/chosen": chosen, "rewards/rejected": rejected}
    metrics |= {"rewards/margins": chosen - rejected}
    metrics |= {"rewards/accuracies": (chosen > rejected).double()}
    metrics["logps/chosen"] = torch.tensor(PAIRS["logp"][there, 0].sum(-1))
    assert_metrics(
        PairLoss(Preference(**options)), PAIRS, {n: float(x.mean()) for n, x in metrics.items()}
    )
