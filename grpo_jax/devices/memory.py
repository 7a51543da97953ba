"""Memory of the devices and of the host: what is in use, and what to say when it runs out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax

_GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # as XLA writes sizes

# What can be changed, by the phase that ran out; the cheapest first.
_REMEDIES = {
    "start": "Split the model over more devices by mesh.fsdp, set algorithm.kl_coef = 0, which "
    "needs no reference, or take a smaller model.",
    "sft": "Lower sft.microbatch (0 takes all of sft.batch at once), set model.remat = full, or "
    "split the model over more devices by mesh.fsdp.",
    "rollout": "Lower rollout.num_slots (0 decodes all completions of a step at once) or "
    "rollout.max_tokens, set model.dtype = bfloat16, or use more devices.",
    "evaluation": "Lower rollout.num_slots (0 decodes all completions at once) or "
    "rollout.max_tokens, set model.dtype = bfloat16, or use more devices.",
    "scoring": "Lower batch.microbatch or rollout.max_tokens, set algorithm.kl_coef = 0, which "
    "needs no reference, or split the model over more devices by mesh.fsdp.",
    "rewards": "Lower rollout.num_slots (0 decodes all completions of a step at once).",
    "checkpoint": "Split the model over more devices by mesh.fsdp.",
    "update": "Lower batch.microbatch (0 chooses by tokens, -1 by memory; 1 is the least) or "
    "rollout.max_tokens, set model.remat = full, or split the model over more devices by "
    "mesh.fsdp.",
}


class OutOfMemory(ValueError):  # noqa: N818
    """A phase asked for more memory than a device had."""


def usage() -> dict[str, float]:
    """GiB in use by their logged names: those of the fullest device here, and of this process.

    A device is left out where its backend does not tell, as on CPU, whose memory is the process's.
    """
    values = {}
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    if stats:
        values["memory/device_gib"] = max(s["bytes_in_use"] for s in stats) / _GIB
        values["memory/device_peak_gib"] = max(s["peak_bytes_in_use"] for s in stats) / _GIB
    statm = Path("/proc/self/statm")  # on Linux alone
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        values["memory/process_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / _GIB
    return values


def limit() -> float | None:
    """Bytes that programs may use of each device here, of the smallest; None where none tells.

    A twentieth is left for what lies between arrays.
    """
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    return 0.95 * min(limits) if limits else None


def refusal(phase: str, error: jax.errors.JaxRuntimeError) -> OutOfMemory | None:
    """What to tell of an error that a phase met; None where memory is not what it lacked."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    asked = _asked_bytes(text)
    said = f"{asked / _GIB:,.2f} GiB were asked for at once" if asked else text.splitlines()[0]
    return OutOfMemory(f"Out of memory in phase {phase}: {said}{_there_is()}. {_REMEDIES[phase]}")


def _asked_bytes(text: str) -> int | None:
    """Bytes that XLA could not have, from its message; None where it names none."""
    found = re.search(
        r"(?:allocat\w+|allocate request for|reserve|Used) ([\d.]+) ?([KMGT]?)(?:i?B| bytes|\b)",
        text,
    )
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _there_is() -> str:
    """What the first device holds, as the end of a sentence."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return f" on {device.device_kind}"
    used, limit = stats["bytes_in_use"] / _GIB, stats["bytes_limit"] / _GIB
    return f" on {device.device_kind}, which has {limit:,.1f} GiB, {used:,.1f} of them in use"
