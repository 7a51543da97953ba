"""What scripts of TRL do around a trainer: their imports, the model's arguments, and the end."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import transformers
from mistakes import make_model

from grpo_jax import trl
from grpo_jax.trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, base
from grpo_jax.trl.config import options_of

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("trl") / "model")


def test_the_names_of_the_module():
    assert {"GRPOTrainer", "SFTConfig", "KTOTrainer"} <= set(dir(trl))
    assert not hasattr(trl, "nonsense")
    for name, use in (("RLOOTrainer", "preset='rloo'"), ("GKDConfig", "teacher='DIR'")):
        with pytest.raises(ImportError, match=f"grpo_jax.trl has no {name}. Use .*{use}"):
            importlib.import_module("grpo_jax.trl").__getattr__(name)
    with pytest.raises(ImportError, match=r"no NashMDTrainer. It has CPOConfig, .*SFTTrainer"):
        exec("from grpo_jax.trl import NashMDTrainer")


def test_model_init_kwargs_of_trls_own_scripts():
    """What `trl/scripts/sft.py` gives where no argument is given."""
    given = {"revision": "main", "trust_remote_code": False, "attn_implementation": None}
    found = options_of(GRPOConfig(model_init_kwargs={**given, "dtype": None}), 64, 1)
    assert found["model.param_dtype"] == "float32"
    for name, value in (("revision", "v2"), ("trust_remote_code", True), ("device_map", "auto")):
        with pytest.raises(ValueError, match=f"has {name}: only `dtype` is read"):
            options_of(GRPOConfig(model_init_kwargs={**given, name: value}), 64, 1)


def trainer(model, **given):
    return SFTTrainer(str(model), SFTConfig("runs/s"), ROWS, **given)


def test_the_models_own_tokenizer_may_be_given(model, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token  # as scripts do; rows are packed here
    trainer(model, processing_class=tokenizer)
    for change in ({"chat_template": "{{ messages }}"}, {"eos_token": "+"}):
        other = transformers.AutoTokenizer.from_pretrained(model)
        for name, value in change.items():
            setattr(other, name, value)
        with pytest.raises(ValueError, match=r"processing_class=.*tokenizer of the model's folder"):
            trainer(model, processing_class=other)
    tokenizer.save_pretrained(tmp_path)
    elsewhere = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="processing_class="):
        trainer(model, processing_class=elsewhere)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("push_to_hub", "SFTTrainer has no push_to_hub: upload the folder that save_model"),
        ("state", "run.metrics"),
        ("add_callback", "callbacks="),
        ("nonsense", "SFTTrainer has no attribute 'nonsense'"),
    ],
)
def test_what_a_trainer_lacks_is_told_with_its_like(model, name, words):
    with pytest.raises(AttributeError, match=words):
        getattr(trainer(model), name)
    assert not hasattr(trainer(model), name)


def test_a_loaded_model_is_told_by_its_name():
    class Qwen2ForCausalLM:
        name_or_path = "Qwen/Qwen2.5-0.5B"

    with pytest.raises(ValueError, match=r"a Qwen2ForCausalLM. .* here 'Qwen/Qwen2.5-0.5B': JAX"):
        SFTTrainer(Qwen2ForCausalLM(), SFTConfig("runs/s"), ROWS)


@pytest.mark.parametrize("kind", [SFTTrainer, GRPOTrainer])
def test_a_checkpoint_to_resume_from_is_refused(model, kind):
    made = kind(model=str(model), args=kind.config("runs/s"), train_dataset=ROWS)
    with pytest.raises(ValueError, match=r"from the newest checkpoint .*model='RUN@STEP'"):
        made.train(resume_from_checkpoint="runs/s/checkpoint-5")


def test_a_cpus_cores_are_no_factor_of_batch_sizes(monkeypatch):
    """TRL counts processes there; JAX has eight CPU devices in these tests."""
    found = importlib.util.find_spec
    for plugins in (set(), {"jax_plugins"}):  # none, and some, so that JAX is asked

        def with_them(name, *rest, plugins=plugins):
            return True if name in plugins else found(name, *rest)

        monkeypatch.setattr(base.importlib.util, "find_spec", with_them)
        assert base.num_devices() == 1
