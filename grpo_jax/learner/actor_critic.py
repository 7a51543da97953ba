"""The updates of a policy and its critic on the same minibatch (PPO).

The two are separate networks with separate optimizers. Both losses read what was computed before
the rollout's first update, so the order of the two updates does not matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.devices.compiling import Call
from grpo_jax.learner import train_state
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.update import Launched, Update
from grpo_jax.structs import ActorCritic, Array, Experience, Params, TrainState


@dataclasses.dataclass(frozen=True)
class ActorCriticUpdate:
    """As `Update`, of a policy and its critic. `warming` updates the critic alone."""

    policy: Update
    critic: Update
    critic_frozen: Params | None = None  # the weights under its adapters; None: all of them learn

    def __call__(
        self,
        state: ActorCritic,
        experience: Experience,
        index: int,
        before_donating: Callable[[Any], None] = lambda carry: None,
        frozen: Params | None = None,
    ) -> tuple[ActorCritic, dict[str, Array]]:
        """The state after both updates on minibatch `index`, and the metrics of both.

        Arguments as for `Update`. Each is refused alone if it is not finite; `skipped` is True if
        one of them was.
        """
        of_policy = self.policy.launched(policy_of(state), experience, index, frozen)
        of_critic = self._launched_critic(state, experience, index)
        before_donating((of_policy.carry, of_critic.carry))
        policy, metrics = of_policy.step()
        critic, of_values = of_critic.step()
        of_values = _of_values(of_values)
        skipped = metrics["skipped"] | of_values["skipped"]
        return together(policy, critic), metrics | of_values | {"skipped": skipped}

    def warming(
        self,
        state: ActorCritic,
        experience: Experience,
        index: int,
        before_donating: Callable[[Any], None] = lambda carry: None,
        frozen: Params | None = None,
    ) -> tuple[ActorCritic, dict[str, Array]]:
        """As `__call__`, but the policy stays. Its update counts as refused, so that the learning
        rate's schedule begins later."""
        of_critic = self._launched_critic(state, experience, index)
        before_donating(of_critic.carry)
        critic, of_values = of_critic.step()
        none = {"policy/loss": jnp.float32(0), "policy/grad_norm": jnp.float32(0)}
        policy = train_state.refuse(policy_of(state), 1)
        return together(policy, critic), none | _of_values(of_values)

    def _launched_critic(self, state: ActorCritic, experience: Experience, index: int) -> Launched:
        return self.critic.launched(state.critic, experience, index, self.critic_frozen)

    @property
    def sizes(self) -> dict[str, CompiledSizes]:
        return {"update": self.policy.sizes, "critic's update": self.critic.sizes}

    def calls(
        self,
        state: ActorCritic,
        experience: Experience,
        length_PG: np.ndarray,
        frozen: Params | None = None,
    ) -> list[Call]:
        """As `Update.calls`: the policy's programs, then the critic's, with the part "critic"."""
        of_policy = self.policy.calls(policy_of(state), experience, length_PG, frozen)
        of_critic = self.critic.calls(state.critic, experience, length_PG, self.critic_frozen)
        return of_policy + [dataclasses.replace(call, part="critic") for call in of_critic]


def policy_of(state: ActorCritic) -> TrainState:
    """The policy's own state."""
    return TrainState(state.params, state.opt_state, state.num_updates, state.num_skipped)


def together(policy: TrainState, critic: TrainState) -> ActorCritic:
    """Both states as one."""
    return ActorCritic(
        policy.params, policy.opt_state, policy.num_updates, policy.num_skipped, critic
    )


def _of_values(metrics: dict[str, Array]) -> dict[str, Array]:
    """A critic's metrics, by names that are not the policy's."""
    return {name.replace("policy/", "value/"): value for name, value in metrics.items()}
