#!/usr/bin/env bash
# Trains on the GPUs of one machine:  launch/gpu.sh --config configs/qwen_jsonl.py [--config.NAME=VALUE ...]
#
# XLA_FLAGS is left as it is: no flag was found that helps all programs. Those that decode are compiled
# with two of their own (grpo_jax/devices/compiling.py). benchmarks/RESULTS.md has the numbers.
#   xla_gpu_enable_command_buffer=+WHILE replays the whole loop over tokens as one CUDA graph, in
#     place of one for each token: 0.97 of the speed on an H200. Graphs of what stands inside the
#     loop are on by default.
#   xla_gpu_enable_pipelined_all_gather, _reduce_scatter and _all_reduce send for one layer while
#     another computes (mesh.fsdp above 1). Compiled for eight H100, they take a quarter more
#     activations and leave as much or more to wait for. config.model.scan_layers = "off" leaves less.
#   xla_gpu_enable_latency_hiding_scheduler, which orders all else beside arithmetic, is on by default.
#   xla_gpu_enable_triton_gemm is on by default; cuBLAS alone was slower for others.
#   xla_gpu_deterministic_ops=true makes runs repeatable bit for bit on one kind of GPU, and slower.
set -eu

# Most of the memory for JAX from the start: growing step by step fragments it. The rest is for
# what allocates beside it: CUDA's context, cuDNN, NCCL.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}

exec python -m grpo_jax.train "$@"
