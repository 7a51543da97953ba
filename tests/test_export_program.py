"""`grpo_jax.export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import TINY, make_model, refusal
from safetensors.numpy import load_file

from grpo_jax import export
from grpo_jax.config import loading
from grpo_jax.learner import optim, train_state
from grpo_jax.models import policy
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.setup.model import find_model, load_params, trained_params
from grpo_jax.setup.run_folder import open_for

STEPS = {3: 0.25, 5: 0.75, 8: 0.5, 9: None}  # by step: the quality
BEST = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    """A run's folder with checkpoints of bfloat16 weights, and their float32 copies by step."""
    base = tmp_path_factory.mktemp("exports")
    config = loading.load(
        str(TINY),
        [f"--config.model.path={make_model(base / 'model')}", "--config.loop.num_steps=9"],
    )
    folder = base / "run"
    open_for(config, folder)
    read = policy.read(config.model.path)
    plain = optim.adamw(lambda step: 0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0,
                        clip_norm=0.0)  # fmt: skip
    optimizer = optim.for_params(plain, "bfloat16", master_weights=True, seed=0)
    weights = policy.load_params(read, one_device, seed=0, dtype=jnp.bfloat16)
    state = train_state.start(weights, read.model, one_device, optimizer)
    checkpoints, copies = Checkpoints(folder / "checkpoints", keep=9), {}
    for step, quality in STEPS.items():
        copy = jax.tree.map(lambda x, step=step: x + 1e-4 * step, state.opt_state.params)
        copies[step] = jax.device_get(copy)
        now = state.replace(
            opt_state=state.opt_state._replace(params=copy), num_updates=jnp.int32(2 * step)
        )
        facts = {"state": {"step": step, "update": 0}}
        checkpoints.save(now, facts, quality=quality)
    facts = {"state": {"step": 9, "update": 1}}  # in the midst of a step
    checkpoints.save(state.replace(num_updates=jnp.int32(19)), facts)
    checkpoints.close()
    return folder, copies


@pytest.fixture(scope="module")
def one_device():
    from tiny import one_device

    return one_device()


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("asked", "step"), [("best", BEST), ("8", 8), ("9", 9)])
def test_a_checkpoint_is_exported_as_it_was_trained(run, tmp_path, capsys, one_device, asked, step):
    """The float32 copy, not the bfloat16 weights."""
    folder, copies = run
    export.main(["--workdir", str(folder), "--step", asked, "--out", str(tmp_path / "out")])

    assert f"checkpoint of step {step}" in capsys.readouterr().out
    written = policy.load_params(policy.read(str(tmp_path / "out")), one_device, seed=0)
    assert same(jax.device_get(written), copies[step])
    noted = json.loads((tmp_path / "out" / "grpo_jax.json").read_text())
    assert (noted["step"], noted["updates"]) == (step, 2 * step)


def test_without_a_step_the_newest_is_exported_into_the_run(run, capsys):
    folder, _ = run
    export.main(["--workdir", str(folder), "--dtype", "bfloat16"])
    out = folder / "exports" / "step_9"
    assert str(out) in capsys.readouterr().out
    assert {x.dtype.name for x in load_file(out / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((out / "grpo_jax.json").read_text())["updates"] == 19

    _, message = refusal(export.main, ["--workdir", str(folder)])
    assert f"--out {out} holds a model already" in message
    shutil.rmtree(folder / "exports")


def test_a_step_may_stand_beside_the_runs_folder(run, one_device):
    """As generate, evaluate and load take it."""
    folder, copies = run
    found = find_model(f"{folder}@{BEST}")
    assert found.said == f"{folder}: checkpoint of step {BEST}"
    assert same(jax.device_get(trained_params(found, one_device)[0]), copies[BEST])
    found = find_model(f"{folder}@best")
    assert jax.tree.leaves(load_params(found, one_device, jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_what_cannot_be_exported_is_refused(run, tmp_path):
    folder, _ = run
    for asked, words in [
        ("7", "has no checkpoint after step 7. It has those after steps 3, 5, 8, 9."),
        ("last", "has no checkpoint after step last"),
    ]:
        status, message = refusal(export.main, ["--workdir", str(folder), "--step", asked])
        assert status == 1 and words in message
    _, message = refusal(export.main, ["--workdir", str(tmp_path)])
    assert "is not the folder of a run" in message

    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "checkpoints" / "10" / "state" / "_METADATA").write_text("{}")
    _, message = refusal(export.main, ["--workdir", str(damaged), "--step", "best"])
    assert "Checkpoint 10 in" in message and "is damaged" in message
    for number in (6, 10, 16, 18):
        shutil.rmtree(damaged / "checkpoints" / str(number))
    _, message = refusal(export.main, ["--workdir", str(damaged), "--step", "best"])
    assert "none of its checkpoints was evaluated" in message
