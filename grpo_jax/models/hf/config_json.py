"""The config.json of an export: of a new model, or a source's in the spellings of all versions."""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_jax.models.families import CLASSIFIER, model_config, rotary
from grpo_jax.structs import ModelConfig

_NEW = ("llama", "qwen2", "qwen3", "mistral")  # families of new models
# The names of the families' classes in transformers. "": it has none for sequences of one label.
CLASSES = {
    **{family: family.capitalize() for family in (*_NEW, "ministral3", "olmo2", "olmo3", "phi3")},
    **{"seed_oss": "SeedOss", "smollm3": "SmolLM3", "glm4": "Glm4", "gemma2": "Gemma2"},
    **{"gemma3_text": "Gemma3Text", "granite": ""},
}


def hf_config(
    config: ModelConfig,
    *,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int | None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The config.json of a new model, in the spelling that every transformers version reads.

    Raises ValueError if the model has a part that its family lacks, or rotary scaling or sliding
    windows, which new models do not have.
    """
    hf = {
        "architectures": [f"{CLASSES[config.family]}ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "dtype": dtype,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_position,
        "model_type": config.family,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": pad_id,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rotaries[0].theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": dtype,  # transformers before 4.56 reads this name
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if config.family in ("llama", "qwen3"):
        hf["attention_bias"] = config.out_bias
    if config.family in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": False, "max_window_layers": config.num_layers}
    decoder = dataclasses.replace(config, head="vocabulary")
    if config.family not in _NEW or model_config(hf, "config.json") != decoder:
        raise ValueError(
            f"{config} cannot be written as a config.json of {config.family}: new models are of "
            f"{', '.join(_NEW)}, their biases and norms of heads must be those of the family, "
            "their rotary frequencies plain, and no layer may have a window."
        )
    return with_head(hf, config, pad_id)


def with_head(hf: dict[str, Any], config: ModelConfig, pad_id: int | None) -> dict[str, Any]:
    """The config.json of a decoder as that of its head: unchanged, or a classifier of one label.

    transformers reads the score at the last token that is not the pad token: it needs a `pad_id`.
    """
    if config.head != "scalar":
        return hf
    return hf | {
        "architectures": [f"{CLASSES[config.family]}{CLASSIFIER}"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }


def refuse_scalar(config: ModelConfig, where: str) -> None:
    """Raises ValueError if transformers has no class for the decoder with a scalar head."""
    if config.wrapper or not CLASSES.get(config.family):
        family = config.wrapper or config.family
        known = ", ".join(name for name, found in CLASSES.items() if found)
        raise ValueError(
            f"{where} is of the family {family}, of which transformers has no text model with a "
            f"score (ForSequenceClassification). Take a model of {known}."
        )


def in_every_spelling(hf: dict[str, Any]) -> dict[str, Any]:
    """A config.json with rotary settings where both transformers 4 and 5 look.

    Version 4 silently ignores `rope_parameters` and takes a base of 10,000.
    """
    hf = dict(hf)
    if isinstance(text := hf.get("text_config"), dict):
        hf["text_config"] = in_every_spelling(text)
    rope = hf.get("rope_parameters")
    if not isinstance(rope, dict):
        return hf
    if isinstance(local := rope.get("sliding_attention"), dict) and hf.get("model_type") != "olmo3":
        hf.setdefault("rope_local_base_freq", local.get("rope_theta"))
    rope = rope.get("full_attention", rope)
    outside = {"rope_theta", "partial_rotary_factor"}  # version 4 has these beside the scaling
    kind = rotary.kind_of(rope)
    if kind == "longrope":
        outside |= {"rope_type", "original_max_position_embeddings"}
    for key in (outside - {"rope_type"}) & rope.keys():
        if hf.get(key) is None and rope[key] is not None:
            hf[key] = rope[key]
    if not hf.get("rope_scaling"):
        scaling = {key: value for key, value in rope.items() if key not in outside}
        scaling |= {"type": kind} if kind == "longrope" else {}  # version 4's name of the kind
        hf["rope_scaling"] = None if kind == "default" else scaling
    return hf
