"""config.json to ModelConfig: every spelling that is read, and every refusal by its message."""

from __future__ import annotations

import dataclasses
import math

import pytest
import transformers

from grpo_jax.models.families import model_config
from grpo_jax.models.hf import config_json
from grpo_jax.structs import (
    Layer,
    LinearScaling,
    ModelConfig,
    RopeScaling,
    Rotary,
    YarnScaling,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
PLAIN = ModelConfig(
    family="llama",
    vocab_size=48,
    width=32,
    mlp_width=56,
    layers=(Layer(),) * 2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    rotaries=(Rotary(10_000.0),),
    norm_eps=1e-5,
    max_position=64,
    tied_head=False,
)
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3"}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": None}
PHI3 = LLAMA | {"model_type": "phi3"}
SMOLLM3 = LLAMA | {"model_type": "smollm3"}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WRAPPED = {"model_type": "mistral3", "text_config": MISTRAL, "vision_config": {"any": 1}}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GROWN = 0.1 * math.log(4) + 1  # equation 22 of arXiv:2309.00071, for a factor of 4
HALF = (Rotary(1e4, share=0.5),)
OLD_GEMMA3 = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
              "rope_local_base_freq": 100, "sliding_window_pattern": 2}  # fmt: skip
NEW_GEMMA3 = {
    "family": "gemma3_text",
    "layers": (Layer(window=4, rotary=1), Layer()),
    "rotaries": (Rotary(5e5, LinearScaling(8.0)), Rotary(100.0)),
    "tied_head": True,
    "norms": "both",
    "norm_offset": 1.0,
    "qk_norm": "head",
    "activation": "gelu_tanh",
    "attention_scale": 1 / 16,  # of the default, 256
    "embed_factor": 32**0.5,
}
WHOLE = {"factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4,
         "original_max_position_embeddings": 16.0}  # fmt: skip
SLIDE, FULL = "sliding_attention", "full_attention"


def read(hf: dict) -> ModelConfig:
    return model_config(hf, "m/config.json")


@pytest.mark.parametrize(
    "hf, changes",
    [
        (LLAMA | {"odd": False, "none": None}, {}),  # switched off
        (LLAMA, {}),
        (LLAMA | {"head_dim": None, "rope_scaling": None, "hidden_act": "silu"}, {}),
        (LLAMA | {"head_dim": 16}, {"head_size": 16}),
        (LLAMA | {"rope_interleaved": False, "is_llama_config": True, "_anything": 1,
                  "transformers.js_config": {}, "nobody_knows": None}, {}),  # as SmolLM2 has it
        ({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, {"num_kv_heads": 4}),
        (LLAMA | {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        (LLAMA | {"tie_word_embeddings": True}, {"tied_head": True}),
        (LLAMA | {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
        (LLAMA | {"rope_theta": 5e5}, {"rotaries": (Rotary(5e5),)}),
        (LLAMA | {"rope_theta": 500_000}, {"rotaries": (Rotary(5e5),)}),
        (LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
         {"rotaries": (Rotary(5e5),)}),
        (LLAMA | {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
         {"rotaries": (Rotary(5e5),)}),
        (LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
         {"rotaries": (Rotary(5e5),)}),
        (LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3},
         {"rotaries": (Rotary(5e5, RopeScaling(8.0, 1.0, 4.0, 16)),)}),
        (LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
         {"rotaries": (Rotary(5e5, RopeScaling(8.0, 1.0, 4.0, 16)),)}),
        (LLAMA | {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}},
         {"rotaries": (Rotary(1e4, RopeScaling(8.0, 1.0, 4.0, 64)),)}),
        # Several places, which agree: what counts is what they mean.
        (LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3,
                  "rope_parameters": LLAMA3 | {"rope_theta": 500_000}},
         {"rotaries": (Rotary(5e5, RopeScaling(8.0, 1.0, 4.0, 16)),)}),
        (LLAMA | {"rope_scaling": {"type": "llama3", **WHOLE}, "rope_parameters": LLAMA3},
         {"rotaries": (Rotary(1e4, RopeScaling(8.0, 1.0, 4.0, 16)),)}),
        (LLAMA | {"rope_scaling": {"type": "default", "rope_theta": 5e5},
                  "rope_parameters": {"rope_type": "default"}}, {"rotaries": (Rotary(5e5),)}),
        (LLAMA | {"rope_scaling": None, "rope_theta": None,
                  "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
         {"rotaries": (Rotary(5e5, RopeScaling(8.0, 1.0, 4.0, 16)),)}),
        (QWEN2, {"family": "qwen2", "qkv_bias": True}),
        (QWEN2 | {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
         {"family": "qwen2", "qkv_bias": True}),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
         {"family": "qwen2", "qkv_bias": True, "layers": (Layer(), Layer(window=4))}),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
         {"family": "qwen2", "qkv_bias": True}),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "layer_types": [SLIDE, FULL]},
         {"family": "qwen2", "qkv_bias": True, "layers": (Layer(window=4), Layer())}),
        (QWEN3 | {"head_dim": 16}, {"family": "qwen3", "qk_norm": "head", "head_size": 16}),
        (QWEN3, {"family": "qwen3", "qk_norm": "head", "head_size": 128}),
        (QWEN3 | {"head_dim": 16, "attention_bias": True},
         {"family": "qwen3", "qk_norm": "head", "head_size": 16, "qkv_bias": True,
          "out_bias": True}),
        (MISTRAL, {"family": "mistral"}),
        (MISTRAL | {"sliding_window": 7}, {"family": "mistral", "layers": (Layer(window=7),) * 2}),
        (MISTRAL | {"layer_types": [FULL, FULL]}, {"family": "mistral"}),
        (MISTRAL | {"sliding_window": 64}, {"family": "mistral"}),  # as long as any row
        (WRAPPED | {"tie_word_embeddings": True},
         {"family": "mistral", "wrapper": "mistral3", "tied_head": True}),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
         {"rotaries": (Rotary(1e4, LinearScaling(4.0)),)}),
        (LLAMA | {"rope_scaling": YARN},
         {"rotaries": (Rotary(1e4, YarnScaling(4.0, 16, 32.0, 1.0, True), amplitude=GROWN),)}),
        (LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 8}},
         {"rotaries": (Rotary(1e4, YarnScaling(4.0, 16, 8.0, 1.0, True), amplitude=1.5),)}),
        (LLAMA | {"rope_scaling": YARN | {"attn_factor": 0.5, "factor": None}},  # 64 / 16
         {"rotaries": (Rotary(1e4, YarnScaling(4.0, 16, 32.0, 1.0, True), amplitude=GROWN / 2),)}),
        (LLAMA | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
         {"rotaries": (Rotary(1e4, YarnScaling(4.0, 16, 32.0, 1.0, True)),)}),
        (PHI3 | {"partial_rotary_factor": 0.5}, {"family": "phi3", "rotaries": HALF}),
        (PHI3 | {"rope_parameters": {"partial_rotary_factor": 0.5}},
         {"family": "phi3", "rotaries": HALF}),
        (GEMMA3 | OLD_GEMMA3, NEW_GEMMA3),
        (GEMMA3 | {"layer_types": [SLIDE, FULL], "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            SLIDE: {"rope_type": "default", "rope_theta": 100}}}, NEW_GEMMA3),
        (GEMMA3 | OLD_GEMMA3 | {"rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            SLIDE: {"rope_theta": 100}}}, NEW_GEMMA3),
        (SMOLLM3 | {"no_rope_layers": [0, 1], "tie_word_embeddings": False},
         {"family": "smollm3", "layers": (Layer(rotary=1), Layer()),
          "rotaries": (Rotary(2e6), Rotary(1.0, share=0.0))}),
    ],
)  # fmt: skip
def test_reads(hf, changes):
    assert read(hf) == dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    "hf, said",
    [
        (LLAMA | {"model_type": "bert"},
         "m/config.json: model_type = 'bert' is not supported. "
         "Supported: one of llama, qwen2, qwen3, mistral, "),
        (LLAMA | {"clip_qkv": 8.0},
         "m/config.json: the key clip_qkv = 8.0 is not known, and it may change what the model "),
        (LLAMA | {"model_type": "gemma3"}, "the key text_config is missing"),
        (WRAPPED | {"text_config": QWEN2},
         "Supported: one with a model_type of mistral, ministral3."),
        (WRAPPED | {"text_config": MISTRAL | {"odd": 1}},
         "m/config.json: text_config: the key odd = 1 is not known"),
        (WRAPPED | {"odd": 1}, "m/config.json: the key odd = 1 is not known"),
        ({}, "m/config.json: the key model_type is missing."),
        *((({k: v for k, v in QWEN2.items() if k != key}),
           f"m/config.json: the key {key} is missing.") for key in QWEN2),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported. Supported: 'silu'"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias = True is not supported. Supported: False"),
        (LLAMA | {"quantization_config": {"bits": 4}},
         "quantization_config = {'bits': 4}: the weights are quantized, and"),
        (LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
         "the weights are quantized by 'bitsandbytes', and training starts from whole ones. Give "
         "the model that they were made from, such as the id without its -bnb-4bit"),
        (LLAMA | {"quantization": {"group_size": 64, "bits": 4}}, "the weights are quantized"),
        (WRAPPED | {"quantization_config": NF4}, "the weights are quantized by 'bitsandbytes'"),
        (WRAPPED | {"text_config": MISTRAL | {"quantization_config": NF4}},
         "text_config.quantization_config = 'nf4' is not supported. Supported: plain weights."),
        (QWEN2 | {"use_mrope": True}, "use_mrope = True is not supported"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}},
         "rope_parameters.partial_rotary_factor = 0.5 is not supported. Supported: 1.0"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
         "rope_scaling.rope_type = 'dynamic' is not supported. "
         "Supported: default, linear, llama3, longrope, proportional, yarn."),
        (LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
         "the key rope_parameters.factor is missing"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0, "alpha": 2}},
         "rope_scaling.alpha = 2 is not known for rope_type = 'linear'"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "truncate": 1}},
         "rope_scaling.truncate = 1 is not supported. Supported: true or false."),
        (PHI3 | {"rope_scaling": {"type": "su", "short_factor": [1.0] * 3, "long_factor": []}},
         "rope_scaling.short_factor = [1.0, 1.0, 1.0] is not supported. Supported: a list of 4 nu"),
        (PHI3 | {"partial_rotary_factor": 0.7}, "partial_rotary_factor = 0.7 is not supported"),
        (GEMMA3 | {"rope_parameters": {"rope_theta": 1e4}}, "Supported: a set for each of"),
        (GEMMA3 | {"rope_theta": 1e5, "rope_parameters": {FULL: {"rope_theta": 1e6}}},
         "rope_parameters.rope_theta = 1000000.0 and rope_theta = 100000.0 contradict each other"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "Supported: False"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "Supported: None"),
        (SMOLLM3 | {"no_rope_layers": [1]}, "Supported: a list of 2 zeros and ones"),
        (SMOLLM3 | {"layer_types": [SLIDE, FULL]}, "sliding_window = None is not supported"),
        (LLAMA | {"rope_parameters": {FULL: {"rope_theta": 1e4}}},
         "is not supported. Supported: one flat set of rotary parameters for all layers"),
        (LLAMA | {"rope_scaling": "yarn"}, "rope_scaling = 'yarn' is not supported"),
        (LLAMA | {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4}},
         "contradict each other"),
        (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
         "rope_parameters.rope_theta = 1000000.0 and rope_theta = 10000.0 contradict each other"),
        (LLAMA | {"rope_theta": 0}, "rope_theta = 0 must be a number above 0"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3"}},
         "the key rope_scaling.factor is missing"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"factor": "8"}},
         "rope_scaling.factor = '8' must be a number above 0"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
         "rope_scaling.low_freq_factor = 4.0 must be below rope_scaling.high_freq_factor = 4.0"),
        (LLAMA | {"num_key_value_heads": 3},
         "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
        (LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 6},
         "hidden_size = 32 must be a multiple of num_attention_heads = 6"),
        (LLAMA | {"head_dim": 7}, "the head size is 7"),
        (LLAMA | {"hidden_size": 0}, "hidden_size = 0 must be a whole number above 0"),
        (LLAMA | {"vocab_size": -1}, "vocab_size = -1 must be a whole number above 0"),
        (LLAMA | {"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0 must be a whole number"),
        (LLAMA | {"intermediate_size": True}, "intermediate_size = True must be a whole number"),
        (LLAMA | {"intermediate_size": None}, "intermediate_size = None must be a whole number"),
        (LLAMA | {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' must be a number above 0"),
        (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be true or false"),
        (LLAMA | {"layer_types": [SLIDE, FULL]}, "layer_types = ['sliding_attention', "),
        (MISTRAL | {"sliding_window": 0}, "sliding_window = 0 must be a whole number above 0"),
        (MISTRAL | {"sliding_window": 4, "layer_types": [SLIDE, FULL]},
         "Supported: for mistral with a sliding window of 4, sliding_attention for every layer"),
        (QWEN2 | {"layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers = 2"),
        (QWEN2 | {"layer_types": [FULL, "linear_attention"]},
         "Supported: a list of full_attention, sliding_attention"),
        (QWEN2 | {"layer_types": [FULL, SLIDE]},
         "for qwen2 with a sliding window of None, full_attention for every layer"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": -1},
         "max_window_layers = -1 must be a whole number, 0 or more"),
    ],
)  # fmt: skip
def test_refuses(hf, said):
    with pytest.raises(ValueError) as error:
        read(hf)
    assert said in str(error.value)
    assert str(error.value).startswith("m/config.json: ")


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_the_defaults_of_absent_keys_are_those_of_transformers(kind):
    sizes = {k: v for k, v in LLAMA.items() if k != "model_type"}
    if kind == "Llama":
        del sizes["num_key_value_heads"]
    theirs = getattr(transformers, f"{kind}Config")(**sizes)

    ours = read(sizes | {"model_type": theirs.model_type})

    assert ours == read(theirs.to_dict())
    assert ours.rotaries[0].theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_head == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("llama", {"qkv_bias": True, "out_bias": True}),
        ("qwen2", {"qkv_bias": True, "tied_head": True}),
        ("qwen3", {"qk_norm": "head"}),
        ("mistral", {}),
    ],
)
def test_a_new_model_is_read_by_transformers(family, changes):
    ours = dataclasses.replace(PLAIN, family=family, head_size=12, **changes)

    hf = config_json.hf_config(ours, bos_id=None, eos_ids=(3,), pad_id=0, dtype="bfloat16")
    theirs = transformers.AutoConfig.for_model(**hf)

    assert read(theirs.to_dict()) == ours
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, 3, 0)
    assert str(theirs.dtype) == "torch.bfloat16"
    two = config_json.hf_config(ours, bos_id=1, eos_ids=(3, 4), pad_id=0)
    assert two["eos_token_id"] == [3, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "llama"},
        {"qkv_bias": False},
        {"out_bias": True},
        {"qk_norm": "head"},
        {"rotaries": (Rotary(1e4, RopeScaling(8.0, 1.0, 4.0, 16)),)},
        {"layers": (Layer(), Layer(window=4))},
    ],
)
def test_a_new_model_that_its_family_cannot_express_is_refused(changes):
    ours = dataclasses.replace(PLAIN, **{"family": "qwen2", "qkv_bias": True} | changes)
    with pytest.raises(ValueError, match=r"cannot be written as a config\.json of"):
        config_json.hf_config(ours, bos_id=None, eos_ids=(3,), pad_id=0)
