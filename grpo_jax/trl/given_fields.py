"""The arguments of TRL 1.16's configs of given completions, and their meaning here.

They are those of SFTConfig, DPOConfig, KTOConfig, RewardConfig, and of the experimental ORPOConfig
and CPOConfig. Those of transformers' TrainingArguments are as in `fields.py`, but for the ones
named here.
"""

from __future__ import annotations

import dataclasses

from grpo_jax.trl.fields import FIELDS, TRAINING_ARGUMENTS, Field, beside, counts, only

_PLANNED = "not built yet"
_PACKED = "rows are packed without padding in any case, and nothing is cut for it"
_ONCE = "rows are read and tokenized once, by one process"
_TOKENIZER = "a model folder with that tokenizer"
_SHUFFLED = "each epoch has an order of its own"
_LIMIT = (
    "limit of a text or chat; of rows with a prompt that of the prompt, `data.max_prompt_tokens`, "
    "and of the completion each"
)


def _section(name: str) -> dict[str, Field]:
    """The arguments of TrainingArguments whose options stand in a section of given completions."""
    rows = "`{}.batch`; times the devices and `gradient_accumulation_steps`, as in TRL"
    every = "`{}.evaluate_every_steps`; an `eval_dataset` is measured as a whole"
    found = {
        "per_device_train_batch_size": counts(8, rows),
        "gradient_accumulation_steps": counts(1, "`{}.batch`"),
        "num_train_epochs": counts(3.0, "`{}.num_epochs`, where `max_steps` is -1"),
        "max_steps": counts(-1, "`{}.num_steps`"),
        "lr_scheduler_type": counts("linear", "`{}.schedule`: linear, cosine or constant"),
        "warmup_steps": counts(0, "`{}.warmup_steps`; below 1 a share of all updates"),
        "weight_decay": counts(0.0, "`{}.weight_decay`"),
        "max_grad_norm": only(1.0, "gradients are clipped to a global norm of 1"),
        "eval_strategy": counts("no", every),
        "eval_steps": counts(None, "`{}.evaluate_every_steps`"),
        "per_device_eval_batch_size": beside(8, "held-out rows are read in batches of training"),
        "save_strategy": counts("steps", "`{}.checkpoint_every_steps`"),
        "save_steps": counts(500, "`{}.checkpoint_every_steps`"),
        "metric_for_best_model": beside(None, "the loss of held-out rows"),
        "greater_is_better": beside(None, "the loss of held-out rows"),
        "auto_find_batch_size": only(False, "{}.microbatch"),
        "bf16_full_eval": beside(False, "held-out rows are read in the precision of training"),
        "label_smoothing_factor": only(0.0, _PLANNED),
        "train_sampling_strategy": only("random", _SHUFFLED),
        "include_for_metrics": beside([], "metrics are those of docs/metrics.md"),
        "batch_eval_metrics": beside(False, "metrics are those of docs/metrics.md"),
        "prediction_loss_only": beside(False, "metrics are those of docs/metrics.md"),
        "label_names": beside(None, "of models other than decoders"),
    }
    return {argument: _of_section(field, name) for argument, field in found.items()}


def _of_section(field: Field, name: str) -> Field:
    """A field whose meaning names the section "{}"."""
    told = {kind: getattr(field, kind).format(name) for kind in ("counts", "only")}
    return dataclasses.replace(field, **told)


_EVERY = {name: FIELDS[name] for name in ("model_init_kwargs", "trust_remote_code")} | {
    "dataset_num_proc": beside(None, _ONCE),
    "max_length": counts(1024, _LIMIT),
    "remove_unused_columns": beside(True, "other columns are not read"),
}
_STABLE = {"pad_to_multiple_of": FIELDS["pad_to_multiple_of"]}
_WRITES = {"router_aux_loss_coef": FIELDS["router_aux_loss_coef"]}
_BOTH = {
    **_STABLE,
    **_WRITES,
    "truncation_mode": only("keep_start", "longer rows are cut at their end"),
    "padding_free": beside(False, _PACKED),
    "pad_token": only(None, _TOKENIZER),
}
_NO_DROPOUT = {"disable_dropout": beside(True, "there is no dropout")}


def _offloading(section: str) -> dict[str, Field]:
    why = f"gradient_checkpointing=True, or {section}.microbatch"
    return {"activation_offloading": only(False, why)}


SFT_FIELDS: dict[str, Field] = {
    **TRAINING_ARGUMENTS,
    **_EVERY,
    **_BOTH,
    **_section("sft"),
    **_offloading("sft"),
    "learning_rate": Field(2e-5, option="sft.learning_rate"),
    "chat_template_path": only(None, "a model folder with that template"),
    "dataset_text_field": counts("text", "`data.columns`, as text=NAME"),
    "dataset_kwargs": only(None, "rows of texts, chats, or prompts with completions", {}),
    "eos_token": only(None, _TOKENIZER),
    "shuffle_dataset": beside(False, _SHUFFLED),
    "packing": only(False, "sft.batch counts rows, which are packed in any case"),
    "packing_strategy": beside("bfd", _PACKED),
    "eval_packing": beside(None, _PACKED),
    "completion_only_loss": counts(None, "`sft.loss_on`: completion, or all where False"),
    "assistant_only_loss": counts(False, "`sft.loss_on`: assistant where True"),
    "loss_type": counts("nll", "`sft.loss`: nll or dft"),
}

_PREFERENCE = {
    **TRAINING_ARGUMENTS,
    **_EVERY,
    **_section("preference"),
    **_NO_DROPOUT,
    "learning_rate": Field(1e-6, option="preference.learning_rate"),
    "beta": Field(0.1, option="preference.beta"),
}
_REFERENCE = {
    **_offloading("preference"),
    "precompute_ref_log_probs": beside(False, "the reference is read once, before training"),
    "precompute_ref_batch_size": beside(None, "the reference is read in batches of training"),
    "sync_ref_model": only(False, _PLANNED),
    "ref_model_mixup_alpha": beside(0.6, "of sync_ref_model"),
    "ref_model_sync_steps": beside(512, "of sync_ref_model"),
}

DPO_FIELDS: dict[str, Field] = {
    **_PREFERENCE,
    **_BOTH,
    **_REFERENCE,
    "loss_type": counts(
        ["sigmoid"],
        "`preference.loss`: sigmoid, hinge, ipo, robust, apo_zero or apo_down; sigmoid_norm is "
        "sigmoid with `preference.log_ratio` mean; a second one may be sft",
    ),
    "loss_weights": counts(None, "`preference.nll_weight`, of sft beside another of weight 1"),
    "ld_alpha": only(None, _PLANNED, 1.0),
    "f_divergence_type": only("reverse_kl", _PLANNED),
    "f_alpha_divergence_coef": beside(0.5, "of f_divergence_type alpha_divergence"),
    "label_smoothing": counts(
        0.0, "`preference.label_smoothing`, of robust; TRL's sigmoid reads none"
    ),
    "use_weighting": only(False, _PLANNED),
    "discopop_tau": beside(0.05, "of loss_type discopop"),
}

KTO_FIELDS: dict[str, Field] = {
    **_PREFERENCE,
    **_STABLE,
    **_WRITES,
    **_REFERENCE,
    "train_sampling_strategy": only(
        "sequential",
        f"{_SHUFFLED}, and mismatched answers are those of the file's order in either case",
        "random",
    ),
    "loss_type": counts("kto", "`preference.loss`: kto or apo_zero_unpaired"),
    "desirable_weight": Field(1.0, option="preference.desirable_weight"),
    "undesirable_weight": Field(1.0, option="preference.undesirable_weight"),
}

_EXPERIMENTAL = {
    **_PREFERENCE,
    "max_completion_length": beside(None, "of encoder-decoders"),
    "generate_during_eval": only(
        False, "python -m grpo_jax.generate, with the run's export as --model"
    ),
    "is_encoder_decoder": only(None, "models are decoders", False),
}

ORPO_FIELDS: dict[str, Field] = {**_EXPERIMENTAL, "padding_value": beside(None, _PACKED)}

CPO_FIELDS: dict[str, Field] = {
    **_EXPERIMENTAL,
    "loss_type": counts(
        "sigmoid",
        "`preference.loss`: sigmoid, hinge or ipo, with `preference.reference` none; simpo is "
        "sigmoid with `preference.log_ratio` mean",
    ),
    "label_smoothing": counts(0.0, "`preference.label_smoothing`, of sigmoid and simpo"),
    "cpo_alpha": counts(1.0, "`preference.nll_weight`"),
    "simpo_gamma": counts(0.5, "`preference.margin`, of simpo"),
    "alpha": only(0.0, "loss_type='simpo', which is AlphaPO with an alpha of 0"),
}

REWARD_FIELDS: dict[str, Field] = {
    **TRAINING_ARGUMENTS,
    **_EVERY,
    **_STABLE,
    **_section("reward_model"),
    **_NO_DROPOUT,
    **_offloading("reward_model"),
    "learning_rate": Field(1e-4, option="reward_model.learning_rate"),
    "max_length": counts(
        1024,
        "limit of a prompt, `data.max_prompt_tokens`, and of an answer, `reward_model.max_tokens`, "
        "each; longer rows are dropped, as in TRL",
    ),
    "chat_template_path": only(None, "a model folder with that template"),
    "eos_token": only(None, _TOKENIZER),
    "pad_token": only(None, _TOKENIZER),
    "center_rewards_coefficient": counts(None, "`reward_model.centre_coef`; None: 0"),
}

# By the name of TRL's config.
GIVEN_FIELDS: dict[str, dict[str, Field]] = {
    "SFTConfig": SFT_FIELDS,
    "DPOConfig": DPO_FIELDS,
    "KTOConfig": KTO_FIELDS,
    "ORPOConfig": ORPO_FIELDS,
    "CPOConfig": CPO_FIELDS,
    "RewardConfig": REWARD_FIELDS,
}
