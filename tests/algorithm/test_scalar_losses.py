"""The losses of models with a scalar head: against TRL, and against float64 transcriptions."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grpo_jax.algorithm import scalar_losses
from grpo_jax.algorithm.scalar_losses import BradleyTerryLoss, ValueLoss
from grpo_jax.structs import Experience

P, C = 5, 4
CASES = {"plain": (False, 0.0), "margin": (True, 0.0), "centred": (True, 0.3)}


@pytest.fixture(scope="module")
def pairs():
    """Values of a batch in float64, the place of each reward, and margins; the last is no pair."""
    rng = np.random.default_rng(0)
    value = rng.normal(size=(P, 2, C))
    last = rng.integers(0, C, (P, 2))
    action = np.arange(C) == last[..., None]
    action[-1] = False
    return value, action, rng.uniform(-0.5, 1, P)


def of_component(value, action, margin, centre):
    """Loss, gradient by reward, and metrics, as the update computes them."""
    component = BradleyTerryLoss(centre)
    with jax.enable_x64(True):
        value, action = jnp.asarray(value), jnp.asarray(action)
        signal = jnp.asarray(np.stack([margin, np.full(P, 9.0)], 1))  # the rejected's is not read
        part = Experience(None, signal, action, None, None)
        take = lambda x: jnp.where(action, x, jnp.zeros((), x.dtype))  # noqa: E731
        terms = component.terms(part, take, lambda x: take(x[..., None]))
        weight, count = component.weights(action)

        def loss(value):
            return (weight * component.loss(take(value), terms)).sum() / count

        total, slope = jax.value_and_grad(loss)(value)
        sums, _ = component.diagnostics(take(value), terms, action)
        means = component.means(sums | {"tokens": action.sum()})
        return float(total), np.asarray(slope), {n: float(x) for n, x in means.items()}


def of_torch(reward, margin, centre):
    """Transcribed: loss of the pairs' mean, and its gradient by reward, [pairs, 2]."""
    reward = torch.tensor(reward, dtype=torch.float64, requires_grad=True)
    chosen, rejected = reward.T
    loss = torch.log(1 + torch.exp(-(chosen - rejected - torch.tensor(margin)))).mean()
    loss = loss + centre * ((chosen + rejected) ** 2).mean()
    loss.backward()
    return loss.item(), reward.grad.numpy()


@pytest.mark.parametrize("case", CASES)
def test_bradley_terry_is_its_transcription(case, pairs):
    value, action, margin = pairs
    has_margin, centre = CASES[case]
    margin = margin * has_margin
    loss, slope, means = of_component(value, action, margin, centre)
    reward = np.where(action, value, 0).sum(-1)[:-1]
    want, by_reward = of_torch(reward, margin[:-1], centre)
    assert loss == pytest.approx(want, rel=1e-12)
    np.testing.assert_allclose(slope.sum(-1)[:-1], by_reward, rtol=1e-12)
    assert np.all(slope[~action] == 0)
    difference = reward[:, 0] - reward[:, 1]
    assert means["reward_model/accuracy"] == pytest.approx((difference > 0).mean())
    assert means["reward_model/margin"] == pytest.approx(difference.mean(), rel=1e-6)
    assert means["reward_model/mean"] == pytest.approx(reward.mean(), rel=1e-6)
    assert means["reward_model/std"] == pytest.approx(reward.std(), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_trl_itself_gives_the_same(case, pairs):
    pytest.importorskip("trl", reason="needs trl")
    from trl.trainer.reward_trainer import RewardTrainer

    value, action, margin = pairs
    has_margin, centre = CASES[case]
    reward = torch.tensor(np.where(action, value, 0).sum(-1)[:-1].T.reshape(-1, 1))
    reward.requires_grad_()
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics = {"train": dict.fromkeys(("min_reward", "mean_reward", "max_reward"))}
    metrics["train"] = {n: [] for n in (*metrics["train"], "accuracy", "margin")}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=centre or None),
        accelerator=same,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2, 2)}
    if has_margin:
        inputs["margin"] = torch.tensor(margin[:-1])

    def model(**kwargs):
        return SimpleNamespace(logits=reward)

    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    ours, slope, means = of_component(value, action, margin * has_margin, centre)
    assert ours == pytest.approx(loss.item(), rel=1e-12)
    by_reward = reward.grad.numpy().reshape(2, -1).T
    np.testing.assert_allclose(slope.sum(-1)[:-1], by_reward, rtol=1e-12)
    for ours, theirs in (("accuracy", "accuracy"), ("margin", "margin"), ("mean", "mean_reward")):
        assert means[f"reward_model/{ours}"] == pytest.approx(metrics["train"][theirs][0], rel=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_value_loss_is_its_transcription(clip):
    rng = np.random.default_rng(1)
    value, old, target = (rng.normal(size=(2, 3, C)) for _ in range(3))
    old = value + rng.normal(size=value.shape) * 0.3
    action = rng.random(value.shape) > 0.3
    component = ValueLoss(clip, 0.7)
    x = torch.tensor(value, requires_grad=True)
    v, r = x[action], torch.tensor(target)[action]
    square = (v - r) ** 2
    near = v
    if clip:
        before = torch.tensor(old)[action]
        near = torch.minimum(torch.maximum(v, before - clip), before + clip)
        square = torch.maximum(square, (near - r) ** 2)
    want = 0.7 * 0.5 * square.mean()
    want.backward()
    with jax.enable_x64(True):
        terms = scalar_losses._Targets(jnp.asarray(old), jnp.asarray(target))
        weight, count = component.weights(jnp.asarray(action))

        def loss(value):
            return (weight * component.loss(value, terms)).sum() / count

        got, slope = jax.value_and_grad(loss)(jnp.asarray(value))
        sums, _ = component.diagnostics(jnp.asarray(value), terms, jnp.asarray(action))
        means = component.means(sums | {"tokens": action.sum()})
    assert float(got) == pytest.approx(want.item(), rel=1e-12)
    np.testing.assert_allclose(slope, x.grad.numpy(), rtol=1e-12, atol=1e-15)
    assert (np.abs(slope[action]) < 1e-12).any() == bool(clip)
    explained = 1 - (target - value)[action].var() / target[action].var()
    assert float(means["value/explained_variance"]) == pytest.approx(explained, rel=1e-4)
    assert float(means["value/mean"]) == pytest.approx(value[action].mean(), rel=1e-5)
    if clip:
        clipped = ((near.detach() - r) ** 2 > (v.detach() - r) ** 2).double().mean()
        assert float(means["value/clip_share"]) == pytest.approx(clipped.item())


def test_equal_returns_explain_nothing():
    component = ValueLoss()
    ones = jnp.ones((1, 1, 3))
    terms = scalar_losses._Targets(ones, ones)
    sums, _ = component.diagnostics(0 * ones, terms, ones > 0)
    means = component.means(sums | {"tokens": jnp.float32(3)})
    assert float(means["value/explained_variance"]) == 0
