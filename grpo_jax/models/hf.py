"""Hugging Face folders in and out: config.json, safetensors, tokenizer.

Every process reads only the slices of each tensor that its own devices hold, and writes one shard
at a time, so no host ever holds a whole model. No code from a checkpoint is run, and pickles are
not read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from grpo_jax import sharding
from grpo_jax.models import families, transformer
from grpo_jax.paths import expanded
from grpo_jax.structs import Array, ModelConfig, Params

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

# safetensors' names of the dtypes that checkpoints of weights come in.
_DTYPES = ("F32", "F16", "BF16")

# Hundreds of times what the largest models have.
_MAX_JSON_BYTES = 2**28
_MAX_TOKENIZER_BYTES = 2**30

# --- Where a model lies -------------------------------------------------------------------------

# No pickles; and not the second copy of the weights that some repositories hold.
_ALLOWED = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_IGNORED = ["consolidated*", "original/*", "*/*"]


def resolve(path: str) -> Path:
    """The folder of a model: a local one, or a hub id ("Qwen/Qwen2.5-0.5B") downloaded or cached.

    Raises ValueError when there is no such folder, or the hub does not give it.
    """
    folder = expanded(path, "model.path")
    if path and folder.is_dir():
        return folder
    missing = f"model.path = {path!r}: there is no such folder"
    if folder.is_file():
        raise ValueError(f"model.path = {path!r} is a file. Give the folder that holds it.")
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)
    if not hub_id or ("/" in path and Path(folder.parts[0]).is_dir()):
        raise ValueError(
            f"{missing}, and it does not look like a hub id (owner/name). "
            "Give a Hugging Face folder that exists, or a hub id."
        )
    try:
        found = huggingface_hub.snapshot_download(
            path, allow_patterns=_ALLOWED, ignore_patterns=_IGNORED, etag_timeout=5
        )
    except (
        Exception
    ) as error:  # the hub's errors, its HTTP library's and the disk's: no common base
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{missing}, and the Hugging Face hub does not give a model of that name ({reason}). "
            "Check the spelling and the connection; a private or gated model needs `hf auth login`."
        ) from error
    return Path(found)


def at_hand(path: str) -> Path | None:
    """The folder of a model that `resolve` would give without the hub; None where it cannot."""
    folder = Path(path).expanduser()
    if not path or folder.is_dir():
        return folder if path else None
    try:
        return Path(huggingface_hub.snapshot_download(path, local_files_only=True))
    except (ValueError, OSError):  # the hub library's errors of names and of what is not cached
        return None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise ValueError(f"{file}: there is no such file.")
    _refuse_odd(file, _MAX_JSON_BYTES)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}, not a JSON object.")
    return value


def _refuse_odd(file: Path, most_bytes: int) -> None:
    """Raises ValueError for a pipe or a device, which may have no end, and for too large a file."""
    if not file.is_file():
        raise ValueError(f"{file} is not a plain file.")
    size = file.stat().st_size
    if size > most_bytes:
        raise ValueError(
            f"{file} has {size} bytes, and a file of its kind at most {most_bytes}. "
            "Download or export the model again."
        )


def read_config(folder: Path) -> ModelConfig:
    """The decoder that the folder's config.json describes.

    Raises ValueError when the file is missing or broken, or tells of something not supported.
    """
    file = folder / "config.json"
    return families.model_config(_read_json(file), str(file))


# --- Names --------------------------------------------------------------------------------------

_OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention/{p}": f"self_attn.{p}_proj" for p in "qkvo"},
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    **{f"mlp/{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class _Leaf(NamedTuple):
    """One array of the parameters and the tensors of a checkpoint that it consists of."""

    names: tuple[str, ...]  # one per layer where `stacked`, else a single one
    stacked: bool  # along a leading axis of layers
    transposed: bool  # kernels are [out, in] in a checkpoint, [in, out] here
    shape: tuple[int, ...]  # of each tensor in the checkpoint


def _leaves(config: ModelConfig) -> Any:
    """A `_Leaf` for every parameter, as a pytree like the parameters."""

    def leaf(path, array) -> _Leaf:
        *module, kind = (part.key for part in path)
        stacked, transposed = module[0] == "layers", kind == "kernel"
        suffix = "bias" if kind == "bias" else "weight"
        if stacked:
            name = f"{_IN_LAYER['/'.join(module[1:])]}.{suffix}"
            names = tuple(f"model.layers.{i}.{name}" for i in range(config.num_layers))
        else:
            names = (f"{_OUTER[module[0]]}.{suffix}",)
        shape = array.shape[1:] if stacked else array.shape
        return _Leaf(names, stacked, transposed, shape[::-1] if transposed else shape)

    return jax.tree_util.tree_map_with_path(leaf, transformer.param_shapes(config))


def _is_leaf(x: Any) -> bool:
    return isinstance(x, _Leaf)


# --- Reading ------------------------------------------------------------------------------------


def load_params(folder: Path, config: ModelConfig, mesh: Mesh, dtype=jnp.float32) -> Params:
    """The checkpoint's parameters as `dtype`, laid out over the mesh (see `transformer.py`).

    Each device's slices are read tensor by tensor. Raises ValueError before any is read when a
    tensor is missing, unused, repeated or of another shape, or a file is broken.
    """
    leaves = _leaves(config)
    tensors = _open(folder)
    _check(folder, tensors, leaves, config)
    shapes = transformer.param_shapes(config)
    shardings = sharding.tree_shardings(mesh, transformer.logical_axes(config), shapes)

    def load(leaf: _Leaf, shape: jax.ShapeDtypeStruct, placed: jax.sharding.Sharding) -> Array:
        return _filled(shape.shape, placed, _reader(leaf, shape.shape, tensors, dtype))

    return jax.tree.map(load, leaves, shapes, shardings, is_leaf=_is_leaf)


def _filled(shape: tuple[int, ...], placed: jax.sharding.Sharding, read: Callable) -> Array:
    """The array of which `read(index)` gives parts; the host holds one part at a time.

    A part that several devices hold is read once.
    """
    parts, held = [], None
    indices = placed.addressable_devices_indices_map(shape)
    for device, index in sorted(indices.items(), key=lambda item: str(item[1])):
        if index != held:
            part, held = read(index), index
        parts.append(jax.block_until_ready(jax.device_put(part, device)))
    return jax.make_array_from_single_device_arrays(shape, placed, parts)


class _Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    slices: Any  # safetensors' slice object: indexing reads
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


def _reader(
    leaf: _Leaf, shape: tuple[int, ...], tensors: dict[str, _Tensor], dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """What reads a part of one parameter."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        layers = range(*bounds[0]) if leaf.stacked else (0,)
        within = [slice(*b) for b in (bounds[1:] if leaf.stacked else bounds)]
        within = tuple(within[::-1] if leaf.transposed else within)
        part = np.empty([stop - start for start, stop in bounds], dtype)
        for row, layer in enumerate(layers):
            value = tensors[leaf.names[layer]].slices[within]
            value = value.T if leaf.transposed else value
            part[row if leaf.stacked else ...] = value
        return part

    return read


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, and all that would compete with them."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(
            isinstance(name, str)
            and Path(name).name == name
            and name.isprintable()  # half of a character, or NUL, is no name of a file
            and len(name.encode()) < 256
            for name in placed.values()
        ):
            raise ValueError(f"{index}: weight_map must give a file of the folder for each tensor.")
        names = sorted(set(placed.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{index} names {_some(absent)}, which {folder} does not hold. "
                "Download or export the model again."
            )
        files = [folder / name for name in names]
        return files if single in files or not single.exists() else [single, *files]
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    if single.is_file():
        files.insert(0, single)
    if not files:
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
        only = f" It has {_some(pickles)}, but pickles can run code and are not read." * bool(
            pickles
        )
        raise ValueError(
            f"{folder} has no weights: no model.safetensors, no model-*-of-*.safetensors.{only} "
            "Save the model with transformers' save_pretrained, which writes safetensors."
        )
    return files


def _open(folder: Path) -> dict[str, _Tensor]:
    """The tensors of all weight files by name; only headers are read."""
    tensors: dict[str, _Tensor] = {}
    repeated = []
    for file in _weight_files(folder):
        try:
            opened = safetensors.safe_open(file, framework="numpy")
            for name in opened.keys():
                if name in tensors:
                    repeated.append(f"{name} ({tensors[name].file.name} and {file.name})")
                s = opened.get_slice(name)
                tensors[name] = _Tensor(file, s, tuple(s.get_shape()), s.get_dtype())
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}). "
                "It may be cut off: download or export the model again."
            ) from error
    if repeated:
        raise ValueError(
            f"{folder}: {_count(repeated, 'tensor')} in more than one file: {_some(repeated)}. "
            "Keep the files of one model in the folder."
        )
    return tensors


def _check(folder: Path, tensors: dict[str, _Tensor], leaves: Any, config: ModelConfig) -> None:
    """Raises ValueError unless the files hold what the config needs and nothing else."""
    needed = {
        name: leaf.shape
        for leaf in jax.tree.leaves(leaves, is_leaf=_is_leaf)
        for name in leaf.names
    }
    allowed = {_HEAD} if config.tied_head else set()
    unused = [
        f"{name} {list(t.shape)} ({t.file.name})"
        for name, t in tensors.items()
        # Old exports keep the rotary frequencies, which follow from the config.
        if name not in needed.keys() | allowed and not name.endswith("rotary_emb.inv_freq")
    ]
    missing = [f"{name} {list(shape)}" for name, shape in needed.items() if name not in tensors]
    found = {name: tensors[name] for name in needed if name in tensors}
    misshaped = [
        f"{name} is {list(t.shape)}, needed {list(needed[name])} ({t.file.name})"
        for name, t in found.items()
        if t.shape != needed[name]
    ]
    other_dtype = [
        f"{name} is {t.dtype} ({t.file.name})"
        for name, t in found.items()
        if t.dtype not in _DTYPES
    ]
    wrong = {
        "missing": missing,
        "not used by the model": unused,
        "of another shape": misshaped,
        f"of a dtype that is not {', '.join(_DTYPES)}": other_dtype,
    }
    said = [
        f"{_count(names, 'tensor')} {what}: {_some(names)}"
        for what, names in wrong.items()
        if names
    ]
    if said:
        raise ValueError(
            f"{folder}: the weights do not fit config.json ({config.family}). {'; '.join(said)}."
        )
    if config.tied_head and _HEAD in tensors:
        _check_tied_head(folder, tensors[_HEAD], tensors[_EMBEDDING])


_COMPARED_ROWS = 4096  # at once: a whole embedding may be gigabytes


def _check_tied_head(folder: Path, head: _Tensor, embedding: _Tensor) -> None:
    """Raises ValueError when a head stored beside a tied embedding is not its copy, bit for bit."""
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    num_rows = head.shape[0]
    parts = [
        slice(i, min(i + _COMPARED_ROWS, num_rows)) for i in range(0, num_rows, _COMPARED_ROWS)
    ]
    same = same and all(
        head.slices[part].tobytes() == embedding.slices[part].tobytes() for part in parts
    )
    if not same:
        raise ValueError(
            f"{folder}: tie_word_embeddings is true in config.json, but {_HEAD} {list(head.shape)} "
            f"{head.dtype} ({head.file.name}) differs from {_EMBEDDING} {list(embedding.shape)} "
            f"{embedding.dtype}. Set tie_word_embeddings to false to use the head, or remove it."
        )


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


# --- Writing ------------------------------------------------------------------------------------


def save(
    folder: Path,
    params: Params,
    config: ModelConfig,
    *,
    source: Path | None,
    dtype: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Writes the model as a folder that transformers loads; an interrupted call leaves none.

    `source` is the folder the model came from, whose configs are kept; None: a new model, which
    ends with the tokenizer's end-of-text token. `dtype`: float32, bfloat16 or float16. An older
    export at `folder` is replaced. Every process must call this; the first writes. Raises
    ValueError when `folder` holds something that is not a model.

    transformers reads a qwen2 folder's text as Qwen2 splits it, whatever tokenizer.json says; give
    a new model with a tokenizer of its own another family.
    """
    dtype = jnp.dtype(dtype)
    writes = jax.process_index() == 0
    if folder.exists() and not (folder / "config.json").exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no model. Export to another folder.")
    partial = folder.with_name(f".{folder.name}.partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was interrupted
        partial.mkdir(parents=True)
    _save_tensors(partial if writes else None, params, config, dtype)
    if writes:
        _save_configs(partial, config, source, dtype.name, tokenizer)
        tokenizer.save_pretrained(partial)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    multihost_utils.sync_global_devices("export")  # it is there for all who go on


def _save_tensors(folder: Path | None, params: Params, config: ModelConfig, dtype: Any) -> None:
    """Writes the weights shard by shard; with None, only takes part in gathering them."""
    leaves = jax.tree.leaves(_leaves(config), is_leaf=_is_leaf)
    sources = {
        name: (leaf, i, array)
        for leaf, array in zip(leaves, jax.tree.leaves(params), strict=True)
        for i, name in enumerate(leaf.names)
    }
    sizes = {
        name: int(np.prod(leaf.shape)) * dtype.itemsize for name, (leaf, _, _) in sources.items()
    }
    shards = list(_shards(sizes))
    placed = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            value = _gather(*sources[name], dtype)  # every process takes part
            if folder is not None:
                tensors[name] = value
        placed |= dict.fromkeys(names, file)
        if folder is not None:
            safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
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


def _gather(leaf: _Leaf, layer: int, array: Array, dtype: Any) -> np.ndarray:
    """One tensor as the checkpoint has it, whole on every process."""
    value = (array[layer] if leaf.stacked else array).astype(dtype)
    if jax.process_count() > 1:
        value = multihost_utils.process_allgather(value, tiled=True)
    value = np.asarray(value)
    return np.ascontiguousarray(value.T) if leaf.transposed else value


def _save_configs(
    folder: Path,
    config: ModelConfig,
    source: Path | None,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if source is None:
        eos_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        hf = families.hf_config(
            config,
            bos_id=tokenizer.bos_token_id,
            eos_ids=eos_ids,
            pad_id=tokenizer.pad_token_id,
            dtype=dtype,
        )
    else:
        hf = _read_json(source / "config.json")
        hf.pop("auto_map", None)  # code of the source, which is not read here and not handed on
        ids |= {key: hf[key] for key in ids if hf.get(key) is not None}
        names = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype"]
        hf |= dict.fromkeys(names, dtype)
    generation = {key: value for key, value in ids.items() if value is not None}
    if source is not None and (source / "generation_config.json").exists():
        generation = _read_json(source / "generation_config.json")
    for name, value in {"config.json": hf, "generation_config.json": generation}.items():
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def stored_dtype(folder: Path | None) -> str:
    """The dtype that the folder's weights are kept in, to export alike; float32 for a new model."""
    if folder is None:
        return "float32"
    settings = _read_json(folder / "config.json")
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"


# --- Tokenizer ----------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; code that comes with it is not run.

    Raises ValueError when there is none or it is broken.
    """
    kinds = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    # transformers may make an empty tokenizer for a known model_type where there are no files.
    if not any((folder / name).exists() for name in kinds):
        raise ValueError(f"{folder} has no tokenizer: none of {', '.join(kinds)}.")
    for pattern in _ALLOWED[:-1]:
        for file in folder.glob(pattern):
            _refuse_odd(file, _MAX_TOKENIZER_BYTES)
    _refuse_paths(folder)
    try:
        if known := _tokenizer_class(folder):
            found = known.from_pretrained(folder, local_files_only=True)
        else:
            from transformers import AutoTokenizer  # and PyTorch with it, where that is installed

            found = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        found(["a b"], verbose=False)  # settings are only looked at when they are used
        found.decode([0], skip_special_tokens=True)
        return found
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{folder}: the tokenizer cannot be loaded ({reason}).") from error


def _refuse_paths(folder: Path) -> None:
    """Raises ValueError where a tokenizer's files shall lie outside of its folder.

    transformers itself sets aside what tokenizer_config.json says of all others.
    """
    file = folder / "tokenizer_config.json"
    names = _read_json(file).get("fast_tokenizer_files") if file.exists() else None
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{file}: fast_tokenizer_files must be names of files in the folder, and "
                f"{str(name)[:80]!r} is not one. Remove the key: tokenizer.json is read without it."
            )


def _tokenizer_class(folder: Path) -> type[PreTrainedTokenizerBase] | None:
    """The class of the folder's tokenizer, or None where `AutoTokenizer` is to choose it."""
    file = folder / "tokenizer_config.json"
    if not file.exists() or not (folder / "tokenizer.json").exists():
        return None
    settings = _read_json(file)
    if "auto_map" in settings:
        return None
    # What tokenizer.json says and no more. For qwen2, AutoTokenizer puts Qwen2's own splitting in
    # the place of any other that is described there, and words come out as nothing.
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")  # transformers 4 and 5
    if settings.get("tokenizer_class") in generic:
        return PreTrainedTokenizerFast
    config = folder / "config.json"
    if settings.get("tokenizer_class") != "Qwen2Tokenizer" or not config.exists():
        return None
    return Qwen2Tokenizer if _read_json(config).get("model_type") in ("qwen2", "qwen3") else None


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All token ids that end a completion, ascending.

    Those of generation_config.json, else of config.json, and the tokenizer's end of text. Raises
    ValueError when there is none, or a file gives something else than token ids.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        value = _read_json(file).get("eos_token_id") if file.exists() else None
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in listed):
            raise ValueError(
                f"{file}: eos_token_id = {value!r} must be a token id or a list of them."
            )
        ids |= set(listed)
        break
    if not ids:
        raise ValueError(
            f"{folder} names no token that ends a completion. Set eos_token_id in "
            "generation_config.json, or eos_token in tokenizer_config.json."
        )
    return tuple(sorted(ids))
