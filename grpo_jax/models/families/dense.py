"""The `ModelConfig` of each dense family from its keys: a function for each, and shared parts.

A function gives transformers' defaults for absent keys, and its family's differences from Llama.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.models.families import rotary
from grpo_jax.models.hf.keys import Keys
from grpo_jax.structs import Layer, ModelConfig, QueryGrowth, Rotary

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _decoder(keys: Keys, **settings: Any) -> ModelConfig:
    """The decoder from the keys that all families share, with a family's own settings.

    By default it has one rotary embedding and layers without a window.
    """
    keys.only(mlp_bias=False, rope_interleaved=False)
    if "activation" not in settings:
        keys.only(hidden_act="silu")
    width, num_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    num_layers = keys.size("num_hidden_layers")
    num_kv_heads = keys.size("num_key_value_heads", null=num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{keys.source}: num_attention_heads = {num_heads} must be a multiple of "
            f"num_key_value_heads = {num_kv_heads}."
        )
    settings.setdefault("layers", (Layer(),) * num_layers)
    if "rotaries" not in settings:
        settings["rotaries"] = (rotary.of_all_layers(keys, _head_size(keys)),)
    # A window as long as the longest row is no window; kernels then need none.
    most = keys.size("max_position_embeddings")
    layers = tuple(
        dataclasses.replace(layer, window=None) if layer.window and layer.window >= most else layer
        for layer in settings.pop("layers")
    )
    return ModelConfig(
        family=keys.get("model_type"),
        vocab_size=keys.size("vocab_size"),
        width=width,
        mlp_width=keys.size("intermediate_size"),
        layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=_head_size(keys),
        norm_eps=keys.number("rms_norm_eps"),
        max_position=most,
        tied_head=keys.flag("tie_word_embeddings"),
        **settings,
    )


def _head_size(keys: Keys) -> int:
    width, num_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    size = 0 if keys.find("head_dim") is None else keys.size("head_dim")
    if not size:
        size, rest = divmod(width, num_heads)
        if rest:
            raise ValueError(
                f"{keys.source}: hidden_size = {width} must be a multiple of num_attention_heads = "
                f"{num_heads} where head_dim is not given."
            )
    if size % 2:
        raise ValueError(
            f"{keys.source}: the head size is {size}; rotary embeddings turn pairs of its "
            "dimensions, so it must be even."
        )
    return size


def _kinds(keys: Keys, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer has the window: from `layer_types`, else from the layer's number."""
    number, types = keys.size("num_hidden_layers"), keys.find("layer_types")
    if types is None:
        return [default(i) for i in range(number)]
    if not isinstance(types, list) or not all(t in (_FULL, _SLIDING) for t in types):
        raise keys.unsupported("layer_types", types, f"a list of {_FULL}, {_SLIDING}")
    if len(types) != number:
        raise ValueError(
            f"{keys.source}: layer_types has {len(types)} entries for num_hidden_layers = {number}."
        )
    return [t == _SLIDING for t in types]


def _window(keys: Keys) -> int | None:
    return None if keys.find("sliding_window") is None else keys.size("sliding_window")


def _windowed(keys: Keys, window: int | None, default: Callable[[int], bool]) -> tuple[Layer, ...]:
    """The layers, some or all with the window; layers with a window use rotary 1."""
    slides = _kinds(keys, default)
    if window is None and any(slides):
        raise keys.unsupported("sliding_window", None, "a number, for layers that have a window")
    return tuple(Layer(window=window, rotary=1) if slide else Layer() for slide in slides)


def _one_rotary(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(dataclasses.replace(layer, rotary=0) for layer in layers)


def _one_window(keys: Keys) -> tuple[Layer, ...]:
    """Layers that all have one window, or none; `layer_types` must agree."""
    window, number = _window(keys), keys.size("num_hidden_layers")
    slides = window is not None
    if set(_kinds(keys, lambda i: slides)) != {slides}:
        raise keys.unsupported(
            "layer_types",
            keys.find("layer_types"),
            f"for {keys.get('model_type')} with a sliding window of {window}, "
            f"{_SLIDING if slides else _FULL} for every layer",
        )
    return (Layer(window=window),) * number


def llama(keys: Keys) -> ModelConfig:
    keys.absent(num_key_value_heads=None)
    keys.only(layer_types=[_FULL] * keys.size("num_hidden_layers"))
    bias = keys.flag("attention_bias")
    return _decoder(keys, qkv_bias=bias, out_bias=bias)


def _qwen_layers(keys: Keys) -> tuple[Layer, ...]:
    keys.absent(sliding_window=4096, max_window_layers=28)
    keys.only(use_mrope=False)
    window, first = _window(keys), keys.find("max_window_layers")
    window = window if keys.flag("use_sliding_window") else None
    if (type(first) is not int or first < 0) and not (first is window is None):
        raise ValueError(
            f"{keys.source}: max_window_layers = {shown(first)} must be a whole number, 0 or more."
        )
    if window is None and any(_kinds(keys, lambda i: False)):
        raise keys.unsupported(
            "layer_types",
            keys.find("layer_types"),
            f"for {keys.get('model_type')} with a sliding window of None, {_FULL} for every layer",
        )
    return _one_rotary(_windowed(keys, window, lambda i: window is not None and i >= first))


def qwen2(keys: Keys) -> ModelConfig:
    return _decoder(keys, layers=_qwen_layers(keys), qkv_bias=True)


def qwen3(keys: Keys) -> ModelConfig:
    keys.absent(head_dim=128)
    bias = keys.flag("attention_bias")
    return _decoder(keys, layers=_qwen_layers(keys), qkv_bias=bias, out_bias=bias, qk_norm="head")


def mistral(keys: Keys) -> ModelConfig:
    keys.absent(sliding_window=4096)
    return _decoder(keys, layers=_one_window(keys))


def ministral3(keys: Keys) -> ModelConfig:
    """Queries grow with their position beyond the length of the first training."""
    keys.absent(
        head_dim=128, num_key_value_heads=8, sliding_window=None, vocab_size=131_072,
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=34, rms_norm_eps=1e-5,
        num_attention_heads=32, max_position_embeddings=262_144,
    )  # fmt: skip
    beta = "llama_4_scaling_beta"
    turns = rotary.of_all_layers(keys, _head_size(keys), known=(beta, "max_position_embeddings"))
    rope = keys.find("rope_parameters") or keys.find("rope_scaling") or {}
    growth = None
    if rope.get(beta) is not None:
        period = keys.number("original_max_position_embeddings", rope)
        growth = QueryGrowth(keys.number(beta, rope), int(period))
    layers = _one_window(keys)
    return _decoder(keys, layers=layers, rotaries=(turns,), query_growth=growth)


def seed_oss(keys: Keys) -> ModelConfig:
    keys.absent(head_dim=128, num_key_value_heads=8, attention_bias=True)
    return _decoder(
        keys, qkv_bias=keys.flag("attention_bias"), out_bias=keys.flag("attention_out_bias")
    )


def smollm3(keys: Keys) -> ModelConfig:
    """Some layers have no positions: those with a 0 in `no_rope_layers`, despite the key's name."""
    keys.absent(num_key_value_heads=4, no_rope_layer_interval=4, tie_word_embeddings=True)
    keys.harmless("max_window_layers")
    number, turns = keys.size("num_hidden_layers"), keys.find("no_rope_layers")
    interval = keys.size("no_rope_layer_interval")
    if turns is None:
        turns = [int((i + 1) % interval != 0) for i in range(number)]
    if not isinstance(turns, list) or len(turns) < number or any(t not in (0, 1) for t in turns):
        raise keys.unsupported("no_rope_layers", turns, f"a list of {number} zeros and ones")
    window = _window(keys)
    window = window if keys.flag("use_sliding_window") else None
    layers = _windowed(keys, window, lambda i: window is not None and not turns[i])
    layers = tuple(
        dataclasses.replace(layer, rotary=1 - turn) for layer, turn in zip(layers, turns)
    )
    one = rotary.of_all_layers(keys, _head_size(keys), theta=2_000_000.0)
    bias = keys.flag("attention_bias")
    return _decoder(
        keys, layers=layers, rotaries=(one, Rotary(1.0, share=0.0)), qkv_bias=bias, out_bias=bias
    )


def olmo2(keys: Keys) -> ModelConfig:
    """Norms follow the branches; queries and keys are normed before they are split into heads."""
    keys.absent(num_key_value_heads=None)
    bias = keys.flag("attention_bias")
    return _decoder(keys, qkv_bias=bias, out_bias=bias, norms="after", qk_norm="whole")


def olmo3(keys: Keys) -> ModelConfig:
    keys.absent(num_key_value_heads=None, sliding_window=4096)
    layers = _windowed(keys, _window(keys), lambda i: (i + 1) % 4 != 0)
    turns = rotary.by_kind(keys, _head_size(keys), 500_000.0, 500_000.0, "rope_theta")
    bias = keys.flag("attention_bias")
    return _decoder(
        keys, layers=layers, rotaries=turns, qkv_bias=bias, out_bias=bias,
        norms="after", qk_norm="whole",
    )  # fmt: skip


def phi3(keys: Keys) -> ModelConfig:
    keys.absent(num_key_value_heads=None, sliding_window=None)
    keys.absent(original_max_position_embeddings=4096)
    keys.only(attention_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
    keys.size("original_max_position_embeddings")
    called = {"su": "longrope", "yarn": "longrope"}
    turns = rotary.of_all_layers(keys, _head_size(keys), share=1.0, called=called)
    return _decoder(keys, layers=_one_window(keys), rotaries=(turns,))


def granite(keys: Keys) -> ModelConfig:
    keys.absent(
        num_key_value_heads=None, attention_multiplier=1.0, embedding_multiplier=1.0,
        residual_multiplier=1.0, logits_scaling=1.0,
    )  # fmt: skip
    bias = keys.flag("attention_bias")
    return _decoder(
        keys,
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=keys.number("attention_multiplier"),
        embed_factor=keys.number("embedding_multiplier"),
        residual_factor=keys.number("residual_multiplier"),
        logit_factor=1 / keys.number("logits_scaling"),
    )


def glm4(keys: Keys) -> ModelConfig:
    keys.absent(num_key_value_heads=2, head_dim=128, attention_bias=True)
    turns = rotary.of_all_layers(keys, _head_size(keys), share=0.5)
    bias = keys.flag("attention_bias")
    return _decoder(keys, rotaries=(turns,), qkv_bias=bias, norms="both")


def _gemma(keys: Keys, **settings: Any) -> ModelConfig:
    keys.absent(
        head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
    )  # fmt: skip
    keys.only(
        hidden_activation="gelu_pytorch_tanh",
        use_bidirectional_attention=False,
        sliding_window_size=keys.find("sliding_window"),
    )
    if keys.find("hidden_act") not in (None, "gelu", "gelu_pytorch_tanh"):  # nothing reads it
        raise keys.unsupported("hidden_act", keys.find("hidden_act"), "'gelu_pytorch_tanh'")
    bias = keys.flag("attention_bias")
    return _decoder(
        keys,
        qkv_bias=bias,
        out_bias=bias,
        norms="both",
        norm_offset=1.0,
        activation="gelu_tanh",
        embed_factor=keys.size("hidden_size") ** 0.5,
        attention_scale=keys.number("query_pre_attn_scalar") ** -0.5,
        logit_cap=keys.maybe("final_logit_softcapping"),
        **settings,
    )


def gemma2(keys: Keys) -> ModelConfig:
    keys.absent(num_key_value_heads=4, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
                sliding_window=4096)  # fmt: skip
    layers = _one_rotary(_windowed(keys, _window(keys), lambda i: i % 2 == 0))
    return _gemma(keys, layers=layers, attention_cap=keys.maybe("attn_logit_softcapping"))


def gemma3_text(keys: Keys) -> ModelConfig:
    keys.absent(
        num_key_value_heads=4, num_attention_heads=8, hidden_size=2304, intermediate_size=9216,
        num_hidden_layers=26, vocab_size=262_208, max_position_embeddings=131_072, head_dim=256,
        sliding_window=4096, sliding_window_pattern=6,
    )  # fmt: skip
    if (cap := keys.find("attn_logit_softcapping")) is not None:  # transformers ignores it
        raise keys.unsupported("attn_logit_softcapping", cap, "None")
    pattern = keys.size("sliding_window_pattern")
    layers = _windowed(keys, _window(keys), lambda i: (i + 1) % pattern != 0)
    turns = rotary.by_kind(keys, _head_size(keys), 1e6, 1e4, "rope_local_base_freq")
    return _gemma(keys, layers=layers, rotaries=turns, qk_norm="head")


FAMILIES = {
    f.__name__: f
    for f in (
        *(llama, qwen2, qwen3, mistral, ministral3, seed_oss, smollm3, olmo2, olmo3),
        *(phi3, granite, glm4, gemma2, gemma3_text),
    )
}
