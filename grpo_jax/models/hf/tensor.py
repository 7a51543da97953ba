"""The place of a parameter in a checkpoint's tensors, for reading and writing.

A checkpoint may have a kernel transposed, several parameters in one tensor, row after row, or rows
in another order, as with adjacent rotary pairs. Reading undoes each of these, and writing redoes
it. Parameters are stacked over layers, tensors are not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The place of a parameter, for one layer if it is stacked.

    `order[i]` is the place of the parameter's row i among its rows in the tensor. A row of a
    transposed kernel is an output.
    """

    name: str  # "{layer}" stands for the layer's number
    transposed: bool = False  # [out, in] in the checkpoint, [in, out] here
    begin: int = 0  # the parameter's first row
    order: tuple[int, ...] | None = None  # None: the same order

    def of_layer(self, layer: int) -> Tensor:
        return dataclasses.replace(self, name=self.name.format(layer=layer))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape up to the parameter's last row, from the parameter's shape."""
        rows, *rest = shape[::-1] if self.transposed else shape
        return (self.begin + rows, *rest)

    def read(self, tensor: Any, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        """The part of the parameter within bounds; slicing `tensor` reads from the file."""
        (first, last), *rest = bounds[::-1] if self.transposed else bounds
        within = [slice(*b) for b in rest]
        if self.order is None:
            value = tensor[(slice(self.begin + first, self.begin + last), *within)]
        else:
            places = np.array(self.order[first:last])
            low, high = int(places.min()), int(places.max()) + 1
            value = tensor[(slice(self.begin + low, self.begin + high), *within)][places - low]
        return value.T if self.transposed else value

    def write(self, value: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the whole parameter to its place in the tensor: the inverse of `read`."""
        value = value.T if self.transposed else value
        places = slice(None) if self.order is None else np.array(self.order)
        tensor[self.begin : self.begin + len(value)][places] = value
