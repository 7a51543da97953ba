"""Hugging Face folders: finding a model's folder, recognizing it, and reading its config.json.

Files of strangers are treated as data: only plain files of bounded size are read, and no code is
run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub

from grpo_jax.hosts.paths import expanded, near
from grpo_jax.messages.values import shown
from grpo_jax.models.families import model_config
from grpo_jax.structs import ModelConfig

# Hundreds of times the size in the largest models.
_MAX_JSON_BYTES = 2**28


# --- Where a model lies -------------------------------------------------------------------------


# No pickles, and no second copy of the weights, which some repositories have.
_ALLOWED = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_IGNORED = ["consolidated*", "original/*", "*/*"]


def as_given(path: str, option: str = "model.path") -> str:
    """A path for messages; `option` is the option that gave it."""
    return f"{option}{' ' if option.startswith('--') else ' = '}{shown(path)}"


def resolve(path: str, option: str = "model.path") -> Path:
    """The folder of a model: a local one, or a hub id ("Qwen/Qwen2.5-0.5B") downloaded or cached.

    `option` is the option that gave the path. Raises ValueError if there is no such folder and the
    hub does not provide it.
    """
    given = as_given(path, option)
    try:
        folder = expanded(path, option)
        is_folder, is_file = bool(path) and folder.is_dir(), folder.is_file()
        if path:
            _refuse_run(given, path, folder)
    except OSError as error:  # from a forbidden folder or an endless name
        raise ValueError(f"{given} cannot be looked up: {error.strerror}.") from error
    if is_folder:
        return folder
    if is_file:
        kind = "GGUF weights, made for llama.cpp" if folder.suffix == ".gguf" else "a file"
        remedy = _ORIGINAL if folder.suffix == ".gguf" else "Give the folder that holds it."
        raise ValueError(f"{given} is {kind}. {remedy}")
    missing = f"{given}: there is no such folder"
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    if not hub_id or ("/" in path and Path(folder.parts[0]).is_dir()):
        raise ValueError(
            f"{missing}, and it does not look like a hub id (owner/name).{near(folder)} "
            "Give a Hugging Face folder that exists, or a hub id."
        )
    try:
        found = huggingface_hub.snapshot_download(
            path, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED, etag_timeout=5
        )
    except Exception as error:  # from hub, HTTP library or disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{missing}, and the Hugging Face hub does not give a model of that name ({reason})."
            f"{near(folder)} Check the spelling and the connection; a private or gated model needs "
            "`hf auth login`."
        ) from error
    return Path(found)


def _refuse_run(given: str, path: str, folder: Path) -> None:
    """Raises ValueError for the folder of a run, and for RUN@STEP: neither is a model itself."""
    run, at, step = str(path).rpartition("@")
    is_run = lambda place: (place / "checkpoints").is_dir()  # noqa: E731
    if at and not folder.exists() and is_run(Path(run).expanduser()):
        raise ValueError(
            f"{given} names a checkpoint of a run. Write it as a folder, and give that: "
            f"grpo-jax export --workdir {run} --step {step} --out DIR."
        )
    if is_run(folder) and not (folder / "tokenizer_config.json").exists():
        export = folder / "export"
        has = (
            f"Its model is {export}"
            if export.is_dir()
            else (f"Write its model: grpo-jax export --workdir {path} --step best --out DIR")
        )
        raise ValueError(f"{given} is the folder of a run. {has}.")


def at_hand(path: str) -> Path | None:
    """The folder that `resolve` can find without the hub, or None."""
    folder = expanded(path, "model.path")
    if not path or folder.is_dir():
        return folder if path else None
    try:
        return Path(huggingface_hub.snapshot_download(path, local_files_only=True))
    except (ValueError, OSError):  # from the hub library: bad names, uncached files
        return None


# --- What a folder is ---------------------------------------------------------------------------


_ORIGINAL = (
    "Give the Hugging Face folder or hub id of the original weights, in safetensors, that it was "
    "made from."
)


# Folders of other programs: file names, what the folder is, and what to do.
_OTHERS = (
    (("*.gguf",), "It holds GGUF weights, made for llama.cpp", _ORIGINAL),
    (
        ("zero_to_fp32.py", "global_step*", "*_model_states.pt"),
        "It is a checkpoint of DeepSpeed",
        "Run its zero_to_fp32.py with --safe_serialization, and put config.json and the "
        "tokenizer's files beside the result.",
    ),
    (
        ("snapshots",),
        "It is a model's place in the hub's cache",
        "Give the hub id (owner/name), or the folder snapshots/HASH in it.",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp_*"),
        "It is a sharded checkpoint of PyTorch (FSDP)",
        "Merge it there, as `accelerate merge-weights` does, and save it with save_pretrained.",
    ),
    (
        ("latest_checkpointed_iteration.txt", "iter_*"),
        "It is a checkpoint of Megatron",
        "Convert it to a Hugging Face folder there.",
    ),
    (
        ("params.json", "consolidated.*"),
        "It holds a model in its maker's own form",
        "Give the Hugging Face folder or hub id of the same model.",
    ),
    (("*/config.json",), "But there are models in it", "Give the folder of one."),
    (("*",), "It holds other files", "Give the folder that has config.json and the weights."),
)


def _refuse_other(folder: Path, given: str) -> None:
    """Raises ValueError for a folder that looks like a model but is not a whole one."""
    config, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.exists():
        base = shown(read_json(adapter).get("base_model_name_or_path", "a model that it names not"))
        merge = f"Merge it into {base} (peft's merge_and_unload), and give the folder of the result"
        if not config.exists():
            raise ValueError(
                f"{given} is an adapter of {base} (adapter_config.json), not a whole model. "
                f"{merge}."
            )
        raise ValueError(
            f"{given} holds an adapter of {base} (adapter_config.json) beside the weights, which "
            f"would be read without it. {merge}; where it is merged into them already, take "
            "adapter_config.json away."
        )
    if config.exists():
        return
    for patterns, what, remedy in _OTHERS:
        found = sorted(str(f.relative_to(folder)) for name in patterns for f in folder.glob(name))
        if found:
            raise ValueError(
                f"{given} has no config.json, which a Hugging Face model has. {what} "
                f"({some(found)}). {remedy}"
            )
    raise ValueError(f"{given} is empty. Give the folder that has config.json and the weights.")


def read_config(folder: Path, given: str = "") -> ModelConfig:
    """The decoder that the folder's config.json describes.

    `given`: the folder as the user wrote it (`as_given`), if known. Raises ValueError if the folder
    is another program's or holds an adapter, and if the file is missing, broken, or not supported.
    """
    _refuse_other(folder, given or str(folder))
    file = folder / "config.json"
    settings = read_json(file)
    if "model_type" not in settings and "binding" in settings:
        raise ValueError(
            f"{given or folder} is the folder of a run. Give the model in it, {folder}/export."
        )
    return model_config(settings, str(file))


# --- Files --------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, if there is none."""
    if not file.exists():
        raise ValueError(f"{file}: there is no such file.")
    refuse_odd(file, _MAX_JSON_BYTES)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}, not a JSON object.")
    return value


def refuse_odd(file: Path, most_bytes: int | None = None) -> None:
    """Raises ValueError for a pipe or a device, which may have no end, and for too large a file."""
    if not file.is_file():
        raise ValueError(f"{file} is not a plain file.")
    size = file.stat().st_size
    if most_bytes is not None and size > most_bytes:
        raise ValueError(
            f"{file} has {size} bytes, and a file of its kind at most {most_bytes}. "
            "Download or export the model again."
        )


def some(items: list[str]) -> str:
    """The first four, and how many more there are."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more
