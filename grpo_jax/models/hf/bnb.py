"""Reads kernels in NF4 from bitsandbytes' files.

    X.weight                                uint8 [n / 2, 1]: codes, the first's bits high
    X.weight.absmax                         float32 [n / 64]: scales; double: uint8 codes of them
    X.weight.quant_map                      float32 [16]: the value of each code
    X.weight.nested_absmax                  double: float32 [n / 64 / 256]
    X.weight.nested_quant_map               double: float32 [256]: the value of each scale's code
    X.weight.quant_state.bitsandbytes__nf4  uint8: JSON of sizes, and of the mean of the scales

n weights count the matrix [out, in] row after row. Codes and scales are taken bit for bit; their
arrays have another order here (`kernels/nf4.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.kernels.nf4 import BLOCK, GROUP, LEVELS, NF4, Scales
from grpo_jax.messages.values import shown

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MAX_STATE_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A matrix [out, in] in NF4. Nothing is read yet; indexing reads and decodes all of it."""

    shape: tuple[int, int]
    parts: Mapping[str, Any]  # by name, of safetensors' slice objects; "" for the codes
    mean: float | None  # of the scales, if they are in 8 bits

    def __getitem__(self, index: Any) -> np.ndarray:
        scale = self._scales()
        if isinstance(scale, Scales):
            groups = np.repeat(scale.largest, GROUP)[: len(scale.codes)]
            scale = scale.levels[scale.codes] * groups + scale.mean
        codes = self._codes()
        values = LEVELS[codes] * np.repeat(scale, BLOCK)[: len(codes)]
        return values.reshape(self.shape)[index]

    def read(self) -> NF4:
        """Its codes and scales in NumPy arrays, as a kernel [in, out]."""
        (outputs, inputs), codes, scale = self.shape, self._codes(), self._scales()
        if inputs % BLOCK == 0:
            blocks = codes.reshape(outputs, -1, BLOCK).transpose(1, 2, 0)
        else:
            blocks = np.pad(codes, (0, -len(codes) % BLOCK)).reshape(-1, BLOCK, 1)
        ordered = lambda x: np.ascontiguousarray(x.reshape(blocks.shape[2], -1).T)  # noqa: E731
        packed = blocks[:, : BLOCK // 2] << 4 | blocks[:, BLOCK // 2 :]
        if isinstance(scale, Scales):
            return NF4(packed, scale.replace(codes=ordered(scale.codes)), (inputs, outputs))
        return NF4(packed, ordered(scale), (inputs, outputs))

    def _codes(self) -> np.ndarray:
        """The codes of all weights, uint8 [n]."""
        packed = self.parts[""][:].reshape(-1)
        return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: math.prod(self.shape)]

    def _scales(self) -> Any:
        """The scales of all blocks, float32 [blocks] or in 8 bits."""
        scale = self.parts["absmax"][:]
        if self.mean is None:
            return scale
        levels, largest = self.parts["nested_quant_map"][:], self.parts["nested_absmax"][:]
        return Scales(scale, levels, largest, np.float32(self.mean))


def decoding(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a folder, with a `Kernel` for the several of each kernel in NF4.

    Raises ValueError, naming the file, if one is in another form of bitsandbytes.
    """
    found = dict(tensors)
    for name in tensors:
        weight, is_state, kind = name.rpartition(_STATE)
        if not is_state or weight not in tensors:
            continue
        own = {part: tensors.get(f"{weight}.{part}") for part in _PARTS}
        own = {part: tensor for part, tensor in own.items() if tensor is not None}
        for extra in (name, *(f"{weight}.{part}" for part in own)):
            found.pop(extra, None)
        where = f"{tensors[name].file}: {shown(weight)}"
        found[weight] = _kernel(where, kind, tensors[name], {"": tensors[weight], **own})
    return found


def _kernel(where: str, kind: str, state: Any, parts: dict[str, Any]) -> Any:
    """The tensor of one kernel."""
    says = _state(where, state)
    double = "nested_absmax" in parts
    known = {"quant_type": "nf4", "blocksize": BLOCK}
    known |= {"nested_blocksize": GROUP, "nested_dtype": "float32"} if double else {}
    for key, value in ({"quant_type": kind} | says).items():
        if key in known and value != known[key]:
            raise ValueError(f"{where} has {key} = {shown(value)}. {known[key]!r} is read. {MEND}")
    shape, mean = says.get("shape"), says.get("nested_offset")
    is_shape = isinstance(shape, list) and len(shape) == 2
    if not is_shape or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ValueError(f"{where} has shape = {shown(shape)}, not two sizes. {MEND}")
    blocks = -(-math.prod(shape) // BLOCK)
    needed = {"": ("U8", (-(-math.prod(shape) // 2), 1)), "quant_map": ("F32", (16,))}
    needed |= {"absmax": ("U8" if double else "F32", (blocks,))}
    if double:
        groups = (-(-blocks // GROUP),)
        needed |= {"nested_absmax": ("F32", groups), "nested_quant_map": ("F32", (256,))}
    for part, (dtype, sizes) in needed.items():
        tensor = parts.get(part)
        if tensor is None or (tensor.dtype, tensor.shape) != (dtype, sizes):
            has = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(
                f"{where} of shape {shape} needs {part or 'codes'} {dtype} {list(sizes)} and has "
                f"{has}. {MEND}"
            )
    if not np.allclose(parts["quant_map"].slices[:], LEVELS, rtol=0, atol=1e-6):
        raise ValueError(f"{where} has a quant_map that is not that of NF4. {MEND}")
    if double and not (type(mean) in (int, float) and math.isfinite(mean)):
        raise ValueError(f"{where} has nested_offset = {shown(mean)}, not a number. {MEND}")
    if says.get("dtype") not in _DTYPES:
        raise ValueError(f"{where} has dtype = {shown(says.get('dtype'))}. {MEND}")
    slices = {part: tensor.slices for part, tensor in parts.items()}
    kernel = Kernel(tuple(shape), slices, float(mean) if double else None)
    return parts[""]._replace(slices=kernel, shape=kernel.shape, dtype=_DTYPES[says["dtype"]])


MEND = "Take the model that it was made from, or download these files again."


def _state(where: str, tensor: Any) -> dict[str, Any]:
    """The JSON of a kernel's sizes."""
    is_text = tensor.dtype == "U8" and len(tensor.shape) == 1
    if not is_text or tensor.shape[0] > _MAX_STATE_BYTES:
        raise ValueError(f"{where} has a quant_state that is no text. {MEND}")
    try:
        says = json.loads(tensor.slices[:].tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} has a quant_state that is no JSON: {error}. {MEND}") from error
    if not isinstance(says, dict):
        raise ValueError(f"{where} has a quant_state that is {type(says).__name__}. {MEND}")
    return says
