"""Shapes of a step's rows: completions, and what a loss reads of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.devices import sharding
from grpo_jax.learner import scoring
from grpo_jax.setup.learner import Learner
from grpo_jax.structs import Experience, Rollouts


@dataclasses.dataclass(frozen=True)
class Rows:
    """Shapes of arrays that a mesh splits along their first axis."""

    mesh: Mesh

    def of(self, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        """The shape with its sharding."""
        axes = ("rows",) + (None,) * (len(shape) - 1)
        placed = sharding.sharding_of(self.mesh, axes, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def rollouts(self, shape_PG: tuple[int, int], width: int, tokens: int) -> Rollouts:
        """Completions of at most `tokens` tokens, and prompts padded to `width`."""
        prompts, _ = shape_PG
        return Rollouts(
            prompt_PQ=self.of((prompts, width), jnp.int32),
            prompt_length_P=self.of((prompts,), jnp.int32),
            completion_PGC=self.of((*shape_PG, tokens), jnp.int32),
            logp_PGC=self.of((*shape_PG, tokens), jnp.float32),
            length_PG=self.of(shape_PG, jnp.int32),
            stopped_PG=self.of(shape_PG, jnp.bool_),
        )

    def experience(
        self,
        config: ConfigDict,
        learner: Learner,
        length_PG: np.ndarray,
        width: int,
        *,
        has_reference: bool,
    ) -> Experience:
        """The experience of a step of a config, with completions of these lengths."""
        tokens = scoring.cut_to(config.rollout.max_tokens, int(length_PG.max()))
        floats = self.of((*length_PG.shape, tokens), jnp.float32)
        flags = self.of((*length_PG.shape, tokens), jnp.bool_)
        alike = self.of(length_PG.shape, jnp.float32)
        critic, teaches = learner.critic is not None, learner.prepare.teach is not None
        adaptive = {controller.coefficient for controller in learner.controllers}
        method = derived.hybrid_method(config)
        rollouts = self.rollouts(length_PG.shape, width, tokens)
        if method is not None and method.given:
            chosen = flags if method.given == "completion" else None
            rollouts = rollouts.replace(given_PGC=flags, chosen_PGC=chosen)
        if derived.forks(config):
            begin_PGC = self.of((*length_PG.shape, tokens), jnp.int32)
            rollouts = rollouts.replace(chosen_PGC=flags, begin_PGC=begin_PGC)
        return Experience(
            rollouts=rollouts,
            advantage=floats if critic or teaches else alike,
            action_PGC=flags,
            old_logp_PGC=floats if derived.needs_old_pass(config) else None,
            ref_logp_PGC=floats if has_reference else None,
            kl_coef_PG=alike if "kl_coef" in adaptive else None,
            entropy_coef_PG=alike if "entropy_coef" in adaptive else None,
            top_entropy_PGC=flags if learner.prepare.selects else None,
            policy_weight_PGC=None if method is None else floats,
            nll_weight_PGC=None if method is None else floats,
            mix_PG=alike if "mix" in adaptive else None,
            teacher_logp_PGC=floats if teaches else None,
            value_PGC=floats if critic else None,
            return_PGC=floats if critic else None,
        )
