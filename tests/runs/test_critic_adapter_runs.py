"""Runs whose policy and critic learn by adapters: continued exactly, exported, begun with again."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kill_and_resume import final_state, log_differences, state_differences
from mistakes import TINY, make_model, refusal

from grpo_jax import train
from grpo_jax.config import loading
from grpo_jax.devices import sharding
from grpo_jax.models import lora
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.hf import peft, targets
from grpo_jax.models.hf.targets import Spec
from grpo_jax.setup import critic as critic_lib
from grpo_jax.setup import lora as lora_lib
from grpo_jax.structs import TrainState

PPO = [
    "--config.algorithm.preset=ppo",
    "--config.algorithm.num_iterations=1",
    "--config.lora.rank=4",
    "--config.critic.first_steps=1",
    "--config.critic.learning_rate=1e-2",
    "--config.logging.tensorboard=False",
    "--config.evaluation.num_problems=0",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, a copy of it, and an adapter of a reward model beside it."""
    root = tmp_path_factory.mktemp("critics")
    shutil.copytree(make_model(root / "model"), root / "copy")
    model = dataclasses.replace(policy_lib.read(str(root / "model")).model, head="scalar")
    model = dataclasses.replace(model, lora=targets.lora_of(model, Spec(3, 6.0)))
    draws = np.random.default_rng(0)
    shapes = lora.trained_shapes(model)
    made = jax.tree.map(lambda x: jnp.float32(draws.normal(0, 0.1, x.shape)), shapes)
    peft.save(root / "adapter", made, model, base=str(root / "model"))
    return root


def argv(root, folder: str, *more: str) -> list[str]:
    where = ["--config", str(TINY), "--workdir", str(root / folder)]
    return [*where, *PPO, f"--config.model.path={root / 'model'}", *more]


def test_a_run_goes_on_exactly_and_leaves_its_critic(root, one_device):
    """The critic begins with a reward model's adapter, whose folder is gone when it goes on."""
    adapter = shutil.copytree(root / "adapter", root / "given")
    given = f"--config.critic.path={adapter}"
    train.main(argv(root, "whole", given))
    train.main(argv(root, "run", given, "--config.loop.num_steps=2"))
    shutil.rmtree(adapter)
    train.main(argv(root, "run", given))
    assert not state_differences(root / "whole", root / "run")
    assert not log_differences(root / "whole", root / "run")

    state = final_state(root / "run")
    ours = {name for name in state if name.startswith("/critic/")}
    assert any("score" in name and "mu" in name for name in ours)
    learned = {"lora_a", "lora_b", "kernel"}
    assert {name.rpartition("/")[2] for name in ours if "/params/" in name} == learned
    size = sum(state[name].nbytes for name in ours)
    # The export has the critic of the last step, and a run may begin with it.
    critic, states, _ = begun(root, root / "run" / "export" / "critic")
    assert size < 3 * 4 * lora.num_trained(critic.model) + 100
    nothing = TrainState({}, (), jnp.int32(0), jnp.int32(0))
    params = jax.device_get(states.first(nothing).critic.params)
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = "/critic/params/" + jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(value, state[name], name)


def begun(root, path, *more: str):
    """The critic of a run that begins with a folder, its states, and whether it shares weights."""
    given = [f"--config.critic.path={path}"] * bool(path)
    config = loading.load(str(TINY), argv(root, "none", *given, *more)[4:])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    policy = lora_lib.adapted_policy(policy_lib.read(config.model.path), config)
    frozen = lora_lib.frozen_params(policy, mesh, config.model.dtype)
    critic = critic_lib.read(config, policy)
    how = config, critic, mesh, optax.adam(1e-3), policy, frozen
    states = critic_lib.states(*how, root / "none")
    if states.frozen is None:
        return critic, states, None
    policys = {id(x) for x in jax.tree.leaves(frozen)}
    return critic, states, {id(x) in policys for x in jax.tree.leaves(states.frozen)}


def test_the_policys_weights_are_the_critics_where_they_are_the_same(root):
    """Of one folder there is one copy, under adapters of another rank too; of another its own."""
    ranks = lambda critic: {r for a in critic.model.lora.adapters for r in a.ranks}  # noqa: E731
    for path, rank in (("", 4), ("model", 4), ("adapter", 3), ("copy", 4)):
        critic, states, shares = begun(root, path and root / path)
        assert ranks(critic) == {rank} and shares == {path != "copy"}, path
        assert "score" not in states.frozen and "head" not in states.frozen
        assert critic.has_new_head
    critic, _, shares = begun(root, "", "--config.critic.lora_rank=2")
    assert ranks(critic) == {2} and shares == {True}
    critic, _, shares = begun(root, "", "--config.critic.lora_rank=0")
    assert critic.model.lora is None and shares is None
    alone = ["--config.lora.rank=0", "--config.critic.lora_rank=5", "--config.lora.base_dtype=int8"]
    critic, _, shares = begun(root, "", *alone)
    assert ranks(critic) == {5} and critic.model.lora.base == "int8" and shares == {False}


REFUSALS = {
    "an adapter has a rank": (
        ["--config.critic.path=ADAPTER", "--config.critic.lora_rank=8"],
        ("critic.lora_rank = 8", "holds adapters", "Leave critic.lora_rank at -1"),
    ),
    "no critic": (
        [
            *("--config.algorithm.preset=grpo", "--config.critic.lora_rank=8"),
            *("--config.critic.first_steps=0", "--config.critic.learning_rate=1e-5"),
        ],
        ("critic.lora_rank = 8 is of a critic",),
    ),
    "no such layer": (
        ["--config.lora.rank=0", "--config.critic.lora_rank=8", "--config.lora.targets=none_proj"],
        ("'none_proj' names no dense layer",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused(root, name, one_device):
    options, words = REFUSALS[name]
    options = [option.replace("ADAPTER", str(root / "adapter")) for option in options]
    status, said = refusal(train.main, argv(root, "refused", *options))
    assert status == 1 and all(word in said for word in words), said
    assert not (root / "refused" / "metrics.jsonl").exists()
