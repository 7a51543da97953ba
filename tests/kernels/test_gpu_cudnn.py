"""cuDNN's attention: what is made of its results, and the program that asks for it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.kernels import attention, gpu_cudnn
from grpo_jax.kernels import choice as choice_lib
from grpo_jax.kernels.gpu_cudnn import Cudnn
from grpo_jax.models import parameters
from grpo_jax.structs import Layer

MODEL = dataclasses.replace(tiny.MODEL, head_size=16)
P, W, T, Q, N, K, H = 2, 2, 6, 5, 4, 2, 16
LENGTH_P = np.array([5, 3])
# Each lane has one completion or none; the whole width, one token.
SEGMENT_PWT = (np.arange(T) < np.array([[4, 6], [0, 1]])[..., None]) * np.array([3, 7])[
    :, None, None
]


def normal(*shape: int, seed: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def arrays(dtype=jnp.float32):
    """Queries, keys and values of completions, then keys and values of their prompts."""
    shapes = (P, W, T, N, H), *((P, W, T, K, H),) * 2, *((P, Q, K, H),) * 2
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def attend(by, window, q, k, v, prefix_k, prefix_v):
    """Prompts by themselves, and completions after them; zeros where nothing is."""
    position_PWT = np.broadcast_to(np.arange(T), SEGMENT_PWT.shape)
    where = SEGMENT_PWT, prefix_k, prefix_v, LENGTH_P, position_PWT, window
    own = by.shared_prefix(q, k, v, *where)
    prompt = by.causal(q[:, 0, :Q], prefix_k, prefix_v, attention.segments(LENGTH_P, Q), window)
    there = (np.arange(Q) < LENGTH_P[:, None])[..., None, None]
    return jnp.where(SEGMENT_PWT[..., None, None] > 0, own, 0), jnp.where(there, prompt, 0)


def values_and_gradients(by, *arrays, window=None):
    def total(*arrays):
        outs = attend(by, window, *arrays)
        sums = [jnp.sum(x * normal(*x.shape, seed=9, dtype=x.dtype)) for x in outs]
        return sum(sums).astype(jnp.float32), outs

    return jax.jit(jax.grad(total, range(5), has_aux=True))(*arrays)


def _past(length_B: jax.Array, x: jax.Array, axis: int = 1) -> jax.Array:
    """True, of x's rank, for what lies past the rows' lengths along an axis."""
    shape = [x.shape[0]] + [1] * (x.ndim - 1)
    shape[axis] = x.shape[axis]
    return (jnp.arange(x.shape[axis])[None] >= length_B[:, None]).reshape(shape)


def forward_by_xla(causal, window, q, k, v, length_B, of_keys_B):
    """As `gpu_cudnn._forward`, with NaN past the queries' lengths."""
    out, lse_BTN = jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=causal, implementation="xla",
        key_value_seq_lengths=of_keys_B, return_residual=True,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    lse = jnp.swapaxes(lse_BTN, 1, 2)
    return tuple(
        jnp.where(_past(length_B, x, axis), jnp.nan, x) for x, axis in ((out, 1), (lse, 2))
    )


def backward_by_hand(causal, window, q, k, v, length_B, of_keys_B, out, lse, by_out):
    """As `gpu_cudnn._backward`, by FlashAttention-2 (arXiv:2307.08691, algorithm 2)."""
    group = q.shape[2] // k.shape[2]
    k_all, v_all = (jnp.repeat(x, group, axis=2) for x in (k, v))
    score = jnp.einsum("btnh,bsnh->bnts", q, k_all)
    hidden = _past(of_keys_B, score, 3) | _past(length_B, score, 2)
    if causal:
        hidden |= ~jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
    if window is not None:
        hidden |= jnp.tri(q.shape[1], k.shape[1], -window, dtype=bool)[None, None]
    weight = jnp.where(hidden, 0, jnp.exp(score - lse[..., None]))
    by_weight = jnp.einsum("btnh,bsnh->bnts", by_out, v_all)
    mean_BNT1 = jnp.swapaxes(jnp.sum(by_out * out, -1), 1, 2)[..., None]
    by_score = weight * (by_weight - mean_BNT1)
    by_k = jnp.einsum("bnts,btnh->bsnh", by_score, q)
    by_v = jnp.einsum("bnts,btnh->bsnh", weight, by_out)
    by_k, by_v = (x.reshape(*k.shape[:3], group, k.shape[-1]).sum(3) for x in (by_k, by_v))
    grads = jnp.einsum("bnts,bsnh->btnh", by_score, k_all), by_k, by_v
    lengths = length_B, of_keys_B, of_keys_B
    return tuple(jnp.where(_past(n, x), jnp.nan, x) for n, x in zip(lengths, grads))


@pytest.mark.parametrize("window", [None, 3])
def test_outputs_and_gradients(monkeypatch, window):
    monkeypatch.setattr(gpu_cudnn, "_forward", forward_by_xla)
    monkeypatch.setattr(gpu_cudnn, "_backward", backward_by_hand)

    want, got = (values_and_gradients(by, *arrays(), window=window) for by in (attention, Cudnn()))

    for wanted, have in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert np.abs(wanted).max() > 1e-2
        np.testing.assert_allclose(have, wanted, atol=2e-5, rtol=1e-4)


def test_the_program_for_a_gpu_asks_for_the_kernel_without_a_mask(monkeypatch):
    monkeypatch.setattr(gpu_cudnn.fused, "check_cudnn_version", lambda: 91000)
    run = jax.jit(lambda *x: values_and_gradients(Cudnn(), *x))

    text = run.trace(*arrays(jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()

    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    names = sorted(line.split("@")[1].split("(")[0] for line in calls)
    assert len(names) == 6 and {n.strip('"') for n in names} == {
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    }
    masks = [line.split("mask_type")[1][:40] for line in calls]
    assert sum("PADDING_CAUSAL" in mask for mask in masks) == 4
    assert sum("PADDING" in mask for mask in masks) == 6


def test_the_backward_pass_runs_no_kernel_of_the_forward_one_again(monkeypatch):
    """Where the products of dense layers are kept, so is what the kernels gave."""
    monkeypatch.setattr(gpu_cudnn.fused, "check_cudnn_version", lambda: 91000)
    params = jax.eval_shape(lambda key: parameters.init(MODEL, key), jax.random.key(0))
    prompt_PQ, completion_PGC = jnp.ones((2, 8), jnp.int32), jnp.ones((2, 2, 6), jnp.int32)

    def calls(remat: str) -> list[str]:
        def total(params):
            hidden = tiny.completion_states(
                params, MODEL, prompt_PQ, jnp.full(2, 8), completion_PGC,
                dtype=jnp.bfloat16, remat=remat, kernels=Cudnn(),
            )  # fmt: skip
            return hidden.astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(total)).trace(params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return [line.split("@")[1].split("(")[0] for line in text.splitlines() if "fmha" in line]

    for remat, times in (("none", 1), ("dots", 1), ("full", 2)):
        names = [name.strip('"') for name in calls(remat)]
        assert names.count("__cudnn$fmhaSoftmax") == 3 * times
        assert names.count("__cudnn$fmhaSoftmaxBackward") == 3


def compare_on_a_gpu(window: int | None) -> None:
    """In bfloat16 against XLA's in float32."""
    in_float32 = [x.astype(jnp.float32) for x in arrays(jnp.bfloat16)]
    exact = values_and_gradients(attention, *in_float32, window=window)
    got = values_and_gradients(Cudnn(), *arrays(jnp.bfloat16), window=window)
    for want, have in zip(jax.tree.leaves(exact), jax.tree.leaves(got), strict=True):
        assert np.linalg.norm(have.astype(jnp.float32) - want) < 0.02 * np.linalg.norm(want)


def test_on_a_gpu(optimized):
    tiny.run_on_a_gpu(__file__, optimized)


def test_the_choice(monkeypatch):
    def choice(platform="gpu", model=tiny.MODEL, dtype=jnp.bfloat16, option="cudnn"):
        mesh = SimpleNamespace(
            devices=np.array([SimpleNamespace(platform=platform)]),
            shape={"tensor": 1, "sequence": 1},
        )
        return choice_lib.choose(option, model, mesh, dtype)

    assert isinstance(choice(), Cudnn) and not choice().shares_lanes
    assert isinstance(choice(option="auto"), Cudnn)
    assert choice(option="auto", dtype=jnp.float32) is attention
    windows = dataclasses.replace(tiny.MODEL, layers=(Layer(window=4), Layer()))
    assert isinstance(choice(model=windows), Cudnn)
    assert choice(model=windows, option="auto") is attention  # until a GPU has compared them
    for words, refused in (
        ("it is for GPUs", {"platform": "cpu"}),
        ("it takes bfloat16", {"dtype": jnp.float32}),
        ("heads are of size 12", {"model": dataclasses.replace(tiny.MODEL, head_size=12)}),
    ):
        with pytest.raises(ValueError, match=rf'model\.attention = "cudnn": .*{words}.*"xla"'):
            choice(**refused)
    monkeypatch.setattr(gpu_cudnn, "_READ_IN", ((0, 9),))
    with pytest.warns(UserWarning, match="not tested with JAX"):
        assert choice() is attention


if __name__ == "__main__":
    for keys in (None, 3):
        compare_on_a_gpu(keys)
