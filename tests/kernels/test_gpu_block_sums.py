"""A draw's sums by the GPU's kernel, interpreted, against plain XLA."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.kernels import choice
from grpo_jax.kernels.block_sums import sums_of_blocks
from grpo_jax.kernels.gpu_block_sums import TritonBlockSums
from grpo_jax.models import logits

B = 5


def compare(vocab: int, rows: int = B, *, interpret: bool = False) -> None:
    """Scores of which many are -inf, whole blocks among them, and large in places."""
    keys = jax.random.split(jax.random.key(vocab), 3)
    score_BV = 5 * jax.random.normal(keys[0], (rows, vocab)) + 100
    hidden_BV = jax.random.bernoulli(keys[1], 0.3, (rows, vocab))
    hidden_BV |= jnp.arange(vocab)[None] < jnp.arange(rows)[:, None] * vocab // (rows + 1)
    score_BV = jnp.where(hidden_BV.at[:, -1].set(False), -jnp.inf, score_BV)
    uniform_B = jax.random.uniform(keys[2], (rows,))
    draw = jax.jit(logits.sample, static_argnames="sums")
    want = draw(score_BV, uniform_B, temperature=0.8)

    got = draw(score_BV, uniform_B, temperature=0.8, sums=TritonBlockSums(interpret=interpret))

    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


@pytest.mark.parametrize("vocab", [1, 97, 1000, 1536, 20_000, 50_257])
def test_it_draws_as_plain_xla_does(vocab):
    """Blocks that are full and not, of a power of two and not, in one program and in several."""
    compare(vocab, interpret=True)


def test_the_program_for_a_gpu_has_the_kernel():
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    scores = jax.ShapeDtypeStruct((B, 4096), jnp.float32)
    uniform = jax.ShapeDtypeStruct((B,), jnp.float32)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        draw = jax.jit(lambda *args: logits.sample(*args, sums=TritonBlockSums()))
        text = draw.trace(scores, uniform).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1


@pytest.mark.parametrize(
    ("platform", "tensor", "dtype", "kernel"),
    [
        ("gpu", 1, jnp.bfloat16, True),
        ("cpu", 1, jnp.bfloat16, False),
        ("gpu", 2, jnp.bfloat16, False),
        ("gpu", 1, jnp.float32, False),
    ],
)
def test_the_choice(platform, tensor, dtype, kernel):
    devices = np.array([SimpleNamespace(platform=platform)])
    mesh = SimpleNamespace(devices=devices, shape={"tensor": tensor})
    want = TritonBlockSums() if kernel else sums_of_blocks
    assert choice.choose_sums(mesh, dtype) == want


def test_on_a_gpu(optimized):
    tiny.run_on_a_gpu(__file__, optimized)


if __name__ == "__main__":
    for tokens in (151_936, 152_064, 50_257):
        compare(tokens, rows=64)
