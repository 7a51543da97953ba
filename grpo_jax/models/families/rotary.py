"""Rotary settings of a config.json: one set for all layers, or one for each kind of layer.

transformers 4 writes `rope_theta` and `rope_scaling` (and `rope_local_base_freq`), version 5
`rope_parameters`. A file may have both, if they mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.models.hf.keys import Keys
from grpo_jax.structs import LinearScaling, LongScaling, RopeScaling, Rotary, YarnScaling

_ORIGINAL = "original_max_position_embeddings"
_ALWAYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "proportional": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {"factor", _ORIGINAL, "attention_factor", "attn_factor", "beta_fast", "beta_slow",
             "mscale", "mscale_all_dim", "truncate", "finetuned"},
    "longrope": {"factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip


def of_all_layers(keys: Keys, head_size: int, **options: Any) -> Rotary:
    """The rotary settings of a file with one set; `options` as for `_rotary`."""
    names = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
    return _rotary(keys, {name: keys.find(name) for name in names}, head_size, **options)


def by_kind(
    keys: Keys, head_size: int, full_theta: float, sliding_theta: float, local_key: str
) -> tuple[Rotary, Rotary]:
    """The rotary settings of layers with full attention, and of layers with a window.

    In the old spelling a scaling belongs to the first only; `local_key` holds the base of the
    second.
    """
    theta, scaling = keys.find("rope_theta"), keys.find("rope_scaling")
    local, both = keys.find(local_key), keys.find("rope_parameters") or {}
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(both, dict) or both.keys() - kinds:
        raise keys.unsupported("rope_parameters", both, f"a set for each of {', '.join(kinds)}")
    full = {"rope_theta": theta, "rope_scaling": scaling,
            "rope_parameters": both.get("full_attention")}  # fmt: skip
    sliding = {local_key: local, "rope_parameters": both.get("sliding_attention")}
    return (
        _rotary(keys, full, head_size, theta=full_theta),
        _rotary(keys, sliding, head_size, theta=sliding_theta, theta_key=local_key),
    )


def kind_of(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rotary(
    keys: Keys,
    view: dict[str, Any],
    head_size: int,
    *,
    theta: float = 10_000.0,  # the first Llama's files omit it
    theta_key: str = "rope_theta",
    share: float | None = None,
    called: Mapping[str, str] = {},
    known: tuple[str, ...] = (),
) -> Rotary:
    """The rotary settings in a part of the file.

    `theta` and `share` (the part of a head that is rotated) are defaults; `share` None: the whole
    head must be. `called`: the family's other names of scaling kinds; `known`: keys allowed besides
    those of the kind.
    """
    holders = {name: view[name] for name in ("rope_scaling", "rope_parameters") if view.get(name)}
    for name, rope in holders.items():
        if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
            raise keys.unsupported(name, rope, "one flat set of rotary parameters for all layers")

    def agreed(key: str, top: str, default: float) -> tuple[str, float]:
        said = {f"{name}.{key}": rope.get(key) for name, rope in holders.items()}
        said[top] = view.get(top)
        found = [(n, keys.number(n, said)) for n, value in said.items() if value is not None]
        if len({value for _, value in found}) > 1:
            both = " and ".join(f"{name} = {value}" for name, value in found)
            raise ValueError(f"{keys.source}: {both} contradict each other. Keep one of them.")
        return next(iter(found), (top, default))

    where, part = agreed("partial_rotary_factor", "partial_rotary_factor", share or 1.0)
    turning = int(head_size * part)
    is_partial = share or any(kind_of(rope) == "proportional" for rope in holders.values())
    if part != 1 and not is_partial:
        raise keys.unsupported(where, part, "1.0")
    if part > 1 or turning % 2 or not turning:
        raise keys.unsupported(where, part, f"at most 1, and pairs of the {head_size} of a head")
    scalings = [
        _scaling(keys, name, rope, turning, called, known) for name, rope in holders.items()
    ]
    if any(one != scalings[0] for one in scalings):
        said = " and ".join(f"{name} = {shown(rope)}" for name, rope in holders.items())
        raise ValueError(f"{keys.source}: {said} contradict each other. Keep one of them.")
    scaling, amplitude, proportional = scalings[0] if scalings else (None, 1.0, False)
    return Rotary(
        agreed("rope_theta", theta_key, theta)[1],
        scaling,
        share=turning / head_size,
        proportional=proportional,
        amplitude=amplitude,
    )


def _scaling(
    keys: Keys, name: str, rope: dict[str, Any], turning: int, called: Mapping, known: tuple
) -> tuple[Any, float, bool]:
    """Scaling or None, factor of cosine and sine, and whether the scaling is proportional."""
    kind = kind_of(rope)
    kind = called.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _KEYS:
        raise keys.unsupported(f"{name}.rope_type", kind, ", ".join(sorted(_KEYS)))
    for key, value in rope.items():
        if key not in _ALWAYS | _KEYS[kind] | set(known) and value is not None:
            raise ValueError(
                f"{keys.source}: {name}.{key} = {shown(value)} is not known for rope_type = "
                f"'{kind}', and it may change what the model computes. Remove it if it does not."
            )

    def number(key: str, default: float | None = None) -> float:
        if default is not None and rope.get(key) is None:
            return default
        return keys.number(key, rope, f"{name}.{key}")

    if kind == "default":
        return None, 1.0, False
    if kind in ("linear", "proportional"):
        factor = number("factor", 1.0 if kind == "proportional" else None)
        return None if factor == 1 else LinearScaling(factor), 1.0, kind == "proportional"
    most = keys.size("max_position_embeddings")
    if keys.find(_ORIGINAL) is None:
        original = int(keys.number(_ORIGINAL, {_ORIGINAL: most} | rope))
    else:  # overrides the one in the set, as in transformers
        original = keys.size(_ORIGINAL)
    if kind == "llama3":
        factor, low, high = map(number, ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ValueError(
                f"{keys.source}: {name}.low_freq_factor = {low} must be below "
                f"{name}.high_freq_factor = {high}."
            )
        return RopeScaling(factor, low, high, original), 1.0, False
    factor = number("factor", most / original)
    if kind == "longrope":
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        lists = [_divisors(keys, name, rope, key, turning // 2) for key in ("short", "long")]
        return LongScaling(*lists, original), number("attention_factor", grown), False
    # Some files have a multiplier of the paper's factor, such as DeepSeek-R1-0528-Qwen3-8B's.
    amplitude = number("attention_factor", _of_yarn(rope, factor, number)) * number(
        "attn_factor", 1.0
    )
    if type(rope.get("truncate", True)) is not bool:
        raise keys.unsupported(f"{name}.truncate", rope["truncate"], "true or false")
    betas = number("beta_fast", 32.0), number("beta_slow", 1.0)
    return YarnScaling(factor, original, *betas, rope.get("truncate", True)), amplitude, False


def _of_yarn(rope: dict[str, Any], factor: float, number: Any) -> float:
    """YaRN's factor of cosine and sine (equation 22), if the file does not give it."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(number("mscale")) / grown(number("mscale_all_dim"))
    return grown(1.0)


def _divisors(
    keys: Keys, name: str, rope: dict[str, Any], key: str, pairs: int
) -> tuple[float, ...]:
    values = rope.get(f"{key}_factor")
    if not isinstance(values, list) or len(values) != pairs:
        raise keys.unsupported(f"{name}.{key}_factor", values, f"a list of {pairs} numbers")
    return tuple(keys.number("i", {"i": value}, f"{name}.{key}_factor") for value in values)
