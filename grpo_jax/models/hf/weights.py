"""Reads the weights of a Hugging Face folder, and checks its tensors.

Every process reads only the slices of each tensor that its own devices hold, so no host ever holds
a whole model. Pickles are not read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh

from grpo_jax.devices import sharding
from grpo_jax.kernels.nf4 import NF4
from grpo_jax.messages.values import counted
from grpo_jax.models import layer_runs, parameters
from grpo_jax.models.families import names
from grpo_jax.models.hf import bnb, fp8
from grpo_jax.models.hf.folder import read_json, refuse_odd, some
from grpo_jax.models.hf.tensor import Tensor
from grpo_jax.structs import Array, ModelConfig, Params

INDEX = "model.safetensors.index.json"

# The dtypes of checkpoint weights: safetensors' names and NumPy's.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


# --- Which tensors ------------------------------------------------------------------------------


_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SCORE = "score.weight"  # the scalar head

# A run's copy of the tensors outside of the decoder. Its suffix keeps it from being read as
# weights.
SET_ASIDE = "set_aside.tensors"


class Leaf(NamedTuple):
    """One array of the parameters, and its place in a checkpoint."""

    tensors: tuple[Tensor, ...]  # one for each layer of the stack, else a single one
    stacked: bool  # along a leading axis of layers
    shape: tuple[int, ...]  # of the parameter, without a stack's axis


def leaves_of(config: ModelConfig) -> Any:
    """A `Leaf` for every parameter, as a pytree like the parameters."""
    table, shapes = names.table(config), parameters.param_shapes(config)

    def leaf(path: Sequence[Any], array: jax.ShapeDtypeStruct, layers: Sequence[int] | None):
        tensor = table["/".join(part.key for part in path)]
        if layers is None:
            return Leaf((tensor,), False, array.shape)
        return Leaf(tuple(tensor.of_layer(i) for i in layers), True, array.shape[1:])

    def slot(run: int, slot: int, layers: Sequence[int]) -> Any:
        stack = layer_runs.slot_of(shapes["layers"], config.layers, run, slot)
        return jax.tree_util.tree_map_with_path(functools.partial(leaf, layers=layers), stack)

    outer = {name: part for name, part in shapes.items() if name != "layers"}
    outer = jax.tree_util.tree_map_with_path(functools.partial(leaf, layers=None), outer)
    return outer | {"layers": layer_runs.by_slot(config.layers, slot)}


def tensor_shapes(leaves: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf):
        for tensor in leaf.tensors:  # the last parameter in a tensor determines its rows
            shape = tensor.shape(leaf.shape)
            shapes[tensor.name] = max(shape, shapes.get(tensor.name, shape))
    return shapes


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


# --- Reading ------------------------------------------------------------------------------------


def load_params(
    folder: Path,
    config: ModelConfig,
    mesh: Mesh,
    dtype=jnp.float32,
    keep: Callable[[Any, Array], Any] = lambda path, x: x,
    codes: Callable[[Any], NF4 | None] = lambda path: None,
    parts: Collection[str] | None = None,
) -> Params:
    """The checkpoint's parameters as `dtype`, laid out over the mesh.

    Each device's slices are read tensor by tensor. `keep(path, array)` replaces each array before
    the next is read. `codes(path)`: the shardings of a parameter whose codes are taken as the files
    have them; None: its values are read. `parts`: the parts of the tree that are read, such as
    "layers"; None: all. Raises ValueError, before reading, if a tensor is missing, unused, repeated
    or of another shape, or if a file is broken.
    """
    leaves = leaves_of(config)
    tensors = _renamed(_open(folder), config)
    tensors = bnb.decoding(tensors) if config.codes else fp8.decoding(tensors)
    _check(folder, tensors, leaves, config)
    shapes = parameters.param_shapes(config)
    shardings = sharding.tree_shardings(mesh, parameters.logical_axes(config), shapes)

    def load(path, leaf: Leaf, shape: jax.ShapeDtypeStruct, placed: jax.sharding.Sharding) -> Any:
        if (where := codes(path)) is not None:
            return _in_codes(leaf, tensors, where)
        return keep(path, _filled(shape.shape, placed, _reader(leaf, shape.shape, tensors, dtype)))

    trees = [
        {name: part for name, part in tree.items() if parts is None or name in parts}
        for tree in (leaves, shapes, shardings)
    ]
    return jax.tree_util.tree_map_with_path(load, *trees, is_leaf=is_leaf)


def _in_codes(leaf: Leaf, tensors: dict[str, _Tensor], where: NF4) -> NF4:
    """The kernels of a stack in NF4, as the files have them; `where`: the shardings."""
    kernels = []
    for tensor in leaf.tensors:
        of_file = tensors[tensor.name]
        if not isinstance(of_file.slices, bnb.Kernel) or tensor.begin or tensor.order:
            raise ValueError(
                f"{of_file.file}: {tensor.name} is not a whole kernel in NF4, as others of the "
                f"model are. {bnb.MEND}"
            )
        kernels.append(of_file.slices.read())
    stack = jax.tree.map(lambda *layers: np.stack(layers), *kernels)
    if jax.tree.structure(stack) != jax.tree.structure(where):
        raise ValueError(
            f"{of_file.file}: the scales of {tensor.name} are not as config.json says "
            f"(bnb_4bit_use_double_quant). {bnb.MEND}"
        )
    put = lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__)  # noqa: E731
    return jax.tree.map(put, stack, where)


def _filled(shape: tuple[int, ...], placed: jax.sharding.Sharding, read: Callable) -> Array:
    """The array whose parts `read(index)` returns; the host holds one part at a time.

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
    leaf: Leaf, shape: tuple[int, ...], tensors: dict[str, _Tensor], dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function that reads a part of one parameter."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        layers = range(*bounds[0]) if leaf.stacked else (0,)
        part = np.empty([stop - start for start, stop in bounds], dtype)
        for row, layer in enumerate(layers):
            tensor = leaf.tensors[layer]
            value = tensor.read(tensors[tensor.name].slices, bounds[leaf.stacked :])
            part[row if leaf.stacked else ...] = value
        return part

    return read


def set_aside(folder: Path, config: ModelConfig) -> dict[str, _Tensor]:
    """Tensors of the folder outside of the decoder, by name; for a run, its own copy of them."""
    kept = folder / SET_ASIDE
    if not config.wrapper or not (kept.exists() or any(folder.glob("*.safetensors"))):
        return {}
    tensors = _headers(folder, [kept]) if kept.exists() else _open(folder)
    tensors = {names.spelled(name, config): tensor for name, tensor in tensors.items()}
    aside = {name: t for name, t in tensors.items() if name.startswith(names.SET_ASIDE)}
    for name, tensor in aside.items():
        if tensor.dtype == fp8.E4M3:
            raise ValueError(
                f"{tensor.file}: {name} is in 8 bits, and it could not be exported with the rest. "
                "Take the model that it was made from."
            )
    return aside


def _renamed(tensors: dict[str, _Tensor], config: ModelConfig) -> dict[str, _Tensor]:
    """The tensors by this decoder's names, if transformers has used others for them.

    A decoder saved without its head has names without "model.". For a tied head, safetensors'
    `save_model` may keep only the head's name.
    """
    if config.wrapper:
        return {names.spelled(name, config): tensor for name, tensor in tensors.items()}
    if "embed_tokens.weight" in tensors and not any(n.startswith("model.") for n in tensors):
        outside = (_HEAD, SCORE)
        tensors = {name if name in outside else f"model.{name}": t for name, t in tensors.items()}
    if config.tied_head and _HEAD in tensors and _EMBEDDING not in tensors:
        tensors = {_EMBEDDING if name == _HEAD else name: t for name, t in tensors.items()}
    return tensors


def stored_dtype(folder: Path) -> str:
    """The dtype of the folder's weights: from config.json, else from the tensors.

    If they have several, the dtype that holds the values of all.
    """
    settings = read_json(folder / "config.json")
    said = settings.get("dtype") or settings.get("torch_dtype")
    if isinstance(said, str) and said in _DTYPES.values():
        return said
    kept = {_DTYPES[t.dtype] for t in _open(folder).values() if t.dtype in _DTYPES}
    widest = jnp.dtype("float32") if not kept else functools.reduce(jnp.promote_types, kept)
    return jnp.dtype(widest).name


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, and all files that compete with them."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(
            isinstance(name, str)
            and Path(name).name == name
            and name.isprintable()  # file names have no NUL and no half characters
            and len(name.encode()) < 256
            for name in placed.values()
        ):
            raise ValueError(f"{index}: weight_map must give a file of the folder for each tensor.")
        names = sorted(set(placed.values()))
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise ValueError(
                f"{index} names {some(absent)}, which {folder} does not hold. "
                "Download or export the model again."
            )
        files = [folder / name for name in names]
        return files if single in files or not single.exists() else [single, *files]
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    if single.exists():
        files.insert(0, single)
    if not files:
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
        only = f" It has {some(pickles)}, but pickles can run code and are not read." * bool(
            pickles
        )
        raise ValueError(
            f"{folder} has no weights: no model.safetensors, no model-*-of-*.safetensors.{only} "
            "Save the model with transformers' save_pretrained, which writes safetensors."
        )
    return files


def _open(folder: Path) -> dict[str, _Tensor]:
    """The tensors of all weight files by name; reads only headers."""
    return _headers(folder, _weight_files(folder))


def _headers(folder: Path, files: list[Path]) -> dict[str, _Tensor]:
    """The tensors of some files of a folder by name."""
    tensors: dict[str, _Tensor] = {}
    repeated = []
    for file in files:
        refuse_odd(file)
        try:
            file.open("rb").close()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
        try:
            opened = safetensors.safe_open(file, framework="numpy")
            starts = functools.cache(fp8.starts)
            for name in opened.keys():
                if name in tensors:
                    repeated.append(f"{name} ({tensors[name].file.name} and {file.name})")
                s = opened.get_slice(name)
                shape, dtype = tuple(s.get_shape()), s.get_dtype()
                if dtype in (fp8.E4M3, fp8.E8M0):
                    s = fp8.Bytes(file, starts(file)[name], shape, dtype)
                tensors[name] = _Tensor(file, s, shape, dtype)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}). "
                "It may be cut off: download or export the model again."
            ) from error
    if repeated:
        raise ValueError(
            f"{folder}: {counted(len(repeated), 'tensor')} in more than one file: {some(repeated)}"
            ". Keep the files of one model in the folder."
        )
    return tensors


def _check(folder: Path, tensors: dict[str, _Tensor], leaves: Any, config: ModelConfig) -> None:
    """Raises ValueError unless the files hold exactly the tensors that the config needs."""
    needed = tensor_shapes(leaves)
    head, embedding = (names.prefix(config) + name for name in (_HEAD, _EMBEDDING))
    allowed = {head} if config.tied_head or config.head == "none" else set()
    unused = [
        f"{name} {list(t.shape)} ({t.file.name})"
        for name, t in tensors.items()
        # Old exports include the rotary frequencies, which follow from the config.
        if name not in needed.keys() | allowed
        and not name.endswith("rotary_emb.inv_freq")
        and not (config.wrapper and name.startswith(names.SET_ASIDE))
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
        f"{counted(len(names), 'tensor')} {what}: {some(names)}"
        for what, names in wrong.items()
        if names
    ]
    if said:
        remedy = ""
        if head in needed and head not in tensors and embedding in tensors:
            remedy = (
                " If the head is the embedding, set tie_word_embeddings to true in config.json."
            )
        elif SCORE in needed and SCORE not in tensors:
            remedy = (
                " config.json says that it is a reward model (ForSequenceClassification), and "
                "without that tensor it gives random rewards. Get its files again."
            )
        elif other_dtype:
            remedy = " Quantized weights are not read: take the model that they were made from."
        raise ValueError(
            f"{folder}: the weights do not fit config.json ({config.family}). "
            f"{'; '.join(said)}.{remedy}"
        )
    if config.tied_head and config.head == "vocabulary" and head in tensors:
        _check_tied_head(folder, head, tensors[head], tensors[embedding])


_COMPARED_ROWS = 4096  # at once: a whole embedding may be gigabytes


def _check_tied_head(folder: Path, name: str, head: _Tensor, embedding: _Tensor) -> None:
    """Raises ValueError if a head stored beside a tied embedding is not its bit-for-bit copy."""
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
            f"{folder}: tie_word_embeddings is true in config.json, but {name} {list(head.shape)} "
            f"{head.dtype} ({head.file.name}) differs from the embedding {list(embedding.shape)} "
            f"{embedding.dtype}. Set tie_word_embeddings to false to use the head, or remove it."
        )
