#!/usr/bin/env bash
# Trains on the GPUs of one machine:  launch/gpu.sh --config configs/qwen_jsonl.py [--config.NAME=VALUE ...]
#
# A flag that is set already is left as it is. Those for several GPUs were not measured with this
# trainer: they follow what XLA's documentation and its issues say of them.
set -eu

# Most of the memory for JAX from the start: growing step by step fragments it. The rest is for
# what allocates beside it: CUDA's context, cuDNN, NCCL.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}

# The XLA flag $1 with the value $2, unless XLA_FLAGS has it. XLA ends a program at its start for a
# flag that it does not know; these are known to jaxlib 0.10.2.
flag() {
  case " ${XLA_FLAGS:-} " in
    *" --$1="* | *" --$1 "*) ;;
    *) export XLA_FLAGS="${XLA_FLAGS:-} --$1=$2" ;;
  esac
}

# Communication runs beside arithmetic, ordered by an estimate of how long each takes. It needs some
# memory and does nothing on one GPU, which has no collectives.
flag xla_gpu_enable_latency_hiding_scheduler true
# Collectives of a loop over layers go round it: the next layer's weights are gathered while this
# one computes (mesh.fsdp above 1).
flag xla_gpu_enable_pipelined_all_gather true
flag xla_gpu_enable_pipelined_reduce_scatter true
flag xla_gpu_enable_pipelined_all_reduce true

# Left at XLA's own choice:
#   xla_gpu_enable_command_buffer=+WHILE replays the whole loop over tokens as one CUDA graph, in
#     place of one for each token: 0.97 of the speed on an H200 (benchmarks/RESULTS.md). Graphs of
#     what stands inside the loop are on by default.
#   xla_gpu_enable_triton_gemm is on by default; cuBLAS alone was slower for others.
#   xla_gpu_deterministic_ops=true makes runs repeatable bit for bit on one kind of GPU, and slower.

exec python -m grpo_jax.train "$@"
