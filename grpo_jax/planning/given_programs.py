"""The programs of an update on completions that the data give, compiled from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.learner import train_state
from grpo_jax.planning.compiled import Program, bytes_per_device
from grpo_jax.planning.programs import Step
from grpo_jax.planning.rows import Rows
from grpo_jax.setup import lora as lora_setup
from grpo_jax.setup.learner import Learner
from grpo_jax.structs import Experience, ModelConfig, Rollouts


class GivenStep(Step):
    """The programs of one update on given completions; nothing is sampled."""

    def __init__(
        self,
        config: ConfigDict,
        model: ModelConfig,
        mesh: Mesh,
        learner: Learner,
        rollouts: Rollouts,
        fields: Mapping[str, str],
        phase: str,
    ):
        """`rollouts`: on the host, of which shapes and lengths are read. `fields`: dtypes of
        further fields [P, G] of the experience. `phase`: of the programs."""
        self.config, self.model, self.mesh, self.learner = config, model, mesh, learner
        self.known, self._device, self._phase = {}, mesh.devices.flat[0], phase
        kept, dtype = jnp.dtype(config.model.param_dtype), jnp.dtype(config.model.dtype)
        self.state = train_state.state_like(model, mesh, learner.optimizer, kept)
        self.frozen = lora_setup.frozen_like(model, mesh, dtype)
        self.length_PG = rollouts.length_PG
        shape, rows = rollouts.length_PG.shape, Rows(mesh)
        like = jax.tree.map(lambda x: rows.of(x.shape, x.dtype), rollouts)
        self.experience = Experience(
            rollouts=like,
            advantage=rows.of(shape, jnp.float32),
            action_PGC=rows.of(rollouts.completion_PGC.shape, jnp.bool_),
            old_logp_PGC=None,
            ref_logp_PGC=None,
            **{name: rows.of(shape, jnp.dtype(kind)) for name, kind in fields.items()},
        )

    def held(self) -> dict[str, float]:
        """Bytes of arrays on each device, by content, without the programs' own memory."""
        gradients, *_ = self.learner.update.zero_gradient.eval_shape()
        return {
            "weights": bytes_per_device((self.state.params, self.frozen)),
            "optimizer": bytes_per_device(self._kept_state().opt_state),
            "gradients": bytes_per_device(gradients),
            "rows": bytes_per_device(self.experience),
        }

    def programs(self) -> list[Program]:
        """The programs of an update, with the other arrays that exist while they run."""
        update, held = self.learner.update, (self._kept_state(), self.frozen)
        found = []
        for call in update.calls(self.state, self.experience, self.length_PG, self.frozen):
            loops = int(call.args[1]) if call.program is update.gradient else 1
            beside: Any = held
            if call.program is update.optimizer_step:
                beside = (*held, self.experience)
            found.append(Program.of(call, self._phase, beside, loops=loops))
        return found
