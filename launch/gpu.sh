#!/usr/bin/env bash
# Trains on the GPUs of one machine:  launch/gpu.sh --config configs/qwen_jsonl.py [--config.NAME=VALUE ...]
set -eu
# Most of the memory for JAX from the start: growing step by step fragments it.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
exec python -m grpo_jax.train "$@"
