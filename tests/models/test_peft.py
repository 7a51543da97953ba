"""Adapters in PEFT's folders: theirs read, ours read by them, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hf_model import CASES, SIZES, edit_json, save_random_model
from safetensors.numpy import load_file
from tiny import completion_states, one_device

from grpo_jax.kernels import dense
from grpo_jax.models import lora, parameters
from grpo_jax.models.families import names
from grpo_jax.models.hf import peft, targets
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.hf.targets import Spec
from grpo_jax.models.hf.weights import load_params

# Of two layers: q and v everywhere, q with rank 5 in the second; down in the first alone.
SETTINGS = {
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "model.layers.0.mlp.down_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 5},
    "alpha_pattern": {"v_proj": 1.5},
}
compiled = functools.partial(
    jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request, tmp_path_factory):
    """A random model's folder, its shape, and its weights."""
    kind, settings = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    folder = tmp_path_factory.mktemp("base")
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    model = read_config(folder)
    return folder, model, load_params(folder, model, one_device())


def logits(weights, model, row_T: np.ndarray) -> np.ndarray:
    """After each token but the last of a row whose first is the prompt, [T, V]."""
    prompt, length = row_T[None, :1], np.array([1], np.int32)
    states = compiled(completion_states)(weights, model, prompt, length, row_T[None, None, 1:])
    return states[0, 0] @ parameters.head_kernel(weights)


def theirs(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        module = pytest.importorskip("peft", reason="needs peft")
        model = module.PeftModel.from_pretrained(model, adapter)
    return model


def torch_logits(model, row_T: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(row_T[None]).long()).logits[0, :-1].numpy()


def random_adapters(model, seed: int = 0):
    """Adapters neither of whose parts is zero."""
    like = lora.trained_shapes(model)
    draws = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draws.normal(0, 0.3, x.shape), jnp.float32), like)


@pytest.fixture
def row_T():  # noqa: N802
    return np.random.default_rng(1).integers(2, SIZES["vocab_size"], 9, dtype=np.int32)


def test_what_peft_writes_is_read(base, tmp_path, row_T):
    peft_lib = pytest.importorskip("peft")
    folder, model, params = base
    wrapped = peft_lib.get_peft_model(theirs(folder), peft_lib.LoraConfig(**SETTINGS))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path)

    spec = peft.read_config(tmp_path)
    adapted = dataclasses.replace(model, lora=targets.lora_of(model, spec))
    adapters = peft.load(tmp_path, adapted, one_device())

    weights = lora.attached(params, adapters, adapted)
    want = torch_logits(wrapped, row_T)
    np.testing.assert_allclose(logits(weights, adapted, row_T), want, atol=1e-5, rtol=1e-5)
    assert np.abs(want - torch_logits(theirs(folder), row_T)).max() > 0.01


def test_peft_reads_what_is_written(base, tmp_path, row_T):
    folder, model, params = base
    spec = Spec(4, 8.0, stabilized=True, targets=("all-linear",), exclude=("o_proj",),
                ranks={"layers.0.mlp.up_proj": 2}, alphas={"k_proj": 3.0})  # fmt: skip
    adapted = dataclasses.replace(model, lora=targets.lora_of(model, spec))
    adapters = random_adapters(adapted)
    ours = logits(lora.attached(params, adapters, adapted), adapted, row_T)

    peft.save(tmp_path, adapters, adapted, base="owner/name")

    wrapped = theirs(folder, tmp_path)
    np.testing.assert_allclose(ours, torch_logits(wrapped, row_T), atol=1e-5, rtol=1e-5)
    kept = json.loads((tmp_path / peft.CONFIG).read_text())
    assert kept["base_model_name_or_path"] == "owner/name"
    again = dataclasses.replace(model, lora=targets.lora_of(model, peft.read_config(tmp_path)))
    for mine, read in zip(adapted.lora.adapters, again.lora.adapters, strict=True):
        assert (mine.path, mine.ranks) == (read.path, read.ranks)
        np.testing.assert_allclose(mine.scalings, read.scalings, rtol=1e-12)


TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FUSED = {  # part of each head turns, so that rows of queries and keys have another order in files
    "phi3": ("Phi3", {"pad_token_id": 0, "rope_parameters": TURNED}),
    "glm4": ("Glm4", {"head_dim": 8, "pad_token_id": 0, "rope_parameters": TURNED}),
}


@pytest.mark.parametrize("family", FUSED)
def test_dense_layers_in_one_tensor_share_an_adapter(family, tmp_path, row_T):
    """As PEFT has it: one A, and B for the rows of all. Theirs read, ours read by them."""
    peft_lib = pytest.importorskip("peft")
    save_random_model(tmp_path / "base", *FUSED[family])
    model = read_config(tmp_path / "base")
    params = load_params(tmp_path / "base", model, one_device())
    ends = {module.rpartition(".")[2] for module in targets.modules(model)}
    wrapped = peft_lib.get_peft_model(
        theirs(tmp_path / "base"), peft_lib.LoraConfig(r=3, lora_alpha=6, target_modules=list(ends))
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    wrapped.save_pretrained(tmp_path / "theirs")

    spec = peft.read_config(tmp_path / "theirs")
    adapted = dataclasses.replace(model, lora=targets.lora_of(model, spec))
    adapters = peft.load(tmp_path / "theirs", adapted, one_device())
    peft.save(tmp_path / "ours", adapters, adapted)

    assert "mlp/gate_up" in {adapter.path for adapter in adapted.lora.adapters}
    assert lora.num_trained(adapted) == sum(x.size for x in jax.tree.leaves(adapters))
    want = torch_logits(wrapped, row_T)
    weights = lora.attached(params, adapters, adapted)
    np.testing.assert_allclose(logits(weights, adapted, row_T), want, atol=1e-5, rtol=1e-5)
    written, read = (load_file(tmp_path / of / peft.WEIGHTS) for of in ("ours", "theirs"))
    assert written.keys() == read.keys()
    jax.tree.map(np.testing.assert_array_equal, written, read)
    again = theirs(tmp_path / "base", tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again, row_T), want, atol=1e-5, rtol=1e-5)
    assert np.abs(want - torch_logits(theirs(tmp_path / "base"), row_T)).max() > 0.01


def test_tensors_have_their_names_and_ranks(base, tmp_path):
    _, model, _ = base
    spec = Spec(
        4, 8.0, targets=("q_proj", r".*\.1\.mlp\.down_proj"), ranks={"1.self_attn.q_proj": 2}
    )
    adapted = dataclasses.replace(model, lora=targets.lora_of(model, spec))
    adapters = random_adapters(adapted)

    peft.save(tmp_path, adapters, adapted)

    attention, mlp = (
        "base_model.model.model.layers.{}.self_attn.q_proj.",
        "base_model.model.model.layers.1.mlp.down_proj.",
    )
    outputs = model.num_heads * model.head_size
    shapes = {name: value.shape for name, value in load_file(tmp_path / peft.WEIGHTS).items()}
    assert shapes == {
        attention.format(0) + "lora_A.weight": (4, 32),
        attention.format(0) + "lora_B.weight": (outputs, 4),
        attention.format(1) + "lora_A.weight": (2, 32),
        attention.format(1) + "lora_B.weight": (outputs, 2),
        mlp + "lora_A.weight": (4, 56),
        mlp + "lora_B.weight": (32, 4),
    }
    read = peft.load(tmp_path, adapted, one_device())
    q = adapters["layers"]["attention"]["q"]
    np.testing.assert_array_equal(read["layers"]["attention"]["q"]["lora_a"][0], q["lora_a"][0])
    np.testing.assert_array_equal(
        read["layers"]["attention"]["q"]["lora_b"][1, :2], q["lora_b"][1, :2]
    )
    assert not read["layers"]["attention"]["q"]["lora_b"][1, 2:].any()  # past its own rank
    assert adapted.lora.adapters[0].scalings == (2.0, 4.0)


def test_merged_is_base_plus_product(base):
    _, model, params = base
    adapted = dataclasses.replace(model, lora=targets.lora_of(model, Spec(2, 6.0)))
    adapters = random_adapters(adapted)

    merged = lora.merged(lora.attached(params, adapters, adapted), jnp.float32)

    assert jax.tree.structure(merged) == jax.tree.structure(params)
    low, kernel = adapters["layers"]["mlp"]["down"], params["layers"]["mlp"]["down"]["kernel"]
    want = kernel + 3.0 * np.einsum("lir,lro->lio", low["lora_a"], low["lora_b"])
    np.testing.assert_allclose(merged["layers"]["mlp"]["down"]["kernel"], want, atol=1e-5)


REFUSED = {
    "modules_to_save": ["lm_head"],
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_asks_for_more_is_refused_by_name(name, tmp_path):
    (tmp_path / peft.CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    assert peft.read_config(tmp_path).rank == 4
    edit_json(tmp_path / peft.CONFIG, **{name: REFUSED[name]})
    with pytest.raises(ValueError, match=name):
        peft.read_config(tmp_path)


def test_a_folder_that_lacks_tensors_is_refused(base, tmp_path):
    _, model, _ = base
    both = dataclasses.replace(
        model, lora=targets.lora_of(model, Spec(2, 4.0, targets=("q_proj", "o_proj")))
    )
    one = dataclasses.replace(model, lora=targets.lora_of(model, Spec(2, 4.0, targets=("q_proj",))))
    peft.save(tmp_path, random_adapters(one), one)
    with pytest.raises(ValueError, match=r"missing.*o_proj\.lora_A"):
        peft.load(tmp_path, both, one_device())
    other = dataclasses.replace(
        model, lora=targets.lora_of(model, Spec(3, 4.0, targets=("q_proj",)))
    )
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is \[2, 32\], needed \[3, 32\]"):
        peft.load(tmp_path, other, one_device())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(2, 4.0, targets=("q_proj", "lm_head")), "lm_head, the head"),
        (Spec(2, 4.0, targets=(".*",)), "lm_head, the head"),
        (Spec(2, 4.0, targets=("embed_tokens",)), "embed_tokens, the embedding"),
        (Spec(2, 4.0, targets=("q_proj", "c_attn")), "'c_attn' names no dense layer"),
        (Spec(2, 4.0, targets=("(q_proj",)), "is no regular expression"),
        (Spec(2, 4.0, exclude=(".*",)), "no layer is left"),
        (Spec(2, 4.0, targets=("q_proj",), ranks={"k_proj": 3}), "'k_proj' of a rank"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_are_refused(base, spec, message):
    with pytest.raises(ValueError, match=message):
        targets.lora_of(base[1], spec)


def test_dense_layers_have_names(base):
    """Every dense layer of a family can be named, and none twice."""
    _, model, _ = base
    found = targets.modules(model)
    assert len(found) == 7 * model.num_layers
    assert found["model.layers.1.self_attn.q_proj"] == ("attention/q", ("attention/q",), 1)
    table = names.table(model)
    assert {f"{module.path}/kernel" for module in found.values()} <= table.keys()


def test_joined_projections_are_the_three(base):
    """Some of them adapted, of several ranks: A side by side, B in blocks."""
    _, model, params = base
    spec = Spec(2, 4.0, targets=("q_proj", "v_proj", "up_proj"), ranks={"v_proj": 3})
    adapted = dataclasses.replace(model, lora=targets.lora_of(model, spec))
    weights = lora.attached(params, random_adapters(adapted), adapted)
    layer = jax.tree.map(lambda x: x[1], weights["layers"])
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)

    joined = parameters.fuse_projections(layer)

    for module, name, parts in (("attention", "qkv", "qkv"), ("mlp", "gate_up", ("gate", "up"))):
        got = dense.product(x, joined[module][name]["kernel"], jnp.float32)
        each = [dense.product(x, layer[module][p]["kernel"], jnp.float32) for p in parts]
        np.testing.assert_allclose(got, np.concatenate(each, axis=-1), atol=1e-5)
