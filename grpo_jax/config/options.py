"""Every option of a run, once: its default, range, unit and meaning.

A file in `configs/` calls `default()`, changes a few values and returns the result from
`get_config()`. The command line overrides single values: `--config.optim.learning_rate=1e-5`.
What cannot work is refused before anything is loaded or compiled: here by the range of each option,
in `config/rules.py` by the rules between options. `python -m grpo_jax.train --config FILE --help`
lists the options with the values in force; docs/options.md is made from this table.

A resumed run must have the values that it was started with, except of options marked `free`: those
change how a run is carried out or shown, not what it computes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config.critic_options import CRITIC
from grpo_jax.config.environment_options import ENVIRONMENT
from grpo_jax.config.given_options import SFT
from grpo_jax.config.hybrid_options import DISTILL, HYBRID
from grpo_jax.config.judge_options import JUDGE
from grpo_jax.config.lora_options import LORA
from grpo_jax.config.objective_options import OBJECTIVE
from grpo_jax.config.preference_options import PREFERENCE
from grpo_jax.config.prompt_options import FEW_PROBLEMS, PROMPTS
from grpo_jax.config.reward_model_options import REWARD_MODEL
from grpo_jax.config.schema import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Option,
    Range,
    choice,
    flag,
    number,
    several,
    text,
)
from grpo_jax.messages.console import WAYS

SECTIONS = {
    "": "The run as a whole",
    "model": "The network, and how it is computed",
    "lora": "Low-rank adapters that learn in place of the weights; docs/lora.md",
    "data": "Problems to train on, and held-out ones",
    "rewards": "Reward functions, and the processes that compute them",
    "judge": 'LLM judges, "judge:RUBRIC.toml" in rewards.names; docs/judges.md',
    "batch": "What a step and an update consist of",
    "prompts": "Which prompts are trained on; docs/prompts.md",
    "rollout": "How completions are sampled",
    "environment": "Conversations with tools or an environment; docs/environments.md",
    "algorithm": "The objective. docs/definitions.md has the formulas",
    "rollout_correction": "Importance weights for where sampler and policy differ",
    "hybrid": "Demonstrations beside drawn completions; docs/hybrids.md",
    "distill": "A teacher whose distribution is imitated; docs/distillation.md",
    "optim": "The optimizer (AdamW), and its learning rate",
    "critic": "The critic that algorithm.critic trains beside the policy; docs/ppo.md",
    "loop": "How long the run goes on, and what overlaps in it",
    "guards": "What is done when the numbers of a step are out of bounds",
    "hosts": "Runs of several processes",
    "evaluation": "Accuracy on held-out problems",
    "checkpoint": "What is saved, and how a run is continued",
    "logging": "What is shown and written while the run goes on",
    "profile": "Traces of single steps",
    "debug": "Search for faults",
    "mesh": "Devices along each axis; their product is all devices",
    "sft": "Supervised training on worked solutions, before GRPO or alone",
    "preference": "Training on preferences, by grpo_jax.dpo; docs/preference.md",
    "reward_model": "Training of a reward model on pairs; docs/reward_models.md",
}

_REST = {-1: "the rest of the devices"}
_ACTIONS = {
    "warn": "say so, and go on",
    "skip": "leave out the step's updates",
    "roll_back": "return to the last checkpoint, and go on with other prompts",
    "stop": "end the run",
}


def _action(name: str, default: str, meaning: str, *allowed: str) -> Option:
    """What a guard does; `allowed`: of _ACTIONS, or all of them."""
    return choice(name, default, {a: _ACTIONS[a] for a in allowed or _ACTIONS}, meaning, free=True)


# fmt: off
TABLE = (
    number("seed", 0, NOT_NEGATIVE, "", "Every random choice of the run follows from it"),
    flag("compile_cache", True,
         "Keep compiled programs between runs, in the user's cache folder or in "
         "JAX_COMPILATION_CACHE_DIR. On a CPU not for a network that is split over devices, nor "
         "for a run that is profiled", free=True),

    text("model.path", "", "Hugging Face folder or hub id", "The model to train",
         special={"": "make a new model, which is first trained as sft.* says"}),
    text("model.tokenizer", "", "Hugging Face folder or hub id", "The tokenizer of a new model",
         special={"": "that of data.task"}),
    choice("model.dtype", "float32", ("float32", "bfloat16"),
           "Precision of activations and of the weights in rollouts"),
    choice("model.param_dtype", "float32", {
               "float32": "",
               "bfloat16": "with stochastic rounding, or with optim.master_weights to the nearest"},
           "Precision of the weights that learn"),
    choice("model.remat", "dots", {
               "none": "nothing: every activation is kept",
               "dots": "everything except products of dense layers",
               "full": "everything",
               "auto": "the least that fits into memory; \"dots\" where the memory is not known, "
                       "and in supervised training"},
           "What the backward pass computes again, to save memory (gradient checkpointing)",
           free=True),
    choice("model.scan_layers", "auto", {
               "auto": "off on a GPU, on elsewhere",
               "on": "one layer is compiled, and run for each",
               "off": "every layer is compiled: fewer copies of what the backward pass keeps, "
                      "but a longer compilation"},
           "Run the layers of an update in a loop (jax.lax.scan)", free=True),
    choice("model.attention", "auto", {
               "auto": "a kernel where one can be used",
               "xla": "no kernel",
               "splash": "TPU kernel",
               "cudnn": "kernel of NVIDIA GPUs"},
           "Attention in scoring and training", free=True),
    flag("model.offload_reference", False,
         "Keep the reference model in host memory while it does not score", free=True),
    number("model.num_layers", 2, COUNT, "layers",
           "Shape of a new model (Qwen2); this and the next four count when model.path is \"\""),
    number("model.width", 128, COUNT, "", "Hidden size of a new model"),
    number("model.mlp_width", 384, COUNT, "", "Hidden size of a new model's MLPs"),
    number("model.num_heads", 4, COUNT, "heads", "Query heads of a new model"),
    number("model.num_kv_heads", 2, COUNT, "heads", "Key and value heads of a new model"),

    *LORA,

    text("data.task", "", "module in grpo_jax.data.tasks",
         "A task that generates its problems. Set this or data.path"),
    text("data.path", "", "file (JSONL, Parquet, Arrow, CSV, JSON), folder or hub id",
         "A dataset. Set this or data.task"),
    text("data.name", "", "configuration, such as \"main\"",
         "The one to read of a hub dataset that has several; otherwise not read"),
    text("data.split", "train", "split",
         "The one to read of a folder or hub dataset; a file has none, and this is not read"),
    text("data.eval_path", "", "as data.path", "Held-out problems",
         special={"": "those of data.path in data.eval_split"}),
    text("data.eval_name", "", "configuration",
         "The one to read of data.eval_path; without data.eval_path, data.name holds"),
    text("data.eval_split", "", "split", "The one with the held-out problems",
         special={"": "with data.eval_path its only split; without it no evaluation"}),
    several("data.columns", (), "\"ours=theirs\"",
            "Columns of the dataset by other names, such as (\"prompt=question\", "
            "\"answer=reward_model.ground_truth\"); a dot reaches into a struct"),
    text("data.prompt_template", "", "template of a text",
         "The prompt's text, with columns as {name} and braces as {{ }}",
         special={"": "the column \"prompt\" as it is"}),
    flag("data.chat", False,
         "A prompt that is a text becomes a user's message in the model's chat template"),
    text("data.system_prompt", "", "message", "System message of chats that have none",
         special={"": "none"}),
    several("data.chat_template_kwargs", (), "\"name=value\"",
            "What the chat template is given besides messages, such as "
            "(\"enable_thinking=False\",)"),
    flag("data.streaming", False,
         "Read rows with given completions (grpo_jax.sft and its like) while training, one window "
         "after the other, and not all into memory before it"),
    number("data.shuffle_buffer", 10_000, NOT_NEGATIVE, "rows",
           "Window of a stream within which rows are shuffled",
           special={0: "the order of the source"}),
    text("data.date", "", "date, such as 2026-11-28", "The date that chat templates are told",
         special={"": "the day on which the run was started"}, free=True),
    number("data.num_train", 10_000, COUNT, "problems", "Training problems that a task generates"),
    number("data.num_eval", 512, NOT_NEGATIVE, "problems",
           "Held-out problems that a task generates"),
    *FEW_PROBLEMS,
    number("data.max_prompt_tokens", 512, COUNT, "tokens",
           "Limit of a prompt, chat template included"),
    choice("data.overlong", "refuse", {
               "refuse": "do not start",
               "drop": "leave the problem out",
               "truncate": "cut the start of the prompt"},
           "What is done with a longer prompt"),

    several("rewards.names", ("exact_answer",), "\"name\", \"name(argument=value)\" or "
            "\"module:function\"", "Reward functions: built-in ones (docs/rewards.md) or your own"),
    several("rewards.weights", (1.0,), "numbers",
            "One for each function; the reward is the weighted sum"),
    text("rewards.accuracy", "", "one of rewards.names",
         "The reward that is 1 for right and 0 for wrong, which accuracy, pass@k and maj@k count",
         special={"": "the first built-in one of that kind; without one there is no accuracy"},
         free=True),
    number("rewards.num_workers", 0, COUNT, "processes", "Processes that compute rewards",
           special={0: "half of the CPUs that the run may use, at most 16"}, free=True),
    number("rewards.timeout_s", 10.0, POSITIVE, "s",
           "For the reward of one completion; a process that takes longer is killed", free=True),
    number("rewards.start_timeout_s", 120.0, POSITIVE, "s",
           "For importing the functions, and for each function's first answer in a process, which "
           "may load a model", free=True),
    number("rewards.memory_limit_gib", 4.0, POSITIVE, "GiB",
           "Memory of each process, with all that it starts", special={0: "no limit"}, free=True),
    choice("rewards.bad_rows", "refuse", {
               "refuse": "do not start",
               "drop": "leave the problem out"},
           "What is done with a problem whose columns a reward function cannot read"),
    choice("rewards.on_failure", "unknown", {
               "unknown": "the completion has no reward: it leaves its group's mean and deviation, "
                          "and the loss",
               "least": "the least value that the reward gave in the step, at most 0"},
           "What a reward counts as that could not be computed"),
    several("rewards.by_step", (), "some of rewards.names",
            "Rewards that tell of steps, such as right_steps: each token gets advantages of the "
            "steps that end at it or later, in place of one for the whole completion"),
    number("rewards.max_failed_share", 0.5, NOT_NEGATIVE, "",
           "Share of a step's completions that may be without a reward; with more, "
           "guards.failed_rewards acts", special={1: "never"}, free=True),
    choice("rewards.code_isolation", "full", {
               "full": "do not start",
               "limits": "say so, and run programs under the limits that there are"},
           "What is done where the system cannot keep programs of the reward `code` from files, "
           "processes or the network", free=True),

    *JUDGE,

    number("batch.prompts", 32, COUNT, "prompts", "Prompts in a step"),
    number("batch.group", 8, COUNT, "completions",
           "Completions for each prompt; 1 needs algorithm.baseline \"none\" or \"greedy\""),
    number("batch.minibatches", 1, COUNT, "updates",
           "Optimizer updates in one pass over a step's rollouts"),
    number("batch.microbatch", 0, COUNT, "prompts",
           "Prompts computed at once in an update; more of them where they are short",
           special={0: "the usual number of tokens", -1: "as many tokens as fit into memory"},
           free=True),
    number("batch.memory_limit_gib", 0.0, POSITIVE, "GiB",
           "Memory of a device, for batch.microbatch = -1 and model.remat = \"auto\"",
           special={0: "what the device reports; a CPU reports none"}, free=True),

    *PROMPTS,

    number("rollout.max_tokens", 256, COUNT, "tokens",
           "Limit of a completion, stop token included"),
    number("rollout.temperature", 1.0, POSITIVE, "", "In sampling and in scoring",
           why="0 gives a group of equal completions, and so no advantage. 1.0 is usual"),
    number("rollout.top_k", 0, COUNT, "tokens", "Sample from the k most likely tokens",
           special={0: "from all"}),
    number("rollout.top_p", 1.0, Range(above=0, at_most=1), "",
           "Sample from the most likely tokens up to this total probability"),
    number("rollout.num_slots", 0, COUNT, "completions", "Completions decoded at once",
           special={0: "all of a step"}, free=True),
    choice("rollout.weights_dtype", "auto", {
               "auto": "as model.dtype",
               "int8": "8 bits, with a scale for each output of a layer"},
           "Precision of the weights in rollouts"),
    choice("rollout.kv_cache_dtype", "auto", {
               "auto": "as model.dtype",
               "int8": "8 bits, with a scale for each position and head"},
           "Precision of the KV cache"),
    choice("rollout.attention", "auto", {
               "auto": "\"streamed\" where it can be used, else \"xla\"",
               "xla": "no kernel: the whole cache is read",
               "streamed": "kernel of NVIDIA GPUs that reads the filled part of the cache",
               "ragged": "the same for TPUs"},
           "Attention in rollouts", free=True),
    flag("rollout.compact", True,
         "Make the batch smaller as completions finish and no prompts wait", free=True),

    *ENVIRONMENT,

    *OBJECTIVE,
    *HYBRID,
    *DISTILL,

    number("optim.learning_rate", 1e-6, POSITIVE, "", "The peak, after warm-up"),
    number("optim.warmup_steps", 0, NOT_NEGATIVE, "updates", "Linear warm-up of the learning rate"),
    choice("optim.schedule", "constant", ("constant", "linear", "cosine"),
           "The learning rate after warm-up, over the updates that were made; refused ones do not "
           "count"),
    number("optim.end_fraction", 0.0, NOT_NEGATIVE, "",
           "Learning rate at the end of a decay, as a fraction of the peak"),
    number("optim.beta1", 0.9, FRACTION, "", "Decay of the first moment"),
    number("optim.beta2", 0.99, FRACTION, "", "Decay of the second moment"),
    number("optim.eps", 1e-8, POSITIVE, "", "Added to the root of the second moment"),
    number("optim.weight_decay", 0.0, NOT_NEGATIVE, "", "Of matrices; norms and biases have none"),
    number("optim.max_grad_norm", 1.0, POSITIVE, "", "Largest global norm of the gradient",
           special={0: "no clipping"}),
    choice("optim.moments_dtype", "float32", {
               "float32": "", "bfloat16": "stochastic rounding",
               "int8": "in blocks with a scale each, stochastic rounding"},
           "Precision of the moments"),
    flag("optim.master_weights", False,
         "Keep float32 weights beside the moments, for model.param_dtype = \"bfloat16\""),
    flag("optim.offload", False,
         "Keep the optimizer's state in host memory while GRPO samples and scores", free=True),

    *CRITIC,

    number("loop.num_steps", 100, COUNT, "steps",
           "Steps of the run, one rollout each. A resumed run may have more, but not with a "
           "decaying optim.schedule or loop.async_rollouts", free=True),
    number("loop.num_epochs", 0.0, NOT_NEGATIVE, "epochs",
           "How often the run asks each training problem, in the place of loop.num_steps: it has "
           "as many steps as that takes", special={0: "loop.num_steps counts"}, free=True),
    number("loop.stall_timeout_s", 3600.0, POSITIVE, "s",
           "The run ends when a phase of a step makes no progress for this long",
           special={0: "never"}, free=True),
    flag("loop.async_rollouts", False,
         "Sample a step's rollouts before the updates of the step before, so that rewards are "
         "computed while the device updates. Needs rollout_correction.level"),

    _action("guards.nonfinite", "skip", "When a loss, gradient or reward is not finite",
            "skip", "roll_back", "stop"),
    _action("guards.failed_rewards", "stop",
            "When more than rewards.max_failed_share of a step's completions have no reward"),
    _action("guards.reward", "warn", "When the mean reward of guards.window steps fell below its "
            "best by more than guards.reward_drop"),
    number("guards.reward_drop", 0.5, POSITIVE, "", "A share of the best; see guards.reward",
           special={0: "not watched"}, free=True),
    number("guards.window", 10, COUNT, "steps", "Steps of a mean; see guards.reward", free=True),
    _action("guards.equal_groups", "warn", "When in every group all rewards were equal, in "
            "guards.equal_groups_steps steps in a row"),
    number("guards.equal_groups_steps", 10, COUNT, "steps", "See guards.equal_groups",
           special={0: "not watched"}, free=True),
    _action("guards.members", "warn", "When one member of an ensemble rose while another fell, "
            "each by guards.member_shift from one guards.window to the next"),
    number("guards.member_shift", 0.5, POSITIVE, "deviations",
           "Of the member's own standard deviation within steps; see guards.members",
           special={0: "not watched"}, free=True),
    _action("guards.kl", "warn", "When policy/kl of an update is above guards.kl_max"),
    number("guards.kl_max", 0.0, POSITIVE, "nats per token", "See guards.kl",
           special={0: "not watched"}, free=True),
    _action("guards.entropy", "warn", "When policy/entropy of an update is below "
            "guards.entropy_min or above guards.entropy_max"),
    number("guards.entropy_min", 0.0, POSITIVE, "nats per token", "See guards.entropy",
           special={0: "not watched"}, free=True),
    number("guards.entropy_max", 0.0, POSITIVE, "nats per token", "See guards.entropy",
           special={0: "not watched"}, free=True),
    number("guards.max_skipped", 5, COUNT, "steps",
           "Steps in a row with refused updates, after which guards.after_skips acts", free=True),
    _action("guards.after_skips", "stop", "When guards.max_skipped steps in a row were refused",
            "roll_back", "stop"),
    number("guards.max_roll_backs", 3, NOT_NEGATIVE, "times",
           "Returns to a checkpoint in a run; it stops where one more is asked for", free=True),

    number("hosts.start_timeout_s", 300.0, POSITIVE, "s",
           "Within this all processes must have started", free=True),
    number("hosts.heartbeat_timeout_s", 100.0, POSITIVE, "s",
           "A process without a heartbeat for this long is lost, and all end", free=True),

    number("evaluation.every_steps", 0, COUNT, "steps",
           "Steps between evaluations by greedy completions",
           special={0: "at the start and the end only"}, free=True),
    number("evaluation.num_problems", 512, COUNT, "problems", "Held-out problems, at most",
           special={0: "no evaluation at all"}, free=True),
    number("evaluation.num_samples", 0, COUNT, "completions",
           "Samples of each problem at the start and the end, for pass@k and maj@k",
           special={0: "none"}, free=True),
    number("evaluation.temperature", 1.0, NOT_NEGATIVE, "", "Of those samples", free=True),
    text("evaluation.reference", "", "column",
         "Texts that grpo_jax.evaluate compares completions with", special={"": "none"}, free=True),

    text("checkpoint.folder", "", "folder, also gs://BUCKET/PATH", "Where checkpoints are kept",
         special={"": "in the workdir"}, free=True),
    number("checkpoint.every_steps", 50, COUNT, "steps", "Steps between checkpoints",
           special={0: "at the end only"}, free=True),
    number("checkpoint.keep", 2, COUNT, "checkpoints",
           "The newest ones are kept, and besides them the one with the best held-out accuracy",
           free=True),
    number("checkpoint.save_before_s", 0.0, POSITIVE, "s",
           "Time from the program's start after which it saves and ends, as before the end of a "
           "queue's time; leave some for a rollout, an update and the save",
           special={0: "never"}, free=True),
    number("checkpoint.max_failed", 3, COUNT, "checkpoints",
           "The run ends when this many in a row cannot be written", free=True),
    flag("checkpoint.export", True, "Write a Hugging Face folder at the end", free=True),
    choice("checkpoint.export_dtype", "auto", {
               "auto": "the wider of the source's and model.param_dtype, which rounds nothing",
               "float32": "", "bfloat16": "", "float16": ""},
           "Precision of the exported weights", free=True),
    several("checkpoint.accept_changes", (), "names of options",
            "Options with which the run may go on although it was started with others, such as "
            "(\"optim.learning_rate\",); config.json notes the change", free=True),
    flag("checkpoint.begin_again", False,
         "Begin at step 0 where a run's checkpoints are gone or all damaged", free=True),

    flag("logging.tensorboard", True, "Scalars and samples for TensorBoard, in the workdir",
         free=True),
    text("logging.wandb_project", "", "project",
         "Write to Weights & Biases too (extra \"wandb\"), with the login of `wandb login`",
         special={"": "none"}, free=True),
    text("logging.wandb_entity", "", "user or team", "Whose project it is at Weights & Biases",
         special={"": "that of the login"}, free=True),
    text("logging.mlflow_experiment", "", "experiment",
         "Write to MLflow too (extra \"mlflow\"), where MLFLOW_TRACKING_URI says",
         special={"": "none"}, free=True),
    text("logging.trackio_project", "", "project",
         "Write to Trackio too (extra \"trackio\"), locally or where TRACKIO_SPACE_ID says",
         special={"": "none"}, free=True),
    text("logging.run_name", "", "name", "The run's, for these three",
         special={"": "that of the workdir"}, free=True),
    several("logging.tags", (), "texts", "The run's, for these three", free=True),
    choice("logging.console", "auto", WAYS, "What is said on standard output", free=True),
    text("logging.on_event", "", "command",
         "Called, without a shell, when the run has finished, stopped or failed, and when a guard "
         "speaks. It gets the event's name in GRPO_JAX_EVENT, the run's folder in "
         "GRPO_JAX_WORKDIR, and a JSON object with the facts on standard input",
         special={"": "none"}, free=True),
    number("logging.samples_every_steps", 20, COUNT, "steps", "Steps between tables of completions",
           special={0: "never"}, free=True),
    number("logging.num_samples", 4, NOT_NEGATIVE, "completions", "Completions in that table",
           free=True),
    flag("logging.token_metrics", False,
         "Measure the entropy at the tokens of given completions and, in supervised training, how "
         "often the model's likeliest token is the given one", free=True),

    several("profile.steps", (), "first and last step, from 1",
            "Write a trace of these steps to the workdir", special={(): "no trace"}, free=True),

    flag("debug.nans", False,
         "Stop at the operation that gives the first NaN; every program runs twice", free=True),

    number("mesh.data", -1, COUNT, "devices",
           "Devices that share the prompts, each with the whole model", special=_REST, free=True),
    number("mesh.fsdp", 1, COUNT, "devices",
           "Devices that share the prompts, and the weights and the optimizer's state too",
           special=_REST, free=True),
    number("mesh.sequence", 1, COUNT, "devices",
           "Devices that split each row in scoring and update, and the rows in sampling",
           special=_REST, free=True),
    number("mesh.tensor", 1, COUNT, "devices", "Devices that split each layer",
           special=_REST, free=True),

    *SFT,
    *PREFERENCE,
    *REWARD_MODEL,
)
# fmt: on

BY_NAME = {option.name: option for option in TABLE}


def default() -> ConfigDict:
    """All options with their defaults, locked: an unknown name is an error."""
    config = ConfigDict()
    for option in TABLE:
        section, _, leaf = option.name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[leaf] = option.default
    return config.lock()
