"""What follows from the options of a run."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from grpo_jax.algorithm.hybrid_methods import METHODS, Method


def groups_at_once(config: ConfigDict) -> int:
    """Groups that the devices share between them: a microbatch, or an update's where it is free."""
    if config.batch.microbatch > 0:
        return config.batch.microbatch
    return config.batch.prompts // config.batch.minibatches


def prompts_per_draw(config: ConfigDict) -> int:
    """Prompts whose groups one call of the engine gives."""
    return config.prompts.per_draw or config.batch.prompts


def prompts_begun(config: ConfigDict) -> int:
    """Prompts whose completions one call of the engine begins: more, if it over-samples."""
    return math.ceil(round(config.prompts.oversample * prompts_per_draw(config), 6))


def follows_pass_rates(config: ConfigDict) -> bool:
    """Whether the prompts of a draw depend on the pass rates of the problems."""
    return config.prompts.outside_weight < 1 or config.prompts.replay_share > 0


def hybrid_method(config: ConfigDict) -> Method | None:
    """The method of the config's hybrid; None if there is none."""
    return METHODS[config.hybrid.method] if config.hybrid.method else None


def completions_per_prompt(config: ConfigDict) -> int:
    """Completions of a group: those that are drawn, and a demonstration if one is given."""
    method = hybrid_method(config)
    return config.batch.group + (method is not None and method.given == "completion")


def num_updates_per_step(config: ConfigDict) -> int:
    """Optimizer updates after each rollout."""
    return config.algorithm.num_iterations * config.batch.minibatches


def num_steps(config: ConfigDict, num_problems: int) -> int:
    """Steps of the run, with so many training problems."""
    if not config.loop.num_epochs:
        return config.loop.num_steps
    asked = num_problems * config.data.repeat
    return _steps_of(config.loop.num_epochs, asked, prompts_begun(config))


def is_supervised(config: ConfigDict, section: str = "sft") -> bool:
    """Whether the config asks for updates on given completions, by one of their sections."""
    schedule = config[section]
    return schedule.num_steps > 0 or schedule.num_epochs > 0


def num_supervised_steps(config: ConfigDict, num_rows: int, section: str = "sft") -> int:
    """Updates on given completions, with so many rows of data."""
    schedule = config[section]
    if not schedule.num_epochs:
        return schedule.num_steps
    return _steps_of(schedule.num_epochs, num_rows, schedule.batch)


def _steps_of(epochs: float, num_problems: int, batch: int) -> int:
    # Of 0.1 epochs of 30 problems 3 are asked, not the 4 that rounding up their product gives.
    return max(math.ceil(round(epochs * num_problems, 6) / batch), 1)


def longest_row(config: ConfigDict, section: str = "sft") -> int:
    """Tokens of the longest prompt with the longest completion that a run has.

    `section`: that of the training on given completions.
    """
    drawn = config.rollout.max_tokens + longest_hint(config)
    longest = max(drawn, config[section].max_tokens)
    return config.data.max_prompt_tokens + longest


def longest_hint(config: ConfigDict) -> int:
    """Tokens of the longest hint after which a completion is drawn."""
    method = hybrid_method(config)
    return config.rollout.max_tokens - 1 if method and method.given == "prefix" else 0


def needs_old_pass(config: ConfigDict) -> bool:
    """Whether a rollout is scored before its first update, besides what that update computes."""
    weighs_sequences = config.rollout_correction.level == "sequence"
    reads_entropies = config.algorithm.top_entropy_share < 1
    several = num_updates_per_step(config) > 1
    reads = weighs_sequences or several or has_kl_in_reward(config) or reads_entropies
    return reads or (bool(config.distill.teacher) and config.distill.loss == "reward")


def has_kl_in_reward(config: ConfigDict) -> bool:
    """Whether the KL to the reference is a part of the reward, and not of the loss."""
    return config.algorithm.kl_in == "reward" and config.algorithm.kl_coef > 0


def learns_from_equal_rewards(config: ConfigDict) -> bool:
    """Whether a group whose rewards are all equal may have advantages other than 0."""
    if config.hybrid.method or config.distill.teacher:
        return True
    algorithm = config.algorithm
    compares = algorithm.baseline not in ("none", "greedy")
    return not compares or algorithm.aggregate == "each" or has_kl_in_reward(config)


def has_environment(config: ConfigDict) -> bool:
    """Whether completions are conversations with an environment or with tools."""
    return bool(config.environment.classes or config.environment.tools)


def forks(config: ConfigDict) -> bool:
    """Whether an episode may have several parts, each a text of its own."""
    return has_environment(config) and config.environment.history == "fork"
