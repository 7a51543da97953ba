"""What is the same is traced once: layers of one kind, a function and its derivative, shapes."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.devices import compiling
from grpo_jax.kernels import row_blocks
from grpo_jax.kernels.attention import Seen
from grpo_jax.kernels.norm import Norm
from grpo_jax.models import block, parameters, transformer
from grpo_jax.structs import Layer


@pytest.fixture
def traced(monkeypatch):
    """The layers that are traced."""
    found, of_layer = [], block.Block.__call__

    def noted(self, *args):
        found.append(self.layer)
        return of_layer(self, *args)

    monkeypatch.setattr(block.Block, "__call__", noted)
    return found


def test_layers_of_one_kind_are_traced_once_in_sampling(traced):
    model = dataclasses.replace(tiny.MODEL, layers=(Layer(), Layer(window=3), *(Layer(),) * 3))
    params = parameters.param_shapes(model)
    stacks = parameters.layer_stacks(params["layers"], model)
    of_layer = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
    params |= {"layers": [jax.tree.map(of_layer, stack) for stack, _ in stacks]}
    traced.clear()
    prompts = jax.ShapeDtypeStruct((2, 6), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    prefill = functools.partial(transformer.prefill, config=model)
    jax.eval_shape(
        lambda params, ids, length: prefill(params, prompt_RQ=ids, length_R=length),
        params,
        *prompts,
    )
    assert sorted(traced, key=repr) == sorted({Layer(), Layer(window=3)}, key=repr)


def test_attention_by_block_is_traced_once_for_its_value_and_its_derivative(monkeypatch):
    """Inside a loop over layers that are computed again, as in an update."""
    found, of = [], row_blocks._Blocks.of
    noted = lambda *args: (found.append("backward" if len(found) else "forward"), of(*args))[1]  # noqa: E731
    monkeypatch.setattr(row_blocks._Blocks, "of", staticmethod(noted))
    q, seen = jnp.ones((1, 12, 2, 4)), Seen(jnp.zeros((1, 12), jnp.int32))

    def loss(q):
        attend = jax.checkpoint(
            lambda x, _: (row_blocks.RowBlocks(5, 0).by_row(x, x, x, seen), None)
        )
        return jax.lax.scan(attend, q, None, length=2)[0].sum()

    jax.make_jaxpr(compiling.exact(jnp.float32, jax.grad(loss)))(q)
    assert found == ["forward", "backward"]


@pytest.mark.parametrize("head", ["vocabulary", "scalar"])
@pytest.mark.parametrize("model", [tiny.MODEL, tiny.GEMMA, tiny.OLMO], ids=["own", "tied", "olmo"])
def test_shapes_are_those_of_the_parameters_that_are_made(model, head):
    model = dataclasses.replace(model, head=head)
    made = jax.eval_shape(lambda: parameters.init(model, jax.random.key(0)))
    assert parameters.param_shapes(model) == made


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_norm_and_its_gradient_are_those_of_flax_to_the_bit(dtype):
    key_x, key_scale = jax.random.split(jax.random.key(0))
    x = (3 * jax.random.normal(key_x, (4, 3, 16))).astype(dtype)
    params = {"params": {"scale": 1 + jax.random.normal(key_scale, (16,))}}

    def both(norm):
        y, back = jax.vjp(
            lambda x, params: norm(epsilon=1e-5, dtype=dtype).apply(params, x), x, params
        )
        return y, *jax.tree.leaves(back(jnp.cos(y)))

    for ours, theirs in zip(
        jax.jit(both, static_argnums=0)(Norm), jax.jit(both, static_argnums=0)(nn.RMSNorm)
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
