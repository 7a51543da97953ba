"""A token's norms by the GPU's kernel, interpreted, against flax's."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.kernels import choice
from grpo_jax.kernels.gpu_norm import FusedNorm
from grpo_jax.kernels.norm import AddNorm, Residual
from grpo_jax.sampling import decode, engine
from grpo_jax.structs import Sampling


def compare(width: int, dtype, *, interpret: bool = False) -> None:
    keys = jax.random.split(jax.random.key(width), 3)
    x, more = (3 * jax.random.normal(key, (4, 3, width), dtype) for key in keys[:2])
    params = {"params": {"scale": 1 + jax.random.normal(keys[2], (width,))}}
    theirs = nn.RMSNorm(epsilon=1e-2, dtype=dtype).apply(params, x + more)
    ours = FusedNorm(epsilon=1e-2, dtype=dtype, interpret=interpret)
    plain = AddNorm(epsilon=1e-2, dtype=dtype)

    total, of_sum = jax.jit(functools.partial(ours.apply, params))(Residual(x, more))
    plain_total, of_plain_sum = plain.apply(params, Residual(x, more))

    close = functools.partial(
        np.testing.assert_allclose, rtol=1e-5 if dtype == jnp.float32 else 0.01
    )
    close(*(np.float32(y) for y in (total, x + more)))
    close(*(np.float32(y) for y in (of_sum, theirs)), atol=1e-6)
    np.testing.assert_array_equal(plain_total, x + more)
    np.testing.assert_array_equal(of_plain_sum, theirs)
    assert total.dtype == of_sum.dtype == dtype
    # A scale in bfloat16 and its offset of 1, added in float32: near 1 bfloat16 has steps of 1/128.
    less = jnp.bfloat16(params["params"]["scale"] - 1)
    theirs = nn.RMSNorm(epsilon=1e-2, dtype=dtype).apply(
        {"params": {"scale": 1 + less.astype(jnp.float32)}}, x + more
    )
    for norm in (ours, plain):
        of_offset = norm.clone(offset=1.0).apply({"params": {"scale": less}}, Residual(x, more))[1]
        close(*(np.float32(y) for y in (of_offset, theirs)), atol=1e-6)


@pytest.mark.parametrize("width", [1, 96, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_norms_as_flax_does(width, dtype):
    compare(width, dtype, interpret=True)


def test_layers_hand_on_what_is_still_to_be_added():
    """A rollout by it is the one by flax's norms."""
    params = tiny.params()
    found = []
    for norm in (AddNorm, functools.partial(FusedNorm, interpret=True)):
        decoder = decode.Decoder(tiny.MODEL, tiny.one_device(), Sampling(), (1,), 6, norm=norm)
        own = engine.Engine(decoder)
        found.append(
            own.generate(
                own.publish(params),
                [[3, 4, 5], [6]],
                group=2,
                key=jax.random.key(0),
                temperature=1.0,
            )
        )
    want, got = found
    assert len(set(map(tuple, want.completion_PGC.reshape(4, -1).tolist()))) > 1
    np.testing.assert_array_equal(got.completion_PGC, want.completion_PGC)
    np.testing.assert_allclose(got.logp_PGC, want.logp_PGC, atol=1e-5)


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", True), ("cpu", False)])
def test_the_choice(platform, kernel):
    devices = np.array([SimpleNamespace(platform=platform)])
    mesh = SimpleNamespace(devices=devices, shape={"tensor": 1})
    assert choice.choose_norm(mesh, jnp.bfloat16) is (FusedNorm if kernel else AddNorm)


def test_on_a_gpu(optimized):
    tiny.run_on_a_gpu(__file__, optimized)


if __name__ == "__main__":
    for states in (896, 1536, 3584):
        compare(states, jnp.bfloat16)
