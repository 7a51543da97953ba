"""Eight bits by hand, and attention on them against attention on what they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.kernels import dense, kv_cache, quantize
from grpo_jax.kernels.quantize import Int8


def test_codes_by_hand():
    # Columns of largest 2.54 and 0: steps of 0.02, and of nothing.
    x = jnp.float32([[1.0, 0], [-2.54, 0], [0.011, 0]])

    kept = quantize.int8(x, 0)

    np.testing.assert_array_equal(kept.codes, [[50, 0], [-127, 0], [1, 0]])  # 0.011 is 0.55 steps
    np.testing.assert_allclose(kept.scale, [0.02, 0], rtol=1e-6)
    assert kept.codes.dtype == jnp.int8 and kept.scale.dtype == jnp.float32
    assert kept.T.codes.shape == (2, 3) and kept.T.scale.shape == (2,)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_by_hand(dtype):
    # [1, 2] times codes [[3, -4], [5, 6]] is [13, 8]; the outputs' scales are 0.5 and 0.25.
    kernel = Int8(jnp.int8([[3, -4], [5, 6]]), jnp.float32([0.5, 0.25]))

    got = quantize.product(jnp.array([[[1, 2]]], dtype), kernel, dtype)

    np.testing.assert_array_equal(got.astype(jnp.float32), [[[6.5, 2.0]]])
    assert got.dtype == dtype
    plain = quantize.product(jnp.array([[1, 2]], dtype), jnp.float32(kernel.codes), dtype)
    np.testing.assert_array_equal(plain.astype(jnp.float32), [[13, 8]])


def test_weights_keep_norms_and_biases():
    params = {
        "embed": {"embedding": jnp.float32([[1.27, 0], [0, -2.54]])},
        "layers": {"q": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones((3, 4))}},
        "norm": {"scale": jnp.ones(2)},
    }
    axes = {
        "embed": {"embedding": ("vocab", "embed")},
        "layers": {"q": {"kernel": ("layers", "embed", "heads"), "bias": ("layers", "heads")}},
        "norm": {"scale": ("norm",)},
    }

    kept = dense.in_precision(params, jnp.bfloat16, int8=True)
    kept_axes = dense.axes_of(kept, axes)

    np.testing.assert_array_equal(kept["embed"]["embedding"].codes, [[127, 0], [0, -127]])
    np.testing.assert_allclose(kept["embed"]["embedding"].scale, [0.01, 0.02], rtol=1e-6)
    assert kept["layers"]["q"]["kernel"].scale.shape == (3, 4)
    assert kept["layers"]["q"]["bias"].dtype == kept["norm"]["scale"].dtype == jnp.bfloat16
    assert kept_axes["embed"]["embedding"] == Int8(("vocab", "embed"), ("vocab",))
    assert kept_axes["layers"]["q"]["kernel"].scale == ("layers", "heads")
    assert kept_axes["layers"]["q"]["bias"] == ("layers", "heads")


def test_attention_on_codes_is_attention_on_what_they_stand_for():
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    r, w, k, size, q_tokens, columns = 2, 3, 2, 8, 5, 4
    prefix = kv_cache.prefix_cache(draw(0, r, q_tokens, k, size), draw(1, r, q_tokens, k, size))
    in_codes = kv_cache.prefix_cache(
        draw(0, r, q_tokens, k, size), draw(1, r, q_tokens, k, size), int8=True
    )
    own = kv_cache.empty_cache((r, k, w), columns, size, jnp.float32, int8=True)
    exact = kv_cache.empty_cache((r, k, w), columns, size, jnp.float32, int8=False)
    for column in range(3):
        new = draw(2 + column, r, w, k, size), draw(9 + column, r, w, k, size) * 3
        own, exact = (kv_cache.write(cache, *new, column) for cache in (own, exact))

    def value(cache):
        keys, values = cache
        return keys.codes * keys.scale[..., None, :], values.codes * values.scale[..., None]

    time_RW = jnp.array([[2, 0, 1], [1, 2, 2]])
    step = kv_cache.DecodeStep(jnp.array([5, 2]), time_RW, time_RW >= 0, 2, columns)
    query = draw(20, r, w, 4, size)
    got = kv_cache.decode(query, in_codes, own, step)

    want = kv_cache.decode(query, value(in_codes), value(own), step)
    np.testing.assert_allclose(got, want, atol=2e-6)
    difference = np.abs(got - kv_cache.decode(query, prefix, exact, step)).max()
    assert 1e-4 < difference < 0.1  # half of a 127th, of values up to 10
    for mine, theirs in zip((*value(in_codes), *value(own)), (*prefix, *exact)):
        np.testing.assert_allclose(mine, theirs, atol=np.abs(theirs).max() / 254 + 1e-6)
