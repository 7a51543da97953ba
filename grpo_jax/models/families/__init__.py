"""Translates Hugging Face's config.json to the decoder's `ModelConfig`.

Families differ only in its settings; `dense.py` has the settings of each family, and `names.py` the
names of its tensors. A value that the decoder cannot compute exactly is refused, never
approximated: a wrong rotary scaling trains without an error and ends in a worse model. Unknown keys
are refused too. An absent key has transformers' default for the family.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.models.families.dense import FAMILIES
from grpo_jax.models.hf.keys import Keys
from grpo_jax.structs import ModelConfig

# Image-text models: the family of the text model in them. Only the text model is trained.
WRAPPERS = {"gemma3": ("gemma3_text",), "mistral3": ("mistral", "ministral3")}
OF_IMAGES = (
    *("vision_config", "image_token_index", "image_token_id", "mm_tokens_per_image"),
    *("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id"),
    *("projector_hidden_act", "vision_feature_layer", "multimodal_projector_bias"),
    "spatial_merge_size",
)
CLASSIFIER = "ForSequenceClassification"  # the end of the names of its architectures


def model_config(hf: dict[str, Any], source: str) -> ModelConfig:
    """The decoder that a config.json describes; `source` names the file in messages.

    Reads the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
    Raises ValueError, naming the file, the key and the value, for missing or unknown keys,
    impossible sizes, and everything that the decoder does not compute.
    """
    keys = Keys(hf, source)
    family = keys.get("model_type")
    codes, head = _codes(keys), _head(keys)
    if isinstance(family, str) and family in WRAPPERS:
        found = _wrapped(keys, family)
    elif isinstance(family, str) and family in FAMILIES:
        found = FAMILIES[family](keys)
    else:
        known = ", ".join([*FAMILIES, *WRAPPERS])
        raise keys.unsupported("model_type", family, f"one of {known}")
    keys.refuse_unread()
    if head == "scalar" and found.wrapper:
        raise keys.unsupported("architectures", hf["architectures"], "a text model for rewards")
    return dataclasses.replace(found, codes=codes, head=head)


def _head(keys: Keys) -> str:
    """The head, as in `ModelConfig`: "scalar" for a classifier of sequences with one label.

    As in transformers, a classifier without `id2label` or `num_labels` has two labels.
    """
    names = keys.find("architectures")
    is_classifier = isinstance(names, list) and any(str(n).endswith(CLASSIFIER) for n in names)
    if not is_classifier:
        return "vocabulary"
    labels = keys.find("id2label")
    number = len(labels) if isinstance(labels, dict) else keys.find("num_labels") or 2
    if number != 1:
        raise ValueError(
            f"{keys.source}: architectures = {shown(names)} with {shown(number)} labels (id2label, "
            "num_labels; 2 where neither is given). A reward model has 1. Save it with "
            "num_labels = 1."
        )
    return "scalar"


def _wrapped(keys: Keys, wrapper: str) -> ModelConfig:
    """The decoder of an image-text model."""
    text = keys.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in WRAPPERS[wrapper]:
        raise keys.unsupported(
            "text_config", text, f"one with a model_type of {', '.join(WRAPPERS[wrapper])}"
        )
    found = model_config(text, f"{keys.source}: text_config")
    if found.codes:
        raise keys.unsupported("text_config.quantization_config", found.codes, "plain weights")
    if keys.find("tie_word_embeddings") is not None:
        found = dataclasses.replace(found, tied_head=keys.flag("tie_word_embeddings"))
    keys.harmless(*OF_IMAGES)
    return dataclasses.replace(found, wrapper=wrapper)


def _codes(keys: Keys) -> str:
    """The codes of the layers' kernels, as in `ModelConfig`; ValueError for unknown ones."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if (said := keys.find(key)) is None:
            continue
        said = said if isinstance(said, dict) else {"quant_method": said}
        if key == "quantization_config" and _is_nf4(said) and keys.hf["model_type"] not in WRAPPERS:
            return "nf4 double" if said.get("bnb_4bit_use_double_quant") else "nf4"
        if key == "quantization_config" and _is_fp8(said):
            return ""  # its values are read: models/hf/fp8.py
        method = said.get("quant_method")
        raise ValueError(
            f"{keys.source}: {key} = {shown(keys.find(key))}: the weights are quantized"
            f"{f' by {shown(method)}' if method else ''}, and training starts from whole ones. "
            "Give the model that they were made from, such as the id without its -bnb-4bit, -AWQ, "
            "-GPTQ-Int4 or -FP8. Of quantized models those in NF4 by bitsandbytes are read "
            '(bnb_4bit_quant_type = "nf4"), as the base of low-rank adapters, and those in "fp8" '
            "with a scale for each block of 128 (weight_block_size)."
        )
    return ""


def _is_nf4(said: dict[str, Any]) -> bool:
    """Whether a quantization_config is that of bitsandbytes for NF4, two codes a byte."""
    return (
        said.get("quant_method") == "bitsandbytes"
        and said.get("load_in_4bit", said.get("_load_in_4bit")) is True
        and said.get("bnb_4bit_quant_type") == "nf4"
        and said.get("bnb_4bit_quant_storage", "uint8") == "uint8"
    )


def _is_fp8(said: dict[str, Any]) -> bool:
    """Whether a quantization_config has 8-bit floating point, with scales of blocks or of all."""
    block = said.get("weight_block_size")
    return (
        said.get("quant_method") == "fp8"
        and said.get("fmt", "e4m3") == "e4m3"
        and (block is None or block == [128, 128])
    )
