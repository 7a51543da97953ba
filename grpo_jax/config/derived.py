"""What follows from the options of a run."""

from __future__ import annotations

import math

from ml_collections import ConfigDict


def groups_at_once(config: ConfigDict) -> int:
    """Groups that the devices share between them: a microbatch, or an update's where it is free."""
    if config.batch.microbatch > 0:
        return config.batch.microbatch
    return config.batch.prompts // config.batch.minibatches


def num_updates_per_step(config: ConfigDict) -> int:
    """Optimizer updates after each rollout."""
    return config.algorithm.num_iterations * config.batch.minibatches


def num_steps(config: ConfigDict, num_problems: int) -> int:
    """Steps of the run, with so many training problems."""
    if not config.loop.num_epochs:
        return config.loop.num_steps
    # Of 0.1 epochs of 30 problems 3 are asked, not the 4 that rounding up their product gives.
    asked = round(config.loop.num_epochs * num_problems, 6)
    return max(math.ceil(asked / config.batch.prompts), 1)


def longest_row(config: ConfigDict) -> int:
    """Tokens of the longest prompt with the longest completion that a run has."""
    return config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.sft.max_tokens)


def needs_old_pass(config: ConfigDict) -> bool:
    """Whether a rollout is scored before its first update, besides what that update computes."""
    return config.rollout_correction.level == "sequence" or num_updates_per_step(config) > 1
