"""Descriptions of NVIDIA GPUs for XLA's compiler, for machines without such a GPU."""

from __future__ import annotations

import dataclasses

from grpo_jax.devices import chips


@dataclasses.dataclass(frozen=True)
class _Generation:
    """Limits of a compute capability, from the table in the CUDA C++ Programming Guide."""

    major: int
    minor: int
    lanes: int  # float32 units per multiprocessor
    threads: int  # resident per multiprocessor
    shared: int  # bytes of shared memory per multiprocessor
    specific: bool  # has features that later generations may lack


_A100 = _Generation(8, 0, 64, 2048, 164 * 2**10, False)
_ADA = _Generation(8, 9, 128, 1536, 100 * 2**10, False)
_HOPPER = _Generation(9, 0, 128, 2048, 228 * 2**10, True)
_B200 = _Generation(10, 0, 128, 2048, 228 * 2**10, True)
_RTX_50 = _Generation(12, 0, 128, 1536, 100 * 2**10, True)


@dataclasses.dataclass(frozen=True)
class _Gpu:
    kind: str  # its `device_kind` in JAX
    generation: _Generation
    cores: int  # multiprocessors
    cache: int  # bytes of L2
    ghz: float

    @property
    def chip(self) -> chips.Chip:
        found = chips.chip(self.kind)
        assert found is not None, self.kind
        return found


_MIB = 2**20
# By the names of `--topology`. Multiprocessors, caches and clocks are from NVIDIA's architecture
# whitepapers, like the rates in `chips`.
_GPUS = {
    "a100-40gb": _Gpu("NVIDIA A100-SXM4-40GB", _A100, 108, 40 * _MIB, 1.41),
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", _A100, 108, 40 * _MIB, 1.41),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", _HOPPER, 132, 50 * _MIB, 1.98),
    "h200": _Gpu("NVIDIA H200", _HOPPER, 132, 50 * _MIB, 1.98),
    "b200": _Gpu("NVIDIA B200", _B200, 148, 126 * _MIB, 1.965),
    "l4": _Gpu("NVIDIA L4", _ADA, 58, 48 * _MIB, 2.04),
    "l40s": _Gpu("NVIDIA L40S", _ADA, 142, 96 * _MIB, 2.52),
    "rtx4090": _Gpu("NVIDIA GeForce RTX 4090", _ADA, 128, 72 * _MIB, 2.52),
    "rtx5090": _Gpu("NVIDIA GeForce RTX 5090", _RTX_50, 170, 96 * _MIB, 2.407),
}
NAMES = tuple(_GPUS)


def chip(name: str) -> chips.Chip:
    """The rates of the GPU of that name."""
    return _GPUS[name].chip


def target(name: str) -> str:
    """The GPU as a `stream_executor.GpuTargetConfigProto` in text.

    It omits fields that only serve XLA's estimates of time. A thread block can have all but 1 KiB
    of a multiprocessor's shared memory; 48 KiB need no opt-in.
    """
    gpu = _GPUS[name]
    own, chip = gpu.generation, gpu.chip
    feature = "ACCELERATED_FEATURES" if own.specific else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_core: {own.shared}
  shared_memory_per_block_optin: {own.shared - 2**10}
  threads_per_core_limit: {own.threads}
  core_count: {gpu.cores}
  fpus_per_core: {own.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  memory_bandwidth: {int(chip.hbm_bytes_per_s)}
  device_memory_size: {int(chip.hbm_bytes)}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.ghz}
  cuda_compute_capability {{ major: {own.major} minor: {own.minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{gpu.kind}"
"""
