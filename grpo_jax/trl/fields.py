"""The arguments of TRL 1.16's GRPOConfig and transformers' TrainingArguments, and their meaning.

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


def _same(default: Any, option: str) -> Field:
    return Field(default, option=option)


def _counts(default: Any, counts: str) -> Field:
    return Field(default, counts=counts)


def _beside(default: Any, why: str) -> Field:
    return Field(default, beside=why)


def _only(default: Any, why: str, *also: Any) -> Field:
    return Field(default, only=why, also=also)


_TORCH = "of PyTorch's processes and memory"
_LOADER = "problems are read into memory once"
_VLLM = "this trainer samples by itself, with the weights that it trains"
_PLANNED = "not built yet"
_HUB = "upload `run.workdir / 'export'` with huggingface_hub"
_DTYPE = "bf16=True or False; GPUs and TPUs that train have bfloat16"
_DEVICES = "mesh.fsdp, mesh.tensor and mesh.sequence, given to GRPOTrainer as options"
_TRACKERS = "Trackio writes locally, or where TRACKIO_SPACE_ID says"

FIELDS: dict[str, Field] = {
    # --- GRPOConfig ---
    "learning_rate": _same(1e-6, "optim.learning_rate"),
    "model_init_kwargs": _counts(None, "its `dtype` is `model.param_dtype`; others are refused"),
    "trust_remote_code": _only(False, "no code of a model is run"),
    "router_aux_loss_coef": _beside(None, "families with experts are not built yet"),
    "disable_dropout": _beside(False, "there is no dropout"),
    "cast_lm_head_to_fp32": _beside(False, "logits are computed in float32"),
    "remove_unused_columns": _only(False, "reward functions get all columns"),
    "num_generations": _counts(8, "`batch.group`"),
    "num_generations_eval": _beside(None, "evaluations are greedy, one completion a problem"),
    "max_completion_length": _same(512, "rollout.max_tokens"),
    "ds3_gather_for_generation": _beside(True, _TORCH),
    "shuffle_dataset": _only(True, "each epoch has an order of its own"),
    "pad_to_multiple_of": _beside("auto", "rows are packed"),
    "generation_batch_size": _counts(None, "`batch.prompts`, times `num_generations`"),
    "steps_per_generation": _counts(None, "`batch.minibatches`"),
    "temperature": _same(1.0, "rollout.temperature"),
    "top_p": _same(1.0, "rollout.top_p"),
    "top_k": _same(0, "rollout.top_k"),
    "min_p": _only(None, "top_p or top_k"),
    "generation_kwargs": _only(None, "temperature, top_p, top_k and max_completion_length", {}),
    "chat_template_kwargs": _counts(None, "`data.chat_template_kwargs`"),
    "repetition_penalty": _only(1.0, "a reward such as repetition_penalty"),
    "cache_implementation": _beside(None, _VLLM),
    "use_vllm": _beside(False, _VLLM),
    "vllm_mode": _beside("colocate", _VLLM),
    "vllm_model_impl": _beside("vllm", _VLLM),
    "vllm_enable_sleep_mode": _beside(False, _VLLM),
    "vllm_structured_outputs_regex": _only(None, _PLANNED),
    "vllm_server_base_url": _beside(None, _VLLM),
    "vllm_server_host": _beside("0.0.0.0", _VLLM),
    "vllm_server_port": _beside(8000, _VLLM),
    "vllm_server_timeout": _beside(240.0, _VLLM),
    "vllm_group_port": _beside(51216, _VLLM),
    "vllm_gpu_memory_utilization": _beside(0.3, _VLLM),
    "vllm_max_model_length": _beside(None, _VLLM),
    "vllm_tensor_parallel_size": _beside(1, _VLLM),
    "beta": _same(0.0, "algorithm.kl_coef"),
    "num_iterations": _same(1, "algorithm.num_iterations"),
    "epsilon": _counts(0.2, "`algorithm.clip_low`, of losses that clip"),
    "delta": _counts(None, "`algorithm.dual_clip_ratio`, of losses that clip"),
    "epsilon_high": _counts(
        None, "`algorithm.clip_high`, or `ratio_cap` of cispo; None: as `epsilon`"
    ),
    "sapo_temperature_neg": _counts(1.05, "`algorithm.sapo_negative`, of sapo"),
    "sapo_temperature_pos": _counts(1.0, "`algorithm.sapo_positive`, of sapo"),
    "vespo_k_pos": _counts(2.0, "`algorithm.vespo_positive`, of vespo"),
    "vespo_lambda_pos": _counts(3.0, "`algorithm.vespo_positive`, of vespo"),
    "vespo_k_neg": _counts(3.0, "`algorithm.vespo_negative`, of vespo"),
    "vespo_lambda_neg": _counts(2.0, "`algorithm.vespo_negative`, of vespo"),
    "importance_sampling_level": _counts("token", "`algorithm.ratio`"),
    "reward_weights": _counts(None, "`rewards.weights`; None: 1 each"),
    "multi_objective_aggregation": _counts(
        "sum_then_normalize",
        "`algorithm.aggregate`: sum (sum_then_normalize), each (normalize_then_sum)",
    ),
    "scale_rewards": _counts(
        "group", "`algorithm.scale_by`: sample_std (group), batch_std (batch), none"
    ),
    "loss_type": _counts(
        "dapo", "`algorithm.surrogate` and `algorithm.normalizer`, as docs/objectives.md says"
    ),
    "mask_truncated_completions": _same(False, "algorithm.mask_truncated"),
    "sync_ref_model": _counts(
        False, "`algorithm.reference_refresh_steps`: `ref_model_sync_steps`, or 0 where False"
    ),
    "ref_model_mixup_alpha": _same(0.6, "algorithm.reference_mix"),
    "ref_model_sync_steps": _counts(
        512, "`algorithm.reference_refresh_steps`, in updates as in TRL"
    ),
    "top_entropy_quantile": _same(1.0, "algorithm.top_entropy_share"),
    "entropy_coef": _same(0.0, "algorithm.entropy_coef"),
    "use_adaptive_entropy": _counts(
        False, "`algorithm.entropy_target`: `entropy_target`, or 0 where False"
    ),
    "entropy_coef_min": _same(0.0, "algorithm.entropy_coef_min"),
    "entropy_coef_max": _same(1.0, "algorithm.entropy_coef_max"),
    "entropy_coef_delta": _same(0.005, "algorithm.entropy_coef_delta"),
    "entropy_target": _counts(0.2, "`algorithm.entropy_target`, with `use_adaptive_entropy`"),
    "max_tool_calling_iterations": _counts(
        None, "`environment.max_turns`, one more; None: no limit, as in TRL"
    ),
    "vllm_importance_sampling_correction": _counts(True, "`rollout_correction`, with `use_vllm`"),
    "vllm_importance_sampling_mode": _counts(
        "sequence_mask", "`rollout_correction.level` and `bound`, with `use_vllm`"
    ),
    "vllm_importance_sampling_clip_max": _counts(3.0, "`rollout_correction.cap`, with `use_vllm`"),
    "vllm_importance_sampling_clip_min": _counts(
        None, "`rollout_correction.floor`, with `use_vllm`"
    ),
    "off_policy_mask_threshold": _counts(None, "`algorithm.max_sequence_drift`"),
    "use_bias_correction_kl": _counts(
        True, "`algorithm.kl_estimator`: k3_ratio, or k3 where False"
    ),
    "log_completions": _counts(False, "`logging.samples_every_steps`; samples.jsonl in any case"),
    "log_multimodal": _beside(True, "prompts are texts"),
    "num_completions_to_print": _counts(None, "`logging.num_samples`; None: 4"),
    "log_unique_prompts": _beside(False, "a table shows completions of one prompt"),
    "log_completions_hub_repo": _only(None, _HUB),
    "use_transformers_continuous_batching": _beside(False, _VLLM),
    "transformers_continuous_batching_config": _beside(None, _VLLM),
    "use_transformers_paged": _beside(False, _VLLM),
    "vllm_importance_sampling_cap": _only(None, "vllm_importance_sampling_clip_max"),
    # --- TrainingArguments: how long, and how the optimizer moves ---
    "output_dir": _counts(None, "the workdir"),
    "per_device_train_batch_size": _counts(8, "`batch.prompts`; times the devices, as in TRL"),
    "gradient_accumulation_steps": _counts(1, "`batch.prompts` and `batch.minibatches`"),
    "num_train_epochs": _counts(3.0, "`loop.num_steps`, where `max_steps` is -1"),
    "max_steps": _counts(-1, "`loop.num_steps`; TRL counts updates, and a step here has several"),
    "lr_scheduler_type": _counts("linear", "`optim.schedule`: linear, cosine or constant"),
    "lr_scheduler_kwargs": _only(None, "optim.end_fraction", {}),
    "warmup_steps": _counts(0, "`optim.warmup_steps`; below 1 a share of all updates"),
    "optim": _only("adamw_torch_fused", "AdamW", "adamw_torch", "adamw_hf"),
    "optim_args": _only(None, "adam_beta1, adam_beta2 and adam_epsilon"),
    "optim_target_modules": _beside(None, "of optimizers other than AdamW"),
    "weight_decay": _same(0.0, "optim.weight_decay"),
    "adam_beta1": _same(0.9, "optim.beta1"),
    "adam_beta2": _same(0.999, "optim.beta2"),
    "adam_epsilon": _same(1e-8, "optim.eps"),
    "max_grad_norm": _same(1.0, "optim.max_grad_norm"),
    "average_tokens_across_devices": _beside(True, "devices change no number"),
    "label_smoothing_factor": _beside(0.0, "of supervised losses"),
    "neftune_noise_alpha": _only(None, _PLANNED),
    "seed": _same(42, "seed"),
    "data_seed": _only(None, "seed"),
    # --- precision and memory ---
    "bf16": _counts(None, "`model.dtype`: bfloat16, or float32 where False"),
    "fp16": _only(False, _DTYPE),
    "bf16_full_eval": _beside(False, "evaluations have the precision of rollouts"),
    "fp16_full_eval": _only(False, _DTYPE),
    "tf32": _only(None, "float32 products are exact", False),
    "gradient_checkpointing": _counts(True, "`model.remat`: dots, or none where False"),
    "gradient_checkpointing_kwargs": _beside(None, _TORCH),
    "activation_checkpointing": _beside(None, _TORCH),
    "activation_checkpointing_kwargs": _beside(None, _TORCH),
    "auto_find_batch_size": _only(
        False, "rows are cut to what memory holds by batch.microbatch=-1"
    ),
    "use_cache": _beside(False, "rollouts have a KV cache"),
    "use_liger_kernel": _beside(False, "kernels are chosen by themselves"),
    "liger_kernel_config": _beside(None, "kernels are chosen by themselves"),
    "torch_compile": _beside(False, "all is compiled"),
    "torch_compile_backend": _beside(None, "all is compiled"),
    "torch_compile_mode": _beside(None, "all is compiled"),
    "torch_empty_cache_steps": _beside(None, _TORCH),
    "use_cpu": _beside(False, "JAX_PLATFORMS=cpu in the environment"),
    "full_determinism": _beside(False, "runs are deterministic"),
    # --- devices ---
    "fsdp": _only(None, _DEVICES, "", []),
    "fsdp_config": _only(None, _DEVICES, {}),
    "deepspeed": _only(None, _DEVICES),
    "parallelism_config": _only(None, _DEVICES),
    "accelerator_config": _beside(None, _TORCH),
    "ddp_find_unused_parameters": _beside(None, _TORCH),
    "ddp_bucket_cap_mb": _beside(None, _TORCH),
    "ddp_broadcast_buffers": _beside(None, _TORCH),
    "ddp_static_graph": _beside(None, _TORCH),
    "ddp_backend": _beside(None, _TORCH),
    "ddp_timeout": _beside(1800, _TORCH),
    "local_rank": _beside(-1, _TORCH),
    "debug": _beside("", _TORCH),
    "skip_memory_metrics": _beside(True, "memory is among the metrics"),
    # --- data ---
    "dataloader_drop_last": _beside(False, "a step takes its prompts across the ends of epochs"),
    "dataloader_num_workers": _beside(0, _LOADER),
    "dataloader_pin_memory": _beside(True, _LOADER),
    "dataloader_persistent_workers": _beside(False, _LOADER),
    "dataloader_prefetch_factor": _beside(None, _LOADER),
    "dataloader_multiprocessing_context": _beside(None, _LOADER),
    "dataloader_in_order": _beside(True, _LOADER),
    "label_names": _beside(None, "of supervised losses"),
    "train_sampling_strategy": _only("random", "each epoch has an order of its own"),
    "length_column_name": _beside("length", _LOADER),
    "ignore_data_skip": _only(False, "a run goes on with the prompts that come next"),
    # --- evaluation ---
    "do_train": _beside(False, "of scripts"),
    "do_eval": _beside(False, "of scripts; an eval_dataset is evaluated by eval_strategy"),
    "do_predict": _beside(False, "of scripts"),
    "eval_strategy": _counts("no", "`evaluation.every_steps`, `evaluation.num_problems`"),
    "eval_steps": _counts(None, "`evaluation.every_steps`, in updates as in TRL"),
    "eval_delay": _only(0, _PLANNED),
    "eval_on_start": _beside(False, "a run that evaluates begins with it"),
    "per_device_eval_batch_size": _beside(8, "slots are filled as completions finish"),
    "eval_accumulation_steps": _beside(None, _TORCH),
    "eval_do_concat_batches": _beside(True, _TORCH),
    "eval_use_gather_object": _beside(False, _TORCH),
    "prediction_loss_only": _beside(False, "of supervised losses"),
    "include_for_metrics": _beside([], "of supervised losses"),
    "batch_eval_metrics": _beside(False, "of supervised losses"),
    # --- saving ---
    "save_strategy": _counts("steps", "`checkpoint.every_steps`"),
    "save_steps": _counts(500, "`checkpoint.every_steps`, in updates as in TRL"),
    "save_total_limit": _counts(None, "`checkpoint.keep`; None: 2, and the best"),
    "save_only_model": _only(False, "checkpoints continue a run; the export is the model"),
    "save_on_each_node": _beside(False, _TORCH),
    "enable_jit_checkpoint": _beside(False, "a run that is told to stop saves first"),
    "load_best_model_at_end": _only(False, "the best checkpoint is kept; the model is the last"),
    "metric_for_best_model": _beside(None, "held-out accuracy, or reward"),
    "greater_is_better": _beside(None, "held-out accuracy, or reward"),
    "restore_callback_states_from_checkpoint": _beside(False, "callbacks have no state here"),
    "resume_from_checkpoint": _beside(None, "a run in a workdir goes on by itself"),
    "push_to_hub": _only(False, _HUB),
    "hub_token": _beside(None, _HUB),
    "hub_private_repo": _beside(None, _HUB),
    "hub_model_id": _beside(None, _HUB),
    "hub_strategy": _beside("every_save", _HUB),
    "hub_always_push": _beside(False, _HUB),
    "hub_revision": _beside(None, _HUB),
    # --- logging ---
    "logging_strategy": _beside("steps", "each step is logged"),
    "logging_steps": _beside(10, "each step is logged"),
    "logging_first_step": _beside(False, "each step is logged"),
    "logging_nan_inf_filter": _beside(True, "an update with such numbers is refused, and counted"),
    "log_on_each_node": _beside(True, "the first process writes"),
    "log_level": _beside("passive", "messages are few"),
    "log_level_replica": _beside("warning", "messages are few"),
    "include_num_input_tokens_seen": _beside("no", "tokens are among the metrics"),
    "disable_tqdm": _beside(None, "a bar is drawn on a terminal alone"),
    "report_to": _counts("none", "`logging.*`: tensorboard, wandb, mlflow and trackio"),
    "project": _counts("huggingface", "`logging.wandb_project` and the like, as `report_to` says"),
    "run_name": _counts(None, "`logging.run_name`; None: that of the workdir"),
    "trackio_space_id": _beside(None, _TRACKERS),
    "trackio_bucket_id": _beside(None, _TRACKERS),
    "trackio_static_space_id": _beside(None, _TRACKERS),
}
