"""Between Hugging Face's config.json and the one decoder's `ModelConfig`.

Llama, Qwen2, Qwen3 and Mistral differ in a few settings; this file knows which, and `names.py`
knows their tensors. A value that `transformer.py` would not compute exactly is refused, never
approximated: a wrong rotary scaling trains without an error and ends in a worse model. An absent
key has the value that transformers gives it in this family.
"""

from __future__ import annotations

from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.models.families.keys import Keys
from grpo_jax.structs import Layer, ModelConfig, RopeScaling, Rotary

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")

# What transformers takes for a key that a file of this family leaves out.
_ABSENT = {
    "llama": {"head_dim": None, "num_key_value_heads": None},
    "qwen2": {"head_dim": None, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "mistral": {"head_dim": None, "sliding_window": 4096},
}


def model_config(hf: dict[str, Any], source: str) -> ModelConfig:
    """The decoder that a config.json describes; `source` names the file in messages.

    Reads the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
    Raises ValueError, naming the file, the key and the value, for a key that is missing, sizes that
    fit no model, and anything that the decoder does not compute.
    """
    keys = Keys(hf, source)
    family = keys.get("model_type")
    if family not in FAMILIES:
        raise keys.unsupported("model_type", family, f"one of {', '.join(FAMILIES)}")
    keys.absent = _ABSENT[family]
    _refuse_quantized(keys)
    for key, only in {
        "hidden_act": "silu",
        "mlp_bias": False,
        "use_mrope": False,
        "partial_rotary_factor": 1.0,
    }.items():
        if hf.get(key, only) != only and hf[key] is not None:
            raise keys.unsupported(key, hf[key], f"{only!r}")

    width, num_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    num_layers = keys.size("num_hidden_layers")
    num_kv_heads = keys.size("num_key_value_heads", null=num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{source}: num_attention_heads = {num_heads} must be a multiple of "
            f"num_key_value_heads = {num_kv_heads}."
        )
    head_size = keys.size("head_dim", null=0)
    if not head_size:
        head_size, rest = divmod(width, num_heads)
        if rest:
            raise ValueError(
                f"{source}: hidden_size = {width} must be a multiple of num_attention_heads = "
                f"{num_heads} where head_dim is not given."
            )
    if head_size % 2:
        raise ValueError(
            f"{source}: the head size is {head_size}; rotary embeddings turn pairs of its "
            "dimensions, so it must be even."
        )
    max_position = keys.size("max_position_embeddings")
    rotary = _rope(keys, max_position)
    attention_bias = family in ("llama", "qwen3") and keys.flag("attention_bias")
    return ModelConfig(
        family=family,
        vocab_size=keys.size("vocab_size"),
        width=width,
        mlp_width=keys.size("intermediate_size"),
        layers=_layers(keys, family, num_layers),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        rotaries=(rotary,),
        norm_eps=keys.number("rms_norm_eps", hf),
        max_position=max_position,
        tied_head=keys.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        qk_norm=family == "qwen3",
    )


def hf_config(
    config: ModelConfig,
    *,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int | None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The config.json of a model of our own, in the spelling that every transformers reads.

    Raises ValueError when the model has a part that its family has not, or a scaling of rotary
    frequencies or sliding windows, which new models do without.
    """
    hf = {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
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
    if model_config(hf, "config.json") != config:
        raise ValueError(
            f"{config} cannot be written as a config.json of {config.family}: its biases and norms "
            "of heads must be those of the family, its rotary frequencies plain, and no layer may "
            "have a window."
        )
    return hf


def _refuse_quantized(keys: Keys) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if (said := keys.hf.get(key)) is None:
            continue
        method = said.get("quant_method") if isinstance(said, dict) else None
        raise ValueError(
            f"{keys.source}: {key} = {shown(said)}: the weights are quantized"
            f"{f' by {shown(method)}' if method else ''}, and training starts from whole ones. "
            "Give the model that they were made from, such as the id without its -bnb-4bit, -AWQ, "
            "-GPTQ-Int4 or -FP8."
        )


def in_every_spelling(hf: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its rotary settings where transformers 4 looks too, not only version 5.

    Version 4 passes over `rope_parameters` without a word, and takes a base of 10,000.
    """
    rope = hf.get("rope_parameters")
    if not isinstance(rope, dict):
        return hf
    hf = dict(hf)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if hf.get("rope_theta") is None and rope.get("rope_theta") is not None:
        hf["rope_theta"] = rope["rope_theta"]
    if not hf.get("rope_scaling"):
        hf["rope_scaling"] = None if _rope_kind(rope) == "default" else scaling
    return hf


def _rope(keys: Keys, max_position: int) -> Rotary:
    """The base of the rotary frequencies and their Llama-3 scaling, if any.

    Both may stand in several places; what counts is that they mean the same.
    """
    hf = keys.hf
    holders = {name: hf[name] for name in ("rope_scaling", "rope_parameters") if hf.get(name)}
    scalings = [_scaling(keys, name, rope, max_position) for name, rope in holders.items()]
    if len(set(scalings)) > 1:
        said = " and ".join(f"{name} = {shown(rope)}" for name, rope in holders.items())
        raise ValueError(f"{keys.source}: {said} contradict each other. Keep one of them.")
    places = [(f"{name}.rope_theta", rope) for name, rope in holders.items()]
    thetas = {
        key: keys.number("rope_theta", holder, key)
        for key, holder in [*places, ("rope_theta", hf)]
        if holder.get("rope_theta") is not None
    }
    if len(set(thetas.values())) > 1:
        said = " and ".join(f"{key} = {theta}" for key, theta in thetas.items())
        raise ValueError(f"{keys.source}: {said} contradict each other. Keep one of them.")
    theta = next(iter(thetas.values()), 10_000.0)  # the Llama of 2023 does not write it
    return Rotary(theta, next(iter(scalings), None))


def _rope_kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(keys: Keys, name: str, rope: Any, max_position: int) -> RopeScaling | None:
    """What the set of rotary parameters called `name` says of scaling; None: there is none."""
    hf = keys.hf
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise keys.unsupported(name, rope, "one flat set of rotary parameters for all layers")
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        key = f"{name}.partial_rotary_factor"
        raise keys.unsupported(key, rope["partial_rotary_factor"], "1.0")
    kind = _rope_kind(rope)
    if kind == "default":
        return None
    if kind != "llama3":
        raise keys.unsupported(f"{name}.rope_type", kind, "default, llama3")
    values = {
        key: keys.number(key, rope, f"{name}.{key}")
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    }
    if values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError(
            f"{keys.source}: {name}.low_freq_factor = {values['low_freq_factor']} must be below "
            f"{name}.high_freq_factor = {values['high_freq_factor']}."
        )
    original = "original_max_position_embeddings"  # beside the dict it wins, as in transformers
    holder = hf if original in hf else {original: max_position} | rope
    position = keys.number(original, holder)
    return RopeScaling(original_max_position=int(position), **values)


def _layers(keys: Keys, family: str, num_layers: int) -> tuple[Layer, ...]:
    """The layers, which differ in how far they look back."""
    first, window = 0, None  # layers from `first` on have the window
    if family == "mistral" and keys.get("sliding_window") is not None:
        window = keys.size("sliding_window")
    if family.startswith("qwen") and keys.flag("use_sliding_window"):
        if keys.get("sliding_window") is not None:
            window = keys.size("sliding_window")
        first = keys.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise ValueError(
                f"{keys.source}: max_window_layers = {shown(first)} must be a whole number, "
                "0 or more."
            )
    sliding = [window is not None and i >= first for i in range(num_layers)]

    types = keys.hf.get("layer_types")
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or not all(isinstance(t, str) and t in known for t in types):
            raise keys.unsupported("layer_types", types, f"a list of {', '.join(known)}")
        if len(types) != num_layers:
            raise ValueError(
                f"{keys.source}: layer_types has {len(types)} entries for num_hidden_layers = "
                f"{num_layers}."
            )
        listed = [known[t] for t in types]
        if family.startswith("qwen") and window is not None:
            sliding = listed
        elif listed != sliding:
            raise keys.unsupported(
                "layer_types",
                types,
                f"for {family} with a sliding window of {window}, "
                f"{'sliding' if any(sliding) else 'full'}_attention for every layer",
            )
    return tuple(Layer(window=window if slides else None) for slides in sliding)
