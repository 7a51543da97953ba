"""Advantages of tokens from a critic's values: generalized advantage estimation (PPO).

    rewards of tokens (the reward at the last, minus the KL at each) -> GAE -> whitened over tokens

An action token is one that the policy chose. Others, as those of a tool's answer, earn nothing and
have no value: the sums pass over them. Arrays are [P, G, C], as in `structs.py`, and keep their
precision, float32 at least.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.structs import Array


@dataclasses.dataclass(frozen=True)
class GAE:
    """The constants of `estimate`; `config.algorithm` and `config.critic` document each."""

    discount: float = 1.0
    policy_lambda: float = 0.95  # of the advantages
    critic_lambda: float = 0.95  # of the returns, which the critic learns
    length_scale: float = 0.0  # lambda of a policy's completion: 1 - 1 / (scale * length); 0: fixed

    def lambda_of(self, length_PG: Array) -> Array | float:
        """The lambda of the advantages: fixed, or of each completion by its length, [P, G].

        VAPO (Yue et al. 2025, arXiv:2504.05118, equation 7) for `length_scale`, there 0.05: the
        longer a completion, the farther its reward reaches. A completion shorter than
        1 / `length_scale` tokens would have one below 0 and gets 0.
        """
        if not self.length_scale:
            return self.policy_lambda
        length_PG = jnp.maximum(length_PG, 1)
        return jnp.maximum(1 - 1 / (self.length_scale * length_PG), 0.0)


def estimate(
    gae: GAE,
    reward_PG: Array,
    value_PGC: Array,
    action_PGC: Array,
    *,
    kl_coef: float = 0.0,
    log_probs: tuple[Array, Array] | None = None,
    whitens: bool = False,
) -> tuple[Array, Array]:
    """Advantages and returns of action tokens, both [P, G, C]; 0 elsewhere.

    `value_PGC`: the critic's value of the state in which each token is chosen. `kl_coef` times
    `log_probs[0] - log_probs[1]`, of policy and reference (k1), is subtracted from the reward of
    each token. A completion with an unknown reward (NaN) has advantages of 0 and returns equal to
    its values, and does not count in the whitening.

    The returns are the advantages with the critic's own lambda plus the values (decoupled GAE:
    VAPO, arXiv:2504.05118, section 4.1).
    """
    known_PG1 = ~jnp.isnan(reward_PG)[..., None]
    reward_PGC = token_rewards(jnp.nan_to_num(reward_PG), action_PGC)
    if kl_coef:
        logp_PGC, ref_logp_PGC = log_probs
        reward_PGC -= kl_coef * jnp.where(action_PGC, logp_PGC - ref_logp_PGC, 0.0)
    of = lambda lambda_PG: advantages(  # noqa: E731
        reward_PGC, value_PGC, action_PGC, discount=gae.discount, lambda_PG=lambda_PG
    )
    adv_PGC, counts_PGC = of(gae.lambda_of(action_PGC.sum(-1))), action_PGC & known_PG1
    return_PGC = jnp.where(counts_PGC, of(gae.critic_lambda), 0.0) + value_PGC
    adv_PGC = jnp.where(counts_PGC, adv_PGC, 0.0)
    if whitens:
        adv_PGC = whitened(adv_PGC, counts_PGC)
    return adv_PGC, jnp.where(action_PGC, return_PGC, 0.0)


def token_rewards(reward_PG: Array, action_PGC: Array) -> Array:
    """The reward of each completion at its last action token, 0 at the others.

    That token may be the one at which the completion was cut: nothing is expected of what would
    have followed. So do verl and TRL's former PPO, and so does a completion that stopped.
    """
    behind_PGC = jnp.cumsum(action_PGC[..., ::-1], axis=-1)[..., ::-1]  # from each token on
    is_last_PGC = action_PGC & (behind_PGC == 1)
    return jnp.where(is_last_PGC, reward_PG[..., None], jnp.zeros((), reward_PG.dtype))


def advantages(
    reward_PGC: Array,
    value_PGC: Array,
    action_PGC: Array,
    *,
    discount: float,
    lambda_PG: Array | float,
) -> Array:
    """GAE of each action token (Schulman et al. 2015, arXiv:1506.02438, equation 16); 0 elsewhere.

        delta = reward + discount * next value - value
        advantage = delta + discount * lambda * next advantage

    "Next" is the next action token; after the last one both are 0. As in verl 0.9, which passes
    over the tokens of tools in the same way.
    """
    dtype = jnp.promote_types(value_PGC.dtype, jnp.float32)

    def step(following: tuple[Array, Array], at: tuple[Array, Array, Array]):
        next_value_PG, next_adv_PG = following
        reward_PG, value_PG, action_PG = at
        delta_PG = reward_PG + discount * next_value_PG - value_PG
        adv_PG = delta_PG + discount * lambda_PG * next_adv_PG
        following = (
            jnp.where(action_PG, value_PG, next_value_PG),
            jnp.where(action_PG, adv_PG, next_adv_PG),
        )
        return following, jnp.where(action_PG, adv_PG, 0.0)

    by_token = lambda x: jnp.moveaxis(x, -1, 0)  # noqa: E731
    zero_PG = jnp.zeros(value_PGC.shape[:-1], dtype)
    values = reward_PGC.astype(dtype), value_PGC.astype(dtype), action_PGC
    _, adv_CPG = jax.lax.scan(step, (zero_PG, zero_PG), tuple(map(by_token, values)), reverse=True)
    return jnp.moveaxis(adv_CPG, 0, -1)


def whitened(adv_PGC: Array, counts_PGC: Array) -> Array:
    """Minus the mean over the batch's tokens, divided by sqrt(their variance + 1e-8).

    As `advantages` of a group whitens over tokens: the variance is that of the tokens themselves,
    and not, as in verl and TRL, the estimate with one token less.
    """
    total = jnp.maximum(counts_PGC.sum(), 1)
    mean = jnp.where(counts_PGC, adv_PGC, 0.0).sum() / total
    centred_PGC = jnp.where(counts_PGC, adv_PGC - mean, 0.0)
    return centred_PGC / jnp.sqrt((centred_PGC**2).sum() / total + 1e-8)


def evaluate(
    gae: GAE,
    reward_PG: np.ndarray,
    value_PGC: np.ndarray,
    action_PGC: np.ndarray,
    *,
    kl_coef: float = 0.0,
    logp_PGC: np.ndarray | None = None,
    ref_logp_PGC: np.ndarray | None = None,
    whitens: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`estimate` in NumPy and in the precision of the values, to check a number by hand."""
    value_PGC = np.asarray(value_PGC)
    with jax.enable_x64(value_PGC.dtype == np.float64):
        log_probs = None
        if kl_coef:
            log_probs = jnp.asarray(logp_PGC), jnp.asarray(ref_logp_PGC)
        found = estimate(
            gae,
            jnp.asarray(np.asarray(reward_PG, value_PGC.dtype)),
            jnp.asarray(value_PGC),
            jnp.asarray(action_PGC),
            kl_coef=kl_coef,
            log_probs=log_probs,
            whitens=whitens,
        )
        return tuple(map(np.asarray, found))
