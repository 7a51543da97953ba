"""TRL's configs of given completions, and their translation to the options of a run."""

from __future__ import annotations

import math
from typing import Any

from grpo_jax.trl.arguments import Arguments, one_of, precision, schedule, text_of, trackers, warmup
from grpo_jax.trl.given_fields import (
    CPO_FIELDS,
    DPO_FIELDS,
    KTO_FIELDS,
    ORPO_FIELDS,
    REWARD_FIELDS,
    SFT_FIELDS,
)

# Loss and log-ratio of each loss_type of DPO, and of CPO, which reads no reference.
_LOSSES = {name: (name, "auto") for name in ("sigmoid", "hinge", "ipo", "robust")}
_LOSSES |= {name: (name, "auto") for name in ("apo_zero", "apo_down")}
_LOSSES["sigmoid_norm"] = "sigmoid", "mean"
_OF_CPO = {name: (name, "auto") for name in ("sigmoid", "hinge", "ipo")}
_OF_CPO |= {"simpo": ("sigmoid", "mean"), "alphapo": ("sigmoid", "mean")}


class SFTConfig(Arguments):
    """TRL 1.16's `SFTConfig`: its arguments and their defaults. Raises as `GRPOConfig`."""

    fields = SFT_FIELDS


class DPOConfig(Arguments):
    """TRL 1.16's `DPOConfig`: its arguments and their defaults. Raises as `GRPOConfig`."""

    fields = DPO_FIELDS


class KTOConfig(Arguments):
    """TRL 1.16's `KTOConfig`: its arguments and their defaults. Raises as `GRPOConfig`."""

    fields = KTO_FIELDS


class ORPOConfig(Arguments):
    """TRL 1.16's `trl.experimental.orpo.ORPOConfig`: its arguments. Raises as `GRPOConfig`."""

    fields = ORPO_FIELDS


class CPOConfig(Arguments):
    """TRL 1.16's `trl.experimental.cpo.CPOConfig`: its arguments. Raises as `GRPOConfig`."""

    fields = CPO_FIELDS


class RewardConfig(Arguments):
    """TRL 1.16's `RewardConfig`: its arguments and their defaults. Raises as `GRPOConfig`."""

    fields = REWARD_FIELDS


def options_of_sft(args: SFTConfig, rows: int, held_out: int, devices: int) -> dict[str, Any]:
    """This trainer's options, by name, from TRL's arguments.

    `rows`, `held_out`: numbers of rows. `devices`: the factor of TRL's batch size.
    """
    names = {"nll": "nll", "dft": "dft", "chunked_nll": "nll"}
    loss_on = "all" if args.completion_only_loss is False else "completion"
    if args.assistant_only_loss:
        if args.completion_only_loss is False:
            raise ValueError(
                "SFTConfig(completion_only_loss=False, assistant_only_loss=True): the assistant's "
                "turns alone count, or every token. Give one of them."
            )
        loss_on = "assistant"
    found = _schedule(args, "sft", rows, held_out, devices)
    if args.dataset_text_field != "text":
        found["data.columns"] = (f"text={args.dataset_text_field}",)
    return (
        found
        | _MEASURED
        | {
            "sft.loss": one_of(args, "loss_type", args.loss_type, names),
            "sft.loss_on": loss_on,
        }
    )


def options_of_dpo(args: DPOConfig, rows: int, held_out: int, devices: int) -> dict[str, Any]:
    """The same of DPO."""
    losses = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    weights = [1.0] * len(losses) if args.loss_weights is None else list(args.loss_weights)
    if len(weights) != len(losses):
        raise ValueError(
            f"DPOConfig(loss_weights=...) has {len(weights)} numbers, and loss_type "
            f"{len(losses)} names."
        )
    by_name = dict(zip(losses, weights))
    nll_weight = by_name.pop("sft", 0.0)
    if len(by_name) != 1 or set(by_name.values()) != {1.0}:
        raise ValueError(
            f"DPOConfig(loss_type={args.loss_type!r}, loss_weights={args.loss_weights!r}): this "
            "trainer has one loss of pairs with a weight of 1, and beside it sft with any weight."
        )
    loss, log_ratio = one_of(args, "loss_type", *by_name, _LOSSES)
    return _preference(args, rows, held_out, devices) | {
        "preference.loss": loss,
        "preference.log_ratio": log_ratio,
        "preference.nll_weight": float(nll_weight),
        "preference.label_smoothing": args.label_smoothing if loss == "robust" else 0.0,
    }


def options_of_kto(args: KTOConfig, rows: int, held_out: int, devices: int) -> dict[str, Any]:
    """The same of KTO."""
    known = {"kto": "kto", "apo_zero_unpaired": "apo_zero_unpaired"}
    loss = one_of(args, "loss_type", args.loss_type, known)
    return _preference(args, rows, held_out, devices) | {"preference.loss": loss}


def options_of_orpo(args: ORPOConfig, rows: int, held_out: int, devices: int) -> dict[str, Any]:
    """The same of ORPO."""
    return _preference(args, rows, held_out, devices) | {"preference.loss": "orpo"}


def options_of_cpo(args: CPOConfig, rows: int, held_out: int, devices: int) -> dict[str, Any]:
    """The same of CPO; "alphapo" is "simpo" without the nll, as in TRL."""
    loss, log_ratio = one_of(args, "loss_type", args.loss_type, _OF_CPO)
    is_simpo = log_ratio == "mean"
    return _preference(args, rows, held_out, devices) | {
        "preference.loss": loss,
        "preference.reference": "none",
        "preference.log_ratio": log_ratio,
        "preference.margin": args.simpo_gamma if is_simpo else 0.0,
        "preference.nll_weight": 0.0 if args.loss_type == "alphapo" else args.cpo_alpha,
        "preference.label_smoothing": args.label_smoothing if loss == "sigmoid" else 0.0,
    }


def options_of_reward(args: RewardConfig, rows: int, held_out: int, devices: int) -> dict[str, Any]:
    """The same of a reward model. Rows that are too long are left out, as in TRL."""
    return _schedule(args, "reward_model", rows, held_out, devices) | {
        "reward_model.centre_coef": args.center_rewards_coefficient or 0.0,
        "reward_model.too_long": "drop",
        "data.overlong": "drop",
    }


_MEASURED = {"logging.token_metrics": True}  # TRL logs the entropy in any case


def _preference(args: Arguments, rows: int, held_out: int, devices: int) -> dict[str, Any]:
    """The options that all trainings on preferences have."""
    return _schedule(args, "preference", rows, held_out, devices) | _MEASURED


def _schedule(
    args: Arguments, section: str, rows: int, held_out: int, devices: int
) -> dict[str, Any]:
    """The options that all have: how long, in what batches, and what is logged."""
    found = {f.option: getattr(args, name) for name, f in args.fields.items() if f.option}
    if not args.max_length:
        raise ValueError(
            f"{type(args).__name__}(max_length={args.max_length!r}): rows of every length would "
            "have to fit. Give the length of the longest."
        )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    steps = args.max_steps if args.max_steps > 0 else 0
    total = steps or max(math.ceil(round(args.num_train_epochs * rows, 6) / batch), 1)
    measures = text_of(args.eval_strategy) != "no"
    own = {
        "batch": batch,
        "num_steps": steps,
        "num_epochs": 0.0 if steps else float(args.num_train_epochs),
        "schedule": schedule(args),
        "warmup_steps": warmup(args.warmup_steps, total),
        "weight_decay": args.weight_decay,
        "max_tokens": args.max_length,
        "too_long": "truncate",
        "checkpoint_every_steps": _every(args.save_strategy, args.save_steps, total, rows, batch),
        "evaluate_every_steps": _every(
            args.eval_strategy, args.eval_steps or args.logging_steps, total, rows, batch
        ),
    }
    found |= {f"{section}.{name}": value for name, value in own.items()} | {
        "data.max_prompt_tokens": args.max_length,
        "evaluation.num_problems": held_out if measures else 0,
        "model.dtype": "float32" if args.bf16 is False else "bfloat16",
        "model.remat": "dots" if args.gradient_checkpointing else "none",
        "checkpoint.keep": args.save_total_limit or 2,
    }
    return found | precision(args) | trackers(args)


def _every(strategy: Any, every: float | None, total: int, rows: int, batch: int) -> int:
    """Updates between events that TRL counts in updates or epochs; 0: only at the end."""
    kind = text_of(strategy)
    if kind == "no" or not every:
        return 0
    if kind == "epoch":
        return max(rows // batch, 1)
    return max(math.ceil(every * total if every < 1 else every), 1)
