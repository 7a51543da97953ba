"""TRL's configs of given completions: each argument is known, means what it says, or is refused."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import datasets
import pytest
from kill_and_resume import log_differences, state_differences
from mistakes import make_model

import grpo_jax
from grpo_jax.config import options
from grpo_jax.metrics import calibration
from grpo_jax.trl import (
    CPOTrainer,
    DPOTrainer,
    KTOTrainer,
    ORPOTrainer,
    RewardTrainer,
    SFTTrainer,
)

COMPLETED = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(1, 10)]
PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "0"} for i in range(1, 10)]
LABELLED = [row | {"label": i % 2 == 0} for i, row in enumerate(COMPLETED)]
# A trainer, its section, its function and its rows.
TRAINERS = {
    "SFT": (SFTTrainer, "sft", grpo_jax.sft, COMPLETED),
    "DPO": (DPOTrainer, "preference", grpo_jax.dpo, PAIRS),
    "KTO": (KTOTrainer, "preference", grpo_jax.dpo, LABELLED),
    "ORPO": (ORPOTrainer, "preference", grpo_jax.dpo, PAIRS),
    "CPO": (CPOTrainer, "preference", grpo_jax.dpo, PAIRS),
    "Reward": (RewardTrainer, "reward_model", grpo_jax.reward_model, PAIRS),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_argument_of_trl_is_known(name):
    """Where TRL is installed, as in benchmarks."""
    where = f"trl.experimental.{name.lower()}" if name in ("ORPO", "CPO") else "trl"
    pytest.importorskip("trl")
    trl, ours = importlib.import_module(where), TRAINERS[name][0]
    config = ours.config
    theirs = {f.name: f for f in dataclasses.fields(getattr(trl, config.__name__))}
    assert set(theirs) == set(config.fields)
    for name, field in theirs.items():
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        assert config.fields[name].default == default, name
    parameters = inspect.signature(getattr(trl, ours.__name__).__init__).parameters
    known = {*inspect.signature(ours.__init__).parameters, *ours.refused}
    assert set(parameters) <= known


def options_by(name: str):
    trainer = TRAINERS[name][0]

    def of(rows=64, held_out=0, devices=1, **arguments):
        return trainer._options_of(trainer.config(**arguments), rows, held_out, devices)

    return of


sft, dpo, kto, orpo, cpo, reward = map(options_by, TRAINERS)


def test_defaults_are_those_of_trl():
    rates = {"SFT": 2e-5, "Reward": 1e-4}
    for name, (_, section, _, _) in TRAINERS.items():
        found, rate = options_by(name)(), rates.get(name, 1e-6)
        assert set(found) <= set(options.BY_NAME)
        own = {n.split(".")[1]: x for n, x in found.items() if n.startswith(f"{section}.")}
        assert own["batch"] == 8 and own["num_epochs"] == 3.0 and own["num_steps"] == 0
        assert own["learning_rate"] == rate and own["schedule"] == "linear"
        too_long = "drop" if name == "Reward" else "truncate"
        assert own["max_tokens"] == 1024 and own["too_long"] == too_long
        assert own["checkpoint_every_steps"] == 500 and own["evaluate_every_steps"] == 0
        assert found["optim.beta2"] == 0.999 and found["model.dtype"] == "bfloat16"
        assert found["evaluation.num_problems"] == 0
        assert found.get("logging.token_metrics", False) == (name != "Reward")
    assert sft()["sft.loss_on"] == "completion" and sft()["sft.loss"] == "nll"
    assert dpo()["preference.loss"] == "sigmoid" and dpo()["preference.beta"] == 0.1


def test_values_that_become_options():
    found = sft(
        devices=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, warmup_steps=0.1,
        max_steps=50, eval_strategy="steps", eval_steps=0.5, held_out=7, save_strategy="epoch",
        completion_only_loss=False, loss_type="dft", dataset_text_field="body", bf16=False,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    assert found["sft.batch"] == 16 and found["sft.num_steps"] == 50
    assert found["sft.warmup_steps"] == 5 and found["sft.evaluate_every_steps"] == 25
    assert found["sft.checkpoint_every_steps"] == 4 and found["evaluation.num_problems"] == 7
    assert found["sft.loss_on"] == "all" and found["sft.loss"] == "dft"
    assert found["data.columns"] == ("text=body",) and found["sft.schedule"] == "cosine"
    assert found["sft.num_epochs"] == 0.0 and found["model.dtype"] == "float32"
    assert sft(assistant_only_loss=True)["sft.loss_on"] == "assistant"
    of_pairs = lambda **given: [  # noqa: E731
        dpo(**given)[f"preference.{n}"]
        for n in ("loss", "log_ratio", "nll_weight", "label_smoothing")
    ]
    assert of_pairs(loss_type="ipo") == ["ipo", "auto", 0.0, 0.0]
    assert of_pairs(loss_type="sigmoid_norm")[:2] == ["sigmoid", "mean"]
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
    assert of_pairs(**both, label_smoothing=0.1) == ["sigmoid", "auto", 0.2, 0.0]
    assert of_pairs(loss_type=["robust"], label_smoothing=0.1)[3] == 0.1
    labelled = kto(loss_type="apo_zero_unpaired", undesirable_weight=1.3, beta=0.2)
    assert labelled["preference.loss"] == "apo_zero_unpaired" and labelled["preference.beta"] == 0.2
    assert labelled["preference.undesirable_weight"] == 1.3 and kto()["preference.loss"] == "kto"
    assert orpo()["preference.loss"] == "orpo"
    centred = reward(center_rewards_coefficient=0.01)
    assert centred["reward_model.centre_coef"] == 0.01 and centred["data.overlong"] == "drop"
    assert reward()["reward_model.centre_coef"] == 0.0


def test_cpo_is_a_loss_without_a_reference():
    names = "loss", "log_ratio", "margin", "nll_weight", "label_smoothing"
    of = lambda **given: [cpo(**given)[f"preference.{n}"] for n in names]  # noqa: E731
    assert cpo()["preference.reference"] == "none"
    assert of() == ["sigmoid", "auto", 0.0, 1.0, 0.0]
    assert of(loss_type="hinge", cpo_alpha=0.2, label_smoothing=0.1)[3:] == [0.2, 0.0]
    assert of(loss_type="ipo")[:2] == ["ipo", "auto"]
    simpo = {"simpo_gamma": 1.6, "label_smoothing": 0.1}
    assert of(loss_type="simpo", **simpo) == ["sigmoid", "mean", 1.6, 1.0, 0.1]
    assert of(loss_type="alphapo", **simpo) == ["sigmoid", "mean", 1.6, 0.0, 0.1]


@pytest.mark.parametrize(
    ("of", "arguments", "words"),
    [
        (sft, {"max_lenght": 8}, "SFTConfig has no argument max_lenght. Did you mean max_length"),
        (sft, {"packing": True}, "packing=True.*In its place: sft.batch counts rows"),
        (sft, {"max_length": None}, "Give the length of the longest"),
        (sft, {"completion_only_loss": False, "assistant_only_loss": True}, "Give one of them"),
        (sft, {"loss_type": "unlikelihood"}, "loss_type='unlikelihood'.*takes 'nll', 'dft'"),
        (sft, {"report_to": "comet_ml"}, "SFTConfig.*comet_ml is not built yet"),
        (sft, {"max_grad_norm": 0.5}, "clipped to a global norm of 1"),
        (dpo, {"loss_type": "exo_pair"}, "DPOConfig.loss_type='exo_pair'. is not built yet"),
        (dpo, {"loss_type": ["sigmoid", "hinge"]}, "one loss of pairs with a weight of 1"),
        (dpo, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers, and loss_type"),
        (dpo, {"sync_ref_model": True}, "sync_ref_model=True"),
        (kto, {"loss_type": "kto_pair"}, "KTOConfig.loss_type='kto_pair'.*takes 'kto', 'apo_zero_"),
        (kto, {"train_sampling_strategy": "group_by_length"}, "takes .*='sequential'.*mismatched"),
        (orpo, {"is_encoder_decoder": True}, "is_encoder_decoder=True.*models are decoders"),
        (cpo, {"alpha": 0.25}, r"CPOConfig\(alpha=0.25\).*AlphaPO with an alpha of 0"),
        (cpo, {"loss_type": "kto_pair"}, "takes 'sigmoid', 'hinge', 'ipo', 'simpo', 'alphapo'"),
        (reward, {"activation_offloading": True}, "reward_model.microbatch"),
        (reward, {"center_reward_coefficient": 1}, "Did you mean center_rewards_coefficient"),
    ],
)  # fmt: skip
def test_what_means_something_else_is_refused(of, arguments, words):
    with pytest.raises(ValueError, match=words):
        of(**arguments)


@pytest.mark.parametrize(
    ("trainer", "arguments", "words"),
    [
        (SFTTrainer, {"model": object()}, r"SFTTrainer\(model=...\) is a object"),
        (SFTTrainer, {"formatting_func": str}, "a column `text` before"),
        (SFTTrainer, {"train_dataset": iter([])}, "which has no length"),
        (SFTTrainer, {"nonsense": 1}, "SFTTrainer has no argument nonsense"),
        (DPOTrainer, {"ref_model": object()}, "the reference is the model as training begins"),
        (DPOTrainer, {"train_dataset": None}, "DPOTrainer needs a train_dataset"),
        (KTOTrainer, {"ref_model": object()}, r"KTOTrainer\(ref_model=...\): the reference is"),
        (KTOTrainer, {"eval_dataset": iter([])}, "data.streaming of grpo_jax.dpo"),
        (ORPOTrainer, {"model_init": print}, "folder or hub id of a model as `model`"),
        (CPOTrainer, {"ref_model": object()}, "CPOTrainer has no argument ref_model"),
        (RewardTrainer, {"optimizers": (1, 2)}, "AdamW, by the options of RewardConfig"),
    ],
)
def test_trainers_that_are_refused(trainer, arguments, words):
    with pytest.raises(ValueError, match=words):
        trainer(**{"model": "m", "train_dataset": COMPLETED} | arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("trl") / "model")


# What a run by our names sets beside what all set.
OWN = {
    "KTO": {"loss": "kto"},
    "ORPO": {"loss": "orpo"},
    "CPO": {"reference": "none", "nll_weight": 1.0},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_by_their_names_is_the_run_by_ours(model, tmp_path, one_device, monkeypatch, name):
    monkeypatch.setattr(calibration, "draw", lambda *drawn: None)
    trainer, section, train, rows = TRAINERS[name]
    theirs = trainer(
        model=str(model),
        args=trainer.config(
            str(tmp_path / "theirs"), per_device_train_batch_size=3, max_steps=2, max_length=16,
            learning_rate=1e-3, bf16=False, save_strategy="no", seed=3, eval_strategy="steps",
            eval_steps=1,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:4]),
    )  # fmt: skip
    with pytest.raises(ValueError, match="after train"):
        theirs.evaluate()
    run = theirs.train(resume_from_checkpoint=None)
    export = tmp_path / "theirs" / "export"
    assert theirs.save_model() == theirs.save_model(str(tmp_path / "theirs")) == export
    copy = theirs.save_model(str(tmp_path / "copy"))
    assert {f.name for f in copy.iterdir()} == {f.name for f in export.iterdir()}
    with pytest.raises(ValueError, match=r"copy'.: that folder is not empty"):
        theirs.save_model(copy)
    assert section == trainer.metric.partition("/")[0]
    assert theirs.evaluate()[trainer.metric] == run.metrics[-1][trainer.metric]
    own = {
        "num_steps": 2, "batch": 3, "learning_rate": 1e-3, "schedule": "linear", "max_tokens": 16,
        "warmup_steps": 0, "weight_decay": 0.0, "evaluate_every_steps": 1,
        "checkpoint_every_steps": 0, "too_long": "drop" if name == "Reward" else "truncate",
        **OWN.get(name, {}),
    }  # fmt: skip
    ours = train(
        model, rows, rows[:4], workdir=tmp_path / "ours", seed=3,
        **{f"{section}.{n}": x for n, x in own.items()}, max_prompt_tokens=16,
        optim={"beta2": 0.999}, overlong="drop" if name == "Reward" else "refuse",
        logging={"token_metrics": name != "Reward", "tensorboard": False},
    )  # fmt: skip
    assert not state_differences(tmp_path / "theirs", ours.workdir)
    assert not log_differences(tmp_path / "theirs", ours.workdir)
