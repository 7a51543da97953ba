"""Loss and gradient against a plain implementation: a row for each completion, nothing shared."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import losses, update
from grpo_jax.models import attention, transformer
from grpo_jax.structs import Experience, Sampling

P, G, C = 4, 5, 9
MODEL = tiny.MODEL
FULL = losses.Objective(0.2, 0.3, kl_coef=0.2, entropy_coef=0.05, max_tokens=C)
NORMALIZERS = ("token", "sequence", "constant")


def plain_attention(q, k, v):
    """Causal, each query head with a copy of its keys and values."""
    length, heads = q.shape[0], q.shape[1]
    k, v = (jnp.repeat(x, heads // k.shape[1], axis=1) for x in (k, v))
    score = jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    score = jnp.where(np.tril(np.ones((length, length), bool))[None], score, -jnp.inf)
    return jnp.einsum("nts,snh->tnh", jax.nn.softmax(score), v), None


def plain_log_probs(params, ids):
    """Log-probabilities over the vocabulary after each token of one row, [T, V]."""
    angles = attention.rotary(jnp.arange(len(ids)), transformer.rotary_frequencies(MODEL))
    x = params["embed"]["embedding"][ids]
    for i in range(MODEL.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        x, _ = transformer.Block(MODEL).apply({"params": layer}, x, angles, plain_attention)
    scale = params["norm"]["scale"]
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_eps) * scale[None]
    return jax.nn.log_softmax(x @ transformer.head_kernel(params))


def plain_loss(params, experience, normalizer: str):
    """The objective from the papers' formulas, every completion after a prompt of its own."""
    rollouts, tokens = experience.rollouts, experience.action_PGC
    ids = np.zeros((P, G, rollouts.prompt_PQ.shape[1] + C), np.int32)  # padding is never seen
    at = rollouts.prompt_length_P[:, None, None] + np.arange(C)[None, None]
    for p, g in np.ndindex(P, G):
        ids[p, g, : at[p, 0, 0]] = rollouts.prompt_PQ[p, : at[p, 0, 0]]
        ids[p, g, at[p, 0]] = rollouts.completion_PGC[p, g]
    each = jax.vmap(jax.vmap(lambda row: plain_log_probs(params, row)))
    p, g = np.arange(P)[:, None, None], np.arange(G)[None, :, None]
    log_prob = each(jnp.asarray(ids))[p, g, at - 1]
    logp = log_prob[p, g, np.arange(C)[None, None], rollouts.completion_PGC]
    ratio = jnp.exp(logp - experience.old_logp_PGC)
    advantage = experience.advantage_PG[..., None]
    loss = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.3) * advantage)
    difference = experience.ref_logp_PGC - logp
    loss += 0.2 * (jnp.exp(difference) - difference - 1)
    loss += 0.05 * (jnp.exp(log_prob) * log_prob).sum(-1)
    loss = jnp.where(tokens, loss, 0.0)
    if normalizer == "sequence":
        return (loss.sum(-1) / tokens.sum(-1)).mean()
    return loss.sum() / {"token": tokens.sum(), "constant": tokens.size}[normalizer]


@pytest.fixture(scope="module")
def experience() -> Experience:
    rng = np.random.default_rng(0)
    rollouts = tiny.rollouts(P, G, C)
    near = lambda: (rollouts.logp_PGC + rng.normal(0, 0.5, (P, G, C))).astype(np.float32)  # noqa: E731
    return Experience(
        rollouts=rollouts,
        advantage_PG=rng.normal(size=(P, G)).astype(np.float32),
        action_PGC=np.arange(C) < rollouts.length_PG[..., None],
        old_logp_PGC=near(),
        ref_logp_PGC=near(),
    )


@pytest.fixture(scope="module")
def wanted(experience):
    def both(name: str):
        return jax.jit(jax.value_and_grad(lambda params: plain_loss(params, experience, name)))

    return {name: both(name)(tiny.params()) for name in NORMALIZERS}


# Tokens of a row: all prompts and completions in one, two groups, one, and less than a group.
@pytest.mark.parametrize("at_once", [1000, 100, 40, 16])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_packed_rows_give_the_plain_loss_and_gradient(
    experience, wanted, normalizer, at_once, monkeypatch
):
    monkeypatch.setattr(update, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    mesh, optimizer = tiny.one_device(), optax.sgd(1.0)
    scorer = update.Scorer(MODEL, mesh, Sampling())
    packed = scorer.microbatches(experience.rollouts, np.arange(P))
    rows, lanes = packed.groups_SNM[0], packed.lane_SNMLT[0]
    assert rows.shape == {1000: (1, 4), 100: (2, 2), 40: (4, 1)}.get(at_once, rows.shape)
    assert (len(rows) > P) == (at_once == 16)  # groups are split
    heads = packed.token_SNDX[0][:, 0] % C == 1  # entries that begin a completion
    if at_once > 16:  # some share a lane
        assert heads.sum() > (lanes.reshape(len(rows), -1, C - 1)[..., 0] >= 0).sum()
    objective = dataclasses.replace(FULL, normalizer=normalizer)
    program = update.make_update(scorer, objective, optimizer, num_minibatches=1)
    state = update.start(jax.tree.map(jnp.array, tiny.params()), MODEL, mesh, optimizer)

    state, metrics = program(state, experience, 0)

    loss, grads = wanted[normalizer]
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-5)
    got = jax.tree.map(lambda old, new: np.asarray(old - new), tiny.params(), state.params)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert largest > 1e-3
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * largest), got, grads
    )
