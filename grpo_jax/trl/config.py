"""TRL's `GRPOConfig`, and its translation to the options of a run."""

from __future__ import annotations

import copy
import difflib
import math
from typing import Any

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
_SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip
_MODES = {
    f"{level}_{bound}": (level, bound)
    for level in ("token", "sequence")
    for bound in ("truncate", "mask")
}


class GRPOConfig:
    """TRL 1.16's `GRPOConfig`: its arguments and their defaults.

    Raises ValueError for an argument that TRL does not have, and for a value that this trainer does
    not support; the message says what to use.
    """

    def __init__(self, output_dir: str | None = None, **arguments: Any):
        for name in arguments:
            if name not in FIELDS:
                close = difflib.get_close_matches(name, FIELDS, n=2)
                hint = f" Did you mean {' or '.join(close)}?" if close else ""
                raise ValueError(f"GRPOConfig has no argument {name}.{hint}")
        for name, field in FIELDS.items():
            setattr(self, name, copy.copy(arguments.get(name, field.default)))
        self.output_dir = output_dir or arguments.get("output_dir")
        for name, value in arguments.items():
            field = FIELDS[name]
            if field.only and not _is_one_of(value, (field.default, *field.also)):
                raise ValueError(
                    f"GRPOConfig({name}={value!r}) is not what this trainer does. It takes "
                    f"{name}={field.default!r}. In its place: {field.only}."
                )


def _is_one_of(value: Any, values: tuple) -> bool:
    return any(value == known and type(value) is type(known) for known in values)


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
        "optim.schedule": _one_of("lr_scheduler_type", _text(args.lr_scheduler_type), _SCHEDULES),
        "optim.end_fraction": 0.0,
        "optim.warmup_steps": _warmup(args.warmup_steps, steps * updates),
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
        found[option] = _every(_text(strategy), every, updates, steps, args, num_problems, batch)
    found |= _loss(args) | _advantage(args)
    return found | _correction(args) | _precision(args) | _trackers(args)


def _loss(args: GRPOConfig) -> dict[str, Any]:
    """The options of the loss; those that the loss_type does not read are left out."""
    surrogate, normalizer = _one_of("loss_type", args.loss_type, _LOSSES)
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


def _text(value: Any) -> str:
    """The text of a value, which may be one of transformers' enumerations."""
    return str(getattr(value, "value", value))


def _one_of(name: str, value: Any, known: dict[Any, Any]) -> Any:
    if value not in known:
        raise ValueError(
            f"GRPOConfig({name}={value!r}) is not built yet. It takes "
            f"{', '.join(repr(k) for k in known)}."
        )
    return known[value]


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


def _warmup(steps: float, updates: int) -> int:
    """The number of warm-up updates; a value below 1 is a share of all, as in transformers 5."""
    return math.ceil(steps * updates) if 0 < steps < 1 else int(steps)


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
    scale_by = _one_of("scale_rewards", args.scale_rewards, _SCALES)
    aggregate = _one_of("multi_objective_aggregation", aggregate, _AGGREGATES)
    return {
        "algorithm.aggregate": aggregate,
        "algorithm.scale_by": "sample_std" if aggregate == "each" else scale_by,
    }


def _correction(args: GRPOConfig) -> dict[str, Any]:
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return {"rollout_correction.level": "none"}
    mode = _one_of("vllm_importance_sampling_mode", args.vllm_importance_sampling_mode,
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


def _precision(args: GRPOConfig) -> dict[str, Any]:
    given = dict(args.model_init_kwargs or {})
    dtype = str(given.pop("dtype", given.pop("torch_dtype", "float32"))).removeprefix("torch.")
    given.pop("attn_implementation", None)  # kernels are chosen automatically
    if given:
        raise ValueError(
            f"GRPOConfig(model_init_kwargs=...) has {', '.join(sorted(given))}: only `dtype` is "
            "read here."
        )
    return {"model.param_dtype": "float32" if dtype == "auto" else dtype}


_REPORT_TO = ("tensorboard", "wandb", "mlflow", "trackio")


def _trackers(args: GRPOConfig) -> dict[str, Any]:
    given = args.report_to
    names = [given] if isinstance(given, str) else list(given or [])
    unknown = [n for n in names if n not in ("none", *_REPORT_TO)]
    if unknown:
        raise ValueError(
            f"GRPOConfig(report_to={given!r}): {', '.join(unknown)} is not built yet. It takes "
            f"'none', {', '.join(map(repr, _REPORT_TO))}."
        )
    return {
        "logging.tensorboard": "tensorboard" in names,
        "logging.wandb_project": args.project if "wandb" in names else "",
        "logging.mlflow_experiment": args.project if "mlflow" in names else "",
        "logging.trackio_project": args.project if "trackio" in names else "",
        "logging.run_name": args.run_name or "",
    }
