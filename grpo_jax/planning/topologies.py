"""The topologies that programs are compiled for, and the rates of their chips.

A chip is one JAX device. Rates are peaks, so a plan's seconds are a lower bound, not a forecast.
"""

from __future__ import annotations

import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from grpo_jax.devices import chips
from grpo_jax.planning import gpu_targets


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip; None if unknown, as for a simulated CPU."""

    name: str
    memory: float | None  # bytes
    flops: float | None  # dense bfloat16 operations per second
    bandwidth: float | None  # bytes per second between memory and cores
    link: float | None  # bytes per second sent along one dimension of the torus, in both directions
    clock: float | None  # cycles per second: peak rate over the matrix units' operations per cycle
    accelerator: str  # a value of TPU_ACCELERATOR_TYPE that lets the compiler start
    usable: float | None  # bytes of its memory that programs may use
    source: str


def _chip(
    name: str,
    rates: chips.Chip,
    usable: float,
    clock: float | None = None,
    accelerator: str = "",
) -> Chip:
    """All links of a GPU serve any mesh axis; a TPU's serve one dimension of the torus each."""
    return Chip(
        name,
        rates.hbm_bytes,
        rates.bf16_flops,
        rates.hbm_bytes_per_s,
        rates.ici_bytes_per_s / _DIMENSIONS.get(rates.name, 1),
        clock,
        accelerator,
        usable,
        rates.source,
    )


def _tpu(name: str, kind: str, clock: float, accelerator: str) -> Chip:
    rates = chips.chip(kind)
    return _chip(name, rates, rates.hbm_bytes - _RESERVED, clock, accelerator)


def _gpu(name: str) -> Chip:
    rates = gpu_targets.chip(name)
    return _chip(name, rates, _GPU_FRACTION * rates.hbm_bytes)


# Bytes of a TPU that its runtime keeps: compilers for v5e report 15.75 of 16 GiB as usable. Below,
# the share of a GPU's memory that `launch/gpu.sh` gives to JAX.
_RESERVED = 2**28
_GPU_FRACTION = 0.92
_DIMENSIONS = {"TPU v4": 3, "TPU v5p": 3, "TPU v5e": 2, "TPU v6e": 2, "TPU v7x": 3}  # of the torus

CHIPS = {
    "v4": _tpu("v4", "TPU v4", 1.05e9, "v4-128"),
    "v5e": _tpu("v5e", "TPU v5e", 1.5e9, "v5litepod-256"),
    "v5p": _tpu("v5p", "TPU v5p", 1.75e9, "v5p-128"),
    "v6e": _tpu("v6e", "TPU v6e", 1.75e9, "v6e-64"),
}
GPUS = {name: _gpu(name) for name in gpu_targets.NAMES}
CPU = Chip("cpu", None, None, None, None, None, "", None, "simulated: no rates")


def of_device(device: jax.Device) -> Chip | None:
    """The chip of a device; None if it is unknown, as for a CPU."""
    rates = chips.chip(device.device_kind)
    if rates is None:
        return None
    return _chip(rates.name, rates, rates.hbm_bytes)


def devices(topology: str) -> tuple[Chip, list[jax.Device]]:
    """The chip and the devices of a topology: "v5e:16x16", "h100:8", or "cpu:8", simulated.

    The hardware need not exist; the extras `plan` and `cuda13` install the compilers. This sets the
    environment variables that they read, so call it before anything else uses JAX. Raises
    ValueError for an unknown topology.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return CPU, _cpus(int(shape))
    if kind in GPUS and shape in ("1", "2", "4", "8"):
        return GPUS[kind], _gpus(topology, kind, shape)
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ValueError(
            f"--topology {topology}: expected one of {', '.join(CHIPS)} and the chips along each "
            f"dimension, such as v5e:16x16 or v5p:4x4x4; one of {', '.join(GPUS)} and 1, 2, 4 or 8 "
            "of them in one machine, such as h100:8; or cpu:8 for simulated devices."
        )
    chip = CHIPS[kind]
    # The compiler's lowest effort takes a quarter of its time. On a 7B shape the operations are the
    # same, and memory is within a tenth of that at the default effort.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    jax.config.update("jax_memory_fitting_effort", -1.0)
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nothing runs: plans do not disturb each other
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=chip.accelerator,
    )
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for TPUs, and prints warnings
    return chip, _described(topology, "TPU", "plan", platform="tpu", topology_name=topology)


def _gpus(topology: str, kind: str, number: str) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    # One slice of one host.
    asked = {"target_config": gpu_targets.target(kind), "topology": f"1x1x{number}"}
    return _described(topology, "CUDA", "gpu", platform="cuda", **asked)


def _described(name: str, what: str, extra: str, **asked: str) -> list[jax.Device]:
    try:
        return list(topologies.get_topology_desc(**asked).devices)
    except Exception as error:  # the compilers' own errors are of several kinds
        raise ValueError(
            f"--topology {name}: the {what} compiler does not know it, or is not installed "
            f'(python -m pip install -e ".[{extra}]"). It says: {str(error).splitlines()[0]}'
        ) from error


def _cpus(number: int) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # JAX has started: use its devices if they suffice
        pass
    there = jax.devices("cpu")
    if len(there) < number:
        raise ValueError(f"--topology cpu:{number}: JAX has started with {len(there)} devices.")
    return there[:number]
