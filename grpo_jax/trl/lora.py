"""Translates PEFT's `LoraConfig` to this trainer's options."""

from __future__ import annotations

from typing import Any

# Settings for more than adapters of dense layers, and their values without effect.
_REFUSED = {
    "lora_dropout": (0, 0.0),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "layer_replication": (None,),
    "init_lora_weights": (True,),
}

_BY_DEFAULT = ("q_proj", "v_proj")  # what PEFT's table has for Llama, Qwen, Mistral and Gemma


# The head of a classifier, which a reward model trains whole in any case.
_HEAD = ["score"]


def options_of_peft(
    peft_config: Any, trainer: str = "GRPOTrainer", head: str = "vocabulary"
) -> dict[str, Any]:
    """Options by name from a `LoraConfig`, or an object with its attributes; {} for None.

    `head`: the model's; beside adapters a "scalar" one is trained whole. Raises ValueError for
    settings that this `trainer` does not support.
    """
    if peft_config is None:
        return {}
    given = getattr(peft_config, "__dict__", {})
    if "lora_alpha" not in given:
        raise ValueError(
            f"{trainer}(peft_config=...) is a {type(peft_config).__name__}; only LoraConfig is "
            "taken."
        )
    for name, allowed in _REFUSED.items():
        if name == "modules_to_save" and head == "scalar":
            allowed = (*allowed, _HEAD)
        if name in given and given[name] not in allowed:
            raise ValueError(
                f"LoraConfig({name}={given[name]!r}) is not what this trainer does. It takes "
                f"{name}={allowed[0]!r}."
            )
    pairs = lambda name: tuple(f"{k}={v}" for k, v in (given.get(name) or {}).items())  # noqa: E731
    return {
        "lora.rank": given["r"],
        "lora.alpha": float(given["lora_alpha"]),
        "lora.rank_stabilized": bool(given.get("use_rslora")),
        "lora.targets": _targets(given.get("target_modules") or _BY_DEFAULT),
        "lora.exclude": _targets(given.get("exclude_modules") or ()),
        "lora.rank_pattern": pairs("rank_pattern"),
        "lora.alpha_pattern": pairs("alpha_pattern"),
    }


def _targets(given: Any) -> tuple[str, ...]:
    """Targets: in PEFT, a text is a regular expression, anything else has ends of names."""
    if isinstance(given, str):
        return (given if given == "all-linear" else f"(?:{given})",)
    return tuple(sorted(given))
