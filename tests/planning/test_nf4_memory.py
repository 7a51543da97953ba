"""The memory of an update with a base in NF4, compiled for a TPU that need not be there."""

from __future__ import annotations

import pytest

from grpo_jax.config import options
from grpo_jax.devices import sharding
from grpo_jax.planning import topologies
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.programs import Step
from grpo_jax.setup import lora
from grpo_jax.structs import Layer, ModelConfig, Rotary

MODEL = ModelConfig(
    family="llama", vocab_size=2048, width=1024, mlp_width=4096, layers=(Layer(),) * 2,
    num_heads=8, num_kv_heads=2, head_size=128, rotaries=(Rotary(1e4),), norm_eps=1e-5,
    max_position=512, tied_head=False,
)  # fmt: skip


def temporary_bytes(base: str, devices) -> int:
    """Bytes of the gradient's arrays besides its arguments and results."""
    config = options.default()
    config.data.path, config.model.path = "data", "model"
    config.model.dtype, config.model.remat = "bfloat16", "full"
    config.lora.rank, config.lora.base_dtype = 16, base
    config.batch.prompts, config.batch.group, config.batch.microbatch = 1, 8, 1
    config.data.max_prompt_tokens = config.rollout.max_tokens = 32
    mesh = sharding.make_mesh(data=1, devices=devices)
    step = Step(config, lora.adapted(MODEL, config), mesh, Lengths.of(config, 0))
    (program,) = [p for p in step.programs() if p.name == "gradient"]
    with step._compiler_device():
        return program.call.lower().compile().memory_analysis().temp_size_in_bytes


def test_an_update_decodes_one_kernel_at_a_time():
    """And keeps no array as large as a kernel for each of the 16 levels."""
    pytest.importorskip("libtpu", reason='needs the extra plan: pip install "grpo_jax[plan]"')
    _, devices = topologies.devices("v5p:2x2x1")
    plain, nf4 = (temporary_bytes(base, devices[:1]) for base in ("auto", "nf4"))
    assert nf4 - plain < 3 * 4 * MODEL.width * MODEL.mlp_width
