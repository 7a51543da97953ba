"""A run compiles the programs that its plan lists, since both ask the engine and the learner."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from hf_model import CASES, save_random_model

from grpo_jax import train
from grpo_jax.config import loading
from grpo_jax.devices import sharding, transfer
from grpo_jax.kernels import gpu_decode
from grpo_jax.kernels.gpu_decode import TritonDecode
from grpo_jax.models import lora
from grpo_jax.models.hf import config_json
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.programs import Step
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import model as model_lib

TINY = "tests/helpers/tiny_config.py"
# What JAX compiles of its own for single operations: random keys, and rows of an array.
OF_JAX = {
    *("stage", "_threefry_seed", "_threefry_fold_in", "convert_element_type"),
    *("broadcast_in_dim", "gather", "slice", "negative"),
}


@contextlib.contextmanager
def compiled() -> Iterator[set[str]]:
    """The names of the programs that are compiled, or read from a cache, while it is entered.

    With those that a run before it in this process has left.
    """
    transfer.reordering.cache_clear()
    names: set[str] = set()

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"Finished XLA compilation of jit\((.+?)\)", record.getMessage()):
                names.add(found[1])

    logger, handler = logging.getLogger("jax._src.dispatch"), Names()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)


def listed(step: Step) -> set[str]:
    return {program.call.program.__name__ for program in step.programs()}


@pytest.mark.slow
def test_a_run_compiles_what_its_plan_lists(tmp_path):
    """On eight devices, with a reference that moves, samples in evaluations, slots that shrink."""
    options = ["batch.prompts=16", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    options += ["rollout.max_tokens=24", "evaluation.num_samples=2", "loop.num_steps=1"]
    options += ["algorithm.reference_refresh_steps=1", "algorithm.top_entropy_share=0.5"]
    options += ["algorithm.kl_target=0.1", "algorithm.entropy_target=0.1"]
    overrides = [f"--config.{option}" for option in (*options, "compile_cache=False")]

    with compiled() as names:
        train.main(["--config", TINY, "--workdir", str(tmp_path), *overrides])

    config = loading.load(TINY, overrides)
    step = Step(
        config, model_lib.model_shape(config), sharding.make_mesh(2, 2, 2), Lengths.of(config)
    )
    assert names - OF_JAX == listed(step)


@pytest.mark.slow
def test_a_run_with_a_critic_compiles_what_its_plan_lists(tmp_path):
    options = ["algorithm.preset=ppo", "loop.num_steps=1", "critic.first_steps=1"]
    options += ["batch.prompts=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    overrides = [f"--config.{option}" for option in (*options, "compile_cache=False")]
    with compiled() as names:
        train.main(["--config", TINY, "--workdir", str(tmp_path), *overrides])
    config = loading.load(TINY, overrides)
    step = Step(
        config, model_lib.model_shape(config), sharding.make_mesh(2, 2, 2), Lengths.of(config)
    )
    alone = {"gradient", "optimizer_step"}  # of the critic, in a step of it alone
    assert names - OF_JAX == listed(step) and alone < names


def test_a_critic_is_planned():
    """Its programs, and its weights, moments and gradients, which are those of its own model."""
    held, names = {}, {}
    for preset in ("reinforce_pp", "ppo"):
        config = loading.load(TINY, [f"--config.algorithm.preset={preset}"])
        model = model_lib.model_shape(config)
        step = Step(config, model, tiny.one_device(), Lengths.of(config))
        held[preset] = step.held()
        names[preset] = {program.name for program in step.programs()}
    assert names["ppo"] - names["reinforce_pp"] == {
        *("score_values critic", "zero_gradient critic", "gradient critic"),
        *("optimizer_step critic", "init_state critic", "init_head"),
    }
    assert names["reinforce_pp"] < names["ppo"]
    critic = dataclasses.replace(model, head="scalar").num_params
    more = {n: held["ppo"][n] - held["reinforce_pp"][n] for n in held["ppo"]}
    assert more["weights"] == more["gradients"] == 4 * critic
    assert 8 * critic <= more["optimizer"] < 8 * critic + 64


def test_a_critics_adapters_are_planned_beside_the_policys_weights(tmp_path):
    """One copy of the frozen weights; with another body, its own."""
    save_random_model(tmp_path / "model", *CASES["llama"])
    save_random_model(tmp_path / "other", *CASES["llama"])
    held = {}
    for preset, path in (("reinforce_pp", ""), ("ppo", ""), ("ppo", "model"), ("ppo", "other")):
        options = [f"algorithm.preset={preset}", "lora.rank=2", f"model.path={tmp_path / 'model'}"]
        options += [f"critic.path={tmp_path / path}"] * bool(path)
        options += ["data.task=arithmetic", "evaluation.num_problems=0"]
        config = loading.load(TINY, [f"--config.{option}" for option in options])
        step = Step(config, model_lib.model_shape(config), tiny.one_device(), Lengths.of(config))
        held[path or preset] = step.held()
    critic = step.learner.critic.model
    number = lora.num_trained(critic)
    for path in ("ppo", "model", "other"):
        more = {n: held[path][n] - held["reinforce_pp"][n] for n in held[path]}
        body = dataclasses.replace(critic, lora=None).num_params - critic.width
        size = np.dtype(config.model.dtype).itemsize
        assert more["weights"] == 4 * number + size * body * (path == "other")
        assert more["gradients"] == 4 * number
        assert 8 * number <= more["optimizer"] < 8 * number + 64
    assert "init_adapters critic" in {program.name for program in step.programs()}


def test_later_turns_are_planned():
    """They go on in their lanes if all have one; else, and eagerly, prefixes are read again."""
    asked = ["--config.environment.tools=['math:floor']", "--config.rollout.max_tokens=24"]
    for more, names in (
        ([], {"align", "append", "put_back"}),
        (["--config.rollout.num_slots=4"], {"empty_slots", "admit", "decode"}),
        (["--config.environment.order=eager"], {"empty_slots", "admit", "decode", "compact"}),
    ):
        config = loading.load(TINY, [*asked, *more])
        step = Step(config, model_lib.model_shape(config), tiny.one_device(), Lengths.of(config))
        later = {p.name.removeprefix("later ") for p in step.programs() if "later" in p.name}
        assert later == names


def test_how_often_a_step_decodes():
    """A token a turn of the decoder's loop and lane, whatever fills the lanes."""
    for slots, waves in ((0, 1), (4, 4)):
        config = loading.load(
            TINY, ["--config.rollout.max_tokens=24", f"--config.rollout.num_slots={slots}"]
        )
        model, mesh = model_lib.model_shape(config), tiny.one_device()
        step = Step(config, model, mesh, Lengths.of(config))
        sampling = [p for p in step.programs() if p.phase == "rollout"]
        (decode,) = (p for p in sampling if p.call.program.__name__ == "decode")
        assert decode.runs == 1 and decode.loops == 24 * waves - 1
        assert not decode.read  # a kernel alone reads less than the whole cache
        turns = dataclasses.replace(step.engine.decoder, steps=4)  # as on a GPU
        engine = Engine(turns, num_slots=slots, num_read=step.config.batch.prompts)
        step.rollout = dataclasses.replace(step.rollout, engine=engine)
        programs = [p for p in step.programs() if p.phase == "rollout"]
        (decode,) = (p for p in programs if p.call.program.__name__ == "decode")
        assert decode.loops == (24 * waves - 1) / 4


def test_greedy_completions_are_sampled_too():
    """One of each prompt, for a baseline that reads their rewards."""
    remax = ["--config.algorithm.baseline=greedy", "--config.algorithm.scale_by=none"]
    config = loading.load(TINY, [*remax, "--config.rollout.max_tokens=24"])
    model, mesh = model_lib.model_shape(config), tiny.one_device()
    sampling = [p for p in Step(config, model, mesh, Lengths.of(config)).programs()
                if p.phase == "rollout"]  # fmt: skip
    of = {p.name: p for p in sampling if p.call.program.__name__ == "decode"}
    assert set(of) == {"decode", "greedy decode"}
    assert of["greedy decode"].loops == of["decode"].loops == 23
    temperature, *_, slots = of["greedy decode"].call.args[1:]
    assert temperature is None and slots.live_RW.shape == (config.batch.prompts, 1)


def test_what_a_kernel_reads_of_the_cache():
    """A completion's first token is sampled from its prompt: the others read what is before."""
    config = loading.load(TINY, ["--config.rollout.max_tokens=200"])
    model, mesh = model_lib.model_shape(config), tiny.one_device()
    step = Step(config, model, mesh, Lengths.of(config))
    kind = object.__new__(TritonDecode)
    step.engine = SimpleNamespace(decoder=SimpleNamespace(kv_cache=kind))
    share = gpu_decode.share_read(np.full(16, 199), 199, 16, 200)
    found = step._read_of_cache(199, 16)
    assert found and set(found.values()) == {share}


@pytest.mark.parametrize(
    ("options", "without"),
    [
        (["algorithm.kl_coef=0.0", "algorithm.num_iterations=1", "batch.minibatches=1"], "score"),
        (["model.path=somewhere"], "init_params"),
        (["rollout.compact=False"], "compact"),
    ],
)
def test_what_a_run_does_not_need_is_not_listed(options, without):
    all_of_it = loading.load(TINY, ["--config.rollout.max_tokens=24"])
    config = loading.load(
        TINY, ["--config.rollout.max_tokens=24", *(f"--config.{o}" for o in options)]
    )
    model, mesh = model_lib.model_shape(all_of_it), tiny.one_device()
    with_it, without_it = (listed(Step(c, model, mesh, Lengths.of(c))) for c in (all_of_it, config))
    assert with_it - without_it == {without}


@pytest.mark.parametrize("base", ["auto", "int8", "nf4"])
def test_adapters_alone_have_gradients_and_moments(base):
    """One base, which is the reference too; all that its programs read is listed."""
    options = ["lora.rank=4", f"lora.base_dtype={base}", "model.dtype=bfloat16"]
    config = loading.load(TINY, [f"--config.{option}" for option in options])
    model = model_lib.model_shape(config)
    step = Step(config, model, tiny.one_device(), Lengths.of(config))

    held = step.held()

    learn, kernels = lora.num_trained(model), 32 * (32 + 2 * 16 + 32 + 3 * 48)
    assert held["reference"] == 0 and held["gradients"] - 4 * learn < 100
    assert 8 * learn <= held["optimizer"] < 8 * learn + 20
    scales = 4 * (32 + 2 * 16 + 32 + 2 * 48 + 32)
    # Of q, k, v, o, gate, up and down: 33 bytes a block, 1032 of levels, of one group and a mean.
    nf4 = 33 * (16 + 8 + 8 + 16 + 3 * 24) + 7 * 1032
    saved = {"auto": 0, "int8": kernels - scales, "nf4": 2 * kernels - nf4}
    of_base = 2 * model.num_params - saved[base]
    assert held["weights"] == 4 * learn + of_base
    assert {"init_adapters", "gradient", "publish_layer"} <= listed(step)


def test_reward_models_are_planned(tmp_path):
    """Their weights, the head's in float32, and their programs, of which each knows its model."""
    sizes = {}
    for name, width in (("one", 32), ("two", 64)):
        (tmp_path / name).mkdir()
        how = {"family": "qwen2", "qk_norm": "", "qkv_bias": True, "width": width}
        model = dataclasses.replace(tiny.MODEL, **how, head="scalar")
        hf = config_json.hf_config(model, bos_id=None, eos_ids=(1,), pad_id=0)
        (tmp_path / name / "config.json").write_text(json.dumps(hf))
        sizes[name] = 2 * model.num_params + 2 * width  # two bytes each, four in the head
    options = ["--config.model.dtype=bfloat16"]
    named = [f"model:{tmp_path / 'one'}", f"model:{tmp_path / 'two'}", "answer_format"]
    judged = [f"--config.rewards.names={named}", "--config.rewards.weights=(1.0,1.0,0.5)"]
    held, names, beside = {}, {}, {}
    for key, more in (("plain", []), ("judged", judged)):
        config = loading.load(TINY, options + more)
        shape = model_lib.model_shape(config)
        step = Step(config, shape, tiny.one_device(), Lengths.of(config))
        held[key], programs = step.held(), step.programs()
        names[key] = {program.name for program in programs}
        beside[key] = {program.name: program.beside for program in programs}
    assert names["judged"] - names["plain"] == {
        "score_values reward one", "score_values reward two"
    }  # fmt: skip
    weights = sum(sizes.values())
    assert held["judged"].pop("reward models") == weights and held["judged"] == held["plain"]
    assert beside["judged"]["decode"] - beside["plain"]["decode"] == weights
    one, two = (beside["judged"][f"score_values reward {name}"] for name in sizes)
    assert two - one == sizes["one"] - sizes["two"]  # what is not the program's own argument
