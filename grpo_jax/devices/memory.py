"""Memory of the devices and of the host: usage, limits, and the message when it runs out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax

_GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # as XLA writes sizes

# Remedies by the phase that ran out of memory, the cheapest first.
_REMEDIES = {
    "start": "Split the model over more devices by mesh.fsdp, set algorithm.kl_coef = 0, which "
    "needs no reference, or take a smaller model.",
    "sft": "Lower sft.microbatch (0 takes all of sft.batch at once), set model.remat = full, or "
    "split the model over more devices by mesh.fsdp.",
    "preference": "Lower preference.microbatch (1 is the least) or preference.max_tokens, set "
    "model.remat = full, or split the model over more devices by mesh.fsdp.",
    "reward_model": "Lower reward_model.microbatch (1 is the least) or reward_model.max_tokens, "
    "set model.remat = full, or split the model over more devices by mesh.fsdp.",
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
    """GiB in use, by metric name: of the fullest local device, and of this process.

    There is no figure of a device if its backend reports none, as on CPU, where the process's
    memory is the device's.
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
    """Bytes that programs may use on each local device (the smallest's); None if none reports it.

    A twentieth is left for gaps between arrays.
    """
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    limits = [s["bytes_limit"] for s in stats if "bytes_limit" in s]
    return 0.95 * min(limits) if limits else None


def refusal(phase: str, error: jax.errors.JaxRuntimeError) -> OutOfMemory | None:
    """The message for an out-of-memory error in a phase; None for other errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    asked = _asked_bytes(text)
    said = f"{asked / _GIB:,.2f} GiB were asked for at once" if asked else text.splitlines()[0]
    return OutOfMemory(f"Out of memory in phase {phase}: {said}{_there_is()}. {_REMEDIES[phase]}")


def _asked_bytes(text: str) -> int | None:
    """Bytes that XLA could not allocate, from its message; None if it names none."""
    found = re.search(
        r"(?:allocat\w+|allocate request for|reserve|Used) ([\d.]+) ?([KMGT]?)(?:i?B| bytes|\b)",
        text,
    )
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _there_is() -> str:
    """The first device's memory and usage, as the end of a sentence."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return f" on {device.device_kind}"
    used, limit = stats["bytes_in_use"] / _GIB, stats["bytes_limit"] / _GIB
    return f" on {device.device_kind}, which has {limit:,.1f} GiB, {used:,.1f} of them in use"
