"""The arguments of TRL 1.16's SFTConfig and DPOConfig, and their meaning here.

Those of transformers' TrainingArguments are as in `fields.py`, but for the ones named here.
"""

from __future__ import annotations

from grpo_jax.trl.fields import FIELDS, TRAINING_ARGUMENTS, Field, beside, counts, only

_PLANNED = "not built yet"
_PACKED = "rows are packed without padding in any case, and nothing is cut for it"
_ONCE = "rows are read and tokenized once, by one process"
_TOKENIZER = "a model folder with that tokenizer"
_SHUFFLED = "each epoch has an order of its own"


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
    told = {"counts", "only"}
    return {
        argument: Field(
            field.default,
            also=field.also,
            beside=field.beside,
            **{kind: getattr(field, kind).format(name) for kind in told if getattr(field, kind)},
        )
        for argument, field in found.items()
    }


_SHARED = "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "pad_to_multiple_of"
_BOTH = {name: FIELDS[name] for name in _SHARED} | {
    "dataset_num_proc": beside(None, _ONCE),
    "max_length": counts(
        1024,
        "limit of a text or chat; of rows with a prompt that of the prompt, "
        "`data.max_prompt_tokens`, and of the completion each",
    ),
    "truncation_mode": only("keep_start", "longer rows are cut at their end"),
    "padding_free": beside(False, _PACKED),
    "pad_token": only(None, _TOKENIZER),
    "remove_unused_columns": beside(True, "other columns are not read"),
}

SFT_FIELDS: dict[str, Field] = {
    **TRAINING_ARGUMENTS,
    **_BOTH,
    **_section("sft"),
    "learning_rate": Field(2e-5, option="sft.learning_rate"),
    "activation_offloading": only(False, "gradient_checkpointing=True, or sft.microbatch"),
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

DPO_FIELDS: dict[str, Field] = {
    **TRAINING_ARGUMENTS,
    **_BOTH,
    **_section("preference"),
    "learning_rate": Field(1e-6, option="preference.learning_rate"),
    "activation_offloading": only(False, "gradient_checkpointing=True, or preference.microbatch"),
    "disable_dropout": beside(True, "there is no dropout"),
    "precompute_ref_log_probs": beside(False, "the reference is read once, before training"),
    "precompute_ref_batch_size": beside(None, "the reference is read in batches of training"),
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
    "beta": Field(0.1, option="preference.beta"),
    "use_weighting": only(False, _PLANNED),
    "discopop_tau": beside(0.05, "of loss_type discopop"),
    "sync_ref_model": only(False, _PLANNED),
    "ref_model_mixup_alpha": beside(0.6, "of sync_ref_model"),
    "ref_model_sync_steps": beside(512, "of sync_ref_model"),
}
