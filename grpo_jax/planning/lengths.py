"""The lengths of the prompts and completions that a plan is made for."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.config import derived


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of a step's prompts and completions, in tokens."""

    prompt: int  # the longest
    completion_PG: np.ndarray

    @staticmethod
    def of(config: ConfigDict, prompt: int = 0, mean: int = 0) -> Lengths:
        """Lengths at the config's limits, or up to `prompt` tokens and with a mean of `mean`.

        With a mean, completions end at every token with equal probability, as those of a model that
        has not learned when to stop.
        """
        group, limit = derived.completions_per_prompt(config), config.rollout.max_tokens
        shape = config.batch.prompts, group
        length_PG = np.full(shape, limit)
        if mean:
            drawn_PG = np.random.default_rng(config.seed).geometric(1 / mean, shape)
            length_PG = np.minimum(drawn_PG, limit)
        return Lengths(prompt or config.data.max_prompt_tokens, length_PG.astype(np.int32))
