"""A config's samplers."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import ModelConfig, Sampling


def make_engine(
    config: ConfigDict,
    model: ModelConfig,
    stop_ids: tuple[int, ...],
    mesh: Mesh,
    *,
    exact: bool = False,
) -> Engine:
    """The config's sampler for a model of this shape; nothing is compiled or allocated yet.

    `exact`: without 8-bit weights, 8-bit cache or merged adapters, even if the config asks for
    them.
    """
    rollout, at_once = config.rollout, derived.prompts_begun(config)
    decoder = decode.decoder_for(
        model,
        mesh,
        sampling(config),
        stop_ids,
        rollout.max_tokens,
        jnp.dtype(config.model.dtype),
        weights="auto" if exact else rollout.weights_dtype,
        cache="auto" if exact else rollout.kv_cache_dtype,
        attention=rollout.attention,
        merge=config.lora.merge_for_rollout and not exact,
    )
    return Engine(
        decoder,
        num_slots=rollout.num_slots or at_once * config.batch.group,
        compact=rollout.compact,
        # An evaluation, with one lane a slot, prefills no more prompts at once than a rollout.
        num_read=at_once,
    )


def make_evaluator(config: ConfigDict, engine: Engine) -> Engine:
    """The sampler for evaluations: the config's own if it is exact."""
    decoder = engine.decoder
    exact = make_engine(config, decoder.model, decoder.stop_ids, decoder.mesh, exact=True)
    return engine if exact.decoder == decoder else exact


def sampling(config: ConfigDict) -> Sampling:
    return Sampling(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p)
