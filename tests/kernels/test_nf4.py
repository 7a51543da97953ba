"""NF4 by hand and against bitsandbytes, if it is installed; and products with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.devices import sharding
from grpo_jax.kernels import dense, nf4, quantize
from grpo_jax.kernels.nf4 import NF4, Scales


def drawn(inputs: int, outputs: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)


def codes_of(kernel: NF4) -> np.ndarray:
    """Codes of [out, in], row after row."""
    halves = np.concatenate([kernel.codes >> 4, kernel.codes & 15], axis=1)
    inputs, outputs = kernel.size
    flat = halves.reshape(inputs, outputs).T if inputs % 64 == 0 else halves
    return np.asarray(flat).reshape(-1)[: inputs * outputs]


def test_a_block_by_hand():
    """The levels 0, 0.0796 and 0.1609 have the middles 0.0398 and 0.1203; a middle goes down."""
    middle = float(np.float32((nf4.LEVELS[7] + nf4.LEVELS[8]) / np.float32(2)))
    shares = [1.0, -1, 0, middle, np.nextafter(np.float32(middle), np.float32(1)), 0.12, 0.121]
    kernel = np.zeros((64, 2), np.float32)
    kernel[: len(shares), 0] = np.float32(shares) * 4
    kernel[33, 0] = -4  # in the byte of input 1

    got = nf4.quantize(jnp.asarray(kernel), double=False)

    assert codes_of(got)[:7].tolist() == [15, 0, 7, 7, 8, 8, 9]
    assert got.codes.shape == (1, 32, 2) and got.codes[0, 1, 0] == 0x00
    assert got.codes[0, 0, 0] == 0xF7 and (got.codes[..., 1] == 0x77).all()
    np.testing.assert_array_equal(got.scale, [[4, 0]])
    value = nf4.decode(got, jnp.float32)
    np.testing.assert_allclose(value[:4, 0], [4, -4, 0, 0])
    np.testing.assert_array_equal(value[:, 1], 0)


def test_scales_in_8_bits_by_hand():
    """Blocks of 1, 3 and 2: a mean of 2, and -1, 1 and 0 times a largest deviation of 1."""
    kernel = np.zeros((64, 3), np.float32)
    kernel[5] = [1, -3, 2]

    got = nf4.quantize(jnp.asarray(kernel)).scale

    assert isinstance(got, Scales) and got.mean == 2 and got.largest.tolist() == [1]
    levels = nf4.SCALE_LEVELS
    assert levels[got.codes].tolist() == [[levels[0], 1, 0]]
    # 2^6 of each sign between 0.1 and 1; the lowest is the middle of the last of them.
    assert (np.abs(levels) > 0.1).sum() == 129 and levels[0] == np.float32(-1 + 0.9 / 128)
    assert len(set(levels.tolist())) == 256


def test_blocks_run_on_where_the_inputs_are_no_multiple_of_64():
    """Of 3 outputs with 48 inputs, the second block is the end of one and most of the next."""
    kernel = np.ones((48, 3), np.float32)
    kernel[:, 1] = 2
    kernel[40, 2] = 5  # weight 136, in the third block

    got = nf4.quantize(jnp.asarray(kernel), double=False)

    np.testing.assert_array_equal(got.scale, [[2], [2], [5]])
    assert got.codes.shape == (3, 32, 1) and got.shape == (48, 3)
    assert nf4.decode(got, jnp.float32)[40, 2] == 5


@pytest.mark.parametrize("inputs", [128, 50])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_are_those_of_the_decoded_kernel(inputs, dtype):
    kernel = nf4.quantize(jnp.asarray(drawn(inputs, 24)))
    x = jnp.asarray(drawn(3, inputs), dtype)
    plain = nf4.decode(kernel, dtype)

    def of(kernel):
        return jax.vjp(lambda x: quantize.product(x, kernel, dtype), x)

    (got, back), (want, want_back) = of(kernel), of(plain)

    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    np.testing.assert_array_equal(*(f(want)[0].astype(jnp.float32) for f in (back, want_back)))
    assert np.abs(plain.astype(jnp.float32) - drawn(inputs, 24)).max() > 0.05


@pytest.mark.parametrize("inputs", [128, 50])
def test_kernels_side_by_side(inputs):
    draws = [drawn(inputs, outputs) for outputs in (24, 7)]
    kernels = [nf4.quantize(jnp.asarray(draw)) for draw in draws]

    joined = dense.side_by_side(kernels, lambda *x: jnp.concatenate(x, axis=-1))

    want = np.concatenate([dense.plain(kernel) for kernel in kernels], axis=-1)
    np.testing.assert_array_equal(dense.plain(joined), want)
    assert isinstance(joined, NF4) == (inputs == 128) and joined.shape == (inputs, 31)


def test_a_mesh_splits_blocks_alone():
    """256 inputs are 4 blocks: over fsdp 2 they split, 192 are 3 and do not."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for inputs, blocks in ((256, 2), (192, 3)):
        kernel, x = nf4.quantize(jnp.asarray(drawn(inputs, 8))), jnp.asarray(drawn(5, inputs))
        axes = dense.axes_of({"kernel": kernel}, {"kernel": ("embed", "mlp")})
        placed = sharding.tree_shardings(mesh, axes, {"kernel": kernel})
        split = jax.device_put({"kernel": kernel}, placed)["kernel"]

        got = jax.jit(lambda x, k: quantize.product(x, k, jnp.float32))(x, split)

        assert split.codes.addressable_shards[0].data.shape == (blocks, 32, 4)
        assert split.scale.codes.addressable_shards[0].data.shape == (blocks, 4)
        want = quantize.product(x, kernel, jnp.float32)
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("size", [(1024, 1024), (100, 300), (3, 33), (130, 7)])
def test_codes_scales_and_values_are_those_of_bitsandbytes(size, double):
    """(in, out): of whole blocks; of blocks that run on; of a last block that is not full."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    kernel = drawn(*size)
    weight = torch.from_numpy(np.ascontiguousarray(kernel.T))
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )

    got = nf4.quantize(jnp.asarray(kernel), double=double)

    want = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=-1).reshape(-1)
    np.testing.assert_array_equal(codes_of(got), want[: kernel.size])
    if not double:
        np.testing.assert_array_equal(np.asarray(got.scale).T.reshape(-1), state.absmax.numpy())
        theirs = got
    else:
        mine, codes = np.asarray(got.scale.codes).T.reshape(-1), state.absmax.numpy()
        np.testing.assert_array_equal(got.scale.levels, state.state2.code.numpy())
        np.testing.assert_allclose(got.scale.mean, state.offset.item(), rtol=2e-7)
        np.testing.assert_allclose(got.scale.largest, state.state2.absmax.numpy(), atol=1e-6)
        # On a CPU bitsandbytes takes the nearest level up to 1e-5; here it is the nearest.
        assert (mine != codes).mean() < 0.005 and np.abs(mine.astype(int) - codes).max() <= 1
        scale = Scales(
            jnp.asarray(codes.reshape(got.scale.codes.shape[::-1]).T),
            jnp.asarray(state.state2.code.numpy()),
            jnp.asarray(state.state2.absmax.numpy()),
            jnp.float32(state.offset.item()),
        )
        theirs = got.replace(scale=scale)
        middle = (got.scale.levels[mine] + got.scale.levels[codes]) / 2
        value = np.asarray(nf4.scales(got.replace(scale=nf4_exact(kernel)))).T.reshape(-1)
        largest = np.repeat(got.scale.largest, 256)[: len(mine)]
        share = (value - float(got.scale.mean)) / largest
        np.testing.assert_allclose(share[mine != codes], middle[mine != codes], atol=2e-5)
    want = functional.dequantize_4bit(packed, state).numpy().T
    np.testing.assert_array_equal(nf4.decode(theirs, jnp.float32), want)


def nf4_exact(kernel: np.ndarray):
    return nf4.quantize(jnp.asarray(kernel), double=False).scale
