"""The losses of supervised training, in float64 against the formulas and against TRL 1.16."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm.components import NLLLoss

B, T, V = 3, 5, 7
RNG = np.random.default_rng(0)
LOGITS_BTV = 2 * RNG.normal(size=(B, T, V))
TARGET_BT = RNG.integers(0, V, (B, T))
ACTION_BT = RNG.random((B, T)) < 0.7


def ours(kind: str):
    """The loss of a batch and its gradient in the logits."""
    with jax.enable_x64(True):
        component, action = NLLLoss(kind), jnp.asarray(ACTION_BT)
        _, count = component.weights(action)

        def loss(logits_BTV):
            logp_BTV = jax.nn.log_softmax(logits_BTV)
            logp_BT = jnp.take_along_axis(logp_BTV, TARGET_BT[..., None], -1)[..., 0]
            per_token = component.loss(logp_BT, jnp.zeros_like(logp_BT), ())
            return jnp.where(action, per_token, 0).sum() / count

        value, slope = jax.value_and_grad(loss)(jnp.asarray(LOGITS_BTV))
        return float(value), np.asarray(slope)


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_the_formulas(kind):
    """Mean of -log p, or of -sg(p) log p, whose gradient is p (p_v - [v is the target])."""
    prob_BTV = np.exp(LOGITS_BTV) / np.exp(LOGITS_BTV).sum(-1, keepdims=True)
    prob_BT = np.take_along_axis(prob_BTV, TARGET_BT[..., None], -1)[..., 0]
    weight_BT = ACTION_BT / ACTION_BT.sum() * (prob_BT if kind == "dft" else 1)
    value, slope = ours(kind)
    assert value == pytest.approx((weight_BT * -np.log(prob_BT)).sum(), abs=1e-12)
    expected = weight_BT[..., None] * (prob_BTV - np.eye(V)[TARGET_BT])
    np.testing.assert_allclose(slope, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_trl_computes_the_same(kind):
    """Its trainer's `compute_loss`, of a model that gives these logits."""
    trl = pytest.importorskip("trl.trainer.sft_trainer", reason="needs trl")
    import torch

    logits = torch.tensor(LOGITS_BTV, requires_grad=True)
    mask = torch.tensor(ACTION_BT)

    def model(**inputs):
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(TARGET_BT)[..., None])[..., 0]
        zero = torch.zeros(B, T)
        return SimpleNamespace(log_probs=picked * mask, label_mask=mask, entropy=zero, is_top1=zero)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, compute_loss_func=None,
        label_smoother=None, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1,
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(loss_type=kind, average_tokens_across_devices=False),
    )  # fmt: skip
    inputs = {"labels": torch.tensor(TARGET_BT), "attention_mask": torch.ones(B, T)}
    loss = trl.SFTTrainer.compute_loss(trainer, model, inputs)
    loss.backward()
    value, slope = ours(kind)
    assert value == pytest.approx(loss.item(), abs=1e-12)
    np.testing.assert_allclose(slope, logits.grad.numpy(), atol=1e-12)
