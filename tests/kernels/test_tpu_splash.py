"""The TPU's attention kernels, interpreted, against plain XLA: outputs and gradients."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.devices import sharding, transfer
from grpo_jax.kernels import attention
from grpo_jax.kernels.tpu_splash import Splash, choose
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.train_state import start
from grpo_jax.learner.update import make_update
from grpo_jax.models import policy
from grpo_jax.structs import Experience, Layer, Sampling

P, W, T, Q, N, K, H = 2, 2, 20, 9, 4, 2, 16
LENGTH_P = np.array([9, 3])
# A lane of two completions and padding, a full one, an empty one, and one of one token.
SEGMENT_PWT = np.zeros((P, W, T), np.int32)
SEGMENT_PWT[0, 0, :7], SEGMENT_PWT[0, 0, 7:15] = 3, 5
SEGMENT_PWT[0, 1], SEGMENT_PWT[1, 1, :1] = 2, 4
POSITION_PWT = np.broadcast_to(np.arange(T), SEGMENT_PWT.shape) - 7 * (SEGMENT_PWT == 5)
WINDOWS = [None, 4]  # 4: a token sees the prompt from the first three of its completion alone


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def both(f, *arrays, kept):
    """Output and gradients of `f(by, *arrays)`, through what is kept of it, by XLA and kernel."""
    cotangent = jnp.where(kept, normal(*kept.shape[:-1], H, seed=9), 0.0)

    def run(by):
        def total(*arrays):
            out = jnp.where(kept, f(by, *arrays), 0.0)
            return jnp.sum(out * cotangent), out

        grads, out = jax.jit(jax.grad(total, range(len(arrays)), has_aux=True))(*arrays)
        return out, *grads

    return run(attention), run(Splash(interpret=True))


def compare(wanted, got):
    for want, have in zip(wanted, got, strict=True):
        assert np.abs(want).max() > 1e-2
        np.testing.assert_allclose(have, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
def test_prompts(window):
    q, k, v = (normal(P, Q, heads, H, seed=i) for i, heads in enumerate((N, K, K)))
    segment_PQ = attention.segments(LENGTH_P, Q)
    kept = (segment_PQ > 0)[..., None, None] & np.ones((1, 1, N, 1), bool)
    compare(*both(lambda by, *x: by.causal(*x, segment_PQ, window), q, k, v, kept=kept))


@pytest.mark.parametrize("window", WINDOWS)
def test_texts_in_one_row(window):
    """Each sees itself alone, as in a row of its own."""
    q, k, v = (normal(1, Q, heads, H, seed=i) for i, heads in enumerate((N, K, K)))
    segment_1Q = np.repeat([1, 2, 3, 0], [Q // 4, Q // 2, 3, Q - Q // 4 - Q // 2 - 3])[None]
    kept = (segment_1Q > 0)[..., None, None] & np.ones((1, 1, N, 1), bool)
    xla, splash = both(lambda by, *x: by.causal(*x, segment_1Q, window), q, k, v, kept=kept)
    compare(xla, splash)
    for segment in (1, 2, 3):
        own = segment_1Q[0] == segment
        alone = attention.causal(q[:, own], k[:, own], v[:, own], segment_1Q[:, own], window)
        np.testing.assert_allclose(xla[0][:, own], alone, atol=2e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_completions_after_their_prompt(window):
    q, k, v = (normal(P, W, T, heads, H, seed=i) for i, heads in enumerate((N, K, K)))
    prefix = [normal(P, Q, K, H, seed=i) for i in (3, 4)]
    kept = (SEGMENT_PWT > 0)[..., None, None] & np.ones((1, 1, 1, N, 1), bool)

    def attend(by, q, k, v, prefix_k, prefix_v):
        return by.shared_prefix(
            q, k, v, SEGMENT_PWT, prefix_k, prefix_v, LENGTH_P, POSITION_PWT, window
        )

    wanted, got = both(attend, q, k, v, *prefix, kept=kept)
    compare(wanted, got)
    assert not np.asarray(got[2])[~(SEGMENT_PWT > 0)].any()  # keys of padding learn nothing


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (1, 2, 4, 1)], ids=str)
def test_an_update_over_devices(shape):
    """Rows, heads and a sequence over eight devices; two key-value heads for four of them.

    Or rows alone, over those of the tensor axis too.
    """
    rollouts, losses_and_grads = tiny.rollouts(4, 3, 9), []
    mesh = sharding.make_mesh(*shape)
    rows = sharding.row_axis(mesh, tiny.MODEL.num_kv_heads)
    kernels = Splash(interpret=True, mesh=mesh, rows=rows)
    for scorer in (
        Scorer(tiny.MODEL, tiny.one_device(), Sampling()),
        Scorer(tiny.MODEL, mesh, Sampling(), kernels=kernels),
    ):
        update = make_update(
            scorer, PolicyLoss(losses.Objective()), optax.sgd(1.0), num_minibatches=1
        )
        like = policy.param_like(tiny.MODEL, scorer.mesh)
        params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tiny.params(), like)
        state = start(params, tiny.MODEL, scorer.mesh, optax.sgd(1.0))
        experience = Experience(
            rollouts=transfer.shard_rows(scorer.mesh, rollouts),
            advantage=rollouts.length_PG - np.float32(4),
            action_PGC=rollouts.logp_PGC < 0,
            old_logp_PGC=None,
            ref_logp_PGC=None,
        )
        state, metrics = update(state, experience, 0)
        moved = jax.tree.map(lambda old, new: old - np.asarray(new), tiny.params(), state.params)
        losses_and_grads.append((metrics["policy/entropy"], moved))
    (entropy, grads), (entropy_by_kernels, grads_by_kernels) = losses_and_grads
    np.testing.assert_allclose(entropy_by_kernels, entropy, rtol=1e-5)
    assert np.abs(grads["layers"]["attention"]["k"]["kernel"]).max() > 1e-3
    jax.tree.map(
        lambda have, want: np.testing.assert_allclose(have, want, atol=1e-5),
        grads_by_kernels,
        grads,
    )


def test_the_choice():
    mesh = tiny.one_device()
    assert choose("auto", tiny.MODEL, mesh) is attention  # on a CPU
    with pytest.raises(ValueError, match=r'model\.attention = "splash": they are for TPUs.*"xla"'):
        choose("splash", tiny.MODEL, mesh)
    tpu = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform="tpu")]),
        size=1,
        shape={"tensor": 1, "sequence": 1},
    )
    assert isinstance(choose("auto", tiny.MODEL, tpu), Splash)
    assert choose("xla", tiny.MODEL, tpu) is attention
    windows = dataclasses.replace(tiny.MODEL, layers=(Layer(window=4), Layer()))
    assert isinstance(choose("auto", windows, tpu), Splash)
