"""Decoding by the TPU's paged kernel, interpreted, against plain XLA."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.literals import TypedInt

from grpo_jax import keys
from grpo_jax.kernels import rotary
from grpo_jax.kernels.choice import choose_decoding
from grpo_jax.kernels.kv_cache import CacheShape, DecodeStep, RingCache
from grpo_jax.kernels.tpu_paged import PAGE, RaggedPagedDecode
from grpo_jax.models import parameters
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Layer, Sampling

R, W, Q, C, N, K, H = 2, 3, 2 * PAGE, 20, 4, 2, 128
FREQUENCIES = 10_000.0 ** (-np.arange(0, H, 2) / H)
STOPS = tuple(range(0, 40, 6))
MODEL = dataclasses.replace(tiny.MODEL, head_size=H, layers=(Layer(),))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """JAX's interpreter (0.10.2) asks the whole numbers of an index for their shape."""
    monkeypatch.setattr(TypedInt, "shape", (), raising=False)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("window", [None, 5])
def test_tokens_after_a_shared_prompt(window):
    """Prompts of a page and a bit and of two whole pages; lanes at different tokens."""
    length_R = jnp.array([PAGE + 3, Q])
    last_RW = np.array([[0, 19, 12], [15, 4, 1]])  # 12 and 15 end a page, 13 and 16 begin one
    kinds, caches = (RingCache(), RaggedPagedDecode(interpret=True)), []
    for kind in kinds:
        cache = kind.empty(CacheShape(R, W, Q, C, K, H), jnp.float32)
        prompt = kind.of_prompt(normal(0, R, Q, K, H), normal(1, R, Q, K, H))
        order = jnp.array([1, 0])
        shuffled = jax.tree.map(lambda x: x[order], prompt)  # noqa: B023
        caches.append(kind.admit(cache, shuffled, order, length_R[order], W))

    @jax.jit
    def run(kind_caches):
        """Tokens 0 to 19 of every lane, as far as it has any, in the ring's columns."""
        outs = []
        for kind, cache in zip(kinds, kind_caches):

            def step(cache, t):
                q, k, v = (
                    jax.random.normal(jax.random.fold_in(jax.random.key(i), t), (R, W, n, H))
                    for i, n in enumerate((N, K, K))
                )
                live_RW = t <= last_RW
                time_RW = jnp.minimum(t, last_RW)
                angles = rotary.rotary(length_R[:, None] + time_RW, FREQUENCIES)
                now = DecodeStep(length_R, time_RW, live_RW, t, C, angles, window)
                out, new = kind.extend(cache, q, k, v, now)  # noqa: B023
                return new, jnp.where(live_RW[..., None, None], out, 0)

            outs.append(jax.lax.scan(step, cache, jnp.arange(C))[1])
        return outs

    want, got = run(caches)
    assert (np.abs(want).max(axis=(1, 2, 3, 4)) > 0.1).all()
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_rollout(monkeypatch):
    """Slots are refilled, and what is left moves into a smaller batch."""
    prompts = [list(range(2, 2 + n)) for n in (3, 16, 17, 5)]
    params = jax.jit(lambda key: parameters.init(MODEL, key))(jax.random.key(0))
    params["head"]["kernel"] *= 40  # else all tokens are about as likely
    found = []
    for kv_cache in (RingCache(), RaggedPagedDecode(interpret=True)):
        decoder = Decoder(MODEL, tiny.one_device(), Sampling(), STOPS, 12, kv_cache=kv_cache)
        engine = Engine(decoder, num_slots=8)
        monkeypatch.setattr(engine, "layouts", lambda *_: [(2, 3), (2, 2)])
        key = keys.key_for(0, "rollout", 6)
        found.append(
            engine.generate(engine.publish(params), prompts, group=3, key=key, temperature=3.0)
        )
        assert engine.shapes == {(2, 3, 32), (2, 2, 32)}
    want, got = found
    # The last two prompts move when a lane ends at its fifth token, and what lanes hold is unlike.
    assert want.length_PG[2:].tolist() == [[5, 12, 8], [1, 12, 6]]
    assert all(len(set(first_G)) == 3 for first_G in want.completion_PGC[2:, :, 0])
    np.testing.assert_array_equal(got.completion_PGC, want.completion_PGC)
    np.testing.assert_allclose(got.logp_PGC, want.logp_PGC, atol=1e-5)


def test_the_choice():
    def choice(model=tiny.MODEL, platform="tpu", option="ragged", cache="auto", tensor=1):
        devices = np.array([SimpleNamespace(platform=platform)])
        mesh = SimpleNamespace(devices=devices, shape={"tensor": tensor})
        return choose_decoding(option, cache, model, mesh, jnp.float32)

    assert choice(MODEL) == RaggedPagedDecode()
    for heads in (1, 2, 4, 8, 16):
        assert choice(dataclasses.replace(MODEL, num_kv_heads=heads)) == RaggedPagedDecode()
    assert choice(option="xla", cache="int8", platform="cpu") == RingCache(int8=True)
    for words, refused in (
        ("it is for TPUs", {"model": MODEL, "platform": "cpu"}),
        ("key-value heads of size 8", {}),
        ('rollout.kv_cache_dtype = "int8"', {"model": MODEL, "cache": "int8"}),
        ("mesh.tensor = 2", {"model": MODEL, "tensor": 2}),
    ):
        with pytest.raises(ValueError, match=rf'rollout\.attention = "ragged": .*{words}.*"xla"'):
            choice(**refused)
