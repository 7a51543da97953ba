"""Several tokens at once, after turns of unlike lengths, against the same tokens one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.literals import TypedInt

from grpo_jax.kernels import rotary
from grpo_jax.kernels.gpu_decode import TritonDecode
from grpo_jax.kernels.kv_cache import CacheShape, Chunk, DecodeStep, RingCache
from grpo_jax.kernels.tpu_paged import PAGE, RaggedPagedDecode

R, W, Q, C, N, K = 2, 3, 2 * PAGE, 20, 4, 2
PROMPT_R = np.array([PAGE + 3, 5])
BEGIN = 13  # the ring's column of the first token
DRAWN_RW = np.array([[3, 11, 1], [5, 2, 8]])  # tokens of the first turn that are in the cache
GIVEN_RW = np.array([[7, 2, 5], [1, 0, 6]])  # tokens of the chunk; one lane does not go on
KINDS = {
    "ring": (RingCache(), 8, 4),
    "ring, int8": (RingCache(int8=True), 8, None),
    "triton, int8": (TritonDecode(int8=True, interpret=True), 32, None),
    "pages": (RaggedPagedDecode(interpret=True), 128, 4),
}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """JAX's interpreter (0.10.2) asks the whole numbers of an index for their shape."""
    monkeypatch.setattr(TypedInt, "shape", (), raising=False)


def tokens(time_RWM, size: int):
    """Queries, keys and values of the tokens at these positions of their lanes, [R, W, M, *, H]."""
    rng, at = np.random.default_rng(0), jnp.asarray(time_RWM)[..., None, None]
    return [
        jnp.take_along_axis(jnp.asarray(x, jnp.float32), at, axis=2)
        for x in (rng.normal(size=(R, W, C, n, size)) for n in (N, K, K))
    ]


def angles(position, size: int):
    return rotary.rotary(position, 10_000.0 ** (-np.arange(0, size, 2) / size))


def decoded(kind, window, cache, size, time_RW, live_RW, column):
    """One token more in the live lanes."""
    heads = (x[:, :, 0] for x in tokens(time_RW[..., None], size))
    cos_sin = angles(PROMPT_R[:, None] + time_RW, size)
    step = DecodeStep(jnp.array(PROMPT_R), time_RW, live_RW, column, C, cos_sin, window, keeps=True)
    return kind.extend(cache, *heads, step)


@pytest.mark.parametrize("case", KINDS)
def test_a_chunk_is_its_tokens_one_by_one(case):
    kind, size, window = KINDS[case]

    def begun():
        cache = kind.empty(CacheShape(R, W, Q, C, K, size), jnp.float32)
        prompt = np.random.default_rng(1).normal(size=(2, R, Q, K, size)).astype(np.float32)
        order = jnp.arange(R)
        prompt = kind.of_prompt(*map(jnp.asarray, prompt))
        return kind.admit(cache, prompt, order, jnp.array(PROMPT_R), W)

    @jax.jit
    def one_by_one():
        def step(cache, t):
            all_RW = jnp.ones((R, W), bool)
            out, cache = decoded(kind, window, cache, size, t * all_RW, all_RW, t)
            return cache, out

        return jax.lax.scan(step, begun(), jnp.arange(C))[1]

    length_RW = DRAWN_RW + GIVEN_RW
    end_RW = BEGIN + length_RW
    column = end_RW[GIVEN_RW > 0].max()
    shift_RW = jnp.array(np.where(GIVEN_RW > 0, column - end_RW, 0))

    @jax.jit
    def in_a_chunk():
        def step(cache, t):
            # More steps than the ring has columns: those of idle lanes must not be written.
            live_RW, time_RW = t < DRAWN_RW, jnp.minimum(t, DRAWN_RW)
            at = (BEGIN + t) % C
            return decoded(kind, window, cache, size, time_RW, live_RW, at)[1], None

        cache, _ = jax.lax.scan(step, begun(), jnp.arange(C + 2))
        cache = kind.align(cache, shift_RW, C)
        outs = []
        for age in (4, 0):  # two chunks of four tokens each
            chunk = Chunk(
                *(jnp.array(PROMPT_R), jnp.array(length_RW), jnp.array(GIVEN_RW)),
                *(jnp.int32(age), jnp.int32(column % C)),
                limit=C,
                window=window,
            )
            position = chunk.positions(4)
            heads = tokens(jnp.maximum(position - PROMPT_R[:, None, None], 0), size)
            chunk = chunk.replace(cos_sin=angles(position, size))
            out, cache = kind.append(cache, *heads, chunk)
            outs += [out[:, :, j] for j in range(4)]
        for t in range(2):  # and the next turn
            live_RW, time_RW = jnp.array(GIVEN_RW > 0), jnp.array(length_RW + t)
            at = (column + t) % C
            out, cache = decoded(kind, window, cache, size, time_RW, live_RW, at)
            outs.append(out)
        return jnp.stack(outs)

    want, got = one_by_one(), in_a_chunk()
    for r, w in np.argwhere(GIVEN_RW > 0):
        given = GIVEN_RW[r, w]
        own = slice(DRAWN_RW[r, w], length_RW[r, w] + 2)
        np.testing.assert_allclose(got[8 - given :, r, w], want[own, r, w], atol=3e-6)
