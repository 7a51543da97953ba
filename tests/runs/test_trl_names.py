"""TRL's names: each of its arguments is known, means what it means there, or is refused."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
from pathlib import Path
from types import SimpleNamespace

import datasets
import jax
import pytest
import transformers
from kill_and_resume import log_differences, state_differences
from mistakes import make_model
from plain_rewards import right

import grpo_jax
from grpo_jax.config import options
from grpo_jax.trainers.listeners import Step
from grpo_jax.trl import GRPOConfig, GRPOTrainer, callbacks, reference, rewards, trainer
from grpo_jax.trl.config import options_of
from grpo_jax.trl.fields import FIELDS
from grpo_jax.trl.given_fields import GIVEN_FIELDS
from grpo_jax.trl.lora import options_of_peft

DOCS = Path(__file__).resolve().parents[2] / "docs" / "from_trl.md"
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 9)]


def test_every_argument_of_transformers_is_known():
    theirs = {f.name: f for f in dataclasses.fields(transformers.TrainingArguments)}
    assert not theirs.keys() - FIELDS.keys()
    # TRL's GRPOConfig has defaults of its own for these.
    own = {"learning_rate", "logging_steps", "gradient_checkpointing", "bf16"}
    own |= {"remove_unused_columns"}
    for name in theirs.keys() - own - {"include_for_metrics"}:
        assert FIELDS[name].default == theirs[name].default, name


def test_every_argument_of_trl_is_known():
    """Where TRL is installed, as in benchmarks."""
    trl = pytest.importorskip("trl")
    theirs = {f.name: f for f in dataclasses.fields(trl.GRPOConfig)}
    assert set(theirs) == set(FIELDS)
    for name in theirs.keys() - {"include_for_metrics"}:
        assert FIELDS[name].default == theirs[name].default, name
    parameters = inspect.signature(trl.GRPOTrainer.__init__).parameters
    ours = {*inspect.signature(GRPOTrainer.__init__).parameters, *trainer_refuses()}
    assert set(parameters) <= ours


def trainer_refuses() -> set[str]:
    from grpo_jax.trl import trainer

    return set(trainer._REFUSED)


def test_the_table_names_options_that_exist_and_stands_in_the_docs():
    for name, field in FIELDS.items():
        kinds = [field.option, field.counts, field.beside, field.only]
        assert sum(map(bool, kinds)) == 1, name
        assert not field.option or field.option in options.BY_NAME, name
        assert not field.option or hasattr(GRPOConfig(), name)
    for fields in GIVEN_FIELDS.values():
        for name, field in fields.items():
            kinds = [field.option, field.counts, field.beside, field.only]
            assert sum(map(bool, kinds)) == 1, name
            assert not field.option or field.option in options.BY_NAME, name
            assert "{" not in field.told().replace("`{}` alone", ""), name
    page = DOCS.read_text()
    assert page.endswith(f"{reference.table()}\n"), "python -m grpo_jax.trl.reference"


def of(num_problems=64, devices=1, **arguments):
    return options_of(GRPOConfig(**arguments), num_problems, devices)


def test_defaults_are_those_of_trl():
    found = of(num_problems=64)
    assert set(found) <= set(options.BY_NAME)
    assert found["batch.prompts"] == 1 and found["batch.group"] == 8
    assert found["batch.minibatches"] == 1 and found["loop.num_steps"] == 3 * 64
    assert found["optim.schedule"] == "linear" and found["optim.beta2"] == 0.999
    assert found["algorithm.scale_by"] == "sample_std"
    assert found["algorithm.normalizer"] == "token"
    assert found["algorithm.kl_estimator"] == "k3_ratio"
    assert found["algorithm.clip_high"] == found["algorithm.clip_low"] == 0.2
    assert found["model.dtype"] == "bfloat16" and found["model.param_dtype"] == "float32"
    assert found["checkpoint.every_steps"] == 500 and found["evaluation.every_steps"] == 0
    assert found["rollout_correction.level"] == "none" and not found["logging.tensorboard"]


@pytest.mark.parametrize(
    ("arguments", "devices", "expected"),
    [
        # completions of a rollout, by device, accumulation and steps; updates on each
        ({"per_device_train_batch_size": 4, "num_generations": 4}, 8, (8, 4, 1)),
        ({"gradient_accumulation_steps": 4}, 2, (8, 8, 1)),
        ({"steps_per_generation": 4}, 1, (4, 8, 4)),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, 1, (4, 8, 2)),
        ({"generation_batch_size": 64}, 2, (8, 8, 4)),
    ],
)
def test_batches_have_the_sizes_that_trl_gives_them(arguments, devices, expected):
    found = of(devices=devices, num_problems=640, **arguments)
    names = ("batch.prompts", "batch.group", "batch.minibatches")
    assert tuple(found[name] for name in names) == expected


def test_updates_become_steps():
    """8 prompts in 4 updates twice over: 8 updates a rollout."""
    several = {"generation_batch_size": 64, "per_device_train_batch_size": 16, "num_iterations": 2}
    found = of(**several, max_steps=80, save_steps=20, eval_strategy="steps", eval_steps=4)
    assert found["loop.num_steps"] == 10
    assert found["checkpoint.every_steps"] == 3 and found["evaluation.every_steps"] == 1
    found = of(**several, num_train_epochs=1.5, save_strategy="epoch", num_problems=70)
    assert found["loop.num_steps"] == 12 and found["checkpoint.every_steps"] == 8
    assert of(**several, max_steps=80, warmup_steps=0.1)["optim.warmup_steps"] == 8
    assert of(**several, max_steps=80, warmup_steps=5)["optim.warmup_steps"] == 5
    assert of(max_steps=9, save_strategy="no")["checkpoint.every_steps"] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("sum", "sample_std")),
        ({"scale_rewards": "batch"}, ("sum", "batch_std")),
        # TRL normalizes each reward by its group's deviation, whatever scale_rewards is.
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"},
            ("each", "sample_std"),
        ),
    ],
)
def test_advantages_are_those_of_trl(arguments, expected):
    found = of(**arguments)
    assert (found["algorithm.aggregate"], found["algorithm.scale_by"]) == expected


def test_what_changes_in_the_objective_during_a_run():
    found = of(entropy_coef=0.01, entropy_target=0.3, ref_model_sync_steps=4)
    assert found["algorithm.entropy_target"] == found["algorithm.reference_refresh_steps"] == 0
    found = of(
        use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=0.3, entropy_coef_max=0.1,
        sync_ref_model=True, ref_model_sync_steps=16, ref_model_mixup_alpha=0.5, beta=0.1,
        top_entropy_quantile=0.2, generation_batch_size=64, num_iterations=2,
    )  # fmt: skip
    changed = {name: found[f"algorithm.{name}"] for name in (
        "entropy_coef", "entropy_target", "entropy_coef_min", "entropy_coef_max",
        "entropy_coef_delta", "reference_mix", "top_entropy_share",
    )}  # fmt: skip
    assert list(changed.values()) == [0.01, 0.3, 0.0, 0.1, 0.005, 0.5, 0.2]
    assert found["algorithm.reference_refresh_steps"] == 1  # 8 updates, twice over
    with pytest.raises(ValueError, match=r"ref_model_sync_steps = 8 updates .* the 16 updates"):
        of(sync_ref_model=True, ref_model_sync_steps=8, generation_batch_size=64, num_iterations=2)


def test_other_values_that_become_options():
    found = of(
        epsilon_high=0.28, loss_type="dr_grpo", scale_rewards=False, use_bias_correction_kl=False,
        use_vllm=True, vllm_importance_sampling_mode="token_truncate", report_to=["wandb"],
        vllm_importance_sampling_clip_max=2.5, project="p", chat_template_kwargs={"think": False},
        model_init_kwargs={"dtype": "bfloat16"}, bf16=False, gradient_checkpointing=False,
        log_completions=True, num_completions_to_print=2, lr_scheduler_type="constant_with_warmup",
    )  # fmt: skip
    assert found["algorithm.clip_high"] == 0.28 and found["algorithm.normalizer"] == "constant"
    # Bounds of a clip are left out where the loss does not clip.
    assert "algorithm.clip_low" not in of(loss_type="sapo", epsilon=0.1)
    found_too = of(loss_type="luspo", importance_sampling_level="sequence", delta=4.0)
    assert found_too["algorithm.ratio"] == "sequence"
    assert found_too["algorithm.dual_clip_ratio"] == 4.0
    assert found_too["algorithm.normalizer"] == "sequence_sum"
    assert of(loss_type="cispo", epsilon_high=5.0)["algorithm.ratio_cap"] == 5.0
    assert of(off_policy_mask_threshold=0.1)["algorithm.max_sequence_drift"] == 0.1
    assert found["algorithm.scale_by"] == "none"
    assert found["algorithm.kl_estimator"] == "k3"
    assert found["rollout_correction.level"] == "token"
    assert (
        found["rollout_correction.bound"] == "truncate" and found["rollout_correction.cap"] == 2.5
    )
    assert found["logging.wandb_project"] == "p" and not found["logging.tensorboard"]
    assert found["data.chat_template_kwargs"] == ("think=False",)
    assert found["model.param_dtype"] == "bfloat16" and found["model.dtype"] == "float32"
    assert found["model.remat"] == "none" and found["optim.schedule"] == "constant"
    assert found["logging.samples_every_steps"] == 1 and found["logging.num_samples"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_generation": 8}, "no argument num_generation. Did you mean num_generations"),
        ({"min_p": 0.1}, r"min_p=0.1\) is not what this trainer does. It takes min_p=None"),
        ({"fp16": True}, "In its place: bf16=True"),
        ({"deepspeed": "ds.json"}, "mesh.fsdp"),
        ({"loss_type": "cispo"}, "caps the ratio at epsilon_high = 0.2, below 1"),
        ({"loss_type": "gspo"}, "loss_type='gspo'.* It takes 'dapo', 'bnpo', 'grpo', 'dr_grpo'"),
        ({"scale_rewards": "mean"}, "scale_rewards='mean'"),
        ({"multi_objective_aggregation": "mean"}, "multi_objective_aggregation='mean'"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial'"),
        ({"report_to": "comet_ml"}, "comet_ml is not built yet"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "has device_map: only `dtype`"),
        ({"num_generations": 3}, "8 completions, which is no multiple of num_generations = 3"),
        ({"max_steps": 3, "steps_per_generation": 2, "num_generations": 4}, "no multiple of the 2"),
        ({"generation_batch_size": 12}, "no multiple of per_device_train_batch_size"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "completions of two rollouts",
        ),
        ({"steps_per_generation": 2}, None),
        ({"steps_per_generation": 2, "num_generations": 16}, "1 prompts in 2 updates"),
        (
            {"num_generations": 4, "steps_per_generation": 40},
            "rollouts of 80 prompts, and the data",
        ),
    ],
)
def test_what_means_something_else_is_refused(arguments, words):
    if words is None:
        of(**arguments)
        return
    with pytest.raises(ValueError, match=words):
        of(**arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("trl") / "model")


def test_a_run_by_their_names_is_the_run_by_ours(model, tmp_path, one_device):
    theirs = GRPOTrainer(
        model=str(model),
        reward_funcs=[right, "answer_format"],
        args=GRPOConfig(
            str(tmp_path / "theirs"), reward_weights=[1.0, 0.5], num_generations=4, max_steps=4,
            per_device_train_batch_size=8, steps_per_generation=2, max_completion_length=8,
            learning_rate=1e-3, beta=0.05, bf16=False, save_strategy="no", seed=3,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        options={"logging.samples_every_steps": 1},
    )  # fmt: skip
    theirs.train()
    assert theirs.save_model() == tmp_path / "theirs" / "export"
    ours = grpo_jax.train(
        model, [right, ("answer_format", 0.5)], ROWS, workdir=tmp_path / "ours",
        prompts=4, group=4, minibatches=2, num_steps=2, seed=3, kl_coef=0.05,
        rollout={"max_tokens": 8}, max_prompt_tokens=1_000_000,
        algorithm={"scale_by": "sample_std", "kl_estimator": "k3_ratio"},
        optim={"learning_rate": 1e-3, "schedule": "linear", "beta2": 0.999},
        logging={"samples_every_steps": 1, "tensorboard": False}, checkpoint={"every_steps": 0},
    )  # fmt: skip
    assert not state_differences(tmp_path / "theirs", ours.workdir)
    assert not log_differences(tmp_path / "theirs", ours.workdir)


class TrainerCallback:
    """As in transformers, whose module needs PyTorch."""

    def on_save(self, args, state, control, **more):
        pass

    def on_log(self, args, state, control, **more):
        pass


class Watches(TrainerCallback):
    """As in TRL's documentation; it stops the run after two updates."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs=None, **more):
        self.heard.append((state.global_step, logs.get("reward"), args.max_steps))

    def on_step_end(self, args, state, control, **more):
        control.should_training_stop = state.global_step >= 2
        return control


class Saves(Watches):
    def on_save(self, args, state, control, **more):
        pass


class Counts:
    """An environment that chooses its task itself, as in TRL's documentation."""

    def reset(self, **row) -> str:
        self.target = random.randint(1, 1000)
        return f"{self.target}="

    def get_reward(self) -> float:
        return 0.0


def test_a_hub_id_among_rewards_is_a_reward_model(model):
    made = GRPOTrainer("m", [right, "math_answer", "o/rm", str(model)], train_dataset=ROWS)
    assert [f for f, _ in made._rewards] == [
        right, "math_answer", "model:o/rm", f"model:{model}",
    ]  # fmt: skip


def test_a_trainer_callback_is_called_and_stops_the_run(tmp_path):
    watches, steps = Watches(), []
    stop = SimpleNamespace(ask=lambda why: steps.append(why))
    (call, _) = callbacks.functions_of([watches, print], GRPOConfig(max_steps=8), updates=2)
    for number in range(3):
        call(Step(number, {"reward": number / 2, "nan": math.nan}, [], tmp_path, stop))
        assert len(steps) == number
    assert watches.heard == [(0, 0.0, 8), (2, 0.5, 8), (4, 1.0, 8)]


def test_an_environment_that_owns_the_data_needs_none(model, tmp_path, monkeypatch):
    """Each prompt of the run is a problem of its own, so that tasks differ."""
    given = {}
    monkeypatch.setattr(trainer, "train", lambda *args, **options: given.update(data=args[2]))
    args = GRPOConfig(str(tmp_path), max_steps=6, per_device_train_batch_size=8, num_generations=4)
    GRPOTrainer(str(model), args=args, environment_factory=Counts).train()
    assert given["data"] == [{"prompt": [{"role": "user", "content": ""}]}] * (
        6 * 2 * len(jax.devices())
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": object()}, "model=...\\) is a object. Give the folder or hub id"),
        ({"peft_config": object()}, "peft_config=...\\) is a object; only LoraConfig"),
        ({"train_dataset": None}, "needs a train_dataset"),
        ({"reward_funcs": [right, right]}, "reward_weights has 1 numbers, and reward_funcs 2"),
        ({"optimizers": (object(), None)}, "AdamW, by the options of GRPOConfig"),
        ({"nonsense": 1}, "no argument nonsense"),
        (
            {"reward_funcs": SimpleNamespace(forward=print, config=1)},
            "holds a SimpleNamespace. Give the reward model's folder",
        ),
        ({"callbacks": [Watches]}, r"Watches is a class. Give Watches\(\)"),
        ({"callbacks": [object()]}, "object is no function, and has none of the methods"),
        ({"callbacks": [Saves()]}, "Saves has on_save, which no run here calls"),
        ({"train_dataset": None, "environment_factory": Counts}, r"needs GRPOConfig\(max_steps"),
        ({"train_dataset": None, "environment_factory": {"a": Counts}}, "a train_dataset whose"),
    ],
)
def test_trainers_that_are_refused(arguments, words):
    known = {"model": "m", "reward_funcs": right, "train_dataset": ROWS}
    known["args"] = GRPOConfig(reward_weights=[1.0])
    with pytest.raises(ValueError, match=words):
        GRPOTrainer(**known | arguments)


# --- Rewards --------------------------------------------------------------------------------------


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


THIRD = [r"\frac{1}{3}"] * 3
THOUGHT = said(
    r"<think> Reasoning </think> The final answer is \boxed{\frac{1}{3}}",
    r"<think> Reasoning </think> The final answer is \boxed{\frac{1}{2}}",
    r"<think> Reasoning with partial answers \boxed{\frac{1}{3}} but no final answer",
)
# Of TRL's documentation: (function, its arguments, what it gives).
DOCUMENTED = {
    "accuracy": (
        lambda r: r.accuracy_reward,
        {"completions": said(r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}"),
         "solution": THIRD[:2]},
        [1.0, 0.0],
    ),
    "reasoning": (
        lambda r: r.reasoning_accuracy_reward,
        {"completions": THOUGHT, "solution": THIRD, "reasoning_delimiters": ["</think>"]},
        [1.0, 0.0, 0.0],
    ),
    "think_format": (
        lambda r: r.think_format_reward,
        {"completions": said("<think>\na.\n</think>\nb.", "<think>\na.\nb.", " <think></think>",
                             "<think><think></think>", "<think></think>")},
        [1.0, 0.0, 0.0, 0.0, 1.0],
    ),
    "cosine": (
        lambda r: r.get_cosine_scaled_reward(max_len=100),
        {"completions": said(r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", r"\boxed{1}"),
         "solution": THIRD, "completion_ids": [[1] * 50, [1] * 50, [1] * 300]},
        [0.75, -0.75, -0.5],
    ),
    "repetition": (
        lambda r: r.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
        {"completion_ids": [[1, 2, 3, 4], [5, 5, 5, 5, 5], [5]]},
        [0.0, -0.75, 0.0],
    ),
    "overlong": (
        lambda r: r.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20),
        {"completion_ids": [[1] * n for n in (80, 90, 100, 101)]},
        [0.0, -0.5, -1.0, -1.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_rewards_give_what_trl_documents(name):
    function, arguments, expected = DOCUMENTED[name]
    assert function(rewards)(**arguments, prompts=["?"] * len(expected)) == pytest.approx(expected)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_rewards_give_what_trl_gives(name):
    """Where TRL is installed, as in benchmarks."""
    theirs = pytest.importorskip("trl.rewards")
    function, arguments, expected = DOCUMENTED[name]
    assert function(theirs)(**arguments) == pytest.approx(expected)


def test_a_row_without_a_solution_has_no_reward():
    given = said("#### 3", r"\boxed{4}", "#### 3")
    assert rewards.accuracy_reward(given, ["", "4", "3"]) == [None, 1.0, 1.0]
    assert rewards.reasoning_accuracy_reward(given, ["", "4", "3"]) == [None, 0.0, 0.0]
    with pytest.raises(ValueError, match="max_penalty"):
        rewards.get_repetition_penalty_reward(max_penalty=0.5)


def test_trls_own_example_with_its_imports_changed(tmp_path, monkeypatch):
    """A reward by its name of TRL, and one with a state of its own."""
    monkeypatch.chdir(tmp_path)
    dataset = datasets.Dataset.from_list(
        [{"prompt": f"{i}+{i}=", "solution": str(2 * i)} for i in range(1, 5)]
    )
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=4)
    trainer = GRPOTrainer(
        model=str(make_model(tmp_path / "model")),
        reward_funcs=[rewards.accuracy_reward, overlong],
        args=GRPOConfig(
            "own-GRPO",
            max_steps=2,
            max_completion_length=4,
            bf16=False,
            per_device_train_batch_size=8,
            num_generations=4,
        ),
        train_dataset=dataset,
    )
    run = trainer.train()

    assert run.workdir.resolve() == (tmp_path / "own-GRPO").resolve()
    for row in run.metrics:
        assert 0 <= row["reward/accuracy_reward"] <= 1
        assert -1 <= row["reward/soft_overlong_punishment_reward"] < 0


def test_a_lora_config_becomes_options():
    """As PEFT's class holds its arguments: a set of targets, or a regular expression."""
    given = SimpleNamespace(
        r=8, lora_alpha=16, use_rslora=True, target_modules={"v_proj", "q_proj"},
        exclude_modules=None, rank_pattern={"down_proj": 4}, alpha_pattern={}, lora_dropout=0.0,
        bias="none", use_dora=False, modules_to_save=None,
    )  # fmt: skip
    found = options_of_peft(given)
    assert found == {
        "lora.rank": 8, "lora.alpha": 16.0, "lora.rank_stabilized": True,
        "lora.targets": ("q_proj", "v_proj"), "lora.exclude": (),
        "lora.rank_pattern": ("down_proj=4",), "lora.alpha_pattern": (),
    }  # fmt: skip
    given.target_modules = r".*\.q_proj"
    assert options_of_peft(given)["lora.targets"] == (r"(?:.*\.q_proj)",)
    given.modules_to_save = ["score"]  # TRL's example of a reward model, whose head learns whole
    assert options_of_peft(given, "RewardTrainer", "scalar")["lora.rank"] == 8
    with pytest.raises(ValueError, match=r"LoraConfig\(modules_to_save=\['score'\]\)"):
        options_of_peft(given)
    given.modules_to_save = None
    with pytest.raises(ValueError, match=r"RewardTrainer\(peft_config=...\) is a object"):
        options_of_peft(object(), "RewardTrainer", "scalar")
    given.lora_dropout = 0.05
    with pytest.raises(ValueError, match=r"LoraConfig\(lora_dropout=0.05\)"):
        options_of_peft(given)
    assert options_of_peft(None) == {}
    given = SimpleNamespace(r=8, lora_alpha=16, target_modules=None)
    assert options_of_peft(given)["lora.targets"] == ("q_proj", "v_proj")  # as PEFT
