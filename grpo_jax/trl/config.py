"""TRL's `GRPOConfig`, and its translation to the options of a run."""

from __future__ import annotations

import math
from typing import Any

from grpo_jax.trl.arguments import Arguments, one_of, precision, schedule, text_of, trackers, warmup
from grpo_jax.trl.fields import FIELDS

# Surrogate and normalizer of each loss_type.
_LOSSES = {
    "dapo": ("clip", "token"), "bnpo": ("clip", "token"), "grpo": ("clip", "sequence"),
    "dr_grpo": ("clip", "constant"), "luspo": ("clip", "sequence_sum"),
    "cispo": ("cispo", "token"), "sapo": ("sapo", "sequence"), "vespo": ("vespo", "token"),
}  # fmt: skip
_SCALES = {
    "group": "sample_std", True: "sample_std", "batch": "batch_std", "none": "none", False: "none",
}  # fmt: skip
_AGGREGATES = {"sum_then_normalize": "sum", "normalize_then_sum": "each"}
_MODES = {
    f"{level}_{bound}": (level, bound)
    for level in ("token", "sequence")
    for bound in ("truncate", "mask")
}


class GRPOConfig(Arguments):
    """TRL 1.16's `GRPOConfig`: its arguments and their defaults.

    Raises ValueError for an argument that TRL does not have, and for a value that this trainer does
    not support; the message says what to use.
    """

    fields = FIELDS


def options_of(args: GRPOConfig, num_problems: int, devices: int) -> dict[str, Any]:
    """This trainer's options, by name, from TRL's arguments.

    `num_problems`: rows of the training data, for epochs. `devices`: the factor of TRL's batch
    sizes. Raises ValueError if sizes do not divide, as in TRL.
    """
    found = {f.option: getattr(args, name) for name, f in FIELDS.items() if f.option}
    batch = _batch(args, devices)
    updates = batch["batch.minibatches"] * args.num_iterations
    steps = _steps(args, num_problems, batch["batch.prompts"], updates)
    found |= batch | {
        "loop.num_steps": steps,
        "algorithm.kl_estimator": "k3_ratio" if args.use_bias_correction_kl else "k3",
        "algorithm.entropy_target": args.entropy_target if args.use_adaptive_entropy else 0.0,
        "algorithm.reference_refresh_steps": _refreshes(args, updates),
        "optim.schedule": schedule(args),
        "optim.end_fraction": 0.0,
        "optim.warmup_steps": warmup(args.warmup_steps, steps * updates),
        "model.dtype": "float32" if args.bf16 is False else "bfloat16",
        "model.remat": "dots" if args.gradient_checkpointing else "none",
        "data.max_prompt_tokens": 1_000_000,  # TRL has no limit; the model's applies
        "data.chat_template_kwargs": tuple(
            f"{name}={value!r}" for name, value in (args.chat_template_kwargs or {}).items()
        ),
        "checkpoint.keep": args.save_total_limit or 2,
        "logging.samples_every_steps": 1 if args.log_completions else 0,
        "logging.num_samples": args.num_completions_to_print or 4,
    }
    for option, strategy, every in (
        ("checkpoint.every_steps", args.save_strategy, args.save_steps),
        ("evaluation.every_steps", args.eval_strategy, args.eval_steps or args.logging_steps),
    ):
        found[option] = _every(text_of(strategy), every, updates, steps, args, num_problems, batch)
    found |= _loss(args) | _advantage(args)
    return found | _correction(args) | precision(args) | trackers(args)


def _loss(args: GRPOConfig) -> dict[str, Any]:
    """The options of the loss; those that the loss_type does not read are left out."""
    surrogate, normalizer = one_of(args, "loss_type", args.loss_type, _LOSSES)
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    found = {
        "algorithm.surrogate": surrogate,
        "algorithm.normalizer": normalizer,
        "algorithm.ratio": args.importance_sampling_level,
        "algorithm.max_sequence_drift": args.off_policy_mask_threshold or 0.0,
    }
    if surrogate == "clip":
        bounds = {"clip_low": args.epsilon, "clip_high": high, "dual_clip_ratio": args.delta or 0.0}
    elif surrogate == "cispo":
        if high < 1:
            raise ValueError(
                f"GRPOConfig(loss_type='cispo') caps the ratio at epsilon_high = {high}, below 1, "
                "so that every token has a smaller loss. Give the cap, such as epsilon_high=5.0."
            )
        bounds = {"ratio_cap": high}
    elif surrogate == "sapo":
        signs = args.sapo_temperature_pos, args.sapo_temperature_neg
        bounds = {"sapo_positive": signs[0], "sapo_negative": signs[1]}
    else:
        bounds = {
            "vespo_positive": (args.vespo_k_pos, args.vespo_lambda_pos),
            "vespo_negative": (args.vespo_k_neg, args.vespo_lambda_neg),
        }
    return found | {f"algorithm.{name}": value for name, value in bounds.items()}


def _batch(args: GRPOConfig, devices: int) -> dict[str, int]:
    """Prompts of a rollout, completions of a prompt, and updates of a pass over them."""
    together, group = args.per_device_train_batch_size * devices, args.num_generations
    accumulated, per = args.gradient_accumulation_steps, args.steps_per_generation
    completions = args.generation_batch_size
    if completions is not None and per is not None:
        raise ValueError("generation_batch_size and steps_per_generation: give one of them.")
    if completions is not None:
        if completions % together:
            raise ValueError(
                f"generation_batch_size = {completions} is no multiple of "
                f"per_device_train_batch_size times {devices} devices = {together}."
            )
        per = completions // together
    else:
        per = accumulated if per is None else per
        completions = together * per
    if completions % group:
        raise ValueError(
            f"A rollout has {completions} completions, which is no multiple of num_generations = "
            f"{group}: per_device_train_batch_size {args.per_device_train_batch_size} times "
            f"{devices} devices times {per} steps."
        )
    if per % accumulated or per < accumulated:
        raise ValueError(
            f"A rollout has {per} steps, which is no multiple of gradient_accumulation_steps = "
            f"{accumulated}: its last update would take completions of two rollouts."
        )
    prompts, minibatches = completions // group, per // accumulated
    if prompts % minibatches:
        raise ValueError(
            f"A rollout has {prompts} prompts in {minibatches} updates. Here an update takes whole "
            "groups: make generation_batch_size / num_generations a multiple of its updates."
        )
    return {"batch.prompts": prompts, "batch.group": group, "batch.minibatches": minibatches}


def _steps(args: GRPOConfig, num_problems: int, prompts: int, updates: int) -> int:
    """The number of rollouts. TRL counts updates, or epochs of whole rollouts."""
    if args.max_steps > 0:
        if args.max_steps % updates:
            raise ValueError(
                f"max_steps = {args.max_steps} updates is no multiple of the {updates} updates of "
                "a rollout, which a step of this trainer makes together."
            )
        return args.max_steps // updates
    per_epoch = num_problems // prompts
    if not per_epoch:
        raise ValueError(
            f"num_train_epochs counts rollouts of {prompts} prompts, and the data has "
            f"{num_problems}. Set max_steps."
        )
    return math.ceil(args.num_train_epochs * per_epoch)


def _refreshes(args: GRPOConfig, updates: int) -> int:
    """Steps between refreshes of the reference, which TRL counts in updates; 0: none."""
    every = args.ref_model_sync_steps
    if not args.sync_ref_model:
        return 0
    if every % updates:
        raise ValueError(
            f"ref_model_sync_steps = {every} updates is no multiple of the {updates} updates of a "
            "rollout, after which this trainer refreshes the reference."
        )
    return every // updates


def _every(
    strategy: str,
    every: float | None,
    updates: int,
    steps: int,
    args: GRPOConfig,
    num_problems: int,
    batch: dict[str, int],
) -> int:
    """Steps between events that TRL counts in updates or epochs; 0: only at the end."""
    if strategy == "no" or not every:
        return 0
    if strategy == "epoch":
        return max(num_problems // batch["batch.prompts"], 1)
    counted = every * steps * updates if every < 1 else every
    return max(math.ceil(counted / updates), 1)


def _advantage(args: GRPOConfig) -> dict[str, str]:
    """The advantage. TRL does not read scale_rewards where each reward is normalized."""
    aggregate = args.multi_objective_aggregation
    scale_by = one_of(args, "scale_rewards", args.scale_rewards, _SCALES)
    aggregate = one_of(args, "multi_objective_aggregation", aggregate, _AGGREGATES)
    return {
        "algorithm.aggregate": aggregate,
        "algorithm.scale_by": "sample_std" if aggregate == "each" else scale_by,
    }


def _correction(args: GRPOConfig) -> dict[str, Any]:
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return {"rollout_correction.level": "none"}
    mode = one_of(args, "vllm_importance_sampling_mode", args.vllm_importance_sampling_mode,
                   {name: name for name in _MODES})  # fmt: skip
    level, bound = _MODES[mode]
    if args.vllm_importance_sampling_clip_max is None:
        raise ValueError("vllm_importance_sampling_clip_max = None: a bound above is needed.")
    return {
        "rollout_correction.level": level,
        "rollout_correction.bound": bound,
        "rollout_correction.cap": float(args.vllm_importance_sampling_clip_max),
        "rollout_correction.floor": float(args.vllm_importance_sampling_clip_min or 0.0),
    }
