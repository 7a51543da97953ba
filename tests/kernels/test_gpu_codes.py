"""Products of few rows with kernels in codes by the GPU's programs, interpreted."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.kernels import choice, gpu_codes, nf4, quantize
from grpo_jax.kernels.gpu_codes import FewRows, Tile
from grpo_jax.models import lora, parameters
from grpo_jax.models.hf import targets
from grpo_jax.sampling import decode, engine
from grpo_jax.structs import Sampling

TILES = [Tile(), Tile(outputs=64, blocks=2, programs=8)]


def kernel_of(kind: str, size: tuple[int, int]):
    whole = jax.random.normal(jax.random.key(1), size) * 0.02
    return nf4.quantize(whole, double=False) if kind == "nf4" else quantize.int8(whole, -2)


def compare(kind: str, tile: Tile, *, interpret: bool = False) -> None:
    kernel = kernel_of(kind, (256, 256))
    x = jax.random.normal(jax.random.key(2), (2, 3, 256)).astype(jnp.bfloat16)
    ours = FewRows(least_int8=0, tile=tile, interpret=interpret)

    got = jax.jit(ours)(x, kernel)

    assert gpu_codes.product(x[0], kernel, tile, interpret=interpret) is not None
    want = quantize.frozen_product(x, kernel)
    # The same products, summed in float32 in another order.
    np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()) * 256**0.5)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("tile", TILES)
def test_it_multiplies_as_plain_xla_does(kind, tile):
    compare(kind, tile, interpret=True)


@pytest.mark.parametrize("size", [(256, 96), (96, 128)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_other_sizes_are_left_to_xla(kind, size):
    kernel = kernel_of(kind, size)
    x = jnp.ones((2, size[0]), jnp.bfloat16)
    assert gpu_codes.product(x, kernel, interpret=True) is None
    np.testing.assert_array_equal(
        FewRows(interpret=True)(x, kernel), quantize.frozen_product(x, kernel)
    )


def test_the_sums_of_parts_stay_in_the_cache():
    """Inputs of 18,944 in 296 steps, as the widest of the 7B shape; 37 parts would need 68 MB."""
    kernel = jax.eval_shape(lambda: quantize.int8(jnp.zeros((18944, 3584)), -2))

    def parts(rows: int) -> int:
        x = jax.ShapeDtypeStruct((rows, 18944), jnp.bfloat16)
        text = jax.make_jaxpr(lambda *a: gpu_codes.product(*a, interpret=True))(x, kernel)
        [call] = [e for e in text.eqns if e.primitive.name == "pallas_call"]
        return call.outvars[0].aval.shape[0]

    assert [parts(rows) for rows in (8, 64, 128)] == [37, 8, 8]


def test_many_rows_and_small_kernels_in_int8_are_left_to_xla():
    kernel = kernel_of("nf4", (256, 256))
    x = jnp.ones((2, 256), jnp.bfloat16)
    small = FewRows(interpret=True), kernel_of("int8", (256, 256))
    assert "pallas_call" not in str(jax.make_jaxpr(small[0])(x, small[1]))
    few = FewRows(most_rows=1, interpret=True)
    text = jax.make_jaxpr(few)(x, kernel)
    assert "pallas_call" not in str(text)
    assert "pallas_call" in str(jax.make_jaxpr(dataclasses.replace(few, most_rows=2))(x, kernel))


def test_the_assembly_looks_every_pair_of_codes_up():
    """Its instructions, carried out here, give the level of both codes of each of 256 bytes."""
    everything = np.arange(256, dtype=np.uint8).view(np.uint32)
    for word in everything.tolist():
        codes = np.uint32([word]).view(np.uint8)
        for shift in (4, 0):
            found = run_ptx(gpu_codes.assembly(shift), {"$4": word})
            levels = np.uint32([found[f"${i}"] for i in range(4)]).view(np.float32)
            np.testing.assert_array_equal(levels, nf4.LEVELS[codes >> shift & 15])


def run_ptx(text: str, registers: dict[str, int]) -> dict[str, int]:
    def permuted(a: int, b: int, selector: int) -> int:
        pool = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        assert max(chosen) < 8  # others repeat the sign
        return int.from_bytes(bytes(pool[i] for i in chosen), "little")

    does = {
        "shr": lambda a, b: a >> b,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "prmt": permuted,
    }
    for name, operands in re.findall(r"(\w+)\.b32 (.*);", text):
        if name in does:
            to, *given = operands.split(", ")
            values = [registers[x] if x in registers else int(x, 0) for x in given]
            registers[to] = does[name](*values)
    return registers


def test_adapters_beside_codes_sample_as_by_plain_xla():
    """A rollout of a model with its base in NF4 draws the same tokens."""
    model = dataclasses.replace(tiny.MODEL, width=128, mlp_width=128, head_size=32)
    lora_of = targets.lora_of(model, targets.Spec(2, 4.0), base="nf4")
    model = dataclasses.replace(model, lora=lora_of)
    init = lambda room, seed: jax.jit(lambda key: room.init(model, key))(jax.random.key(seed))  # noqa: E731
    frozen = lora.frozen_as(model, init(parameters, 0), jnp.float32)
    weights = lora.attached(frozen, init(lora, 1), model)
    found, few = [], FewRows(tile=Tile(outputs=64), interpret=True)
    for product in (quantize.frozen_product, few):
        decoder = decode.Decoder(
            model, tiny.one_device(), Sampling(), (1,), 6, fuse=True, frozen_product=product
        )
        own = engine.Engine(decoder)
        published = own.publish(weights)
        kernel = published["layers"][0]["attention"]["o"]["kernel"].kernel
        assert isinstance(kernel.scale, nf4.Scales) == (product is not few)
        found.append(
            own.generate(
                published, [[3, 4, 5], [6]], group=2, key=jax.random.key(0), temperature=1.0
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
    found = choice.choose_frozen_product(mesh, jnp.bfloat16)
    assert found == (FewRows() if kernel else quantize.frozen_product)


def test_on_a_gpu(optimized):
    tiny.run_on_a_gpu(__file__, optimized)


if __name__ == "__main__":
    for kind in ("nf4", "int8"):
        for tile in TILES:
            compare(kind, tile)
