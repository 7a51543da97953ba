"""The losses of models with a scalar head: a reward model's, and a critic's.

They are components as those of `components.py`, of values in place of log-probabilities: a model
with a scalar head gives one number for each state. Arrays are [P, G, C] of a microbatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.structs import Array, Experience

Take = Callable[[Array], Array]

# --- Reward models --------------------------------------------------------------------------------


def bradley_terry(
    chosen: Array, rejected: Array, margin: Array | float = 0.0, centre_coef: float = 0.0
) -> Array:
    """Loss of each pair: -log sigmoid(chosen - rejected - margin) + coefficient * (sum of both)^2.

    The probability that the chosen one is preferred is sigmoid(chosen - rejected) (Bradley & Terry
    1952; Ouyang et al. 2022, arXiv:2203.02155, equation 1). The margin says by how much it is
    better (Llama 2, Touvron et al. 2023, arXiv:2307.09288, equation 2). The last term keeps the
    mean of rewards, which the first leaves open, at 0 (Eisenstein et al. 2023, arXiv:2312.09244,
    section 3). As TRL 1.16's RewardTrainer.
    """
    loss = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return loss + centre_coef * (chosen + rejected) ** 2


class _Pairs(NamedTuple):
    """What the loss of pairs knows besides the rewards."""

    action_PGC: Array  # bool: the one prediction of each completion that is its reward
    margin_PG: Array  # by how much the chosen one is better, at the chosen one


@dataclasses.dataclass(frozen=True)
class BradleyTerryLoss:
    """`bradley_terry` of pairs: a pair is a group of two, chosen and rejected.

    A completion's reward is the value at its one action token. A group without actions is no pair.
    The signal of the step, `Experience.advantage`, is the margin of the pair, at the chosen one.
    """

    centre_coef: float = 0.0

    metric: ClassVar[str] = "reward_model/loss"
    sums: ClassVar[tuple[str, ...]] = ("pairs", "right", "margin", "reward", "square")
    maxima: ClassVar[tuple[str, ...]] = ()
    needs_completions: ClassVar[bool] = True
    reads_best: ClassVar[bool] = False

    def reads_entropy(self, part: Experience) -> bool:
        return False

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> _Pairs:
        margin_PGC = take_of_completion(part.advantage)
        return _Pairs(take(part.action_PGC), margin_PGC.sum(axis=-1))

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        weight_P = action_PGC.any(axis=(1, 2)).astype(jnp.float32)
        return weight_P, weight_P.sum()

    def loss(self, value_PGC: Array, terms: _Pairs) -> Array:
        chosen_P, rejected_P = rewards(value_PGC, terms.action_PGC).T
        return bradley_terry(chosen_P, rejected_P, terms.margin_PG[:, 0], self.centre_coef)

    def diagnostics(self, value_PGC: Array, terms: _Pairs, action_PGC: Array):
        reward_PG = rewards(value_PGC, action_PGC)
        there_P = action_PGC.any(axis=(1, 2))
        margin_P = reward_PG[:, 0] - reward_PG[:, 1]
        total = lambda x: jnp.where(there_P, x, 0).sum().astype(jnp.float32)  # noqa: E731
        each = there_P, margin_P > 0, margin_P, reward_PG.sum(1), (reward_PG**2).sum(1)
        return dict(zip(self.sums, map(total, each))), {}

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        pairs = jnp.maximum(sums["pairs"], 1.0)
        mean = sums["reward"] / (2 * pairs)
        variance = jnp.maximum(sums["square"] / (2 * pairs) - mean**2, 0.0)
        return {
            "reward_model/accuracy": sums["right"] / pairs,
            "reward_model/margin": sums["margin"] / pairs,
            "reward_model/mean": mean,
            "reward_model/std": jnp.sqrt(variance),
        }


def rewards(value_PGC: Array, action_PGC: Array) -> Array:
    """The value at the one action token of each completion, [P, G]; 0 without one."""
    return jnp.where(action_PGC, value_PGC, 0.0).sum(axis=-1)


# --- Critics --------------------------------------------------------------------------------------


def value_loss(value: Array, old: Array, target: Array, clip: float) -> Array:
    """Half of the larger square of value - target, and of the same with a clipped value.

    The value is clipped to within `clip` of the one before the rollout's updates; 0: no clip
    (OpenAI's PPO; verl 0.9 and TRL's former PPO).
    """
    square = (value - target) ** 2
    if clip:
        near = jnp.clip(value, old - clip, old + clip)
        square = jnp.maximum(square, (near - target) ** 2)
    return square / 2


class _Targets(NamedTuple):
    old: Array
    target: Array


@dataclasses.dataclass(frozen=True)
class ValueLoss:
    """`coefficient` times the mean of `value_loss` over the action tokens of an update."""

    clip: float = 0.2
    coefficient: float = 0.5

    metric: ClassVar[str] = "value/loss"
    sums: ClassVar[tuple[str, ...]] = ("clipped", "value", "target", "target_2", "error", "error_2")
    maxima: ClassVar[tuple[str, ...]] = ()
    needs_completions: ClassVar[bool] = True
    reads_best: ClassVar[bool] = False

    def reads_entropy(self, part: Experience) -> bool:
        return False

    def terms(self, part: Experience, take: Take, take_of_completion: Take) -> _Targets:
        return _Targets(take(part.value_PGC), take(part.return_PGC))

    def weights(self, action_PGC: Array) -> tuple[Array, Array]:
        weight_PGC = action_PGC.astype(jnp.float32)
        return weight_PGC, weight_PGC.sum()

    def loss(self, value_PGC: Array, terms: _Targets) -> Array:
        return self.coefficient * value_loss(value_PGC, terms.old, terms.target, self.clip)

    def diagnostics(self, value_PGC: Array, terms: _Targets, action_PGC: Array):
        error = terms.target - value_PGC
        clipped = jnp.zeros_like(action_PGC)
        if self.clip:
            near = jnp.clip(value_PGC, terms.old - self.clip, terms.old + self.clip)
            clipped = (near - terms.target) ** 2 > error**2
        each = clipped, value_PGC, terms.target, terms.target**2, error, error**2
        total = lambda x: jnp.where(action_PGC, x, 0).sum().astype(jnp.float32)  # noqa: E731
        return dict(zip(self.sums, map(total, each))), {}

    def means(self, sums: dict[str, Array]) -> dict[str, Array]:
        """With the share of the returns' variance that the values explain, at most 1.

        It is 0 for a constant value, below 0 for worse ones, and 0 where all returns are equal.
        """
        tokens = jnp.maximum(sums["tokens"], 1.0)
        mean = {name: sums[name] / tokens for name in self.sums}
        variance = mean["target_2"] - mean["target"] ** 2
        unexplained = mean["error_2"] - mean["error"] ** 2
        return {
            "value/clip_share": mean["clipped"],
            "value/mean": mean["value"],
            "value/return_mean": mean["target"],
            "value/explained_variance": jnp.where(
                variance > 0, 1 - unexplained / jnp.where(variance > 0, variance, 1.0), 0.0
            ),
        }
