"""The keys of a config.json, read strictly: a key that nothing reads is refused, not ignored."""

from __future__ import annotations

import sys
from typing import Any

from grpo_jax.messages.values import shown

_REQUIRED = object()

# Far above any existing model; beyond it, the list of tensors alone would fill the memory.
_LARGEST = {"num_hidden_layers": 2_000, "max_position_embeddings": 2**31 - 1,
            "original_max_position_embeddings": 2**31 - 1}  # fmt: skip
_LARGEST_SIZE = 2**24

# Keys that any file may have and that change nothing here: notes of transformers and others, token
# ids, which are read elsewhere, settings of training and generation. Names that begin with "_" too.
HARMLESS = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version use_cache tokenizer_class
    attn_implementation cache_implementation initializer_range pretraining_tp model_max_length
    max_sequence_length use_flash_attn is_llama_config transformers.js_config num_labels
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    attention_dropout hidden_dropout residual_dropout resid_pdrop embd_pdrop hidden_dropout_prob
    attention_probs_dropout_prob
    id2label label2id problem_type finetuning_task task_specific_params prefix
    chunk_size_feed_forward output_attentions output_hidden_states return_dict torchscript
    use_bfloat16 tf_legacy_loss pruned_heads is_decoder is_encoder_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder unsloth_fixed unsloth_version
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)


class Keys:
    """The keys of one config.json, or of a part of it, with the file's name in every message."""

    def __init__(self, hf: dict[str, Any], source: str):
        self.hf, self.source = hf, source
        self._absent: dict[str, Any] = {}
        self._read: set[str] = set()

    def absent(self, **values: Any) -> None:
        """Sets transformers' defaults for keys that a file of this family leaves out."""
        self._absent |= values

    def harmless(self, *names: str) -> None:
        """Marks keys of this family that change nothing here."""
        self._read |= set(names)

    def refuse_unread(self) -> None:
        """Raises ValueError for keys that were not read, unless they are null or switched off."""
        for key, value in self.hf.items():
            if (
                key in self._read | HARMLESS
                or key.startswith("_")
                or value is None
                or value is False
            ):
                continue
            raise ValueError(
                f"{self.source}: the key {key} = {shown(value)} is not known, and it may change "
                "what the model computes. Remove it if it does not."
            )

    def unsupported(self, key: str, value: Any, supported: str) -> ValueError:
        return ValueError(
            f"{self.source}: {key} = {shown(value)} is not supported. Supported: {supported}."
        )

    def find(self, key: str) -> Any:
        """The value of a key, or the default of an absent one; None without a default."""
        self._read.add(key)
        return self.hf.get(key, self._absent.get(key))

    def get(self, key: str) -> Any:
        self._read.add(key)
        value = self.hf.get(key, self._absent.get(key, _REQUIRED))
        if value is _REQUIRED:
            raise ValueError(f"{self.source}: the key {key} is missing.")
        return value

    def only(self, **values: Any) -> None:
        """Raises ValueError for a key with any other value than the given one."""
        for key, only in values.items():
            if (value := self.find(key)) is not None and value != only:
                raise self.unsupported(key, value, repr(only))

    def size(self, key: str, null: int | None = None) -> int:
        """A whole number above 0; `null` replaces a null, if one is allowed."""
        value = self.get(key)
        if value is None and null is not None:
            return null
        if type(value) is not int or value <= 0:
            raise ValueError(
                f"{self.source}: {key} = {shown(value)} must be a whole number above 0."
            )
        largest = _LARGEST.get(key, _LARGEST_SIZE)
        if value > largest:
            raise ValueError(f"{self.source}: {key} = {shown(value)} must be at most {largest}.")
        return value

    def number(self, key: str, holder: dict[str, Any] | None = None, name: str = "") -> float:
        """A finite number above 0, from a part of the file; `name` in messages."""
        name = name or key
        if holder is None:
            value = self.get(key)
        elif key not in holder:
            raise ValueError(f"{self.source}: the key {name} is missing.")
        else:
            value = holder[key]
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{self.source}: {name} = {shown(value)} must be a number above 0.")
        return float(value)

    def maybe(self, key: str) -> float | None:
        """A number above 0, or None for a null."""
        return None if self.find(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """True or false; false if absent, unless this family has another default."""
        self._read.add(key)
        value = self.hf.get(key, self._absent.get(key, False))
        if type(value) is not bool:
            raise ValueError(f"{self.source}: {key} = {shown(value)} must be true or false.")
        return value
