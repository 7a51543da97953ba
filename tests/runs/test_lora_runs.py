"""Runs whose adapters learn: continued exactly, exported, read by other programs, refused."""

from __future__ import annotations

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_model import in_nf4
from kill_and_resume import final_state, log_differences, state_differences
from mistakes import TINY, make_model, refusal
from safetensors.numpy import load_file, save_file

from grpo_jax import export, sft, train
from grpo_jax.devices import sharding
from grpo_jax.models import lora, policy
from grpo_jax.models.hf import peft
from grpo_jax.setup.model import find_model, load_params

LORA = ["--config.lora.rank=4", "--config.lora.alpha=8"]
FEW = ["--config.logging.tensorboard=False", "--config.evaluation.num_problems=0"]


def argv(folder, *more: str) -> list[str]:
    return ["--config", str(TINY), "--workdir", str(folder), *FEW, *more]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "base")


def one() -> jax.sharding.Mesh:
    return sharding.make_mesh(devices=jax.devices()[:1])


def same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_a_run_goes_on_exactly_and_its_adapters_leave_it(tmp_path, model, one_device, capsys):
    """Stopped after two steps of four; then its checkpoint, export and adapter are one policy."""
    options = [*LORA, f"--config.model.path={model}", "--config.lora.exclude=k_proj"]
    train.main(argv(tmp_path / "whole", *options))
    told = "LoRA: rank 4 on attention/o, attention/q, attention/v, "
    assert told in capsys.readouterr().out
    train.main(argv(tmp_path / "run", *options, "--config.loop.num_steps=2"))
    train.main(argv(tmp_path / "run", *options))

    assert not state_differences(tmp_path / "whole", tmp_path / "run")
    assert not log_differences(tmp_path / "whole", tmp_path / "run")
    # A checkpoint has adapters, their moments and the counters alone.
    folder = tmp_path / "run"
    learned = sum(x.nbytes for name, x in final_state(folder).items())
    base = policy.read(str(model))
    assert learned < 3 * 4 * lora.num_trained(find_model(f"{folder}@4").policy.model) + 100
    assert not [n for n in final_state(folder) if "kernel" in n or "embed" in n]

    # What the run exports is the base with the adapter, which stands beside it.
    weights = load_params(find_model(f"{folder}@4"), one(), jnp.float32)
    merged = lora.merged(weights, jnp.float32)
    exported = policy.load_params(policy.read(str(folder / "export")), one(), 0)
    same(exported, merged)
    before = policy.load_params(base, one(), 0)
    change = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, exported)
    assert change["layers"]["attention"]["q"]["kernel"] > 1e-6
    assert change["layers"]["attention"]["k"]["kernel"] == change["embed"]["embedding"] == 0
    kept = json.loads((folder / "export" / "adapter" / peft.CONFIG).read_text())
    assert kept["base_model_name_or_path"] == str(model) and kept["r"] == 4
    assert "k_proj" not in kept["target_modules"]

    # So does `export` of a checkpoint.
    export.main(["--workdir", str(folder), "--step", "2", "--out", str(tmp_path / "two")])
    two = lora.merged(load_params(find_model(f"{folder}@2"), one(), jnp.float32), jnp.float32)
    same(policy.load_params(policy.read(str(tmp_path / "two")), one(), 0), two)

    # Another run begins with that adapter: the KL to it is 0, and another base is refused.
    given = [f"--config.model.path={model}", f"--config.lora.path={tmp_path / 'two' / 'adapter'}"]
    given += ["--config.batch.minibatches=1", "--config.algorithm.num_iterations=1"]
    train.main(argv(tmp_path / "next", *given, "--config.loop.num_steps=1"))
    rows = [json.loads(x) for x in (tmp_path / "next" / "metrics.jsonl").read_text().splitlines()]
    assert abs(rows[0]["policy/kl"]) < 1e-10  # of the bare base it would be 1e-7 and more
    shutil.rmtree(tmp_path / "two")  # the run has a copy
    train.main(argv(tmp_path / "next", *given, "--config.loop.num_steps=2"))

    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    _, told = refusal(train.main, argv(folder, *options, "--config.loop.num_steps=5"))
    shutil.copyfile(other / "model.safetensors", model / "model.safetensors")
    assert "read something else: weights of the model" in told


def test_a_base_in_8_bits_learns_merged_or_not(tmp_path, one_device):
    """After the supervised start of a new model, all of whose weights learn."""
    codes = [*LORA, "--config.lora.base_dtype=int8", "--config.loop.num_steps=2"]
    train.main(argv(tmp_path / "run", *codes, "--config.lora.merge_for_rollout=True"))

    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["policy/loss"]) for row in rows)
    whole = final_state(tmp_path / "run" / "bootstrap")
    assert any("kernel" in name for name in whole)
    # The export puts the adapters on the weights that the 8 bits stand for.
    start = policy.load_params(
        policy.read(str(tmp_path / "run" / "bootstrap" / "export")), one(), 0
    )
    exported = policy.load_params(policy.read(str(tmp_path / "run" / "export")), one(), 0)
    found = find_model(f"{tmp_path / 'run'}@2")
    state = load_params(found, one(), jnp.float32)["layers"]["mlp"]["up"]["kernel"]
    low = np.einsum("lir,lro->lio", state.a * state.scaling[:, None], state.b)
    want = start["layers"]["mlp"]["up"]["kernel"] + low
    np.testing.assert_allclose(exported["layers"]["mlp"]["up"]["kernel"], want, atol=1e-6)


def test_a_base_in_files_of_bitsandbytes_goes_on_exactly(tmp_path, model, one_device):
    """The codes in its files are the base, and the export has what they stand for."""
    source = tmp_path / "base-bnb-4bit"
    shutil.copytree(model, source)
    values = in_nf4(source)
    options = [*LORA, f"--config.model.path={source}"]
    train.main(argv(tmp_path / "whole", *options, "--config.loop.num_steps=2"))
    train.main(argv(tmp_path / "run", *options, "--config.loop.num_steps=1"))
    train.main(argv(tmp_path / "run", *options, "--config.loop.num_steps=2"))

    assert not state_differences(tmp_path / "whole", tmp_path / "run")
    assert not log_differences(tmp_path / "whole", tmp_path / "run")
    export = tmp_path / "run" / "export"
    exported = policy.load_params(policy.read(str(export)), one(), 0)["layers"]["mlp"]["down"]
    found = load_params(find_model(f"{tmp_path / 'run'}@2"), one(), jnp.float32)
    state = found["layers"]["mlp"]["down"]["kernel"]
    low = np.einsum("ir,r,ro->io", state.a[0], state.scaling[0], state.b[0])
    want = values["model.layers.0.mlp.down_proj.weight"].T + low
    np.testing.assert_allclose(exported["kernel"][0], want, atol=1e-6)
    assert np.abs(low).max() > 1e-6
    _, told = refusal(train.main, argv(tmp_path / "all", *options, "--config.lora.rank=0"))
    assert "has its kernels in NF4 (bitsandbytes), and lora.rank = 0 trains all" in told


def test_supervised_training_has_adapters(tmp_path, model, one_device):
    options = [*LORA, f"--config.model.path={model}"]
    sft.main(argv(tmp_path / "sft", *options))

    names = [name for name in final_state(tmp_path / "sft") if "params" in name]
    assert names and all(re.search(r"lora_[ab]$", name) for name in names)
    assert (tmp_path / "sft" / "export" / "adapter" / peft.WEIGHTS).exists()
    _, told = refusal(sft.main, argv(tmp_path / "new", *LORA))
    assert "makes a new model, whose weights say nothing yet" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config.lora.targets=lm_head"], "lm_head, the head"),
        (["--config.lora.targets=c_attn"], "'c_attn' names no dense layer"),
        (["--config.lora.rank_pattern=q_proj"], 'is not "pattern=number"'),
        (["--config.lora.path=/nowhere"], "lora.path = '/nowhere'"),
        (["--config.model.offload_reference=True"], "the reference of low-rank adapters"),
        (["--config.lora.rank=0", "--config.lora.base_dtype=int8"], "goes with low-rank adapters"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(
    tmp_path, model, options, message, one_device
):
    asked = [*LORA, f"--config.model.path={model}", *options]
    status, told = refusal(train.main, argv(tmp_path / "run", *asked))
    assert status and message in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
