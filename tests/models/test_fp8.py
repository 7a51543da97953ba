"""Models in 8-bit floating point with scales of blocks: their values, and what is refused."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from hf_model import K_PROJ, edit_json, load, save_random_model

from grpo_jax.models.hf import weights
from grpo_jax.models.hf.folder import read_config

# 2 blocks of rows or columns, the second not whole; a device's part begins within a block.
SIZES = {"hidden_size": 160, "intermediate_size": 264, "head_dim": 40}
CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SCALE = K_PROJ + "_scale_inv"
FILE = "model.safetensors"


def in_fp8(folder, scales=torch.float32, whole: bool = False) -> dict[str, np.ndarray]:
    """Makes the layers' kernels of a folder random codes with scales; their values in float64."""
    draw, values, found = np.random.default_rng(0), {}, safetensors.torch.load_file(folder / FILE)
    for name in [n for n, x in found.items() if ".layers." in n and x.ndim == 2]:
        out, inputs = found[name].shape
        codes = draw.integers(0, 256, (out, inputs)).astype(np.uint8)
        codes[codes & 127 == 127] = 0  # not a number
        codes = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        grid = () if whole else (-(-out // 128), -(-inputs // 128))
        scale = torch.tensor(2 ** draw.uniform(-12, -8, grid), dtype=torch.float64).to(scales)
        each = scale.to(torch.float64).expand(1, 1) if whole else scale.to(torch.float64)
        each = each.repeat_interleave(out if whole else 128, 0)[:out]
        each = each.repeat_interleave(inputs if whole else 128, 1)[:, :inputs]
        values[name] = (codes.to(torch.float64) * each).numpy()
        found |= {name: codes, name + "_scale_inv": scale}
        if whole:
            found[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
    safetensors.torch.save_file(found, folder / FILE, metadata={"format": "pt"})
    block = {"weight_block_size": None} if whole else {}
    edit_json(folder / "config.json", quantization_config=CONFIG | block)
    return values


@pytest.mark.parametrize(
    ("scales", "whole"),
    [(torch.float32, False), (torch.float8_e8m0fnu, False), (torch.bfloat16, True)],
    ids=["float32", "e8m0", "one"],
)
def test_values_are_codes_times_the_scale_of_their_block(tmp_path, scales, whole):
    save_random_model(tmp_path, "Llama", SIZES)
    values = in_fp8(tmp_path, scales, whole)
    for mesh in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        for dtype in (jnp.float32, jnp.bfloat16):
            _, params = load(tmp_path, dtype, **mesh)
            for module, of, part in (("attention", "self_attn", "q"), ("mlp", "mlp", "down")):
                got = np.asarray(params["layers"][module][part]["kernel"][1])
                want = values[f"model.layers.1.{of}.{part}_proj.weight"].T
                np.testing.assert_array_equal(got, want.astype(np.float32).astype(dtype))
                assert len(np.unique(got)) > 200


def change(folder, **tensors) -> None:
    found = safetensors.torch.load_file(folder / FILE)
    found = {k: v for k, v in (found | tensors).items() if v is not None}
    safetensors.torch.save_file(found, folder / FILE)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, f"in 8 bits has no {SCALE}"),
        (torch.ones(2, 3), r"needs scales F32 [1, 2] and has F32 [2, 3]"),
        (torch.ones(1, 2, dtype=torch.int32), r"needs scales F32 [1, 2] and has I32 [1, 2]"),
    ],
    ids=["none", "another grid", "integers"],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, scale, message):
    save_random_model(tmp_path, "Llama", SIZES)
    in_fp8(tmp_path)
    change(tmp_path, **{SCALE: scale})
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert message in str(error.value) and K_PROJ in str(error.value)
    assert "Take the model that it was made from" in str(error.value)


def test_a_tower_in_8_bits_is_refused(tmp_path):
    """It is exported byte for byte, beside a config.json that says nothing of 8 bits any more."""
    codes = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    safetensors.torch.save_file({"vision_tower.a.weight": codes}, tmp_path / FILE)
    of_images = dataclasses.replace(tiny.MODEL, wrapper="mistral3")
    with pytest.raises(ValueError, match=r"vision_tower\.a\.weight is in 8 bits"):
        weights.set_aside(tmp_path, of_images)


@pytest.mark.parametrize("said", [{"weight_block_size": [1, 32]}, {"fmt": "e5m2"}], ids=str)
def test_other_blocks_are_refused(folder, said):
    edit_json(folder / "config.json", quantization_config=CONFIG | said)
    with pytest.raises(ValueError, match="quantized by 'fp8', and training starts from whole"):
        read_config(folder)
