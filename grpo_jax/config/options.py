"""Every option of a run, once, with its unit and meaning.

A file in `configs/` calls `default()`, changes a few values and returns the result from
`get_config()`. The command line overrides single values: `--config.optim.learning_rate=1e-5`.
What cannot work is refused (`config/rules.py`) before anything is loaded or compiled.
"""

from __future__ import annotations

from ml_collections import ConfigDict


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
    # In the update: "loop", one compiled layer for all; "apart", each its own, which copies less of
    # what the backward pass keeps and takes longer to compile; "auto", apart on a GPU
    c.model.layers = "auto"
    # In scoring and training: "xla", or the kernels "splash" of TPUs or "cudnn" of NVIDIA GPUs, or
    # "auto", theirs where they can be had
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
    # Renames "ours=theirs", such as ("prompt=question", "answer=reward_model.ground_truth"); a dot
    # reaches into a struct
    c.data.columns = ()
    c.data.template = ""  # text of the prompt, columns as {name}, braces as {{ }}; "": as it is
    c.data.chat = False  # a text prompt is a user's message, written by the model's chat template
    c.data.system = ""  # system message before a chat that has none; "": none
    # What the chat template is given besides messages, "name=value", such as
    # ("enable_thinking=False",)
    c.data.template_arguments = ()
    c.data.date = ""  # that chat templates are told, 2026-11-28; "": when the run was started
    c.data.num_train = 10_000  # training problems that a task generates
    c.data.num_eval = 512  # held-out problems that a task generates
    c.data.max_prompt_tokens = 512  # of a prompt, chat template included
    c.data.overlong = "refuse"  # a longer one: "refuse" to start, "drop" it, "truncate" its start

    c.rewards = ConfigDict()
    c.rewards.names = ("exact_answer",)  # built-in or "module:function", or NAME(argument=value)
    c.rewards.weights = (1.0,)  # one per name; the reward is the weighted sum
    # The reward that gives 1 for right and 0 for wrong, which accuracy, pass@k and maj@k read. "":
    # the first built-in one that does; without such there is no accuracy
    c.rewards.accuracy = ""
    # Processes that compute rewards; 0: half of the CPUs that the run may use, at most 16
    c.rewards.num_workers = 0
    c.rewards.time_limit_s = 10.0  # of a reward for one completion; a process that hangs is killed
    # To import the functions, and of each function's first answer in a process: models are loaded
    c.rewards.start_limit_s = 120.0
    c.rewards.memory_gb = 4.0  # of each process with all that it starts, GiB; 0: no limit
    c.rewards.bad_rows = "refuse"  # problems whose columns no reward can read: "refuse" or "drop"
    # More of a step's completions that have no reward: guards.failed_rewards; 1: never
    c.rewards.max_failed_share = 0.5

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
    # "xla", or a kernel that reads of the cache what is there: "streamed" of NVIDIA GPUs, which
    # "auto" takes where it can, or "ragged" of TPUs
    c.rollout.attention = "auto"
    c.rollout.compact = True  # finished rows leave the batch when no prompts wait

    c.algorithm = ConfigDict()
    c.algorithm.num_iterations = 1  # passes over a step's rollouts
    # Unit of advantages: "none" that of the reward, "std" the group's standard deviation,
    # "sample_std" the larger one that is estimated from a sample, G - 1, as in TRL
    c.algorithm.scale_by = "std"
    c.algorithm.clip_low = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    c.algorithm.clip_high = 0.2
    c.algorithm.kl_coef = 0.0  # weight of the KL to the frozen reference (k3), per token
    # Of what it has the gradient: "reference_policy" of KL(reference||policy), k3 as it stands;
    # "policy_reference" of KL(policy||reference), k3 times the ratio to the old policy, as in TRL
    c.algorithm.kl_gradient = "reference_policy"
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
    # After warm-up: "constant", "linear" or "cosine", by the updates that were made; those that are
    # refused do not count
    c.optim.schedule = "constant"
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
    c.guards.max_skipped = 5  # steps; as many refused updates in a row, and the run does
    c.guards.after_skips = "stop"  # this: "roll_back" or "stop"
    c.guards.max_roll_backs = 3  # of a run; where one more is asked for it stops

    c.hosts = ConfigDict()  # of a run of several processes
    c.hosts.start_limit_s = 300.0  # until all must have started
    c.hosts.lost_limit_s = 100.0  # without a sign of life of one, after which all end

    c.evaluation = ConfigDict()
    c.evaluation.every_steps = 0  # greedy, on held-out problems; 0: at start and end only
    c.evaluation.num_problems = 512  # at most; 0: no evaluation at all
    c.evaluation.num_samples = 0  # per problem, for pass@k and maj@k at start and end; 0: none
    c.evaluation.temperature = 1.0  # of those samples
    c.evaluation.reference = ""  # column of texts that grpo_jax.evaluate compares with; "": none

    c.checkpoint = ConfigDict()
    c.checkpoint.folder = ""  # where they are kept, gs://BUCKET/PATH too; "": in the workdir
    c.checkpoint.every_steps = 50  # 0: at the end only
    c.checkpoint.keep = 2  # the newest this many, and besides them the one that did best held out
    # Seconds after its start at which the program saves and ends, as before the end of a queue's
    # time; leave some for a rollout, an update and the save. 0: never
    c.checkpoint.save_before_s = 0.0
    c.checkpoint.max_failed = 3  # the run ends when this many in a row cannot be written
    c.checkpoint.export = True  # write a Hugging Face folder at the end
    # Of its weights: "float32", "bfloat16" or "float16"; or "auto", the wider of what the source is
    # kept in and what was trained, which rounds nothing
    c.checkpoint.export_dtype = "auto"
    # Options, by name, that a run may go on with though it was started with others, such as
    # ("optim.learning_rate",); config.json notes them
    c.checkpoint.accept_changes = ()
    c.checkpoint.begin_again = False  # at step 0 where a run's checkpoints are gone or all damaged

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

    # Keep compiled programs in the user's cache folder, or JAX_COMPILATION_CACHE_DIR, between runs;
    # on a CPU not of a network that its devices split, nor of a run that is profiled.
    c.compile_cache = True
    return c.lock()
