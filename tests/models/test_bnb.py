"""Models in NF4 as bitsandbytes writes them: codes are taken bit for bit, others are refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_model import K_PROJ, edit_json, in_nf4, load, rewrite, save_random_model, tensors_of

from grpo_jax import config as config_lib
from grpo_jax.devices import sharding
from grpo_jax.kernels import dense
from grpo_jax.kernels.nf4 import NF4
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.policy import Policy
from grpo_jax.setup import lora

# Blocks are whole in the kernels of 64 inputs, and run on over outputs in those of 56.
SIZES = {"hidden_size": 64, "head_dim": 14, "intermediate_size": 128}
STATE = ".quant_state.bitsandbytes__nf4"


def options(**lora_options):
    config = config_lib.default()
    config.model.path, config.lora.rank = "some/model-bnb-4bit", 4
    for name, value in lora_options.items():
        config.lora[name] = value
    return config


def base_of(folder, mesh, dtype=jnp.float32, **lora_options):
    policy = Policy(read_config(folder), None, (), folder)
    return lora.frozen_params(lora.adapted_policy(policy, options(**lora_options)), mesh, dtype)


@pytest.fixture(params=[True, False], ids=["double", "single"])
def quantized(request, tmp_path):
    save_random_model(tmp_path, "Llama", SIZES)
    return tmp_path, in_nf4(tmp_path, double=request.param)


def test_the_codes_of_a_folder_are_the_base(quantized):
    folder, values = quantized
    file = tensors_of(folder)
    whole = base_of(folder, sharding.make_mesh(devices=jax.devices()[:1]))
    split = base_of(folder, sharding.make_mesh(data=2, fsdp=2, tensor=2), base_dtype="nf4")

    jax.tree.map(np.testing.assert_array_equal, whole, split)
    for module, part, layer in (("attention", "k", 1), ("attention", "o", 0), ("mlp", "down", 1)):
        name = f"model.layers.{layer}.{'self_attn' if module == 'attention' else 'mlp'}.{part}_proj"
        kernel = whole["layers"][module][part]["kernel"]
        assert isinstance(kernel, NF4)
        got = np.asarray(dense.plain(kernel)[layer])
        np.testing.assert_array_equal(got, values[f"{name}.weight"].T)
        codes = np.concatenate([kernel.codes[layer] >> 4, kernel.codes[layer] & 15], axis=1)
        packed = file[f"{name}.weight"].reshape(-1)
        want = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
        codes = codes.reshape(-1, codes.shape[2]).T.reshape(-1)
        np.testing.assert_array_equal(codes[: len(want)], want)
    gate = split["layers"]["mlp"]["gate"]["kernel"]  # 64 inputs are one block, which is not split
    assert gate.codes.addressable_shards[0].data.shape == (2, 1, 32, 64)
    down = split["layers"]["mlp"]["down"]["kernel"]
    assert down.codes.addressable_shards[0].data.shape == (2, 1, 32, 32)
    assert whole["embed"]["embedding"].dtype == jnp.float32


def test_its_values_are_read_where_codes_are_of_no_use(quantized):
    """As for an export, or to generate with it."""
    folder, values = quantized
    _, params = load(folder, data=2, fsdp=2, tensor=2)
    np.testing.assert_array_equal(params["layers"]["attention"]["k"]["kernel"][1], values[K_PROJ].T)


def test_files_of_bitsandbytes_have_its_values(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors = save_random_model(tmp_path, "Llama", SIZES)
    in_nf4(tmp_path)
    want = {}

    def change(file):
        for name in [n for n in file if n.endswith(STATE)]:
            name = name.removesuffix(STATE)
            packed, state = functional.quantize_4bit(
                tensors[name].contiguous(), quant_type="nf4", compress_statistics=True
            )
            want[name] = functional.dequantize_4bit(packed, state).numpy()
            parts = state.as_dict(packed=True)
            file |= {name: packed.numpy(), **{f"{name}.{k}": v.numpy() for k, v in parts.items()}}

    rewrite(tmp_path, change)
    _, values = load(tmp_path)
    base = base_of(tmp_path, sharding.make_mesh())
    for got in (values, base):
        got = dense.plain(got["layers"]["mlp"]["up"]["kernel"])
        np.testing.assert_array_equal(got[1], want["model.layers.1.mlp.up_proj.weight"].T)


def said(tensor: np.ndarray, **changes) -> np.ndarray:
    """A kernel's JSON with changes."""
    return np.frombuffer(json.dumps(json.loads(tensor.tobytes()) | changes).encode(), np.uint8)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (STATE, lambda x: said(x, blocksize=128), "has blocksize = 128. 64 is read."),
        (STATE, lambda x: said(x, nested_blocksize=64), "nested_blocksize = 64. 256 is read"),
        (STATE, lambda x: said(x, shape=[64, 64]), r"shape [64, 64] needs codes U8 [2048, 1]"),
        (STATE, lambda x: said(x, shape="all"), "has shape = 'all', not two sizes"),
        (STATE, lambda x: said(x, nested_offset=None), "nested_offset = None, not a number"),
        (STATE, lambda x: said(x, dtype="int4"), "has dtype = 'int4'"),
        (STATE, lambda x: x[:-1], "quant_state that is no JSON"),
        (".quant_map", lambda x: x[::-1].copy(), "a quant_map that is not that of NF4"),
        (".absmax", lambda x: x[:-1], "needs absmax U8 [28] and has U8 [27]"),
    ],
)
def test_a_kernel_in_another_form_is_refused(tmp_path, part, change, message):
    save_random_model(tmp_path, "Llama", SIZES)
    in_nf4(tmp_path)
    rewrite(tmp_path, lambda file: file.update({K_PROJ + part: change(file[K_PROJ + part])}))

    with pytest.raises(ValueError) as error:
        base_of(tmp_path, sharding.make_mesh())

    assert message in str(error.value) and K_PROJ in str(error.value)
    assert "Take the model that it was made from" in str(error.value)


def test_layers_in_several_forms_are_refused(tmp_path):
    """As where some layers were left whole; and where config.json says something else."""
    tensors = save_random_model(tmp_path, "Llama", SIZES)
    in_nf4(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=CONFIG)
    with pytest.raises(ValueError, match="not as config"):
        base_of(tmp_path, sharding.make_mesh())

    def whole(file):
        for name in [n for n in file if n.startswith(K_PROJ)]:
            del file[name]
        file[K_PROJ] = tensors[K_PROJ].numpy()

    rewrite(tmp_path, whole)
    with pytest.raises(ValueError, match="is not a whole kernel in NF4"):
        base_of(tmp_path, sharding.make_mesh())
    load(tmp_path)  # values can be read


CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("lora_options", "message"),
    [
        ({"rank": 0}, "lora.rank = 0 trains all weights, which needs whole ones. Set lora.rank"),
        (
            {"base_dtype": "int8"},
            "lora.base_dtype = 'int8', but model.path = 'some/model-bnb-4bit'",
        ),
    ],
)
def test_what_needs_whole_weights_is_refused(tmp_path, lora_options, message):
    save_random_model(tmp_path, "Llama", {})
    in_nf4(tmp_path)
    with pytest.raises(ValueError, match="without its -bnb-4bit") as error:
        lora.adapted(read_config(tmp_path), options(**lora_options))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        CONFIG | {"bnb_4bit_quant_type": "fp4"},
        CONFIG | {"bnb_4bit_quant_storage": "bfloat16"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
    ],
    ids=str,
)
def test_other_codes_are_refused_by_name(folder, said):
    edit_json(folder / "config.json", quantization_config=said)
    with pytest.raises(ValueError, match="Give the model that they were made") as e:
        read_config(folder)
    assert f"by '{said['quant_method']}'" in str(e.value) and "NF4 by bitsandbytes" in str(e.value)
