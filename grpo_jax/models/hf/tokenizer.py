"""The tokenizer of a Hugging Face folder, and the tokens that end a completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from grpo_jax.messages.values import shown
from grpo_jax.models.hf import growth
from grpo_jax.models.hf.folder import read_json, refuse_odd

_MAX_BYTES = 2**30  # of a file; hundreds of times the largest
_READ = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; code in the folder is not run.

    Raises ValueError when there is none or it is broken.
    """
    kinds = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    # For a known model_type without files, transformers may make an empty tokenizer.
    if not any((folder / name).exists() for name in kinds):
        raise ValueError(f"{folder} has no tokenizer: none of {', '.join(kinds)}.")
    for pattern in _READ:
        for file in folder.glob(pattern):
            refuse_odd(file, _MAX_BYTES)
    _refuse_paths(folder)
    growth.refuse(folder)
    try:
        if known := _tokenizer_class(folder):
            found = known.from_pretrained(folder, local_files_only=True)
        else:
            from transformers import AutoTokenizer  # and PyTorch, if installed

            found = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        found(["a b"], verbose=False)  # settings are checked only when used
        found.decode([0], skip_special_tokens=True)
        return found
    except BaseException as error:
        # For a broken file the tokenizers library raises bare Exception, or a Rust panic, which is
        # not even an Exception.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{folder}: the tokenizer cannot be loaded ({reason}).") from error


def _refuse_paths(folder: Path) -> None:
    """Raises ValueError if a tokenizer's settings name files outside of its folder.

    transformers itself ignores tokenizer_config.json for all other files.
    """
    file = folder / "tokenizer_config.json"
    names = read_json(file).get("fast_tokenizer_files") if file.exists() else None
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{file}: fast_tokenizer_files must be names of files in the folder, and "
                f"{str(name)[:80]!r} is not one. Remove the key: tokenizer.json is read without it."
            )


def _tokenizer_class(folder: Path) -> type[PreTrainedTokenizerBase] | None:
    """The class of the folder's tokenizer; None: `AutoTokenizer` chooses."""
    file = folder / "tokenizer_config.json"
    if not file.exists() or not (folder / "tokenizer.json").exists():
        return None
    settings = read_json(file)
    if "auto_map" in settings:
        return None
    # This class does only what tokenizer.json says. For qwen2, AutoTokenizer replaces any
    # pre-tokenizer there by Qwen2's own, and words then encode to nothing.
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")  # transformers 4 and 5
    if settings.get("tokenizer_class") in generic:
        return PreTrainedTokenizerFast
    config = folder / "config.json"
    if settings.get("tokenizer_class") != "Qwen2Tokenizer" or not config.exists():
        return None
    return Qwen2Tokenizer if read_json(config).get("model_type") in ("qwen2", "qwen3") else None


def pad_id(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The pad token: of config.json (`settings`), else of the tokenizer, else its end of text.

    The last is what TRL takes where a reward model has none.
    """
    named = settings.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id
    return next((i for i in named if type(i) is int), None)


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """All token ids that end a completion, ascending.

    They are those of generation_config.json, else of config.json, and the tokenizer's end of text.
    Raises ValueError if there is none, if a file has something else than token ids, or if an id is
    outside the model's vocabulary.
    """
    ids = {}  # and who says so
    if tokenizer.eos_token_id is not None:
        ids[tokenizer.eos_token_id] = f"{folder}: the tokenizer's eos_token {tokenizer.eos_token!r}"
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        value = read_json(file).get("eos_token_id") if file.exists() else None
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in listed):
            raise ValueError(
                f"{file}: eos_token_id = {shown(value)} must be a token id or a list of them."
            )
        ids |= dict.fromkeys(listed, f"{file}: eos_token_id = {shown(value)}")
        break
    if not ids:
        raise ValueError(
            f"{folder} names no token that ends a completion. Set eos_token_id in "
            "generation_config.json, or eos_token in tokenizer_config.json."
        )
    largest = max(ids)
    if largest >= vocab_size:
        raise ValueError(
            f"{ids[largest]}: the id {shown(largest)} is past the model's vocab_size = "
            f"{vocab_size}, so it can never end a completion. Give ids below that."
        )
    return tuple(sorted(ids))
