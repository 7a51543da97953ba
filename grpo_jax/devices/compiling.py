"""How XLA is asked for programs, how many at once, and how long a run waited for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.devices import sharding

# Launches at once: CPU devices of several processes wait for each other forever with 100 in flight.
MAX_IN_FLIGHT = 16
_YNN = "xla_cpu_experimental_ynn_fusion_type"
_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted program with its arguments: a run calls it, a plan compiles it for shapes alone."""

    program: Callable
    args: tuple[Any, ...]  # arrays, or their shapes with shardings
    part: str = ""  # of what, where a program is called for several things
    times: int = 1

    @property
    def name(self) -> str:
        return f"{self.program.__name__} {self.part}".strip()

    def __call__(self) -> Any:
        return self.program(*self.args)

    def lower(self) -> jax.stages.Lowered:
        return self.program.lower(*self.args)

    def result(self) -> Any:
        """Shapes and shardings of what it gives."""
        return self.program.eval_shape(*self.args)


def options(mesh: Mesh) -> dict[str, int | str]:
    """Options of `jax.jit` for large programs on the devices of a mesh.

    On CPU less is tried with what stands between the matrix products: compiling takes 0.6 of the
    time, and no program was measured to be slower. The library YNNPACK computes products alone:
    with sums by it too, an update of a small model takes a fifth more time. Where JAX was asked to
    compile quickly (JAX_DISABLE_MOST_OPTIMIZATIONS) compiling takes half of what is left, and
    rollouts a fifth more time.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return {}
    wanted = {
        "xla_backend_optimization_level": 1,
        _YNN: "LIBRARY_FUSION_TYPE_DOT",
    }
    if jax.config.values["jax_disable_most_optimizations"]:
        wanted = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    return {name: value for name, value in wanted.items() if _is_known(name, value)}


def options_of_decoding(mesh: Mesh) -> dict[str, int | str]:
    """The same of programs that decode.

    On CPU YNNPACK sums there too, which takes a fifth less time.

    XLA for GPUs makes one product of two that share an operand, and for that puts their weights
    side by side anew for every token. And it takes products of few rows apart along what is summed,
    in float32 parts that another kernel adds; cuBLAS does so by itself where it pays.
    """
    if not sharding.is_gpu(mesh):
        return {name: value for name, value in options(mesh).items() if name != _YNN}
    wanted = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_experimental_force_split_k": 1}
    known = {name: value for name, value in wanted.items() if _is_known(name, value)}
    return options(mesh) | known


def exact(dtype: Any, f: Callable) -> Callable:
    """`f`, its float32 products in full precision where a network's `dtype` is float32.

    Left to itself XLA multiplies float32 with 11 bits of each number on GPUs since Ampere (TF32)
    and with 8 on TPUs, which is bfloat16 for twice its memory. Kernels in `f` follow. A CPU has
    full precision in any case.
    """
    if jnp.dtype(dtype) != jnp.float32:
        return f

    @functools.wraps(f)
    def in_full(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return f(*args)

    return in_full


@functools.cache
def _is_known(option: str, value: int | str) -> bool:
    """Whether the XLA that is here has an option: programs with another cannot be compiled."""
    program = jax.jit(jnp.negative, compiler_options={option: value})
    try:
        program.lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Compiling:
    """Counts programs compiled, or read from the compile cache, while it is entered."""

    def __init__(self) -> None:
        self.programs, self.seconds, self._told_s = 0, 0.0, 0.0

    def __enter__(self) -> Compiling:
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, seconds: float, **_) -> None:
        if event == _EVENT:
            self.programs += 1
            self.seconds += seconds

    def since_last(self) -> dict[str, float]:
        """Seconds since the last call, and programs so far, by their logged names."""
        values = {"time/compile_s": self.seconds - self._told_s, "programs": self.programs}
        self._told_s = self.seconds
        return values
