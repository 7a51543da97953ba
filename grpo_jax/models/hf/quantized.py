"""Which quantized weights of a config.json are read, and how; all others are refused by name."""

from __future__ import annotations

from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.models.hf.keys import Keys


def codes_of(keys: Keys, is_wrapper: bool) -> str:
    """The codes of the layers' kernels, as in `ModelConfig`; ValueError for unknown ones.

    `is_wrapper`: the file is of a model of images and text, whose kernels are read whole.
    """
    for key in ("quantization_config", "compression_config", "quantization"):
        if (said := keys.find(key)) is None:
            continue
        said = said if isinstance(said, dict) else {"quant_method": said}
        if key == "quantization_config" and _is_nf4(said) and not is_wrapper:
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
