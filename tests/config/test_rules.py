"""What is refused of options, each alone and together."""

from __future__ import annotations

import pytest
from valid_config import refusal_of, valid

from grpo_jax.config import rules as rules_lib

_KL = {"algorithm__kl_coef": 0.1}
# Changes that read problems from a dataset.
_DATASET = {"data__task": "", "data__path": "owner/name", "model__path": "m"}
_REMAX = {"algorithm__baseline": "greedy", "algorithm__scale_by": "none"}
_KL_IN_REWARD = {"algorithm__kl_in": "reward", "algorithm__kl_coef": 0.1}
_STEPS = {"rewards__by_step": ("right_steps",)}
_CRITIC = {
    "algorithm__critic": True,
    "algorithm__baseline": "none",
    "algorithm__scale_by": "none",
}


@pytest.mark.parametrize(
    "changes",
    [{}, _REMAX, {**_REMAX, "batch__group": 1}, _KL_IN_REWARD, {**_CRITIC, "batch__group": 1}],
    ids=str,
)
def test_the_base_of_these_tests_is_valid(changes):
    rules_lib.check(valid(**changes))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"optim__beta1": 1.0}, ["optim.beta1 = 1.0", "below 1"]),
        ({"optim__beta2": -0.1}, ["optim.beta2 = -0.1", "at least 0"]),
        (
            {"algorithm__surrogate": "cispo", "algorithm__clip_low": 0.1},
            ["algorithm.clip_low = 0.1", 'of "clip"', "algorithm.surrogate = 'cispo'"],
        ),
        (
            {"algorithm__mask_threshold": 0.1},
            ["algorithm.mask_threshold = 0.1", "surrogates with a mask", "'clip'"],
        ),
        (
            {**_STEPS, "algorithm__scale_by": "batch_std"},
            ["rewards.by_step = ('right_steps',)", "of a step", "algorithm.scale_by = 'batch_std'"],
        ),
        (
            {**_STEPS, "prompts__drop_equal_groups": True},
            ["rewards.by_step", "prompts.drop_equal_groups = True", "differ by steps"],
        ),
        (
            {**_STEPS, "environment__classes": ("echo:Echo",)},
            ["completions of one turn", "environment.turn_rewards = True"],
        ),
        (
            {**_STEPS, "data__task": "unseen_form", "hybrid__method": "uft"},
            ["rewards.by_step", "hybrid.method = 'uft'", "as a whole"],
        ),
        (
            {"environment__classes": ("echo:Echo",), "environment__turn_rewards": True},
            ["environment.turn_rewards = True", 'no "environment:turn_rewards"'],
        ),
        ({"algorithm__critic": True}, ["algorithm.baseline = 'mean'", '"ppo"', "the baseline"]),
        (
            {**_CRITIC, "algorithm__scale_by": "std"},
            ["algorithm.critic = True and algorithm.scale_by = 'std'", "'none'"],
        ),
        (
            {**_CRITIC, "algorithm__credit": "rank"},
            ["algorithm.critic = True and algorithm.credit = 'rank'", "the reward itself"],
        ),
        (
            {**_CRITIC, "algorithm__aggregate": "each"},
            ["algorithm.critic = True and algorithm.aggregate = 'each'", "one critic"],
        ),
        (
            {**_CRITIC, "algorithm__whiten": "completions"},
            ['algorithm.whiten = "completions"', "of tokens"],
        ),
        (
            {**_CRITIC, "algorithm__gae_lambda": 1.0, "algorithm__gae_length_scale": 0.05},
            ["algorithm.gae_lambda = 1 and algorithm.gae_length_scale = 0.05", "Leave one"],
        ),
        (
            {**_CRITIC, "critic__first_steps": 2, "algorithm__entropy_target": 0.1},
            ["critic.first_steps = 2", "algorithm.entropy_target = 0.1"],
        ),
        ({"critic__clip": 0.1}, ["critic.clip = 0.1", "algorithm.critic = False", "0.2"]),
        ({"algorithm__discount": 0.9}, ["algorithm.discount = 0.9 is of a critic"]),
        ({"algorithm__ratio_cap": 0.2}, ["algorithm.ratio_cap = 0.2 must be at least 1", "5 is"]),
        (
            {"algorithm__ratio": "sequence", "algorithm__surrogate": "reinforce"},
            ['algorithm.ratio = "sequence"', "'reinforce'"],
        ),
        (
            {"algorithm__ratio": "geometric", "algorithm__surrogate": "sapo"},
            ['algorithm.ratio = "geometric"', "'sapo' does not clip"],
        ),
        (
            {"algorithm__ratio": "geometric", "algorithm__dual_clip_loss": 3.0},
            ["algorithm.dual_clip_loss = 3.0", '"geometric"'],
        ),
        (
            {"algorithm__dual_clip_ratio": 1.1},
            ["algorithm.dual_clip_ratio = 1.1", "1 + algorithm.clip_high = 1.2"],
        ),
        ({"algorithm__dual_clip_loss": 0.5}, ["algorithm.dual_clip_loss = 0.5", "above 1"]),
        (
            {"algorithm__surrogate": "vespo", "algorithm__vespo_positive": (2.0,)},
            ["algorithm.vespo_positive = (2.0,)", "two numbers"],
        ),
        ({"rollout_correction__floor": 0.5}, ["rollout_correction.floor = 0.5", '"none" has none']),
        (
            {"rollout_correction__level": "token", "rollout_correction__floor": 3.0},
            ["rollout_correction.floor = 3", "below rollout_correction.cap = 2"],
        ),
        (
            {"algorithm__surrogate": "sampler_mask", "rollout_correction__level": "token"},
            ["sampler_mask", "twice"],
        ),
        (
            {"algorithm__surrogate": "vespo", "rollout_correction__level": "sequence"},
            ["vespo", "rollout_correction.level"],
        ),
        ({"algorithm__clip_low": 1.0}, ["algorithm.clip_low = 1.0", "below 1"]),
        ({"profile__steps": (3,)}, ["profile.steps = (3,)", "(first, last)", "100"]),
        ({"profile__steps": (5, 4)}, ["profile.steps = (5, 4)"]),
        ({"profile__steps": (0, 4)}, ["profile.steps = (0, 4)"]),
        ({"profile__steps": (99, 101)}, ["profile.steps = (99, 101)", "loop.num_steps = 100"]),
        ({"rollout__top_p": 0.0}, ["rollout.top_p = 0.0", "above 0"]),
        ({"rollout__top_p": 1.1}, ["rollout.top_p = 1.1", "at most 1"]),
        (
            {"rollout__temperature": 0.0},
            ["rollout.temperature = 0.0 must be above 0: ", "no advantage"],
        ),
        ({"optim__learning_rate": float("nan")}, ["optim.learning_rate = nan"]),
        ({"optim__eps": float("inf")}, ["optim.eps = inf must be a finite number"]),
        ({"batch__prompts": 2**31}, ["batch.prompts = 2147483648 must be at most 2147483647"]),
        ({"seed": 10**5000}, ["seed = 10^300 or more must be at most"]),
        (
            {"rewards__memory_limit_gib": 1e300},
            ["rewards.memory_limit_gib = 1e+300 must be at most"],
        ),
        ({"rewards__weights": ([1],)}, ["rewards.weights: [1] must be a text or a number"]),
        ({"checkpoint__folder": "a\0b"}, ["checkpoint.folder = 'a\\x00b' holds what is no char"]),
        (
            {"data__system_prompt": "\ud800"},
            ["data.system_prompt = '\\ud800' holds what is no character"],
        ),
        ({"model__dtype": "float16"}, ["model.dtype = 'float16'", "float32, bfloat16"]),
        (
            {"algorithm__normalizer": "mean"},
            ["algorithm.normalizer = 'mean'", "token, sequence, sequence_sum, constant"],
        ),
        (
            {"optim__moments_dtype": "int4"},
            ["optim.moments_dtype = 'int4'", "float32, bfloat16, int8"],
        ),
        (
            {"checkpoint__export_dtype": "int8"},
            ["checkpoint.export_dtype = 'int8'", "auto, float32, bfloat16, float16"],
        ),
        ({"model__param_dtype": "int8"}, ["model.param_dtype = 'int8'", "float32, bfloat16"]),
        ({"model__scan_layers": "scan"}, ["model.scan_layers = 'scan'", "auto, on, off"]),
        ({"optim__master_weights": True}, ["optim.master_weights = True", "model.param_dtype"]),
        ({"rollout__weights_dtype": "int4"}, ["rollout.weights_dtype = 'int4'", "auto, int8"]),
        ({"rollout__kv_cache_dtype": "fp8"}, ["rollout.kv_cache_dtype = 'fp8'", "auto, int8"]),
        (
            {"rollout_correction__level": "token_mask"},
            ["rollout_correction.level = 'token_mask'", "none, token, sequence"],
        ),
        ({"rollout_correction__bound": "clip"}, ["rollout_correction.bound", "truncate, mask"]),
        (
            {"loop__async_rollouts": True},
            ["loop.async_rollouts = True", 'rollout_correction.level = "none"'],
        ),
        (
            {"prompts__per_draw": 64},
            ["prompts.per_draw = 64", "batch.prompts = 32", "prompts.drop_equal_groups = True"],
        ),
        ({"prompts__oversample": 0.9}, ["prompts.oversample = 0.9 must be at least 1", "1.25"]),
        (
            {"prompts__oversample": 1.5, "environment__classes": ("echo:Echo",)},
            ["prompts.oversample = 1.5", "environments answer", "prompts.oversample = 1"],
        ),
        (
            {"prompts__drop_equal_groups": True, "prompts__per_draw": 4, "prompts__max_draws": 7},
            ["prompts.max_draws = 7", "give 28 groups", "batch.prompts = 32"],
        ),
        (
            {
                "prompts__drop_equal_groups": True,
                "loop__async_rollouts": True,
                "rollout_correction__level": "token",
            },
            ["loop.async_rollouts = True", "prompts.drop_equal_groups = True", "to False"],
        ),
        (
            {"prompts__drop_equal_groups": True, "loop__num_epochs": 2.0},
            ["loop.num_epochs = 2", "prompts.drop_equal_groups = True", "Set loop.num_steps"],
        ),
        ({"prompts__outside_weight": 0.0}, ["prompts.outside_weight = 0.0", "exclude a problem"]),
        ({"prompts__replay_share": 1.0}, ["prompts.replay_share = 1.0", "below 1"]),
        (
            {"prompts__low_rate": 0.9},
            ["prompts.low_rate = 0.9", "at most prompts.high_rate = 0.8"],
        ),
        ({"optim__schedule": "step"}, ["optim.schedule = 'step'", "constant, linear, cosine"]),
        ({"batch__group": 1}, ["batch.group = 1", "at least 2", 'baseline to "none" or "greedy"']),
        (
            {"algorithm__baseline": "greedy"},
            ["algorithm.baseline = 'greedy' and algorithm.scale_by = 'std'", 'scale_by = "none"'],
        ),
        (
            {"algorithm__baseline": "none", "algorithm__scale_by": "batch_std"},
            ["algorithm.baseline = 'none' and algorithm.scale_by = 'batch_std'", "whiten"],
        ),
        (
            {"algorithm__credit": "best", "algorithm__baseline": "leave_one_out"},
            ["algorithm.credit = 'best' and algorithm.baseline = 'leave_one_out'", '"mean"'],
        ),
        (
            {**_REMAX, "algorithm__credit": "rank"},
            ["algorithm.credit = 'rank' and algorithm.baseline = 'greedy'", "no rank"],
        ),
        (
            {"algorithm__credit": "rank", "algorithm__scale_by": "mean"},
            ["algorithm.credit = 'rank' and algorithm.scale_by = 'mean'"],
        ),
        (
            {**_REMAX, "loop__async_rollouts": True, "rollout_correction__level": "token"},
            ["algorithm.baseline = 'greedy' and loop.async_rollouts = True"],
        ),
        (
            {**_REMAX, **_KL_IN_REWARD},
            ["algorithm.kl_in = 'reward' and algorithm.baseline = 'greedy'"],
        ),
        (
            {**_KL_IN_REWARD, "algorithm__aggregate": "each"},
            ["algorithm.kl_in = 'reward' and algorithm.aggregate = 'each'"],
        ),
        (
            {**_KL_IN_REWARD, "algorithm__kl_estimator": "k3_ratio"},
            ["algorithm.kl_in = 'reward' and algorithm.kl_estimator = 'k3_ratio'"],
        ),
        (
            {"batch__prompts": 6, "batch__minibatches": 4, "batch__group": 3},
            ["6 * 3 = 18 rows", "batch.minibatches = 4", "multiple of 4"],
        ),
        (
            {"batch__prompts": 12, "batch__minibatches": 2, "batch__microbatch": 4},
            ["12 / 2 = 6 prompts per update", "batch.microbatch = 4", "multiple of 8"],
        ),
        (
            {"batch__microbatch": -2},
            ["batch.microbatch = -2 must be at least 1, or ", "or -1 (as many"],
        ),
        (
            {"optim__schedule": "linear", "optim__warmup_steps": 100},
            ["optim.warmup_steps = 100", "100 updates", "optim.schedule = 'linear'"],
        ),
        ({"data__task": ""}, ["data.task = ''", "data.path = ''", "exactly one"]),
        (
            {"data__path": "p.jsonl"},
            ["data.task = 'arithmetic'", "data.path = 'p.jsonl'", "exactly one"],
        ),
        ({"data__eval_path": "p.jsonl"}, ["data.eval_path goes with data.path", "data.task"]),
        ({"data__eval_split": "test"}, ["data.eval_split goes with data.path"]),
        ({"data__name": "main"}, ["data.name goes with data.path"]),
        ({"data__eval_name": "main"}, ["data.eval_name goes with data.path"]),
        ({"data__columns": ("a=b",)}, ["data.columns goes with data.path"]),
        ({"data__prompt_template": "{a}"}, ["data.prompt_template goes with data.path"]),
        ({"data__chat": True}, ["data.chat goes with data.path"]),
        ({"data__system_prompt": "Think."}, ["data.system_prompt goes with data.path"]),
        ({**_DATASET, "data__eval_name": "main"}, ["data.eval_name = 'main' goes with", "_path"]),
        ({**_DATASET, "data__columns": ("question",)}, ["data.columns: 'question'", "ours=theirs"]),
        ({**_DATASET, "data__prompt_template": "{}"}, ["data.prompt_template = '{}'", "{{ and }}"]),
        ({"data__overlong": "cut"}, ["data.overlong = 'cut'", "refuse, drop, truncate"]),
        ({"guards__kl": "ignore"}, ["guards.kl = 'ignore'", "warn, skip, roll_back, stop"]),
        ({"guards__nonfinite": "warn"}, ["guards.nonfinite = 'warn'", "skip, roll_back, stop"]),
        ({"guards__after_skips": "skip"}, ["guards.after_skips = 'skip'", "of roll_back, stop"]),
        (
            {"guards__reward": "roll_back", "checkpoint__every_steps": 0},
            ['guards.reward = "roll_back"', "checkpoint.every_steps = 0", "another action"],
        ),
        ({"guards__kl_max": 0.5}, ["guards.kl_max = 0.5", "algorithm.kl_coef = 0", "reference"]),
        ({"algorithm__kl_target": 0.1}, ["algorithm.kl_target = 0.1", "algorithm.kl_coef = 0"]),
        (
            {"algorithm__reference_refresh_steps": 9},
            ["algorithm.reference_refresh_steps = 9", "algorithm.kl_coef = 0"],
        ),
        (
            {**_KL, "algorithm__reference_refresh_steps": 9, "lora__rank": 4},
            ["algorithm.reference_refresh_steps = 9", "low-rank adapters", "lora.rank = 0"],
        ),
        (
            {**_KL, "algorithm__kl_target": 0.1, "algorithm__kl_horizon": 51},
            ["algorithm.kl_horizon = 51", "256 completions", "51.2"],
        ),
        (
            {"algorithm__entropy_target": 0.1, "algorithm__entropy_coef": -0.1},
            ["algorithm.entropy_coef = -0.1", "algorithm.entropy_coef_min = 0.0"],
        ),
        (
            {"algorithm__entropy_target": 0.1, "algorithm__entropy_coef_min": 0.5},
            ["algorithm.entropy_coef = 0.0", "algorithm.entropy_coef_max = 1.0"],
        ),
        (
            {"algorithm__entropy_target": 0.1, "algorithm__entropy_coef": 1.5},
            ["algorithm.entropy_coef = 1.5", "algorithm.entropy_coef_max = 1.0"],
        ),
        (
            {"guards__entropy_min": 1.0, "guards__entropy_max": 1.0},
            ["guards.entropy_max = 1.0", "above guards.entropy_min = 1.0"],
        ),
        ({"rewards__weights": (1.0, 2.0)}, ["rewards.names has 1", "rewards.weights 2"]),
        ({"rewards__weights": (), "rewards__names": ()}, ["at least one reward"]),
        ({"checkpoint__folder": "gs://b/r"}, ["checkpoint.folder = 'gs://b/r'", "model.path"]),
        ({"sft__num_steps": 0}, ['model.path = ""', "sft.num_steps = 0"]),
        (
            {"data__task": "", "data__path": "p"},
            ['model.path = ""', "data.task", "model.tokenizer"],
        ),
        ({**_DATASET, "model__tokenizer": "t"}, ["model.tokenizer = 't'", "model.path = 'm'"]),
        ({"data__streaming": True}, ["data.streaming goes with data.path"]),
        ({**_DATASET, "data__streaming": True, "data__subset": (0,)}, ["data.subset = (0,)"]),
        (
            {"model__num_heads": 4, "model__num_kv_heads": 3},
            ["model.num_heads = 4", "model.num_kv_heads = 3"],
        ),
        ({"model__width": 132}, ["model.width = 132", "multiple of 2 * model.num_heads = 8"]),
        ({"mesh__data": 0}, ["mesh.data = 0", "-1"]),
        ({"mesh__tensor": -2}, ["mesh.tensor = -2", "-1"]),
        ({"mesh__fsdp": -1}, ["mesh.data and mesh.fsdp are -1", "only one"]),
    ],
)
def test_rules(changes, parts):
    message = refusal_of(valid(**changes))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "changes",
    [
        {"batch__prompts": 12, "batch__minibatches": 2, "batch__microbatch": 3},
        {"sft__batch": 6, "sft__microbatch": 4},
        {"optim__schedule": "linear", "optim__warmup_steps": 99},
        {"data__task": "", "data__path": "p.jsonl", "data__eval_path": "q.jsonl",
         "model__path": "m"},
        {"model__path": "m", "sft__num_steps": 0, "model__num_kv_heads": 3},
        {**_DATASET, "data__name": "main", "data__eval_split": "test", "data__chat": True},
        {**_DATASET, "data__eval_path": "owner/name", "data__eval_name": "main"},
        {**_DATASET, "data__columns": ("prompt=a",), "data__prompt_template": "{prompt} {b} {{}}"},
        {"data__overlong": "drop"},
        {"rollout__top_p": 1.0, "optim__beta1": 0.0},
        {"mesh__data": 1, "mesh__tensor": -1},
        {"model__param_dtype": "bfloat16", "optim__master_weights": True},
        {"loop__async_rollouts": True, "rollout_correction__level": "token"},
        {"guards__kl_max": 0.5, "algorithm__kl_coef": 1e-6, "guards__kl": "roll_back"},
        {"guards__entropy_min": 1.0},
        {**_KL, "algorithm__kl_target": 0.1, "algorithm__kl_horizon": 52},
        {**_KL, "algorithm__reference_refresh_steps": 1, "algorithm__reference_mix": 1.0},
        {"algorithm__entropy_coef": -0.1, "algorithm__top_entropy_share": 0.2},
    ],
)  # fmt: skip
def test_what_the_rules_allow(changes):
    rules_lib.check(valid(**changes))


def test_types_are_checked():
    config = valid()
    config.optim.unlock()
    with config.ignore_type():
        config.optim.learning_rate = "fast"
    assert "optim.learning_rate = 'fast' is not of type float" in refusal_of(config)


def test_a_missing_option_is_named():
    config = valid()
    with config.unlocked():
        del config.optim.learning_rate
    assert "optim.learning_rate = None" in refusal_of(config)


def test_groups_split_over_devices():
    config = valid(batch__prompts=12, batch__minibatches=3)
    rules_lib.check_devices(config, 4)
    begun = valid(batch__prompts=12, prompts__oversample=1.25)
    rules_lib.check_devices(begun, 3)
    with pytest.raises(ValueError, match=r"begins 15 prompts in place of 12, .* a multiple of 4"):
        rules_lib.check_devices(begun, 4)
    with pytest.raises(ValueError, match=r"give 4 prompts at once.*= 8 devices.*multiple of 8"):
        rules_lib.check_devices(config, 8)
    with pytest.raises(ValueError, match=r"batch.microbatch = 2 give 2 prompts at once"):
        rules_lib.check_devices(valid(batch__prompts=12, batch__microbatch=2), 4)


def test_heads_split_over_the_devices_of_a_row():
    rules_lib.check_heads(4, sequence=2, tensor=2)
    rules_lib.check_heads(3, sequence=1, tensor=2)  # tensor alone: by column
    with pytest.raises(
        ValueError, match=r"mesh\.sequence = 4 and mesh\.tensor = 2.*a divisor of 4"
    ):
        rules_lib.check_heads(4, sequence=4, tensor=2)
