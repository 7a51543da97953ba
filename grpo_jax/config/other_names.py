"""What TRL, verl and earlier versions call an option, for the hint on a name that is none here.

No alias: such a name is refused, and the message tells ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from grpo_jax.config.options import BY_NAME, SECTIONS
from grpo_jax.messages.values import shown

# Names of TRL's GRPOConfig and of transformers' TrainingArguments, and what verl's dotted names end
# with: the longest end of a name that stands here counts.
_ELSEWHERE = {
    # model
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "gradient_checkpointing": "model.remat",
    "enable_gradient_checkpointing": "model.remat",
    "attn_implementation": "model.attention",
    "param_offload": "model.offload_reference",
    "optimizer_offload": "optim.offload",
    "hidden_size": "model.width",
    "intermediate_size": "model.mlp_width",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    # data
    "train_dataset": "data.path",
    "train_files": "data.path",
    "dataset_name": "data.path",
    "dataset_config": "data.name",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "eval_dataset": "data.eval_path",
    "val_files": "data.eval_path",
    "max_prompt_length": "data.max_prompt_tokens",
    "apply_chat_template_kwargs": "data.chat_template_kwargs",
    "truncation": "data.overlong",
    "filter_overlong_prompts": "data.overlong",
    # rewards
    "reward_funcs": "rewards.names",
    "custom_reward_function": "rewards.names",
    "custom_reward_function.path": "rewards.names",
    "custom_reward_function.name": "rewards.names",
    "reward_weights": "rewards.weights",
    "overlong_buffer": "rewards.names",
    "overlong_buffer.enable": "rewards.names",
    "overlong_buffer.len": "rewards.names",
    "overlong_buffer.penalty_factor": "rewards.weights",
    # batch
    "num_generations": "batch.group",
    "rollout.n": "batch.group",
    "group_size": "batch.group",
    "generation_batch_size": "batch.prompts",
    "train_batch_size": "batch.prompts",
    "steps_per_generation": "batch.minibatches",
    "ppo_mini_batch_size": "batch.minibatches",
    "per_device_train_batch_size": "batch.microbatch",
    "gradient_accumulation_steps": "batch.microbatch",
    "ppo_micro_batch_size": "batch.microbatch",
    "ppo_micro_batch_size_per_gpu": "batch.microbatch",
    # prompts: verl's, then NeMo RL's, slime's and OpenRLHF's
    "filter_groups": "prompts.drop_equal_groups",
    "filter_groups.enable": "prompts.drop_equal_groups",
    "filter_groups.max_num_gen_batches": "prompts.max_draws",
    "gen_batch_size": "prompts.per_draw",
    "use_dynamic_sampling": "prompts.drop_equal_groups",
    "dynamic_sampling_max_gen_batches": "prompts.max_draws",
    "batch_multiplier": "prompts.per_draw",
    "over_sampling_batch_size": "prompts.per_draw",
    "dynamic_filtering": "prompts.drop_equal_groups",
    # rollout
    "max_completion_length": "rollout.max_tokens",
    "max_new_tokens": "rollout.max_tokens",
    "max_response_length": "rollout.max_tokens",
    "max_num_seqs": "rollout.num_slots",
    # algorithm
    "beta": "algorithm.kl_coef",
    "kl_loss_coef": "algorithm.kl_coef",
    "use_kl_loss": "algorithm.kl_coef",
    "use_bias_correction_kl": "algorithm.kl_estimator",
    "kl_loss_type": "algorithm.kl_estimator",
    "kl_penalty": "algorithm.kl_estimator",
    "delta": "algorithm.dual_clip_ratio",
    "clip_ratio_c": "algorithm.dual_clip_loss",
    "importance_sampling_level": "algorithm.ratio",
    "sapo_temperature_pos": "algorithm.sapo_positive",
    "sapo_temperature_neg": "algorithm.sapo_negative",
    "vespo_k_pos": "algorithm.vespo_positive",
    "vespo_lambda_pos": "algorithm.vespo_positive",
    "vespo_k_neg": "algorithm.vespo_negative",
    "vespo_lambda_neg": "algorithm.vespo_negative",
    "off_policy_mask_threshold": "algorithm.max_sequence_drift",
    "vllm_importance_sampling_clip_min": "rollout_correction.floor",
    "target_kl": "algorithm.kl_target",
    "kl_ctrl.type": "algorithm.kl_target",
    "horizon": "algorithm.kl_horizon",
    "use_adaptive_entropy": "algorithm.entropy_target",
    "sync_ref_model": "algorithm.reference_refresh_steps",
    "ref_model_sync_steps": "algorithm.reference_refresh_steps",
    "ref_model_mixup_alpha": "algorithm.reference_mix",
    "top_entropy_quantile": "algorithm.top_entropy_share",
    "epsilon": "algorithm.clip_low",
    "clip_ratio": "algorithm.clip_low",
    "clip_ratio_low": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "clip_ratio_high": "algorithm.clip_high",
    "entropy_coeff": "algorithm.entropy_coef",
    "ppo_epochs": "algorithm.num_iterations",
    "loss_type": "algorithm.preset",
    "loss_mode": "algorithm.preset",
    "loss_agg_mode": "algorithm.normalizer",
    "scale_rewards": "algorithm.scale_by",
    "norm_adv_by_std_in_grpo": "algorithm.scale_by",
    "multi_objective_aggregation": "algorithm.aggregate",
    "adv_estimator": "algorithm.baseline",
    "advantage_estimator": "algorithm.baseline",
    "normalize_advantages": "algorithm.whiten",
    "use_kl_in_reward": "algorithm.kl_in",
    "kl_ctrl.kl_coef": "algorithm.kl_coef",
    "mask_truncated_completions": "algorithm.mask_truncated",
    "vllm_importance_sampling_correction": "rollout_correction.level",
    "vllm_importance_sampling_mode": "rollout_correction.level",
    "vllm_importance_sampling_cap": "rollout_correction.cap",
    "vllm_importance_sampling_clip_max": "rollout_correction.cap",
    "rollout_is": "rollout_correction.level",
    "rollout_is_threshold": "rollout_correction.cap",
    # training on given completions
    "simpo_gamma": "preference.margin",
    "cpo_alpha": "preference.nll_weight",
    "rpo_alpha": "preference.nll_weight",
    "center_rewards_coefficient": "reward_model.centre_coef",
    # lora
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "use_rslora": "lora.rank_stabilized",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "exclude_modules": "lora.exclude",
    "lora_adapter_path": "lora.path",
    "peft_config": "lora.rank",
    "use_peft": "lora.rank",
    "quantization_config": "lora.base_dtype",
    "load_in_4bit": "lora.base_dtype",
    "load_in_8bit": "lora.base_dtype",
    # a critic
    "gamma": "algorithm.discount",
    "lam": "algorithm.gae_lambda",
    "critic.optim.lr": "critic.learning_rate",
    "critic_warmup": "critic.first_steps",
    "cliprange_value": "critic.clip",
    "vf_coef": "critic.loss_coef",
    # environments
    "environment_factory": "environment.classes",
    "multi_turn.enable": "environment.classes",
    "multi_turn.tool_config_path": "environment.tools",
    "max_assistant_turns": "environment.max_turns",
    "max_tool_calling_iterations": "environment.max_turns",
    "max_tool_response_length": "environment.observation_tokens",
    # optim
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "warmup_style": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_steps",
    "min_lr_ratio": "optim.end_fraction",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "betas": "optim.beta1",
    "adam_epsilon": "optim.eps",
    "grad_clip": "optim.max_grad_norm",
    "clip_grad": "optim.max_grad_norm",
    # the run
    "max_steps": "loop.num_steps",
    "num_train_epochs": "loop.num_epochs",
    "total_training_steps": "loop.num_steps",
    "total_epochs": "loop.num_epochs",
    "data_seed": "seed",
    "eval_steps": "evaluation.every_steps",
    "eval_strategy": "evaluation.every_steps",
    "test_freq": "evaluation.every_steps",
    "val_kwargs.n": "evaluation.num_samples",
    "output_dir": "checkpoint.folder",
    "default_local_dir": "checkpoint.folder",
    "save_steps": "checkpoint.every_steps",
    "save_freq": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "max_actor_ckpt_to_keep": "checkpoint.keep",
    "report_to": "logging.wandb_project",
    "project_name": "logging.wandb_project",
    "run_name": "logging.run_name",
    "experiment_name": "logging.run_name",
    "entity": "logging.wandb_entity",
    "log_completions": "logging.samples_every_steps",
    "num_completions_to_print": "logging.num_samples",
    "log_val_generations": "logging.num_samples",
    "tensor_model_parallel_size": "mesh.tensor",
    "ulysses_sequence_parallel_size": "mesh.sequence",
    "context_parallel_size": "mesh.sequence",
    "fsdp_size": "mesh.fsdp",
}
_FORMERLY = {
    "algorithm.importance_correction": "rollout_correction.level",
    "algorithm.importance_cap": "rollout_correction.cap",
    "algorithm.kl_gradient": "algorithm.kl_estimator",
    "data.system": "data.system_prompt",
    "data.template": "data.prompt_template",
    "data.template_arguments": "data.chat_template_kwargs",
    "hosts.lost_limit_s": "hosts.heartbeat_timeout_s",
    "hosts.start_limit_s": "hosts.start_timeout_s",
    "loop.stall_limit_s": "loop.stall_timeout_s",
    "model.layers": "model.scan_layers",
    "optim.clip_norm": "optim.max_grad_norm",
    "optim.float32_copy": "optim.master_weights",
    "optim.moments": "optim.moments_dtype",
    "rewards.memory_gb": "rewards.memory_limit_gib",
    "rewards.start_limit_s": "rewards.start_timeout_s",
    "rewards.time_limit_s": "rewards.timeout_s",
    "rollout.cache": "rollout.kv_cache_dtype",
    "rollout.weights": "rollout.weights_dtype",
}


def no_such(name: str) -> str:
    """What is said of a name that is no option."""
    found = meant(name)
    hint = f" Did you mean {' or '.join(found)}?" if found else ""
    where = "`python -m grpo_jax.train --help` lists all options."
    return f"There is no option {name[:80]}.{hint} {where}"


# What other programs of the kind take.
_PROGRAMS_HAVE = {
    "--dry-run": "--check",
    "--output-dir": "--workdir",
    "--model-name-or-path": "--config.model.path",
    "--version": "grpo-jax --version",
}


def no_such_argument(argument: str, takes: Sequence[str] = ("--config",)) -> str:
    """What is said of an argument that the program does not take.

    `takes`: its own, with their hyphens; a program with `--config` takes options of the run, too.
    """
    has_options = "--config" in takes
    name = argument.partition("=")[0]
    leaf = name.removeprefix("--config.").lstrip("-")
    hint, found = "", []
    if has_options and name == argument == f"--config.{leaf}" and leaf in SECTIONS:
        hint = f" It is a section: `grpo-jax options {leaf}` lists its options."
    elif has_options and name == argument == f"--config.{leaf}" and leaf in BY_NAME:
        hint = " It lacks a value."
    elif name.startswith("--"):
        ours = _PROGRAMS_HAVE.get(f"--{leaf.replace('_', '-')}", "")
        found = [ours] if ours else difflib.get_close_matches(name, takes, n=1)
        if has_options and not found:
            found = [f"--config.{option}" for option in meant(leaf)[:1]]
    hint = f" Did you mean {found[0]}?" if found else hint
    if has_options:
        hint += (
            " Options of the run are written --config.name=value, for example "
            "--config.optim.learning_rate=1e-5."
        )
    return f"Unknown argument {shown(argument)}.{hint or ' --help lists what there is.'}"


def meant(name: str) -> list[str]:
    """The options that a name may mean which is none, the likeliest first; [] where none is near.

    `name`: dotted, or its last part alone.
    """
    if name in _FORMERLY:
        return [_FORMERLY[name]]
    parts = name.split(".")
    for start in range(len(parts)):
        ending = ".".join(parts[start:])
        if ending in _ELSEWHERE:
            return [_ELSEWHERE[ending]]
    leaf = parts[-1]
    found = [n for n in BY_NAME if n.rpartition(".")[2] == leaf]
    found += [new for old, new in _FORMERLY.items() if old.rpartition(".")[2] == leaf]
    return list(dict.fromkeys([*found, *difflib.get_close_matches(name, BY_NAME, n=3)]))
