"""The rules that the options of a run follow, each alone and together.

Nothing is loaded or compiled before `check` has refused what cannot work.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.config.dotted import flatten
from grpo_jax.data.problems import form_of
from grpo_jax.messages import credentials
from grpo_jax.messages.values import shown


def check(config: ConfigDict, default: ConfigDict) -> None:
    """Raises ValueError for values that cannot work, alone or together.

    `default` has every option, with a value of its type.
    """
    flat = flatten(config)
    for name, kind in ((n, type(v)) for n, v in flatten(default).items()):
        if name not in flat or type(flat[name]) is not kind:
            raise ValueError(
                f"{name} = {shown(flat.get(name))} is not of type {kind.__name__}, which it "
                "needs to be."
            )
    for name, value in flat.items():
        _check_value(name, value)
    _check_ranges(flat)
    _check_mesh(flat)
    _check_choices(config)
    _check_batch(config)
    _check_loop(config)
    for name in config.checkpoint.accept_changes:
        if name not in flat:
            raise ValueError(f"checkpoint.accept_changes: there is no option {shown(name)}.")
    _check_guards(config)
    _check_sources(config)


def _check_value(name: str, value: Any) -> None:
    """Raises ValueError for a value that no option can have."""
    if isinstance(value, tuple):
        for entry in value:
            if type(entry) not in (str, int, float):
                raise ValueError(
                    f"{name}: {shown(entry)} must be a text or a number, not a "
                    f"{type(entry).__name__}."
                )
            _check_value(name, entry)
    elif isinstance(value, str):
        secret = credentials.stands_in(value)
        if secret:
            raise ValueError(
                f"{name} holds {secret}. A run records its options, and shows them: set keys and "
                "passwords in the environment, such as HF_TOKEN, and nowhere else."
            )
        if re.search("[\0\ud800-\udfff]", value):
            raise ValueError(f"{name} = {shown(value)} holds what is no character of a text.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value} must be a finite number.")
    elif abs(value) > LARGEST and (type(value) is int or name.endswith(("_s", "_gb"))):
        raise ValueError(f"{name} = {shown(value)} must be at most {LARGEST}.")


LARGEST = 2**31 - 1  # what devices count with
_POSITIVE = (
    "batch.prompts batch.minibatches algorithm.num_iterations rollout.max_tokens loop.num_steps "
    "data.max_prompt_tokens data.num_train model.num_layers model.width model.mlp_width "
    "model.num_heads model.num_kv_heads optim.learning_rate optim.eps "
    "sft.batch sft.learning_rate sft.max_tokens checkpoint.keep rewards.time_limit_s "
    "rewards.start_limit_s checkpoint.max_failed hosts.start_limit_s hosts.lost_limit_s "
    "algorithm.importance_cap guards.window guards.max_skipped"
).split()
_NOT_NEGATIVE = (
    "seed rollout.temperature rollout.top_k rollout.num_slots algorithm.clip_low "
    "algorithm.clip_high algorithm.kl_coef optim.warmup_steps optim.weight_decay optim.clip_norm "
    "optim.end_fraction evaluation.every_steps evaluation.num_problems evaluation.num_samples "
    "evaluation.temperature checkpoint.every_steps logging.samples_every_steps logging.num_samples "
    "data.num_eval sft.num_steps sft.microbatch sft.warmup_steps sft.weight_decay "
    "sft.checkpoint_every_steps rewards.num_workers rewards.memory_gb rewards.max_failed_share "
    "loop.stall_limit_s batch.memory_limit_gib checkpoint.save_before_s "
    "guards.reward_drop guards.equal_groups_steps guards.kl_max guards.entropy_min "
    "guards.entropy_max guards.max_roll_backs"
).split()


def _check_ranges(flat: dict[str, Any]) -> None:
    for name in _POSITIVE:
        if not flat[name] > 0:
            raise ValueError(f"{name} = {flat[name]} must be above 0.")
    for name in _NOT_NEGATIVE:
        if not flat[name] >= 0:
            raise ValueError(f"{name} = {flat[name]} must not be below 0.")
    for name in ("optim.beta1", "optim.beta2", "algorithm.clip_low"):
        if not 0 <= flat[name] < 1:
            raise ValueError(f"{name} = {flat[name]} must be at least 0 and below 1.")
    steps, last = flat["profile.steps"], flat["loop.num_steps"]
    if steps and not (
        len(steps) == 2
        and all(type(step) is int for step in steps)
        and 1 <= steps[0] <= steps[1] <= last
    ):
        raise ValueError(
            f"profile.steps = {steps} must be (first, last), two steps from 1 to loop.num_steps = "
            f"{last}, or () for no trace."
        )
    if not 0 < flat["rollout.top_p"] <= 1:
        raise ValueError(f"rollout.top_p = {flat['rollout.top_p']} must be above 0, at most 1.")
    if flat["rollout.temperature"] == 0:
        raise ValueError(
            "rollout.temperature = 0 gives a group of equal completions, and so no advantage. "
            "Set it above 0; 1.0 is usual."
        )


def _check_mesh(flat: dict[str, Any]) -> None:
    sizes = {name: size for name, size in flat.items() if name.startswith("mesh.")}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"{name} = {size} must be a number of devices, at least 1, or -1 for the rest."
            )
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"{' and '.join(rest)} are -1, the rest of the devices; only one can be.")


def _check_choices(config: ConfigDict) -> None:
    choices = {
        "model.dtype": (config.model.dtype, ("float32", "bfloat16")),
        "model.param_dtype": (config.model.param_dtype, ("float32", "bfloat16")),
        "optim.moments": (config.optim.moments, ("float32", "bfloat16", "int8")),
        "model.remat": (config.model.remat, ("none", "dots", "full", "auto")),
        "model.layers": (config.model.layers, ("auto", "loop", "apart")),
        "model.attention": (config.model.attention, ("auto", "xla", "splash", "cudnn")),
        "rollout.attention": (config.rollout.attention, ("auto", "xla", "ragged", "streamed")),
        "rollout.weights": (config.rollout.weights, ("same", "int8")),
        "rollout.cache": (config.rollout.cache, ("same", "int8")),
        "data.overlong": (config.data.overlong, ("refuse", "drop", "truncate")),
        "algorithm.scale_by": (config.algorithm.scale_by, ("none", "std", "sample_std")),
        "algorithm.kl_gradient": (
            config.algorithm.kl_gradient,
            ("reference_policy", "policy_reference"),
        ),
        "algorithm.normalizer": (config.algorithm.normalizer, ("token", "sequence", "constant")),
        "algorithm.importance_correction": (
            config.algorithm.importance_correction,
            ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        ),
        "rewards.bad_rows": (config.rewards.bad_rows, ("refuse", "drop")),
        "checkpoint.export_dtype": (
            config.checkpoint.export_dtype,
            ("auto", "float32", "bfloat16", "float16"),
        ),
        "optim.schedule": (config.optim.schedule, ("constant", "linear", "cosine")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} = {value!r} must be one of {', '.join(allowed)}.")
    if config.optim.float32_copy and config.model.param_dtype == "float32":
        raise ValueError(
            "optim.float32_copy = True, but the parameters are float32 themselves. Set "
            'model.param_dtype = "bfloat16", or optim.float32_copy = False.'
        )


def _check_loop(config: ConfigDict) -> None:
    if config.loop.async_rollouts and config.algorithm.importance_correction == "none":
        raise ValueError(
            "loop.async_rollouts = True samples with weights that are a step old, and "
            'algorithm.importance_correction = "none" leaves that uncorrected. Set it to '
            '"token_truncate" or another correction, or loop.async_rollouts = False.'
        )


def _check_guards(config: ConfigDict) -> None:
    guards, every = config.guards, config.checkpoint.every_steps
    actions = ("warn", "skip", "roll_back", "stop")
    choices = {"nonfinite": actions[1:], "after_skips": actions[2:]}
    choices |= dict.fromkeys("failed_rewards reward equal_groups kl entropy".split(), actions)
    for name, allowed in choices.items():
        if guards[name] not in allowed:
            raise ValueError(
                f"guards.{name} = {guards[name]!r} must be one of {', '.join(allowed)}."
            )
        if guards[name] == "roll_back" and not every:
            raise ValueError(
                f'guards.{name} = "roll_back" goes back to the last checkpoint, and '
                "checkpoint.every_steps = 0 writes none before the end. Set that above 0, or the "
                "guard to another action."
            )
    if guards.kl_max and not config.algorithm.kl_coef:
        raise ValueError(
            f"guards.kl_max = {guards.kl_max}, but algorithm.kl_coef = 0 runs without the "
            "reference that policy/kl is measured from. Set it above 0 (1e-6 changes next to "
            "nothing), or guards.kl_max = 0."
        )
    if guards.entropy_max and guards.entropy_max <= guards.entropy_min:
        raise ValueError(
            f"guards.entropy_max = {guards.entropy_max} must be above guards.entropy_min = "
            f"{guards.entropy_min}, or 0 for no bound."
        )


def _check_batch(config: ConfigDict) -> None:
    batch, updates = config.batch, derived.num_updates_per_step(config)
    if batch.group < 2:
        raise ValueError(
            f"batch.group = {batch.group}: advantages are relative to the other completions of a "
            "prompt, so a group needs at least 2. 8 is usual."
        )
    if batch.prompts % batch.minibatches:
        raise ValueError(
            f"batch.prompts * batch.group = {batch.prompts} * {batch.group} = "
            f"{batch.prompts * batch.group} rows do not split into batch.minibatches = "
            f"{batch.minibatches} parts of whole groups. "
            f"Make batch.prompts a multiple of {batch.minibatches}."
        )
    per_update = batch.prompts // batch.minibatches
    if batch.microbatch < -1:
        raise ValueError(
            f"batch.microbatch = {batch.microbatch} must be a number of prompts, 0 for the usual "
            "number of tokens, or -1 for as many as fit into memory."
        )
    if batch.microbatch > 0 and per_update % batch.microbatch:
        raise ValueError(
            f"batch.prompts / batch.minibatches = {batch.prompts} / {batch.minibatches} = "
            f"{per_update} prompts per update do not split into microbatches of batch.microbatch = "
            f"{batch.microbatch} prompts. Make batch.prompts a multiple of "
            f"{batch.minibatches * batch.microbatch}, or batch.microbatch divide {per_update}."
        )
    if config.sft.microbatch and config.sft.batch % config.sft.microbatch:
        raise ValueError(
            f"sft.batch = {config.sft.batch} does not split into microbatches of sft.microbatch = "
            f"{config.sft.microbatch}. Make it a multiple of {config.sft.microbatch}."
        )
    if config.optim.schedule != "constant":
        total = config.loop.num_steps * updates
        if config.optim.warmup_steps >= total:
            raise ValueError(
                f"optim.warmup_steps = {config.optim.warmup_steps} leaves nothing of the {total} "
                f"updates of the run for optim.schedule = {config.optim.schedule!r}."
            )


def _check_sources(config: ConfigDict) -> None:
    if bool(config.data.task) == bool(config.data.path):
        raise ValueError(
            f"data.task = {config.data.task!r} and data.path = {config.data.path!r}: "
            "set exactly one of them, a generated task or a dataset."
        )
    if config.data.task:
        names = "name eval_path eval_name eval_split columns template chat system"
        for name in f"{names} template_arguments date".split():
            if config.data[name]:
                raise ValueError(
                    f"data.{name} goes with data.path; a task makes its own problems and held-out "
                    f"set. Clear data.{name}, or set data.path in place of data.task."
                )
    elif config.data.eval_name and not config.data.eval_path:
        raise ValueError(
            f"data.eval_name = {config.data.eval_name!r} goes with data.eval_path. Set that too; "
            "for a split of data.path, data.eval_split alone."
        )
    form_of(config.data)
    _check_date(config.data.date)
    if len(config.rewards.names) != len(config.rewards.weights) or not config.rewards.names:
        raise ValueError(
            f"rewards.names has {len(config.rewards.names)} entries and rewards.weights "
            f"{len(config.rewards.weights)}; give one weight for each of at least one reward."
        )
    if not config.model.path:
        if config.checkpoint.folder:
            raise ValueError(
                f"checkpoint.folder = {config.checkpoint.folder!r} keeps the checkpoints of one "
                'training, and model.path = "" makes a new model by a training before it. Set '
                "model.path, or clear checkpoint.folder."
            )
        if not config.sft.num_steps:
            raise ValueError(
                'model.path = "" makes a new model, and sft.num_steps = 0 leaves it untrained: '
                "no completion would earn a reward. Set model.path to a Hugging Face folder or hub "
                "id, or sft.num_steps above 0."
            )
        if not config.data.task:
            raise ValueError(
                'model.path = "" makes a new model, which needs the tokenizer and worked solutions '
                "of a data.task. Set data.task, or model.path."
            )
        if config.model.num_heads % config.model.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {config.model.num_heads} must be a multiple of "
                f"model.num_kv_heads = {config.model.num_kv_heads}."
            )
        if config.model.width % (2 * config.model.num_heads):
            raise ValueError(
                f"model.width = {config.model.width} must be a multiple of 2 * model.num_heads = "
                f"{2 * config.model.num_heads}: rotary positions need an even head size."
            )


def _check_date(date: str) -> None:
    try:
        if date:
            datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(
            f"data.date = {shown(date)} is no date. Write one such as 2026-11-28 or "
            "2026-11-28T20:15:00, or nothing for the day on which the run starts."
        ) from error


def check_devices(config: ConfigDict, num_row_shards: int) -> None:
    """Raises ValueError when the groups of an update do not split over the devices."""
    batch = config.batch
    per_microbatch = derived.groups_at_once(config)
    if per_microbatch % num_row_shards:
        raise ValueError(
            f"batch.prompts = {batch.prompts}, batch.minibatches = {batch.minibatches} and "
            f"batch.microbatch = {batch.microbatch} give {per_microbatch} prompts at once that do "
            f"not split over mesh.data * mesh.fsdp = {num_row_shards} devices. Make it a "
            f"multiple of {num_row_shards}."
        )


def check_heads(num_heads: int, sequence: int, tensor: int) -> None:
    """Raises ValueError when a row's devices do not have equally many heads."""
    if sequence > 1 and num_heads % (sequence * tensor):
        raise ValueError(
            f"mesh.sequence = {sequence} and mesh.tensor = {tensor} split attention by head over "
            f"{sequence * tensor} devices, and the model has {num_heads} heads. Make their product "
            f"a divisor of {num_heads}."
        )
