"""Writes a model as a Hugging Face folder, shard by shard: no host ever holds a whole model.

Configs and tokenizer files are copies of those in the folder that the model was read from. They are
changed only if transformers before version 5 would read them differently from version 5, or fail.
"""

from __future__ import annotations

import collections
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from grpo_jax.models.hf import config_json
from grpo_jax.models.hf import tokenizer as tokenizer_lib
from grpo_jax.models.hf.folder import read_json
from grpo_jax.models.hf.tensor import Tensor
from grpo_jax.models.hf.weights import (
    INDEX,
    SET_ASIDE,
    is_leaf,
    leaves_of,
    set_aside,
    tensor_shapes,
)
from grpo_jax.structs import Array, ModelConfig, Params

MAX_SHARD_BYTES = 5 * 10**9

# Names of the files that a tokenizer may consist of, in transformers 4 and 5.
_TOKENIZER_FILES = (
    *("*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json"),  # of images
)


def save(
    folder: Path,
    params: Params,
    config: ModelConfig,
    *,
    source: Path | None,
    dtype: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes the model as a folder that transformers loads; an interrupted call leaves no folder.

    `source` is the folder the model came from, or one of `keep`, whose configs and tokenizer are
    kept; None: a new model with this tokenizer, which ends with its end-of-text token. `dtype`:
    float32, bfloat16 or float16. An older export at `folder` is replaced. Every process must call
    this; the first writes. Raises ValueError when `folder` holds something that is not a model.

    transformers reads a qwen2 folder's text as Qwen2 splits it, whatever tokenizer.json says; give
    a new model with a tokenizer of its own another family.
    """
    dtype = jnp.dtype(dtype)
    if folder.exists() and not (folder / "config.json").exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no model. Export to another folder.")
    if jax.process_index() == 0:
        with _replacing(folder) as partial:
            _save_tensors(partial, params, config, dtype, source)
            _save_configs(partial, config, source, dtype.name, tokenizer)
    else:
        _save_tensors(None, params, config, dtype, source)
    multihost_utils.sync_global_devices("export")  # it is there for all who go on


def keep(
    folder: Path,
    config: ModelConfig,
    source: Path,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Copies the files of `source` that an export needs, besides weights, to `folder`.

    `save` takes `folder` as its source, so a run can end after its model's folder is gone. `dtype`:
    of the source's weights.
    """
    with _replacing(folder) as partial:
        _save_configs(partial, config, source, dtype, tokenizer)
        if kept := {name: t.slices[:] for name, t in set_aside(source, config).items()}:
            safetensors.numpy.save_file(kept, partial / SET_ASIDE)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that replaces `folder` when all is written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # from an interrupted export
    partial.mkdir(parents=True)
    yield partial
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# --- Weights ------------------------------------------------------------------------------------


def _save_tensors(
    folder: Path | None, params: Params, config: ModelConfig, dtype: Any, source: Path | None
) -> None:
    """Writes the weights shard by shard; without a folder, only takes part in gathering them.

    Tensors of the source outside of the decoder, such as the vision tower's, are copied unchanged.
    """
    leaves = leaves_of(config)
    shapes, parts = tensor_shapes(leaves), collections.defaultdict(list)
    flat = jax.tree.leaves(leaves, is_leaf=is_leaf)
    for leaf, array in zip(flat, jax.tree.leaves(params), strict=True):
        for i, tensor in enumerate(leaf.tensors):
            parts[tensor.name].append((tensor, array, i if leaf.stacked else None))
    sizes = {name: math.prod(shapes[name]) * dtype.itemsize for name in parts}
    others = set_aside(source, config) if source is not None else {}
    for name, tensor in others.items():
        sizes[name] = math.prod(tensor.shape) * 4  # at most
    shards = list(_shards(sizes))
    placed = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            if name in others:
                value = others[name].slices[:]
            else:  # every process takes part
                value = _assembled(shapes[name], parts[name], dtype)
            if folder is not None:
                tensors[name] = value
        placed |= dict.fromkeys(names, file)
        if folder is not None:
            (folder / file).touch()
            mode = (folder / file).stat().st_mode  # the user's default for new files
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(mode)  # the library makes the file readable by its owner only
    if folder is not None and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Tensor names in groups of at most MAX_SHARD_BYTES; a larger tensor has its own."""
    shard, total = [], 0
    for name, size in sizes.items():
        if shard and total + size > MAX_SHARD_BYTES:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += size
    yield shard


def _assembled(
    shape: tuple[int, ...], parts: list[tuple[Tensor, Array, int | None]], dtype: Any
) -> np.ndarray:
    """One tensor in the checkpoint's form, whole on every process.

    `parts`: the parameters in it, and their layer.
    """
    whole = np.empty(shape, dtype)
    for tensor, array, layer in parts:
        value = (array if layer is None else _of_layer(array, layer)).astype(dtype)
        if jax.process_count() > 1:
            value = multihost_utils.process_allgather(value, tiled=True)
        tensor.write(np.asarray(value), whole)
    return whole


def _of_layer(array: Array, layer: int) -> Array:
    """One layer of a stack; on a CPU without a copy and without a program for each shape."""
    on_cpu = all(device.platform == "cpu" for device in array.sharding.device_set)
    return (np.asarray(array) if on_cpu and array.is_fully_addressable else array)[layer]


# --- Configs and tokenizer ----------------------------------------------------------------------


def _save_configs(
    folder: Path,
    config: ModelConfig,
    source: Path | None,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes everything but the weights."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if source is None:
        eos_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        hf = config_json.hf_config(
            config,
            bos_id=tokenizer.bos_token_id,
            eos_ids=eos_ids,
            pad_id=tokenizer_lib.pad_id({}, tokenizer)
            if config.head == "scalar"
            else tokenizer.pad_token_id,
            dtype=dtype,
        )
        tokenizer.save_pretrained(folder)
    else:
        hf = config_json.in_every_spelling(read_json(source / "config.json"))
        hf.pop("auto_map", None)  # the source's own code, which is neither read nor exported
        hf.pop("quantization_config", None)  # an export has no codes
        ids |= {key: hf[key] for key in ids if hf.get(key) is not None}
        hf |= {"dtype": dtype, "torch_dtype": dtype}  # version 5's name, and the name before 4.56
        hf = config_json.with_head(hf, config, tokenizer_lib.pad_id(hf, tokenizer))
        _copy_tokenizer(source, folder)
    _write_json(folder / "config.json", hf)
    generation = {key: value for key, value in ids.items() if value is not None}
    if source is not None and (source / "generation_config.json").exists():
        generation = read_json(source / "generation_config.json")
    _write_json(folder / "generation_config.json", generation)
    _make_portable(folder)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)  # without permissions: a cache's may be read-only


# Notes of transformers 5 on itself and on the machine that loaded the tokenizer; and code.
_NOT_HANDED_ON = ("is_local", "local_files_only", "backend", "auto_map")


def _make_portable(folder: Path) -> None:
    """Changes the folder's tokenizer_config.json so that transformers 4 can read it.

    Version 4 fails on a class and a list of tokens that version 5 writes, and needs the list of
    added tokens that version 5 leaves out. Programs that read only this file look for the chat
    template in it.
    """
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return
    before = read_json(file)
    after = {key: value for key, value in before.items() if key not in _NOT_HANDED_ON}
    extra, template = after.get("extra_special_tokens"), folder / "chat_template.jinja"
    if after.get("tokenizer_class") == "TokenizersBackend":
        after["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra, list):
        del after["extra_special_tokens"]
        after["additional_special_tokens"] = extra
    if (folder / "tokenizer.json").exists() and "added_tokens_decoder" not in after:
        if before.keys() & {"backend", "is_local"} or isinstance(extra, list):
            after["added_tokens_decoder"] = _added_tokens(folder / "tokenizer.json")
    if template.exists() and not after.get("chat_template"):
        after["chat_template"] = template.read_text(encoding="utf-8")
    if after != before:
        _write_json(file, after)


def _added_tokens(file: Path) -> dict[str, dict[str, Any]]:
    """The added tokens by id, in the form of tokenizer_config.json."""
    return {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in read_json(file).get("added_tokens", [])
    }
