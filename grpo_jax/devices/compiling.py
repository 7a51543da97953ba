"""Compiler options, the number of programs in flight, and the time that a run spends compiling."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.devices import sharding

# Programs in flight. With 100, CPU devices of several processes wait for each other forever.
MAX_IN_FLIGHT = 16
_YNN = "xla_cpu_experimental_ynn_fusion_type"
_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted program with its arguments: a run calls it, a plan compiles it for shapes alone."""

    program: Callable
    args: tuple[Any, ...]  # arrays, or their shapes with shardings
    part: str = ""  # tells several calls of one program apart
    times: int = 1

    @property
    def name(self) -> str:
        return f"{self.program.__name__} {self.part}".strip()

    def __call__(self) -> Any:
        return self.program(*self.args)

    def lower(self) -> jax.stages.Lowered:
        return self.program.lower(*self.args)

    def result(self) -> Any:
        """Shapes and shardings of the call's results."""
        return self.program.eval_shape(*self.args)


def options(mesh: Mesh) -> dict[str, int | str]:
    """Compiler options of large programs on the devices of a mesh, for `jax.jit`.

    On CPU, XLA optimizes the code between matrix products less: compiling takes 0.6 of the time,
    and no program was measured to be slower. YNNPACK computes only matrix products: if it also
    computes sums, an update of a small model takes a fifth more time. If JAX is asked to compile
    quickly (JAX_DISABLE_MOST_OPTIMIZATIONS), other options halve the remaining compile time, and
    rollouts take a fifth more time.
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
    """Compiler options of programs that decode, for `jax.jit`.

    On CPU, YNNPACK computes sums here too, which takes a fifth less time.

    On GPU, two passes of XLA are off. One merges two products that share an operand, and so
    concatenates their weights again for every token. The other splits products of few rows along
    the summed axis, into float32 parts that another kernel adds (split-K); cuBLAS does that by
    itself where it pays.
    """
    if not sharding.is_gpu(mesh):
        return {name: value for name, value in options(mesh).items() if name != _YNN}
    wanted = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_experimental_force_split_k": 1}
    known = {name: value for name, value in wanted.items() if _is_known(name, value)}
    return options(mesh) | known


def exact(dtype: Any, f: Callable) -> Callable:
    """`f` with float32 products in full precision, if the network's `dtype` is float32.

    By default XLA multiplies float32 numbers with 11 bits of each on GPUs since Ampere (TF32), and
    with 8 on TPUs, which is bfloat16 for twice its memory. Kernels in `f` follow this setting. A
    CPU has full precision in any case.
    """
    is_full = jnp.dtype(dtype) == jnp.float32
    in_full = functools.partial(jax.default_matmul_precision, "highest")

    @functools.wraps(f)
    def traced(*args: Any, **kwargs: Any) -> Any:
        # The abstract mesh by its name, although it is that already: what JAX differentiates it
        # traces with a mesh that is set, and would not find the same function traced without one.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            with in_full() if is_full else contextlib.nullcontext():
                return f(*args, **kwargs)

    return traced


@functools.cache
def _is_known(option: str, value: int | str) -> bool:
    """Whether the installed XLA has this option: it refuses programs with an unknown one."""
    program = jax.jit(jnp.negative, compiler_options={option: value})
    try:
        program.lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Compiling:
    """While entered, counts the programs that are compiled or read from the compile cache."""

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
        """Compile seconds since the last call, and programs so far, by metric name."""
        values = {"time/compile_s": self.seconds - self._told_s, "programs": self.programs}
        self._told_s = self.seconds
        return values
