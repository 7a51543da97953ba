"""The rules that the options of a run follow together; those of single options are in `options`.

Nothing is loaded or compiled before `check` has refused what cannot work.
"""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.config import (
    advantage_rules,
    credit_rules,
    critic_rules,
    derived,
    environment_rules,
    hybrid_rules,
    objective_rules,
    options,
    other_names,
    preference_options,
)
from grpo_jax.config.dotted import flatten
from grpo_jax.config.schema import Option
from grpo_jax.data.problems import form_of
from grpo_jax.messages import credentials
from grpo_jax.messages.values import shown


def check(config: ConfigDict) -> None:
    """Raises ValueError for values that cannot work, alone or together."""
    flat = flatten(config)
    for option in options.TABLE:
        kind, value = type(option.default), flat.get(option.name)
        if type(value) is not kind:
            raise ValueError(
                f"{option.name} = {shown(value)} is not of type {kind.__name__}, which it "
                "needs to be."
            )
    for option in options.TABLE:
        _check_value(option, flat[option.name])
    for option in options.TABLE:
        refusal = option.refusal(flat[option.name])
        if refusal:
            raise ValueError(refusal)
    _check_profile(config)
    _check_mesh(config)
    _check_precision(config)
    _check_lora(config)
    _check_batch(config)
    objective_rules.check(config)
    critic_rules.check(config)
    advantage_rules.check(config)
    hybrid_rules.check(config)
    environment_rules.check(config)
    credit_rules.check(config)
    _check_prompts(config)
    preference_options.check(config)
    _check_loop(config)
    for name in config.checkpoint.accept_changes:
        if name not in flat:
            raise ValueError(f"checkpoint.accept_changes: {other_names.no_such(str(name))}")
    _check_guards(config)
    _check_sources(config)


def _check_value(option: Option, value: Any) -> None:
    """Raises ValueError for a value that no option can have."""
    name = option.name
    if isinstance(value, tuple):
        for entry in value:
            if type(entry) not in (str, int, float):
                raise ValueError(
                    f"{name}: {shown(entry)} must be a text or a number, not a "
                    f"{type(entry).__name__}."
                )
            _check_value(option, entry)
    elif isinstance(value, str):
        secret = credentials.find_secret(value)
        if secret:
            raise ValueError(
                f"{name} holds {secret}. A run records its options, and shows them: set keys and "
                "passwords in the environment, such as HF_TOKEN, and nowhere else."
            )
        if re.search("[\0\ud800-\udfff]", value):
            raise ValueError(f"{name} = {shown(value)} holds what is no character of a text.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value} must be a finite number.")
    elif abs(value) > LARGEST and (type(value) is int or option.unit in ("s", "GiB")):
        raise ValueError(f"{name} = {shown(value)} must be at most {LARGEST}.")


LARGEST = 2**31 - 1  # what devices count with


def _check_profile(config: ConfigDict) -> None:
    steps, last = config.profile.steps, config.loop.num_steps
    if (
        steps
        and not config.loop.num_epochs
        and not (
            len(steps) == 2
            and all(type(step) is int for step in steps)
            and 1 <= steps[0] <= steps[1] <= last
        )
    ):
        raise ValueError(
            f"profile.steps = {steps} must be (first, last), two steps from 1 to loop.num_steps = "
            f"{last}, or () for no trace."
        )


def _check_mesh(config: ConfigDict) -> None:
    rest = [f"mesh.{name}" for name, size in config.mesh.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"{' and '.join(rest)} are -1, the rest of the devices; only one can be.")


def _check_precision(config: ConfigDict) -> None:
    if config.optim.master_weights and config.model.param_dtype == "float32":
        raise ValueError(
            "optim.master_weights = True, but the parameters are float32 themselves. Set "
            'model.param_dtype = "bfloat16", or optim.master_weights = False.'
        )


def _check_lora(config: ConfigDict) -> None:
    lora = config.lora
    if lora.rank or lora.path:
        if config.model.offload_reference:
            raise ValueError(
                "model.offload_reference = True, but the reference of low-rank adapters is the "
                "model without them, of which there is no second copy. Set it to False."
            )
        return
    of_critic = config.algorithm.critic and (config.critic.lora_rank > 0 or config.critic.path)
    for name in ("base_dtype", "merge_for_rollout"):
        if name == "base_dtype" and of_critic:
            continue  # it may have adapters of its own
        if lora[name] != options.BY_NAME[f"lora.{name}"].default:
            raise ValueError(
                f"lora.{name} = {shown(lora[name])} goes with low-rank adapters, and lora.rank = 0 "
                "trains all weights. Set lora.rank, such as to 16, or leave it."
            )


def _check_loop(config: ConfigDict) -> None:
    if config.loop.async_rollouts and config.rollout_correction.level == "none":
        raise ValueError(
            "loop.async_rollouts = True samples with weights that are a step old, and "
            'rollout_correction.level = "none" leaves that uncorrected. Set it to "token" or '
            '"sequence", or loop.async_rollouts = False.'
        )


def _check_guards(config: ConfigDict) -> None:
    guards = config.guards
    for name, value in guards.items():
        if value == "roll_back" and not config.checkpoint.every_steps:
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
    if batch.prompts % batch.minibatches:
        raise ValueError(
            f"batch.prompts * batch.group = {batch.prompts} * {batch.group} = "
            f"{batch.prompts * batch.group} rows do not split into batch.minibatches = "
            f"{batch.minibatches} parts of whole groups. "
            f"Make batch.prompts a multiple of {batch.minibatches}."
        )
    per_update = batch.prompts // batch.minibatches
    if batch.microbatch > 0 and per_update % batch.microbatch:
        raise ValueError(
            f"batch.prompts / batch.minibatches = {batch.prompts} / {batch.minibatches} = "
            f"{per_update} prompts per update do not split into microbatches of batch.microbatch = "
            f"{batch.microbatch} prompts. Make batch.prompts a multiple of "
            f"{batch.minibatches * batch.microbatch}, or batch.microbatch divide {per_update}."
        )
    if config.optim.schedule != "constant" and not config.loop.num_epochs:
        total = config.loop.num_steps * updates
        if config.optim.warmup_steps >= total:
            raise ValueError(
                f"optim.warmup_steps = {config.optim.warmup_steps} leaves nothing of the {total} "
                f"updates of the run for optim.schedule = {config.optim.schedule!r}."
            )


def _check_prompts(config: ConfigDict) -> None:
    asked, wanted = config.prompts, config.batch.prompts
    if asked.low_rate > asked.high_rate:
        raise ValueError(
            f"prompts.low_rate = {asked.low_rate:g} must be at most prompts.high_rate = "
            f"{asked.high_rate:g}: they are the ends of a band."
        )
    if asked.oversample > 1 and derived.has_environment(config):
        raise ValueError(
            f"prompts.oversample = {asked.oversample:g} ends a draw by the tokens that it decodes, "
            "and episodes end when their environments answer. Set prompts.oversample = 1, or "
            "environment.classes and environment.tools to ()."
        )
    if not asked.drop_equal_groups:
        if asked.per_draw not in (0, wanted):
            raise ValueError(
                f"prompts.per_draw = {asked.per_draw}, but a step that drops no groups has one "
                f"draw of batch.prompts = {wanted} prompts. Set prompts.drop_equal_groups = True, "
                "or prompts.per_draw = 0."
            )
        return
    most = asked.max_draws * derived.prompts_per_draw(config)
    if most < wanted:
        raise ValueError(
            f"prompts.max_draws = {asked.max_draws} draws of prompts.per_draw = {asked.per_draw} "
            f"prompts give {most} groups, and a step needs batch.prompts = {wanted}. Raise one of "
            "the two."
        )
    if config.algorithm.baseline in ("none", "greedy"):
        raise ValueError(
            f"algorithm.baseline = {config.algorithm.baseline!r} gives groups of equal rewards a "
            "gradient, and prompts.drop_equal_groups = True drops them. Set that to False, or "
            "another baseline."
        )
    if config.loop.async_rollouts:
        raise ValueError(
            "loop.async_rollouts = True samples a step before the rewards of the step before are "
            "known, and prompts.drop_equal_groups = True needs a step's rewards to know how many "
            "more prompts it asks. Set one of them to False."
        )
    if config.loop.num_epochs:
        raise ValueError(
            f"loop.num_epochs = {config.loop.num_epochs:g} counts the steps by the prompts that "
            "each asks, and with prompts.drop_equal_groups = True that depends on the rewards. Set "
            "loop.num_steps, and loop.num_epochs = 0."
        )


def _check_sources(config: ConfigDict) -> None:
    if bool(config.data.task) == bool(config.data.path):
        raise ValueError(
            f"data.task = {config.data.task!r} and data.path = {config.data.path!r}: "
            "set exactly one of them, a generated task or a dataset."
        )
    if config.data.task:
        names = "name eval_path eval_name eval_split columns prompt_template chat streaming"
        for name in f"{names} system_prompt chat_template_kwargs date".split():
            if config.data[name]:
                raise ValueError(
                    f"data.{name} goes with data.path; a task makes its own problems and held-out "
                    f"set. Clear data.{name}, or set data.path in place of data.task."
                )
    elif config.data.streaming and config.data.subset:
        raise ValueError(
            f"data.subset = {shown(config.data.subset)} names rows by their numbers, and "
            "data.streaming = True reads them one after the other. Set one of the two otherwise."
        )
    elif config.data.eval_name and not config.data.eval_path:
        raise ValueError(
            f"data.eval_name = {config.data.eval_name!r} goes with data.eval_path. Set that too; "
            "for a split of data.path, data.eval_split alone."
        )
    if config.model.path and config.model.tokenizer:
        raise ValueError(
            f"model.tokenizer = {config.model.tokenizer!r} is of a new model, and model.path = "
            f"{config.model.path!r} names one, which has its own. Clear one of the two."
        )
    form_of(config.data)
    _check_date(config.data.date)
    names, weights = config.rewards.names, config.rewards.weights
    needed = not config.distill.teacher and not derived.has_environment(config)
    if len(names) != len(weights) or (needed and not names):
        at_least = " of at least one reward, or name a distill.teacher" if needed else ""
        raise ValueError(
            f"rewards.names has {len(names)} entries and rewards.weights {len(weights)}; give one "
            f"weight for each{at_least}."
        )
    if not config.model.path:
        if config.checkpoint.folder:
            raise ValueError(
                f"checkpoint.folder = {config.checkpoint.folder!r} keeps the checkpoints of one "
                'training, and model.path = "" makes a new model by a training before it. Set '
                "model.path, or clear checkpoint.folder."
            )
        if not derived.is_supervised(config):
            raise ValueError(
                'model.path = "" makes a new model, and sft.num_steps = 0 leaves it untrained: '
                "no completion would earn a reward. Set model.path to a Hugging Face folder or hub "
                "id, or sft.num_steps or sft.num_epochs above 0."
            )
        if not config.data.task and not config.model.tokenizer:
            raise ValueError(
                'model.path = "" makes a new model, which needs a tokenizer: that of a data.task, '
                "or of a folder. Set data.task, model.tokenizer or model.path."
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
    if config.prompts.per_draw % num_row_shards:
        raise ValueError(
            f"prompts.per_draw = {config.prompts.per_draw} does not split over mesh.data * "
            f"mesh.fsdp = {num_row_shards} devices. Make it a multiple of {num_row_shards}."
        )
    if derived.prompts_begun(config) % num_row_shards:
        raise ValueError(
            f"prompts.oversample = {config.prompts.oversample:g} begins "
            f"{derived.prompts_begun(config)} prompts in place of "
            f"{derived.prompts_per_draw(config)}, which do not split over mesh.data * mesh.fsdp = "
            f"{num_row_shards} devices. Choose it so that they are a multiple of {num_row_shards}."
        )


def check_heads(num_heads: int, sequence: int, tensor: int) -> None:
    """Raises ValueError when a row's devices do not have equally many heads."""
    if sequence > 1 and num_heads % (sequence * tensor):
        raise ValueError(
            f"mesh.sequence = {sequence} and mesh.tensor = {tensor} split attention by head over "
            f"{sequence * tensor} devices, and the model has {num_heads} heads. Make their product "
            f"a divisor of {num_heads}."
        )
