"""Translates Hugging Face's config.json to the decoder's `ModelConfig`.

`dense.py` has the settings of each family, and `names.py` the names of its tensors. Refused are
unknown keys, and values that the decoder cannot compute exactly: a wrong rotary scaling trains
without an error and ends in a worse model. An absent key has transformers' default for the family.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.models.families.dense import FAMILIES
from grpo_jax.models.hf import quantized
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
    given = keys.get("model_type")
    family = given if isinstance(given, str) else ""
    codes, head = quantized.codes_of(keys, family in WRAPPERS), _head(keys)
    if family in WRAPPERS:
        found = _wrapped(keys, family)
    elif family in FAMILIES:
        found = FAMILIES[family](keys)
    else:
        raise keys.unsupported("model_type", given, f"one of {', '.join([*FAMILIES, *WRAPPERS])}")
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
        known = ", ".join(WRAPPERS[wrapper])
        raise keys.unsupported("text_config", text, f"one with a model_type of {known}")
    found = model_config(text, f"{keys.source}: text_config")
    if found.codes:
        raise keys.unsupported("text_config.quantization_config", found.codes, "plain weights")
    if keys.find("tie_word_embeddings") is not None:
        found = dataclasses.replace(found, tied_head=keys.flag("tie_word_embeddings"))
    keys.harmless(*OF_IMAGES)
    return dataclasses.replace(found, wrapper=wrapper)
