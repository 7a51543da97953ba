"""Reads kernels in 8-bit floating point, with scales of blocks as in DeepSeek-V3's files.

    X.weight            float8_e4m3 [out, in]
    X.weight_scale_inv  float32, bfloat16 or float8_e8m0 [out / 128, in / 128], rounded up; or one
                        scale for all
    X.activation_scale  of inputs in 8 bits, which are not computed with here

A weight is its code times the scale of its block (arXiv:2412.19437, section 3.3). The file of a
model says so in config.json as quant_method = "fp8".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.messages.values import shown

BLOCK = 128  # rows and columns that share a scale
WEIGHT, SCALE, UNUSED = ".weight", ".weight_scale_inv", ".activation_scale"
E4M3, E8M0 = "F8_E4M3", "F8_E8M0"  # safetensors' names
MEND = "Take the model that it was made from, or download these files again."

# The value of each byte.
_VALUES = {
    name: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for name, dtype in ((E4M3, jnp.float8_e4m3fn), (E8M0, jnp.float8_e8m0fnu))
}


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A tensor of bytes in a file; indexing reads. safetensors does not read it to NumPy."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: str

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values as float32."""
        raw = np.memmap(self.file, np.uint8, "r", self.start, self.shape or (1,))
        return _VALUES[self.dtype][raw[index]]


def starts(file: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file starts, in bytes."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        name: 8 + length + tensor["data_offsets"][0]
        for name, tensor in header.items()
        if name != "__metadata__"
    }


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A matrix [out, in] of codes and scales; indexing reads and decodes, in float32."""

    codes: Bytes
    scale: np.ndarray  # float32 [blocks of out, blocks of in]
    block: tuple[int, int]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, columns = (
            range(*part.indices(size)) for part, size in zip(index, self.codes.shape, strict=True)
        )
        value = self.codes[index]
        scale = np.repeat(self.scale, self.block[1], axis=1)[:, columns.start : columns.stop]
        for i, of_rows in enumerate(scale):
            first, last = (
                min(max(n * self.block[0] - rows.start, 0), len(rows)) for n in (i, i + 1)
            )
            value[first:last] *= of_rows
        return value


def decoding(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a folder, with a `Kernel` for each in 8-bit floating point and its scales.

    Raises ValueError, naming the file, if the scales are missing or of another form.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != E4M3 or not name.endswith(WEIGHT):
            continue
        stem = name.removesuffix(WEIGHT)
        scale = found.pop(stem + SCALE, None)
        found.pop(stem + UNUSED, None)
        where = f"{tensor.file}: {shown(name)} {list(tensor.shape)}"
        if len(tensor.shape) != 2 or scale is None:
            raise ValueError(f"{where} in 8 bits has no {stem + SCALE}. {MEND}")
        grid = tuple(-(-size // BLOCK) for size in tensor.shape)
        one = scale.shape in ((), (1,), (1, 1))
        if scale.dtype not in ("F32", "BF16", E8M0) or not (one or scale.shape == grid):
            raise ValueError(
                f"{where} in blocks of {BLOCK} needs scales F32 {list(grid)} and has "
                f"{scale.dtype} {list(scale.shape)}. {MEND}"
            )
        values = np.asarray(scale.slices[...], np.float32)
        kernel = (
            Kernel(tensor.slices, values.reshape(1, 1), tensor.shape)
            if one
            else Kernel(tensor.slices, values, (BLOCK, BLOCK))
        )
        found[name] = tensor._replace(slices=kernel, dtype="F32")
    return found
