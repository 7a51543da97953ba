"""The topologies that programs are compiled for, and the rates of their chips.

A chip is one JAX device. Rates are peaks: a plan's seconds are a floor, not a forecast.
"""

from __future__ import annotations

import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from grpo_jax import chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip; None where there are none, as for a simulated CPU."""

    name: str
    memory: float | None  # bytes
    flops: float | None  # dense bfloat16 operations per second
    bandwidth: float | None  # bytes per second between memory and cores
    link: float | None  # bytes per second sent along one dimension of the torus, both ways round
    clock: float | None  # cycles per second: the peak over the operations of the matrix units
    accelerator: str  # a value of TPU_ACCELERATOR_TYPE that lets the compiler start
    source: str

    @property
    def usable(self) -> float | None:
        """Bytes of its memory that programs may use."""
        return None if self.memory is None else self.memory - RESERVED


def _tpu(name: str, kind: str, dimensions: int, clock: float, accelerator: str) -> Chip:
    rates = chips.chip(kind)
    return Chip(
        name,
        rates.hbm_bytes,
        rates.bf16_flops,
        rates.hbm_bytes_per_s,
        rates.ici_bytes_per_s / dimensions,
        clock,
        accelerator,
        rates.source,
    )


CHIPS = {
    "v4": _tpu("v4", "TPU v4", 3, 1.05e9, "v4-128"),
    "v5e": _tpu("v5e", "TPU v5e", 2, 1.5e9, "v5litepod-256"),
    "v5p": _tpu("v5p", "TPU v5p", 3, 1.75e9, "v5p-128"),
    "v6e": _tpu("v6e", "TPU v6e", 2, 1.75e9, "v6e-64"),
}
CPU = Chip("cpu", None, None, None, None, None, "", "simulated: no rates")

# Of a chip's memory the runtime keeps some: compilers for v5e report 15.75 of 16 GiB as usable.
RESERVED = 2**28


def devices(topology: str) -> tuple[Chip, list[jax.Device]]:
    """The chip and the devices of a topology such as "v5e:16x16", or of "cpu:8", simulated.

    No TPU need be there; the extra `plan` brings its compiler. Sets the environment that the
    compiler reads, so it must come before anything else uses JAX. Raises ValueError for a topology
    that there is not.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return CPU, _cpus(int(shape))
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ValueError(
            f"--topology {topology}: expected one of {', '.join(CHIPS)} and the chips along each "
            "dimension, such as v5e:16x16 or v5p:4x4x4, or cpu:8 for simulated devices."
        )
    chip = CHIPS[kind]
    # The least effort of the compiler takes a quarter of its time. On a 7B shape the operations are
    # the same, and memory is within a tenth of what it finds with the usual effort.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    jax.config.update("jax_memory_fitting_effort", -1.0)
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nothing is run: two plans do not disturb each other
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=chip.accelerator,
    )
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for TPUs, and prints what it misses
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the compiler's own errors are of several kinds
        raise ValueError(
            f"--topology {topology}: the TPU compiler does not know it, or is not installed "
            f'(python -m pip install -e ".[plan]"). It says: {str(error).splitlines()[0]}'
        ) from error
    return chip, list(described.devices)


def _cpus(number: int) -> list[jax.Device]:
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # JAX has started: what it has must do
        pass
    there = jax.devices("cpu")
    if len(there) < number:
        raise ValueError(f"--topology cpu:{number}: JAX has started with {len(there)} devices.")
    return there[:number]
