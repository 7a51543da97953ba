"""Every option of a run, once, with its unit and meaning; and every rule between options.

A file in `configs/` calls `default()`, changes a few values and returns the result from
`get_config()`. The command line overrides single values: `--config.optim.learning_rate=1e-5`.
`check` refuses what cannot work before anything is loaded or compiled.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import credentials
from grpo_jax.data.problems import Form
from grpo_jax.messages import shown


def default() -> ConfigDict:
    """All options with their defaults, locked: an unknown name is an error."""
    c = ConfigDict()
    c.seed = 0  # every random choice of the run follows from it

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder or hub id; "": make a new model (sft.* trains it first)
    c.model.dtype = "float32"  # of activations and rollout weights: "float32" or "bfloat16"
    # Of the weights that learn: "float32", or "bfloat16", rounded by chance, or with
    # optim.float32_copy to the nearest
    c.model.param_dtype = "float32"
    # What the backward pass computes again: "none" nothing, "full" everything, "dots" all but the
    # products of dense layers, "auto" the least that fits into memory. Where that is not known, and
    # in supervised training, "auto" is "dots"
    c.model.remat = "dots"
    # In scoring and training: "xla", or the kernels "splash" of TPUs or "cudnn" of NVIDIA GPUs, or
    # "auto", on TPUs theirs where they can be had
    c.model.attention = "auto"
    c.model.offload_reference = False  # to host memory, but while it scores
    c.model.num_layers = 2  # shape of a new model (Qwen2), read when model.path is ""
    c.model.width = 128
    c.model.mlp_width = 384
    c.model.num_heads = 4
    c.model.num_kv_heads = 2

    c.data = ConfigDict()
    c.data.task = ""  # a generated task, module grpo_jax.data.tasks.<task>; or data.path
    c.data.path = ""  # file (JSONL, Parquet, Arrow, CSV, JSON), folder or hub id of a dataset
    c.data.name = ""  # configuration of a hub dataset that has several: "main"; else not read
    c.data.split = "train"  # of a folder or hub dataset; a file has none, and this is not read
    c.data.eval_path = ""  # held-out problems; "": those of data.path in data.eval_split
    c.data.eval_name = ""  # the same of data.eval_path; without eval_path data.name holds
    c.data.eval_split = ""  # no eval_path: "" for no evaluation; with one: "" for its only split
    c.data.columns = ()  # renames "ours=theirs", such as ("prompt=question", "answer=solution")
    c.data.template = ""  # text of the prompt, columns as {name}, braces as {{ }}; "": as it is
    c.data.chat = False  # a text prompt is a user's message, written by the model's chat template
    c.data.system = ""  # system message before a chat that has none; "": none
    c.data.num_train = 10_000  # training problems that a task generates
    c.data.num_eval = 512  # held-out problems that a task generates
    c.data.max_prompt_tokens = 512  # of a prompt, chat template included
    c.data.overlong = "refuse"  # a longer one: "refuse" to start, "drop" it, "truncate" its start

    c.rewards = ConfigDict()
    c.rewards.names = ("exact_answer",)  # built-in or "module:function", or NAME(argument=value)
    c.rewards.weights = (1.0,)  # one per name; the reward is the weighted sum
    c.rewards.num_workers = 0  # processes that compute rewards; 0: half of the CPUs, at most 16
    c.rewards.time_limit_s = 10.0  # of a reward for one completion; a process that hangs is killed
    c.rewards.memory_gb = 4.0  # memory limit of each process, GiB; 0: none
    c.rewards.bad_rows = "refuse"  # problems whose columns no reward can read: "refuse" or "drop"
    c.rewards.max_failed_share = 1.0  # more of a step's completions: guards.failed_rewards

    c.batch = ConfigDict()
    c.batch.prompts = 32  # prompts per step
    c.batch.group = 8  # completions per prompt
    c.batch.minibatches = 1  # optimizer updates per pass over a step's rollouts
    # Prompts at once in an update, more where short; 0: by their tokens; -1: as many tokens as fit
    # into memory
    c.batch.microbatch = 0
    # Of a device, GiB, to which -1 and "auto" keep; 0: what it says to have, on CPU nothing
    c.batch.memory_limit_gib = 0.0

    c.rollout = ConfigDict()
    c.rollout.max_tokens = 256  # completion limit, tokens, stop token included
    c.rollout.temperature = 1.0  # sampling and scoring alike
    c.rollout.top_k = 0  # keep the k most likely tokens; 0: all
    c.rollout.top_p = 1.0  # keep the most likely tokens up to this probability
    c.rollout.num_slots = 0  # completions decoded at once; 0: all of a step
    c.rollout.weights = "same"  # as model.dtype; "int8" with a scale for each output of a layer
    c.rollout.cache = "same"  # keys and values; "int8" with a scale for each position and head
    c.rollout.attention = "xla"  # or the kernel "ragged" of TPUs, which reads what is there alone
    c.rollout.compact = True  # finished rows leave the batch when no prompts wait

    c.algorithm = ConfigDict()
    c.algorithm.num_iterations = 1  # passes over a step's rollouts
    c.algorithm.scale_by_std = True  # advantages in group standard deviations; False: reward units
    c.algorithm.clip_low = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    c.algorithm.clip_high = 0.2
    c.algorithm.kl_coef = 0.0  # weight of the KL to the frozen reference (k3), per token
    c.algorithm.entropy_coef = 0.0  # weight of the entropy bonus, per token
    c.algorithm.normalizer = "token"  # mean over "token"s of the batch, "sequence"s, or "constant"
    c.algorithm.mask_truncated = False  # leave completions that were cut out of the loss
    # What the sampler's weights, precision or age change is corrected by the ratio of policy to
    # sampler: "none"; of each "token_" or whole "sequence_", above the cap "truncate"d or "mask"ed
    c.algorithm.importance_correction = "none"
    c.algorithm.importance_cap = 2.0  # the largest such ratio

    c.optim = ConfigDict()
    c.optim.learning_rate = 1e-6  # peak
    c.optim.warmup_steps = 0  # updates of linear warm-up
    c.optim.schedule = "constant"  # after warm-up: "constant", "linear" or "cosine"
    c.optim.end_fraction = 0.0  # learning rate at the end of a decay, as a fraction of the peak
    c.optim.beta1 = 0.9
    c.optim.beta2 = 0.99
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0  # of matrices; norms and biases have none
    c.optim.clip_norm = 1.0  # global norm of the gradient; 0: no clipping
    c.optim.moments = "float32"  # how they are kept: "float32", "bfloat16" or "int8" in blocks
    c.optim.float32_copy = False  # of bfloat16 parameters, kept beside the moments
    c.optim.offload = False  # GRPO keeps the optimizer's state in host memory between its steps

    c.loop = ConfigDict()
    c.loop.num_steps = 100  # rollouts
    c.loop.stall_limit_s = 3600.0  # the run ends when a phase of a step does not get on; 0: never
    # Sample a step's rollouts before the updates of the step before: rewards are then computed
    # while the device updates. Needs algorithm.importance_correction
    c.loop.async_rollouts = False

    # What is done where a step's numbers are out of bounds: "warn"; "skip" its updates; "roll_back"
    # to the last checkpoint, and on with other prompts; or "stop"
    c.guards = ConfigDict()
    c.guards.nonfinite = "skip"  # a loss, gradient or reward; but never "warn"
    c.guards.failed_rewards = "stop"  # more than rewards.max_failed_share
    c.guards.reward = "warn"  # the mean reward fell below its best
    c.guards.reward_drop = 0.5  # by more than this share of it; 0: not watched
    c.guards.window = 10  # steps that both are means of
    c.guards.equal_groups = "warn"  # the rewards of each group were equal
    c.guards.equal_groups_steps = 10  # in this many steps in a row; 0: not watched
    c.guards.kl = "warn"  # an update's policy/kl
    c.guards.kl_max = 0.0  # is above this, nats per token; 0: not watched
    c.guards.entropy = "warn"  # an update's policy/entropy
    c.guards.entropy_min = 0.0  # is below this, nats per token; 0: not watched
    c.guards.entropy_max = 0.0  # or above this; 0: not watched
    c.guards.max_skipped = 5  # refused updates in a row, after which the run does
    c.guards.after_skips = "stop"  # this: "roll_back" or "stop"
    c.guards.max_roll_backs = 3  # of a run; where one more is asked for it stops

    c.hosts = ConfigDict()  # of a run of several processes
    c.hosts.start_limit_s = 300.0  # until all must have started
    c.hosts.lost_limit_s = 100.0  # without a sign of life of one, after which all end

    c.evaluation = ConfigDict()
    c.evaluation.every_steps = 0  # greedy accuracy on held-out problems; 0: at start and end only
    c.evaluation.num_problems = 512  # at most; 0: no evaluation at all
    c.evaluation.num_samples = 0  # per problem, for pass@k and maj@k at start and end; 0: none
    c.evaluation.temperature = 1.0  # of those samples
    c.evaluation.reference = ""  # column of texts that grpo_jax.evaluate compares with; "": none

    c.checkpoint = ConfigDict()
    c.checkpoint.folder = ""  # where they are kept, gs://BUCKET/PATH too; "": in the workdir
    c.checkpoint.every_steps = 50  # 0: at the end only
    c.checkpoint.keep = 2  # the newest this many, and besides them the one of best accuracy
    # Seconds after its start at which the program saves and ends, as before the end of a queue's
    # time; leave some for a rollout, an update and the save. 0: never
    c.checkpoint.save_before_s = 0.0
    c.checkpoint.max_failed = 3  # the run ends when this many in a row cannot be written
    c.checkpoint.export = True  # write a Hugging Face folder at the end

    c.logging = ConfigDict()
    c.logging.tensorboard = True  # scalars and samples for TensorBoard in the workdir
    c.logging.wandb_project = ""  # Weights & Biases project (extra "wandb"); "": none
    c.logging.samples_every_steps = 20  # show a table of completions; 0: never
    c.logging.num_samples = 4  # completions in that table

    c.profile = ConfigDict()
    c.profile.steps = ()  # (first, last): a trace of these steps, from 1, in the workdir; (): none

    c.debug = ConfigDict()
    c.debug.nans = False  # stop at the operation that gives the first NaN; every program runs twice

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices along each axis; -1: the rest
    c.mesh.fsdp = 1
    c.mesh.sequence = 1  # devices that split each row in scoring and update, and rows in sampling
    c.mesh.tensor = 1

    c.sft = ConfigDict()
    c.sft.num_steps = 0  # supervised updates of a new model before GRPO
    c.sft.batch = 64  # worked solutions per update
    c.sft.microbatch = 0  # solutions computed at once, those of like length together; 0: all
    c.sft.learning_rate = 1e-3  # peak, cosine to 0
    c.sft.warmup_steps = 20
    c.sft.weight_decay = 0.01
    c.sft.max_tokens = 256  # of a worked solution, stop token included
    c.sft.checkpoint_every_steps = 500

    c.compile_cache = True  # keep compiled programs in the user's cache folder between runs
    return c.lock()


# --- Reading a file and overrides ---------------------------------------------------------------


def load(path: str, overrides: list[str]) -> ConfigDict:
    """The config of a file with `--config.name=value` arguments applied, checked and frozen.

    Raises ValueError, naming the option and the remedy, for anything that is wrong with it.
    """
    file = Path(path)
    if not file.is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py"))
        hint = f" Files in configs/: {', '.join(known)}." if known else ""
        raise ValueError(f"--config: there is no file {path!r}.{hint}")
    if file.suffix != ".py":
        raise ValueError(f"--config: {path} is not a Python file, NAME.py, as in configs/.")
    spec = importlib.util.spec_from_file_location("grpo_jax_config_file", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a user's file may fail in any way
        raise ValueError(
            f"--config: {path} does not give a config ({type(error).__name__}: {error}). It needs "
            "a function get_config() that changes and returns grpo_jax.config.default()."
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config: get_config() of {path} returns a {type(config).__name__}, not a config. "
            "Let it return the one that it got from grpo_jax.config.default()."
        )
    for argument in overrides:
        name, equals, text = argument.partition("=")
        if not name.startswith("--config.") or not equals:
            raise ValueError(
                f"Unknown argument {shown(argument)}. Options of the run are written "
                "--config.name=value, for example --config.optim.learning_rate=1e-5."
            )
        _override(config, name.removeprefix("--config."), text)
    check(config)
    return ConfigDict(config).lock()


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _override(config: ConfigDict, name: str, text: str) -> None:
    flat = flatten(config)
    if name not in flat:
        leaf = name.rpartition(".")[2]
        close = [n for n in flat if n.rpartition(".")[2] == leaf]
        close += difflib.get_close_matches(name, flat, n=3)
        hint = f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
        raise ValueError(
            f"There is no option {name[:80]}.{hint} grpo_jax/config.py lists all options."
        )
    section, _, leaf = name.rpartition(".")
    holder = config[section] if section else config
    holder[leaf] = _parse(name, text, flat[name])


def _parse(name: str, text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`."""
    kind = type(old)
    if kind is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        if kind is float and type(value) is int:
            value = float(value)
    # Of nonsense, of nesting without end, of a dict with a list as a key, of 10**400 as a float.
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, OverflowError):
        value = text
    if kind is tuple and isinstance(value, (list, str, int, float)):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "True or False"}
        raise ValueError(
            f"{name} = {shown(text)} is not {wanted.get(kind, 'a tuple')}. "
            f"It is {old!r} now; give a value of that type."
        )
    return value


# --- Rules ----------------------------------------------------------------------------------------


def check(config: ConfigDict) -> None:
    """Raises ValueError for values that cannot work, alone or together."""
    flat = flatten(config)
    for name, kind in ((n, type(v)) for n, v in flatten(default()).items()):
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
    elif abs(value) > _LARGEST and (type(value) is int or name.endswith(("_s", "_gb"))):
        raise ValueError(f"{name} = {shown(value)} must be at most {_LARGEST}.")


_LARGEST = 2**31 - 1  # what devices count with
_POSITIVE = (
    "batch.prompts batch.minibatches algorithm.num_iterations rollout.max_tokens loop.num_steps "
    "data.max_prompt_tokens data.num_train model.num_layers model.width model.mlp_width "
    "model.num_heads model.num_kv_heads optim.learning_rate optim.eps "
    "sft.batch sft.learning_rate sft.max_tokens checkpoint.keep rewards.time_limit_s "
    "checkpoint.max_failed hosts.start_limit_s hosts.lost_limit_s algorithm.importance_cap "
    "guards.window guards.max_skipped"
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
        "model.attention": (config.model.attention, ("auto", "xla", "splash", "cudnn")),
        "rollout.attention": (config.rollout.attention, ("xla", "ragged")),
        "rollout.weights": (config.rollout.weights, ("same", "int8")),
        "rollout.cache": (config.rollout.cache, ("same", "int8")),
        "data.overlong": (config.data.overlong, ("refuse", "drop", "truncate")),
        "algorithm.normalizer": (config.algorithm.normalizer, ("token", "sequence", "constant")),
        "algorithm.importance_correction": (
            config.algorithm.importance_correction,
            ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        ),
        "rewards.bad_rows": (config.rewards.bad_rows, ("refuse", "drop")),
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
    batch, updates = config.batch, num_updates_per_step(config)
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
        for name in ("name eval_path eval_name eval_split columns template chat system").split():
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
    Form(config.data.columns, config.data.template, config.data.chat, config.data.system)
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


def groups_at_once(config: ConfigDict) -> int:
    """Groups that the devices share between them: a microbatch, or an update's where it is free."""
    if config.batch.microbatch > 0:
        return config.batch.microbatch
    return config.batch.prompts // config.batch.minibatches


def check_devices(config: ConfigDict, num_row_shards: int) -> None:
    """Raises ValueError when the groups of an update do not split over the devices."""
    batch = config.batch
    per_microbatch = groups_at_once(config)
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


def num_updates_per_step(config: ConfigDict) -> int:
    """Optimizer updates after each rollout."""
    return config.algorithm.num_iterations * config.batch.minibatches


def needs_old_pass(config: ConfigDict) -> bool:
    """Whether a rollout is scored before its first update, besides what that update computes."""
    sequences = config.algorithm.importance_correction.startswith("sequence")
    return sequences or num_updates_per_step(config) > 1


# --- What a resumed run must agree on -----------------------------------------------------------

# Options that change how a run is carried out or shown, not what it computes.
_FREE = (
    "loop.num_steps evaluation. checkpoint. logging. profile. debug. mesh. compile_cache "
    "rollout.num_slots rollout.compact batch.microbatch sft.microbatch model.remat model.attention "
    "optim.offload model.offload_reference guards. sft.checkpoint_every_steps "
    "rewards.num_workers rewards.time_limit_s rewards.memory_gb rewards.max_failed_share "
    "loop.stall_limit_s hosts. batch.memory_limit_gib rollout.attention"
).split()


def binding(config: ConfigDict) -> dict[str, Any]:
    """The options that a resumed run must share with the one it continues."""
    flat = flatten(config)
    bound = {k: v for k, v in flat.items() if not any(k == f or k.startswith(f) for f in _FREE)}
    # The decay ends with the run, and the last step samples nothing ahead.
    if config.optim.schedule != "constant" or config.loop.async_rollouts:
        bound["loop.num_steps"] = config.loop.num_steps
    return json.loads(json.dumps(bound))  # tuples as the lists that a file gives back


def refuse_other_config(config: ConfigDict, file: Path) -> None:
    """Raises ValueError when the workdir's recorded config (a JSON file) belongs to another run."""
    then, now = json.loads(file.read_text())["binding"], binding(config)
    names = sorted(n for n in then.keys() | now.keys() if then.get(n) != now.get(n))
    if names:
        changes = "; ".join(f"{n}: {then.get(n)!r} there, {now.get(n)!r} now" for n in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(
            f"--workdir {file.parent} holds a run of a different config ({changes}{more}). "
            "Give the run its own --workdir, or the options it was started with."
        )


def fingerprint(config: ConfigDict) -> str:
    """A short name of what the run computes, equal for configs that may resume each other."""
    text = json.dumps(binding(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
