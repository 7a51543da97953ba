"""A compiled program's text, parsed."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

_BYTES = {"pred": 1, "token": 0, "opaque": 0}


# --- The text -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # not in the device's main memory

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        each = _BYTES.get(self.dtype, int(bits[0]) / 8 if bits else 0)
        return math.prod(self.shape) * each

    @property
    def moved(self) -> float:
        return 0.0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    literal: str  # the text between the parentheses

    @functools.cached_property
    def arrays(self) -> tuple[_Array, ...]:
        return _arrays(self.type)

    @property
    def in_place(self) -> tuple[int, ...]:
        """Indices of results that alias an operand."""
        found = re.search(r"output_to_operand_aliasing={(.*?\))}", self.attributes)
        return tuple(int(n or 0) for n in re.findall(r"{(\d*)}: ", found[1])) if found else ()

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def sizes(self, name: str) -> tuple[int, ...]:
        found = re.search(rf"\b{name}={{([\d,]*)}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")


def _arrays(text: str) -> tuple[_Array, ...]:
    found = []
    for dtype, shape, layout in _ARRAY.findall(text):
        sizes = tuple(int(n.strip("<=")) for n in shape.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(_Array(dtype, sizes, bool(space) and space[1] != "0"))
    return tuple(found)


def _balanced(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each as its instructions by name; and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line[:1] not in (" ", "}", ""):
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
            continue
        found = _LINE.match(line)
        if not found:
            continue
        rest = found[3]
        end = _balanced(rest, 0) if rest.startswith("(") else rest.find(" ")
        opcode = re.match(r"\s*([\w\-]+)\(", rest[end:])
        if not opcode:
            continue
        begin = end + opcode.end() - 1
        close = _balanced(rest, begin)
        inside = rest[begin + 1 : close - 1]
        current[found[2]] = Instruction(
            name=found[2],
            type=rest[:end],
            opcode=opcode[1],
            operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
            attributes=rest[close:],
            root=bool(found[1]),
            literal=inside,
        )
    return computations, entry


# --- Costs ----------------------------------------------------------------------------------------


def window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


# --- Who takes part -------------------------------------------------------------------------------


def groups(attributes: str, kind: str, devices: int) -> np.ndarray:
    """Groups of devices [groups, size], numbered as in the mesh, from any of XLA's notations.

    The notations: lists, {{0,1},{2,3}}; an iota that is reshaped and transposed,
    [2,4]<=[4,2]T(1,0); axes of the compiler's own mesh, mesh['a'=2,'b'=4] {'a'}.
    """
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
        found = [tuple(map(int, p.split(","))) for p in re.findall(r"\{([\d,]+)\}", pairs[1])]
        return np.array([p for p in found if p[0] != p[1]] or [[0, 0]])
    at = attributes.find("replica_groups=")
    text = attributes[at + len("replica_groups=") :]
    if text.startswith("{{"):
        lists = text[: text.index("}}") + 1]
        return np.array([_ints(g) for g in re.findall(r"\{([\d,]+)\}", lists)])
    if text.startswith("["):
        shape, rest = re.match(r"\[([\d,]+)\](?:<=(\S*))?", text).groups()
        return _count(rest.rstrip(",")).reshape(_ints(shape))
    if text.startswith("mesh["):
        names = re.match(r"mesh\[([^\]]*)\]", text)[1]
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", names)}
        order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", text.split("{")[0])
        ids = _count(order[1]) if order else np.arange(math.prod(sizes.values()))
        chosen = re.search(r"\{([^}]*)\}", text)[1]
        chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
        return _of_axes(ids.reshape(tuple(sizes.values())), list(sizes), chosen)
    return np.arange(devices)[None]


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _count(text: str) -> np.ndarray:
    """The iota [4,2]T(1,0): 0 to 7 in that shape, transposed, and flattened."""
    shape, turned = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (ids.transpose(_ints(turned)) if turned else ids).reshape(-1)


def _of_axes(ids: np.ndarray, names: list[str], chosen: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along some axes; 'a':(2)4 is the part of size 4 of axis a, after a part of size 2."""
    shape, inside = [], []
    for name, size in zip(names, ids.shape):
        part = next((c for c in chosen if c[0] == name), None)
        if part is None:
            shape.append(size)
        elif part[1]:
            before, own = int(part[1]), int(part[2])
            inside.append(len(shape) + 1)
            shape += [before, own, size // (before * own)]
        else:
            inside.append(len(shape))
            shape.append(size)
    ids = np.moveaxis(ids.reshape(shape), inside, range(-len(inside), 0))
    return ids.reshape(-1, math.prod(ids.shape[len(shape) - len(inside) :]))
