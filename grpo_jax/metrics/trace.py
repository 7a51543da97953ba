"""Reads a profiler trace: operations by phase and part."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from grpo_jax.devices.phases import PHASES

_OTHER = "other"  # programs of no phase: random keys, copies between host and device


class Operation(NamedTuple):
    """One operation of a compiled program, over all its runs."""

    phase: str  # one of PHASES, or "other"
    program: str
    name: str  # XLA's
    part: str  # scopes between the phase and the operation, such as "decode/Block/mlp/up"
    calls: int
    seconds: float


def newest_trace(workdir: Path) -> Path:
    """The newest trace file in a run's folder; ValueError if there is none."""
    traces = sorted(Path(workdir).glob("plugins/profile/*/*.xplane.pb"))
    if not traces:
        raise ValueError(
            f"{workdir} holds no trace. --config.profile.steps=(10,12) writes one of these steps."
        )
    return traces[-1]


def operations(trace: Path) -> list[Operation]:
    """Every operation that ran on a device in a trace, the longest first."""
    content = trace.read_bytes()
    scopes = _scopes(content)
    phase_of = {program: _phase(names.values()) for program, names in scopes.items()}
    calls: dict[tuple[str, str], int] = collections.Counter()
    nanoseconds: dict[tuple[str, str], float] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_serialized_xspace(content).planes:
        of_gpu = plane.name.startswith("/device:GPU")  # kernels are not nested
        for line in plane.lines:
            for key, duration_ns in _alone(line.events, nested=not of_gpu):
                calls[key] += 1
                nanoseconds[key] += duration_ns
    found = [
        Operation(
            phase_of.get(program, _OTHER),
            program,
            name,
            _part(_scope(scopes.get(program, {}), name)),
            calls[program, name],
            duration_ns / 1e9,
        )
        for (program, name), duration_ns in nanoseconds.items()
    ]
    return sorted(found, key=lambda o: -o.seconds)


def _alone(events: Any, *, nested: bool) -> Iterator[tuple[tuple[str, str], float]]:
    """(program, operation) of each event on a line of a trace, and its own nanoseconds.

    `nested`: an event that begins during another one is inside of it.
    """
    open_events: list[list[Any]] = []  # [end, key, own ns]: each is inside the one before
    device_events = (e for e in events if e.duration_ns > 0)
    for event in sorted(device_events, key=lambda e: (e.start_ns, -e.duration_ns)):
        stats = dict(event.stats)
        if "hlo_op" not in stats:
            continue
        while open_events and open_events[-1][0] <= event.start_ns:
            yield tuple(open_events.pop()[1:])
        if open_events and nested:
            open_events[-1][2] -= event.duration_ns
        name = str(stats["hlo_op"])
        if name.startswith("command_buffer"):  # a graph of kernels: all its events have one name
            name = event.name
        key = f"{stats.get('hlo_module')}({stats.get('program_id')})", name
        open_events.append([event.start_ns + event.duration_ns, key, event.duration_ns])
    for _, key, duration_ns in open_events:
        yield key, duration_ns


# --- The scopes of operations ---------------------------------------------------------------------


def _phase(scopes: Any) -> str:
    """The phase that most operations of a program name; "other" if none does."""
    named = collections.Counter(w for scope in scopes for w in _words(scope) if w in PHASES)
    return named.most_common(1)[0][0] if named else _OTHER


def _words(scope: str) -> list[str]:
    """A scope's names without the transformations around them: transpose(jvp(mlp)) is mlp.

    Of operations that XLA fused, (mlp/add:mlp/mul), it takes the first.
    """
    scope = re.sub(r"\(([^():]+):[^()]*\)?", r"\1", scope)
    words = (re.sub(r"^(?:(?!jit)\w+\()+|\)+$", "", word) for word in scope.split("/"))
    return [word for word in words if word]


_STRUCTURE = re.compile(
    r"jit\(.*|while|body|cond|closed_call|eval_jaxpr|checkpoint|rematted_computation|shard_map|"
    r"branch_\d+_fun|.*<.*|\w+\._\w+"
)


def _scope(scopes: Mapping[str, str], name: str) -> str:
    """The scope of an operation, or of the operation that gives a GPU kernel its name."""
    return scopes.get(name) or scopes.get(re.sub(r"_+(\d+)$", r".\1", name), "")


def _part(scope: str) -> str:
    """The scopes below the phase, and marks for the backward pass and for recomputation."""
    words = _words(scope)
    at = next((i for i, word in enumerate(words) if word in PHASES), len(words))
    kept = [word for word in words[at + 1 :] if not _STRUCTURE.fullmatch(word)]
    again, backward = "rematted_computation" in scope, "transpose(" in scope
    return "/".join(kept) + (" (again)" if again else " (backward)" if backward else "")


def _scopes(content: bytes) -> dict[str, dict[str, str]]:
    """The scope of each operation by program, from the programs stored in a trace.

    It reads the protocol buffers directly (xplane.proto, hlo.proto), since JAX's reader of traces
    does not give the programs.
    """
    scopes: dict[str, dict[str, str]] = {}
    for plane in _walk(memoryview(content), 1):  # XSpace.planes
        if _text(plane, 2) != "/host:metadata":  # XPlane.name
            continue
        for metadata in _walk(plane, 4, 2):  # XPlane.event_metadata.value, one for each program
            names = scopes.setdefault(_text(metadata, 2), {})  # XEventMetadata.name
            # XEventMetadata.stats.bytes_value, an HloProto; .hlo_module.computations.instructions
            for instruction in _walk(metadata, 5, 6, 1, 3, 2):
                for scope in (_text(m, 2) for m in _walk(instruction, 7)):  # .metadata.op_name
                    names[_text(instruction, 1)] = scope
    return scopes


def _walk(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at a path of field numbers."""
    if not path:
        yield message
        return
    for number, value in _fields(message):
        if number == path[0] and isinstance(value, memoryview):
            yield from _walk(value, *path[1:])


def _text(message: memoryview, number: int) -> str:
    return next((bytes(v).decode() for n, v in _fields(message) if n == number), "")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value (an integer, or bytes) of each field of a protocol buffer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield tag >> 3, message[at : at + size]
        at += size


# --- The table ------------------------------------------------------------------------------------


def rows(found: list[Operation], top: int) -> list[dict[str, Any]]:
    """The `top` longest operations of each phase, and the sum of the others, with shares."""
    entries = []
    for phase in (*PHASES, _OTHER):
        own = [o for o in found if o.phase == phase]
        total, rest = sum(o.seconds for o in own), own[top:]
        shown = own[:top]
        if rest:
            calls, seconds = sum(o.calls for o in rest), sum(o.seconds for o in rest)
            shown.append(Operation(phase, "", f"{len(rest)} others", "", calls, seconds))
        entries += [o._asdict() | {"share": o.seconds / total} for o in shown]
    return entries
