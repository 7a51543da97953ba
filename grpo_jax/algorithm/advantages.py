"""Group-relative advantages: a completion is judged against the others of its prompt."""

import jax.numpy as jnp

from grpo_jax.structs import Array


def group_advantages(reward_PG: Array, *, scale_by: str) -> Array:
    """Reward of each completion relative to the others of its prompt, float32 [P, G].

    `scale_by` "none": in reward units (Liu et al. 2025, arXiv:2503.20783, "Dr. GRPO"). "std": in
    standard deviations of the G rewards themselves (Shao et al. 2024, arXiv:2402.03300, section
    4.1.2), and 0 where that is at most 1e-4. "sample_std": divided by the sample estimate, of
    G - 1, plus 1e-4, as TRL 1.16 does. A group of equal rewards gives exact zeros. A reward of NaN
    is unknown: its completion gets 0 and does not count among the others.
    """
    known_PG = ~jnp.isnan(reward_PG)
    reward_PG = reward_PG.astype(jnp.float32)
    # Relative to one of them: the mean of equal numbers rounds, the mean of zeros does not.
    first_P1 = jnp.take_along_axis(reward_PG, known_PG.argmax(axis=1, keepdims=True), axis=1)
    reward_PG = jnp.where(known_PG, reward_PG - first_P1, 0.0)
    count_P1 = jnp.maximum(known_PG.sum(axis=1, keepdims=True), 1)
    mean_P1 = reward_PG.sum(axis=1, keepdims=True) / count_P1
    adv_PG = jnp.where(known_PG, reward_PG - mean_P1, 0.0)
    square_P1 = (adv_PG**2).sum(axis=1, keepdims=True)
    if scale_by == "std":  # the floor: rounding alone gives equal rewards a std near 1e-7
        std_P1 = jnp.sqrt(square_P1 / count_P1)
        adv_PG = jnp.where(std_P1 > 1e-4, adv_PG / jnp.maximum(std_P1, 1e-4), 0.0)
    if scale_by == "sample_std":
        adv_PG /= jnp.sqrt(square_P1 / jnp.maximum(count_P1 - 1, 1)) + 1e-4
    return adv_PG
