"""The cost of one run of a compiled program on a device, read from the program's text.

XLA's own analysis counts the body of a loop once, however often it runs, and ignores the network.
Here a body counts once per iteration. The iterations follow from the loop's condition; for loops
whose end depends on data, as in decoding, the caller gives them. Operations are those of matrix
products alone. Bytes are those between memory and cores: data that a TPU keeps on chip between two
fusions costs none.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from grpo_jax.devices import sharding
from grpo_jax.planning import hlo_text
from grpo_jax.planning.hlo_text import Instruction

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_FREE = frozenset(  # these move no bytes
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "add-dependency opt-barrier copy-done domain iota".split()
)

_FUSIONS = ("fusion", "fusion-start")  # GPUs start copies asynchronously
_CALLING = ("while", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ
    size: int  # devices in a group
    sent: float  # bytes that a device sends per run, on a ring
    times: float
    where: str  # its name in the source
    channel: str = ""  # its id in the compiler
    beside: float = 0.0  # operations of products between its start and its end, per run


class Kernel(NamedTuple):
    """One kernel launch: an operation, or several in one fusion."""

    flops: float
    bytes: float
    times: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost on one device of one run of the program."""

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0  # the compiler's own estimate, without collectives; 0 if it has none
    collectives: tuple[Collective, ...] = ()
    kernels: tuple[Kernel, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.cycles + other.cycles,
            self.collectives + other.collectives,
            self.kernels + other.kernels,
        )

    def times(self, n: float) -> Cost:
        each = (dataclasses.replace(c, times=c.times * n) for c in self.collectives)
        kernels = (k._replace(times=k.times * n) for k in self.kernels)
        return Cost(self.flops * n, self.bytes * n, self.cycles * n, tuple(each), tuple(kernels))

    def in_turn(self, flops: float, bandwidth: float) -> float:
        """Seconds at these rates if kernels run one after the other."""
        return math.fsum(k.times * max(k.flops / flops, k.bytes / bandwidth) for k in self.kernels)

    @property
    def sent(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Bytes that collectives send, by kind and mesh axes."""
        return _totals(self.collectives, lambda c: c.sent)

    def waited(self, flops: float, link: float) -> dict[tuple[str, tuple[str, ...]], float]:
        """Seconds of collectives that no matrix product hides, at these rates, by kind and axes.

        A lower bound: collectives that run at the same time share products and links.
        """
        return _totals(self.collectives, lambda c: max(c.sent / link - c.beside / flops, 0.0))


def _totals(
    collectives: Iterable[Collective], of: Callable[[Collective], float]
) -> dict[tuple[str, tuple[str, ...]], float]:
    total: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
    for c in collectives:
        total[c.kind, c.axes] += of(c) * c.times
    return dict(total)


def cost(
    text: str, mesh: Mesh, loops: float = 1.0, read: Mapping[tuple[int, ...], float] | None = None
) -> Cost:
    """The cost of a program, from its `as_text()`; loops of unknown length run `loops` times each.

    `read`: by shape, the mean share of an operand that custom kernels read; of other shapes they
    read all. Their writes to such an operand in place do not count.
    """
    return _Program(text, mesh, loops, read or {}).cost()


# --- Costs ----------------------------------------------------------------------------------------


class _Program:
    def __init__(self, text: str, mesh: Mesh, loops: float, read: Mapping[tuple[int, ...], float]):
        self.computations, self.entry = hlo_text.parse(text)
        self.mesh, self.loops, self.gpu = mesh, loops, sharding.is_gpu(mesh)
        self.read = read
        self._known: dict[str, Cost] = {}

    def cost(self) -> Cost:
        return self._of(self.entry)

    def _of(self, name: str) -> Cost:
        if name not in self._known:
            parts = self._in_order(name)
            collectives = [c for p in parts for c in p.collectives]
            self._known[name] = _sum(parts, collectives if self.gpu else _once(collectives))
        return self._known[name]

    def _in_order(self, name: str) -> list[Cost]:
        """The costs of a computation's instructions, in the order in which they run."""
        instructions = list(self.computations[name].values())
        parts = [self._launched(i, name) for i in instructions]
        ends = {
            started: n
            for n, i in enumerate(instructions)
            if i.opcode.endswith("-done")
            for started in i.operands
        }
        for n, (i, part) in enumerate(zip(instructions, parts)):
            if part.collectives and i.opcode.endswith("-start"):
                beside = math.fsum(p.flops for p in parts[n + 1 : ends.get(i.name)])
                each = (dataclasses.replace(c, beside=beside) for c in part.collectives)
                parts[n] = dataclasses.replace(part, collectives=tuple(each))
        return parts

    def _launched(self, i: Instruction, inside: str) -> Cost:
        """An instruction's cost, with its kernel."""
        cost = self._instruction(i, inside)
        if i.opcode in _CALLING or not (cost.flops or cost.bytes):
            return cost
        return dataclasses.replace(cost, kernels=(Kernel(cost.flops, cost.bytes, 1.0),))

    def _instruction(self, i: Instruction, inside: str) -> Cost:
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return Cost()
        if i.opcode == "while":
            body, condition = i.attribute("body"), i.attribute("condition")
            return (self._of(body) + self._of(condition)).times(self._trips(i))
        if i.opcode in ("call", "async-start"):
            called = i.attribute("to_apply") or i.attribute("calls")
            return self._of(called) if called in self.computations else Cost()
        whole = Cost(bytes=self._bytes(i, inside), cycles=_cycles(i))
        called = i.attribute("calls") if i.opcode in _FUSIONS else None
        if called:
            inner = self._of(called)  # a fusion is one kernel as a whole
            return whole + Cost(flops=inner.flops, collectives=self._fused(called, inner))
        if i.opcode == "dot":
            whole += Cost(flops=self._dot(i, inside))
        elif i.opcode == "convolution":
            whole += Cost(flops=self._convolution(i, inside))
        kind = i.opcode.removesuffix("-start")
        if kind in KINDS:
            whole += Cost(collectives=(self._collective(i, kind, inside),))
        return whole

    def _fused(self, name: str, inner: Cost) -> tuple[Collective, ...]:
        """A fusion's collectives: on TPUs a reduce-scatter is an all-reduce and a slice."""
        if "all-reduce-scatter" not in name:
            return inner.collectives
        return tuple(
            dataclasses.replace(c, kind="reduce-scatter", sent=c.sent / 2)
            if c.kind == "all-reduce"
            else c
            for c in inner.collectives
        )

    def _trips(self, loop: Instruction) -> float:
        """A loop's iterations: as XLA notes them, or from the constant that bounds its counter."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return float(noted[1])
        condition = self.computations[loop.attribute("condition")]
        limits = [self._limit(i, condition, {}) for i in condition.values()]
        limits = [found for found in limits if found is not None]
        if len(limits) != 1:
            return self.loops
        limit, counter = limits[0]
        body = self.computations[loop.attribute("body")]
        root = next(i for i in body.values() if i.root)
        step = self._added(body[root.operands[counter]], body, {}) or 1  # more than 1 if unrolled
        return float(-(-limit // step))

    def _limit(self, i: Instruction, inside: Mapping, outer: Mapping) -> tuple[int, int] | None:
        """The constant that bounds a loop's counter, and the counter's index in the loop's state.

        The comparison may be inside a fusion, whose arguments are `outer`.
        """
        if i.opcode == "fusion" and i.attribute("calls") in self.computations:
            called = self.computations[i.attribute("calls")]
            given = {n: inside[o] for n, o in enumerate(i.operands) if o in inside}
            found = [self._limit(j, called, given) for j in called.values()]
            return next((n for n in found if n is not None), None)
        if i.opcode != "compare" or "direction=LT" not in i.attributes:
            return None
        left, right = (inside[o] for o in i.operands)
        if outer:
            left, right = (
                outer[int(x.literal)] if x.opcode == "parameter" else x for x in (left, right)
            )
        index = left.attribute("index")
        if index is None or right.opcode != "constant" or not right.literal.isdigit():
            return None
        return int(right.literal), int(index)

    def _added(self, i: Instruction, inside: Mapping, outer: Mapping) -> int | None:
        """The increment of a counter by a loop's body; None if it is not a sum."""
        if i.opcode == "get-tuple-element":
            return 0
        if i.opcode == "constant":
            return int(i.literal) if i.literal.isdigit() else None
        if i.opcode == "parameter":
            return outer.get(int(i.literal))
        below = [self._added(inside[o], inside, outer) for o in i.operands]
        if i.opcode == "fusion" and i.attribute("calls") in self.computations:
            called = self.computations[i.attribute("calls")]
            root = next(j for j in called.values() if j.root)
            return self._added(root, called, dict(enumerate(below)))
        known = i.opcode in ("add", "copy", "bitcast") and None not in below
        return sum(below) if known else None

    # Matrix products.

    def _dot(self, i: Instruction, inside: str) -> float:
        left = self.computations[inside][i.operands[0]].arrays[0].shape
        summed = math.prod(left[d] for d in i.sizes("lhs_contracting_dims"))
        return 2.0 * math.prod(i.arrays[0].shape) * summed

    def _convolution(self, i: Instruction, inside: str) -> float:
        """Operations of a convolution, as TPUs write matrix products: padded windows are batches.

        So it counts, for each spatial axis, the pairs of output and kernel positions that meet an
        input.
        """
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
        left, right = (self.computations[inside][o].arrays[0].shape for o in i.operands[:2])
        inputs, kernel, outputs = labels.groups()
        out = i.arrays[0].shape
        flops = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * right[kernel.index("i")]
        window = {
            key: value.split("x")
            for key, value in re.findall(r"(\w+)=([\dx_\-]+)", hlo_text.window(i.attributes))
        }
        for n, axis in enumerate(c for c in outputs if c.isdigit()):
            number = lambda key, default, n=n: int(window.get(key, [default] * (n + 1))[n])  # noqa: E731
            before = int(window.get("pad", ["0_0"] * (n + 1))[n].split("_")[0])
            o = np.arange(out[outputs.index(axis)])[:, None] * number("stride", 1)
            k = np.arange(right[kernel.index(axis)])[None] * number("rhs_dilate", 1)
            at, wide = o + k - before, number("lhs_dilate", 1)
            last = (left[inputs.index(axis)] - 1) * wide
            flops *= int(((at >= 0) & (at <= last) & (at % wide == 0)).sum())
        return flops

    # Bytes between memory and cores.

    def _bytes(self, i: Instruction, inside: str) -> float:
        scope = self.computations[inside]
        operands = [scope[o].arrays for o in i.operands if o in scope]
        share = self.read if i.opcode == "custom-call" else {}
        read = [sum(a.moved * share.get(a.shape, 1.0) for a in arrays) for arrays in operands]
        # Such a kernel changes one position of many in place.
        written = sum(
            a.moved for n, a in enumerate(i.arrays) if not (a.shape in share and n in i.in_place)
        )
        if i.opcode.endswith("-start"):  # its result includes the operands
            written = max(written - sum(read), 0.0)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * written
        if i.opcode == "dynamic-update-slice":
            return 2 * read[1]
        if i.opcode in _FUSIONS and i.attribute("calls") in self.computations:
            return self._fusion_bytes(self.computations[i.attribute("calls")], read, written)
        return sum(read) + written

    def _fusion_bytes(self, body: Mapping, read: list[float], written: float) -> float:
        """Bytes of a fusion; of a sliced operand or an updated result it counts only that part."""
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for i in body.values():
            for operand in i.operands:
                users[operand].append(i)
        total = 0.0
        for i in body.values():
            if i.opcode != "parameter" or int(i.literal) >= len(read):
                continue
            share = min(_touched(i, users) / max(sum(a.bytes for a in i.arrays), 1.0), 1.0)
            total += read[int(i.literal)] * share
        root = next(i for i in body.values() if i.root)
        while root.opcode in ("bitcast", "convert", "copy") and root.operands[0] in body:
            root = body[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            update = sum(a.bytes for a in body[root.operands[1]].arrays)
            written *= min(update / max(sum(a.bytes for a in root.arrays), 1.0), 1.0)
        return total + written

    # Collectives.

    def _collective(self, i: Instruction, kind: str, inside: str) -> Collective:
        scope = self.computations[inside]
        arrays = [a for o in i.operands if o in scope for a in scope[o].arrays]
        payload = sum(a.bytes for a in arrays)
        groups = hlo_text.groups(i.attributes, kind, self.mesh.size)
        size = groups.shape[1]
        ring = (size - 1) / max(size, 1)
        sent = {
            "all-gather": payload * (size - 1),
            "reduce-scatter": payload * ring,
            "all-reduce": 2 * payload * ring,
            "all-to-all": payload * ring,
            "collective-permute": payload,
        }[kind]
        where = re.search(r'op_name="([^"]*)"', i.attributes)
        axes, name = _axes(groups, self.mesh), where[1] if where else ""
        return Collective(kind, axes, size, sent, 1.0, name, i.attribute("channel_id") or "")


def _sum(parts: list[Cost], collectives: Iterable[Collective]) -> Cost:
    return Cost(
        math.fsum(p.flops for p in parts),
        math.fsum(p.bytes for p in parts),
        math.fsum(p.cycles for p in parts),
        tuple(collectives),
        tuple(k for p in parts for k in p.kernels),
    )


def _once(collectives: Iterable[Collective]) -> list[Collective]:
    """One collective per channel: a TPU spreads one over the fusions that run meanwhile."""
    found: dict[Any, Collective] = {}
    for c in collectives:
        name = c.channel or object()
        if name not in found or c.times < found[name].times:
            found[name] = c
    return list(found.values())


def _cycles(i: Instruction) -> float:
    found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return float(found[1]) if found else 0.0


def _touched(i: Instruction, users: Mapping[str, list[Instruction]]) -> float:
    """Bytes of a fusion's parameter that it reads."""
    total = 0.0
    for user in users[i.name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == i.name:
            total += sum(a.bytes for a in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == i.name:
            continue  # in place
        elif user.opcode == "bitcast":
            total += _touched(user, users)
        else:
            return math.inf
    return total


# --- Who takes part -------------------------------------------------------------------------------


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    names = set()
    for group in groups[:64]:  # all are alike
        place = np.stack(np.unravel_index(group, mesh.devices.shape))
        differs = (place != place[:, :1]).any(axis=1)
        names |= {name for name, d in zip(mesh.axis_names, differs) if d}
    return tuple(name for name in mesh.axis_names if name in names)


def as_json(sent: Mapping[tuple[str, tuple[str, ...]], float]) -> dict[str, dict[str, float]]:
    """Bytes sent, by kind, then by mesh axes joined with "+"."""
    table: dict[str, dict[str, float]] = {}
    for (kind, axes), value in sorted(sent.items()):
        table.setdefault(kind, {})["+".join(axes) or "none"] = value
    return json.loads(json.dumps(table))
