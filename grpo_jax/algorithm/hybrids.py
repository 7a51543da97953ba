"""Hybrids of supervised and reinforcement learning: which tokens carry which loss, and how much.

A step's groups hold demonstrations besides the completions that the policy drew: as one more
completion of each group, or as the beginning of each. A hybrid is a row of
`hybrid_methods.METHODS`. Its loss is

    policy loss / its own count  +  coefficient * nll / its own count

where both counts are those of the whole update. `docs/hybrids.md` has the formulas, and the
differences from the papers. Log-probabilities are float32 nats; H of a token is its entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.hybrid_methods import Method, Schedule
from grpo_jax.algorithm.objective import Objective, TokenTerms
from grpo_jax.structs import Array, Experience, Rollouts


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """A method with its numbers; `config.hybrid` documents each."""

    method: Method
    nll_coef: float
    shaping: float = 0.1
    pass_reward: float = 1.0
    max_pass_rate: float = 0.0
    mix: Schedule | None = None  # None: the sum of both losses
    hint: Schedule | None = None  # probability of each token of a demonstration to be in the hint

    def known(self, reward: Array, rollouts: Rollouts, action_PGC: Array) -> Array:
        """The rewards that count in their groups: NaN where a given completion's does not.

        `reward` [P, G], or by function [P, G, R].
        """
        if self.method.given != "completion":
            return reward
        left_out_PG = rollouts.given_PGC.any(axis=-1)
        if self.method.is_reinforced:  # but for places without a demonstration
            left_out_PG &= ~action_PGC.any(axis=-1)
        shape = left_out_PG.shape + (1,) * (reward.ndim - 2)
        return jnp.where(left_out_PG.reshape(shape), jnp.nan, reward)

    def weights(
        self,
        objective: Objective,
        reward_PG: Array,
        rollouts: Rollouts,
        action_PGC: Array,
        num_minibatches: int,
        known_PG: Array | None = None,
    ) -> dict[str, Array]:
        """Weights of each token in both losses, over their counts, as fields of `Experience`.

        `reward_PG`: of all completions, given ones too. Minibatch i of n holds prompts i, i + n,
        ...; each count is that of its minibatch. `known_PG`: False for completions whose reward is
        unknown. They have no policy loss and no part in the pass rate of their group, and a group
        without a known one has no nll by it. Other nll of given tokens needs no reward. None: all
        are known.
        """
        method = self.method
        given_PGC = given_tokens(rollouts, action_PGC)
        policy_PGC = action_PGC if method.is_reinforced else action_PGC & ~given_PGC
        if known_PG is not None:
            policy_PGC &= known_PG[..., None]
        nll_PGC = given_PGC & (method.nll == "given")
        passed_PG = reward_PG >= self.pass_reward  # an unknown reward does not pass
        if method.nll == "passed":
            nll_PGC = policy_PGC & passed_PG[..., None]
        if method.switches:
            drawn_PG = ~given_PGC.any(axis=-1) & ~_fillers(rollouts)
            if known_PG is not None:
                drawn_PG &= known_PG
            count_P = jnp.maximum(drawn_PG.sum(axis=1), 1)
            rate_P = (passed_PG & drawn_PG).sum(axis=1) / count_P
            fails_P = (rate_P <= self.max_pass_rate) & given_PGC.any(axis=(1, 2))
            fails_P &= drawn_PG.any(axis=1)
            policy_PGC &= ~fails_P[:, None, None]
            nll_PGC &= fails_P[:, None, None]
        of_policy = lambda mask_PGC: losses.weights(mask_PGC, objective)  # noqa: E731
        if method.given == "completion" and not method.is_reinforced:  # the last one has no part
            drawn_PGC = _over_count(policy_PGC[:, :-1], num_minibatches, of_policy)
            policy = jnp.pad(drawn_PGC, ((0, 0), (0, 1), (0, 0)))
        else:
            policy = _over_count(policy_PGC, num_minibatches, of_policy)
        return {
            "policy_weight_PGC": policy,
            "nll_weight_PGC": _over_count(nll_PGC, num_minibatches, _alike),
        }

    def of_drawn(self, terms: TokenTerms, entropy: Array) -> TokenTerms:
        """The terms of the policy loss of drawn tokens, with the weights of their surrogate."""
        if not self.method.positive_coef:
            return terms
        coef = self.method.positive_coef * jnp.exp(jax.lax.stop_gradient(entropy))
        return terms.replace(policy_weight=jnp.where(terms.advantage > 0, coef, 1.0))

    def policy_loss(self, drawn: Array, logp: Array, given: Array, advantage: Array) -> Array:
        """The policy loss of each token, from that of `drawn` ones; `given` tells which are not."""
        if not self.method.is_reinforced:
            return drawn
        prob = jnp.exp(logp)
        shaped = prob / (prob + self.shaping) if self.method.shapes else prob
        return jnp.where(given, -shaped * advantage, drawn)

    def nll(self, logp: Array, entropy: Array) -> Array:
        """The nll of each token with its weight by the policy, which has no gradient."""
        prob = jax.lax.stop_gradient(jnp.exp(logp))
        if self.method.weight == "uncertainty":
            return -logp * prob * (1 - prob)
        if self.method.weight == "certainty":
            return -logp * jnp.exp(-jax.lax.stop_gradient(entropy))
        return -logp


@dataclasses.dataclass(frozen=True)
class Weigh:
    """The values of an experience that a hybrid adds before its updates."""

    hybrid: Hybrid
    objective: Objective
    num_minibatches: int

    def __call__(
        self, experience: Experience, reward_PG: Array, known_PG: Array | None = None
    ) -> Experience:
        """The experience with the weights of its tokens; `known_PG`: as for `Hybrid.weights`."""
        of = self.objective, reward_PG, experience.rollouts, experience.action_PGC
        return experience.replace(**self.hybrid.weights(*of, self.num_minibatches, known_PG))


def given_tokens(of: Rollouts | Experience, action_PGC: Array) -> Array:
    """True for tokens of demonstrations that are trained on, bool [P, G, C]."""
    rollouts = of.rollouts if isinstance(of, Experience) else of
    if rollouts.given_PGC is None:
        return jnp.zeros_like(action_PGC)
    return rollouts.given_PGC & action_PGC


def _fillers(rollouts: Rollouts) -> Array:
    """True for places of demonstrations that a problem does not have, [P, G]."""
    return rollouts.given_PGC[..., 0] & ~rollouts.chosen_PGC[..., 0]


def _alike(mask_PGC: Array) -> tuple[Array, Array]:
    weight_PGC = mask_PGC.astype(jnp.float32)
    return weight_PGC, weight_PGC.sum()


def _over_count(
    mask_PGC: Array, num_minibatches: int, weigh: Callable[[Array], tuple[Array, Array]]
) -> Array:
    """The weights of tokens, divided by the divisor of their minibatch, float32 [P, G, C]."""

    def one(mask_PGC: Array) -> Array:
        weight_PGC, count = weigh(mask_PGC)
        return weight_PGC / jnp.maximum(count, 1.0)

    by_minibatch = mask_PGC.reshape(-1, num_minibatches, *mask_PGC.shape[1:])
    return jax.vmap(one, in_axes=1, out_axes=1)(by_minibatch).reshape(mask_PGC.shape)
