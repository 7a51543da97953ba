"""The arguments of TRL 1.16's GRPOConfig and transformers' TrainingArguments, and their meaning.

Those of SFTConfig and DPOConfig are in `given_fields.py`.

There are four kinds of arguments. Some equal one of this trainer's options. Some become options
together with others (`config.py` computes them). Some have no effect here, such as the number of
data-loading processes. For the rest, only the values that describe this trainer are accepted.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
    """An argument: its default in TRL and its meaning here."""

    default: Any
    option: str = ""  # this trainer's option with the same value
    counts: str = ""  # options that follow from it and other arguments
    beside: str = ""  # why it has no effect here
    only: str = ""  # why other values are refused, and what to use
    also: tuple = ()  # accepted values besides the default

    def told(self) -> str:
        """Its meaning here, for the table of docs/from_trl.md."""
        if self.option:
            return f"`{self.option}`"
        if self.counts:
            return self.counts
        if self.beside:
            return f"no effect: {self.beside}"
        taken = " or ".join(f"`{value!r}`" for value in (self.default, *self.also))
        return f"{taken} alone: {self.only}"


def same(default: Any, option: str) -> Field:
    return Field(default, option=option)


def counts(default: Any, counts: str) -> Field:
    return Field(default, counts=counts)


def beside(default: Any, why: str) -> Field:
    return Field(default, beside=why)


def only(default: Any, why: str, *also: Any) -> Field:
    return Field(default, only=why, also=also)


_TORCH = "of PyTorch's processes and memory"
_LOADER = "problems are read into memory once"
_VLLM = "this trainer samples by itself, with the weights that it trains"
_PLANNED = "not built yet"
_HUB = "upload `run.workdir / 'export'` with huggingface_hub"
_DTYPE = "bf16=True or False; GPUs and TPUs that train have bfloat16"
_DEVICES = "mesh.fsdp, mesh.tensor and mesh.sequence, given to GRPOTrainer as options"
_TRACKERS = "Trackio writes locally, or where TRACKIO_SPACE_ID says"

_OF_GRPO: dict[str, Field] = {
    "learning_rate": same(1e-6, "optim.learning_rate"),
    "model_init_kwargs": counts(
        None, "its `dtype` is `model.param_dtype`; what else would change anything is refused"
    ),
    "trust_remote_code": only(False, "no code of a model is run"),
    "router_aux_loss_coef": beside(None, "families with experts are not built yet"),
    "disable_dropout": beside(False, "there is no dropout"),
    "cast_lm_head_to_fp32": beside(False, "logits are computed in float32"),
    "remove_unused_columns": only(False, "reward functions get all columns"),
    "num_generations": counts(8, "`batch.group`"),
    "num_generations_eval": beside(None, "evaluations are greedy, one completion a problem"),
    "max_completion_length": same(512, "rollout.max_tokens"),
    "ds3_gather_for_generation": beside(True, _TORCH),
    "shuffle_dataset": only(True, "each epoch has an order of its own"),
    "pad_to_multiple_of": beside("auto", "rows are packed"),
    "generation_batch_size": counts(None, "`batch.prompts`, times `num_generations`"),
    "steps_per_generation": counts(None, "`batch.minibatches`"),
    "temperature": same(1.0, "rollout.temperature"),
    "top_p": same(1.0, "rollout.top_p"),
    "top_k": same(0, "rollout.top_k"),
    "min_p": only(None, "top_p or top_k"),
    "generation_kwargs": only(None, "temperature, top_p, top_k and max_completion_length", {}),
    "chat_template_kwargs": counts(None, "`data.chat_template_kwargs`"),
    "repetition_penalty": only(1.0, "a reward such as repetition_penalty"),
    "cache_implementation": beside(None, _VLLM),
    "use_vllm": beside(False, _VLLM),
    "vllm_mode": beside("colocate", _VLLM),
    "vllm_model_impl": beside("vllm", _VLLM),
    "vllm_enable_sleep_mode": beside(False, _VLLM),
    "vllm_structured_outputs_regex": only(None, _PLANNED),
    "vllm_server_base_url": beside(None, _VLLM),
    "vllm_server_host": beside("0.0.0.0", _VLLM),
    "vllm_server_port": beside(8000, _VLLM),
    "vllm_server_timeout": beside(240.0, _VLLM),
    "vllm_group_port": beside(51216, _VLLM),
    "vllm_gpu_memory_utilization": beside(0.3, _VLLM),
    "vllm_max_model_length": beside(None, _VLLM),
    "vllm_tensor_parallel_size": beside(1, _VLLM),
    "beta": same(0.0, "algorithm.kl_coef"),
    "num_iterations": same(1, "algorithm.num_iterations"),
    "epsilon": counts(0.2, "`algorithm.clip_low`, of losses that clip"),
    "delta": counts(None, "`algorithm.dual_clip_ratio`, of losses that clip"),
    "epsilon_high": counts(
        None, "`algorithm.clip_high`, or `ratio_cap` of cispo; None: as `epsilon`"
    ),
    "sapo_temperature_neg": counts(1.05, "`algorithm.sapo_negative`, of sapo"),
    "sapo_temperature_pos": counts(1.0, "`algorithm.sapo_positive`, of sapo"),
    "vespo_k_pos": counts(2.0, "`algorithm.vespo_positive`, of vespo"),
    "vespo_lambda_pos": counts(3.0, "`algorithm.vespo_positive`, of vespo"),
    "vespo_k_neg": counts(3.0, "`algorithm.vespo_negative`, of vespo"),
    "vespo_lambda_neg": counts(2.0, "`algorithm.vespo_negative`, of vespo"),
    "importance_sampling_level": counts("token", "`algorithm.ratio`"),
    "reward_weights": counts(None, "`rewards.weights`; None: 1 each"),
    "multi_objective_aggregation": counts(
        "sum_then_normalize",
        "`algorithm.aggregate`: sum (sum_then_normalize), each (normalize_then_sum)",
    ),
    "scale_rewards": counts(
        "group", "`algorithm.scale_by`: sample_std (group), batch_std (batch), none"
    ),
    "loss_type": counts(
        "dapo", "`algorithm.surrogate` and `algorithm.normalizer`, as docs/objectives.md says"
    ),
    "mask_truncated_completions": same(False, "algorithm.mask_truncated"),
    "sync_ref_model": counts(
        False, "`algorithm.reference_refresh_steps`: `ref_model_sync_steps`, or 0 where False"
    ),
    "ref_model_mixup_alpha": same(0.6, "algorithm.reference_mix"),
    "ref_model_sync_steps": counts(
        512, "`algorithm.reference_refresh_steps`, in updates as in TRL"
    ),
    "top_entropy_quantile": same(1.0, "algorithm.top_entropy_share"),
    "entropy_coef": same(0.0, "algorithm.entropy_coef"),
    "use_adaptive_entropy": counts(
        False, "`algorithm.entropy_target`: `entropy_target`, or 0 where False"
    ),
    "entropy_coef_min": same(0.0, "algorithm.entropy_coef_min"),
    "entropy_coef_max": same(1.0, "algorithm.entropy_coef_max"),
    "entropy_coef_delta": same(0.005, "algorithm.entropy_coef_delta"),
    "entropy_target": counts(0.2, "`algorithm.entropy_target`, with `use_adaptive_entropy`"),
    "max_tool_calling_iterations": counts(
        None, "`environment.max_turns`, one more; None: no limit, as in TRL"
    ),
    "vllm_importance_sampling_correction": counts(True, "`rollout_correction`, with `use_vllm`"),
    "vllm_importance_sampling_mode": counts(
        "sequence_mask", "`rollout_correction.level` and `bound`, with `use_vllm`"
    ),
    "vllm_importance_sampling_clip_max": counts(3.0, "`rollout_correction.cap`, with `use_vllm`"),
    "vllm_importance_sampling_clip_min": counts(
        None, "`rollout_correction.floor`, with `use_vllm`"
    ),
    "off_policy_mask_threshold": counts(None, "`algorithm.max_sequence_drift`"),
    "use_bias_correction_kl": counts(True, "`algorithm.kl_estimator`: k3_ratio, or k3 where False"),
    "log_completions": counts(False, "`logging.samples_every_steps`; samples.jsonl in any case"),
    "log_multimodal": beside(True, "prompts are texts"),
    "num_completions_to_print": counts(None, "`logging.num_samples`; None: 4"),
    "log_unique_prompts": beside(False, "a table shows completions of one prompt"),
    "log_completions_hub_repo": only(None, _HUB),
    "use_transformers_continuous_batching": beside(False, _VLLM),
    "transformers_continuous_batching_config": beside(None, _VLLM),
    "use_transformers_paged": beside(False, _VLLM),
    "vllm_importance_sampling_cap": only(None, "vllm_importance_sampling_clip_max"),
}

TRAINING_ARGUMENTS: dict[str, Field] = {
    # --- how long, and how the optimizer moves ---
    "output_dir": counts(None, "the workdir"),
    "per_device_train_batch_size": counts(8, "`batch.prompts`; times the devices, as in TRL"),
    "gradient_accumulation_steps": counts(1, "`batch.prompts` and `batch.minibatches`"),
    "num_train_epochs": counts(3.0, "`loop.num_steps`, where `max_steps` is -1"),
    "max_steps": counts(-1, "`loop.num_steps`; TRL counts updates, and a step here has several"),
    "lr_scheduler_type": counts("linear", "`optim.schedule`: linear, cosine or constant"),
    "lr_scheduler_kwargs": only(None, "optim.end_fraction", {}),
    "warmup_steps": counts(0, "`optim.warmup_steps`; below 1 a share of all updates"),
    "optim": only("adamw_torch_fused", "AdamW", "adamw_torch", "adamw_hf"),
    "optim_args": only(None, "adam_beta1, adam_beta2 and adam_epsilon"),
    "optim_target_modules": beside(None, "of optimizers other than AdamW"),
    "weight_decay": same(0.0, "optim.weight_decay"),
    "adam_beta1": same(0.9, "optim.beta1"),
    "adam_beta2": same(0.999, "optim.beta2"),
    "adam_epsilon": same(1e-8, "optim.eps"),
    "max_grad_norm": same(1.0, "optim.max_grad_norm"),
    "average_tokens_across_devices": beside(True, "devices change no number"),
    "label_smoothing_factor": beside(0.0, "of supervised losses"),
    "neftune_noise_alpha": only(None, _PLANNED),
    "seed": same(42, "seed"),
    "data_seed": only(None, "seed"),
    # --- precision and memory ---
    "bf16": counts(None, "`model.dtype`: bfloat16, or float32 where False"),
    "fp16": only(False, _DTYPE),
    "bf16_full_eval": beside(False, "evaluations have the precision of rollouts"),
    "fp16_full_eval": only(False, _DTYPE),
    "tf32": only(None, "float32 products are exact", False),
    "gradient_checkpointing": counts(True, "`model.remat`: dots, or none where False"),
    "gradient_checkpointing_kwargs": beside(None, _TORCH),
    "activation_checkpointing": beside(None, _TORCH),
    "activation_checkpointing_kwargs": beside(None, _TORCH),
    "auto_find_batch_size": only(False, "rows are cut to what memory holds by batch.microbatch=-1"),
    "use_cache": beside(False, "rollouts have a KV cache"),
    "use_liger_kernel": beside(False, "kernels are chosen by themselves"),
    "liger_kernel_config": beside(None, "kernels are chosen by themselves"),
    "torch_compile": beside(False, "all is compiled"),
    "torch_compile_backend": beside(None, "all is compiled"),
    "torch_compile_mode": beside(None, "all is compiled"),
    "torch_empty_cache_steps": beside(None, _TORCH),
    "use_cpu": beside(False, "JAX_PLATFORMS=cpu in the environment"),
    "full_determinism": beside(False, "runs are deterministic"),
    # --- devices ---
    "fsdp": only(None, _DEVICES, "", []),
    "fsdp_config": only(None, _DEVICES, {}),
    "deepspeed": only(None, _DEVICES),
    "parallelism_config": only(None, _DEVICES),
    "accelerator_config": beside(None, _TORCH),
    "ddp_find_unused_parameters": beside(None, _TORCH),
    "ddp_bucket_cap_mb": beside(None, _TORCH),
    "ddp_broadcast_buffers": beside(None, _TORCH),
    "ddp_static_graph": beside(None, _TORCH),
    "ddp_backend": beside(None, _TORCH),
    "ddp_timeout": beside(1800, _TORCH),
    "local_rank": beside(-1, _TORCH),
    "debug": beside("", _TORCH),
    "skip_memory_metrics": beside(True, "memory is among the metrics"),
    # --- data ---
    "dataloader_drop_last": beside(False, "a step takes its prompts across the ends of epochs"),
    "dataloader_num_workers": beside(0, _LOADER),
    "dataloader_pin_memory": beside(True, _LOADER),
    "dataloader_persistent_workers": beside(False, _LOADER),
    "dataloader_prefetch_factor": beside(None, _LOADER),
    "dataloader_multiprocessing_context": beside(None, _LOADER),
    "dataloader_in_order": beside(True, _LOADER),
    "label_names": beside(None, "of supervised losses"),
    "train_sampling_strategy": only("random", "each epoch has an order of its own"),
    "length_column_name": beside("length", _LOADER),
    "ignore_data_skip": only(False, "a run goes on with the prompts that come next"),
    # --- evaluation ---
    "do_train": beside(False, "of scripts"),
    "do_eval": beside(False, "of scripts; an eval_dataset is evaluated by eval_strategy"),
    "do_predict": beside(False, "of scripts"),
    "eval_strategy": counts("no", "`evaluation.every_steps`, `evaluation.num_problems`"),
    "eval_steps": counts(None, "`evaluation.every_steps`, in updates as in TRL"),
    "eval_delay": only(0, _PLANNED),
    "eval_on_start": beside(False, "a run that evaluates begins with it"),
    "per_device_eval_batch_size": beside(8, "slots are filled as completions finish"),
    "eval_accumulation_steps": beside(None, _TORCH),
    "eval_do_concat_batches": beside(True, _TORCH),
    "eval_use_gather_object": beside(False, _TORCH),
    "prediction_loss_only": beside(False, "of supervised losses"),
    "include_for_metrics": beside([], "of supervised losses"),
    "batch_eval_metrics": beside(False, "of supervised losses"),
    # --- saving ---
    "save_strategy": counts("steps", "`checkpoint.every_steps`"),
    "save_steps": counts(500, "`checkpoint.every_steps`, in updates as in TRL"),
    "save_total_limit": counts(None, "`checkpoint.keep`; None: 2, and the best"),
    "save_only_model": only(False, "checkpoints continue a run; the export is the model"),
    "save_on_each_node": beside(False, _TORCH),
    "enable_jit_checkpoint": beside(False, "a run that is told to stop saves first"),
    "load_best_model_at_end": only(False, "the best checkpoint is kept; the model is the last"),
    "metric_for_best_model": beside(None, "held-out accuracy, or reward"),
    "greater_is_better": beside(None, "held-out accuracy, or reward"),
    "restore_callback_states_from_checkpoint": beside(False, "callbacks have no state here"),
    "resume_from_checkpoint": beside(None, "a run in a workdir goes on by itself"),
    "push_to_hub": only(False, _HUB),
    "hub_token": beside(None, _HUB),
    "hub_private_repo": beside(None, _HUB),
    "hub_model_id": beside(None, _HUB),
    "hub_strategy": beside("every_save", _HUB),
    "hub_always_push": beside(False, _HUB),
    "hub_revision": beside(None, _HUB),
    # --- logging ---
    "logging_strategy": beside("steps", "each step is logged"),
    "logging_steps": beside(10, "each step is logged"),
    "logging_first_step": beside(False, "each step is logged"),
    "logging_nan_inf_filter": beside(True, "an update with such numbers is refused, and counted"),
    "log_on_each_node": beside(True, "the first process writes"),
    "log_level": beside("passive", "messages are few"),
    "log_level_replica": beside("warning", "messages are few"),
    "include_num_input_tokens_seen": beside("no", "tokens are among the metrics"),
    "disable_tqdm": beside(None, "a bar is drawn on a terminal alone"),
    "report_to": counts("none", "`logging.*`: tensorboard, wandb, mlflow and trackio"),
    "project": counts("huggingface", "`logging.wandb_project` and the like, as `report_to` says"),
    "run_name": counts(None, "`logging.run_name`; None: that of the workdir"),
    "trackio_space_id": beside(None, _TRACKERS),
    "trackio_bucket_id": beside(None, _TRACKERS),
    "trackio_static_space_id": beside(None, _TRACKERS),
}

FIELDS = _OF_GRPO | TRAINING_ARGUMENTS  # of GRPOConfig
