"""The same completions and the same update on any mesh of eight devices and on one device alone."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from grpo_jax import keys, sharding
from grpo_jax.algorithm import losses
from grpo_jax.algorithm.update import Scorer, make_prepare, make_update, start
from grpo_jax.models import transformer
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Sampling

pytestmark = pytest.mark.usefixtures("quick_compiling")

PROMPTS = [[7], [5, 6, 7, 8], [30, 2], [11, 12, 13], [3, 3], [39], [9, 8, 7], [20]]
GROUP, LIMIT, RATE = 2, 6, 0.5
MESHES = [(8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2)]


def place(mesh):
    """The tiny model's parameters where this mesh wants them."""
    axes = transformer.logical_axes(tiny.MODEL)
    params = tiny.params()
    return jax.device_put(params, sharding.tree_shardings(mesh, axes, params))


def generate(mesh):
    engine = Engine(Decoder(tiny.MODEL, mesh, Sampling(), (tiny.STOP,), LIMIT), compact=False)
    key = keys.key_for(0, "rollout", 0)
    return engine.generate(
        engine.publish(place(mesh)), PROMPTS, group=GROUP, key=key, temperature=1.0
    )


def train(mesh, rollouts):
    """Loss, and the parameters after one step of plain gradient descent."""
    scorer, optimizer = Scorer(tiny.MODEL, mesh, Sampling()), optax.sgd(RATE)
    reward_PG = np.random.default_rng(1).uniform(size=(len(PROMPTS), GROUP)).astype(np.float32)
    reference = jax.tree.map(lambda x: x * 1.1, place(mesh))
    prepare = make_prepare(scorer, by_std=True, mask_truncated=False, with_old=True)
    experience = prepare(place(mesh), reference, *sharding.shard_rows(mesh, (rollouts, reward_PG)))
    update = make_update(
        scorer,
        losses.Objective(kl_coef=0.1, entropy_coef=0.01),
        optimizer,
        num_minibatches=1,
    )
    state = start(place(mesh), tiny.MODEL, mesh, optimizer)
    state, metrics = update(state, experience, 0)
    return state.params, metrics["policy/loss"]


@pytest.fixture(scope="module")
def alone():
    mesh = tiny.one_device()
    rollouts = generate(mesh)
    return rollouts, jax.device_get(train(mesh, rollouts))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_mesh_changes_nothing(alone, shape):
    rollouts, (want_params, want_loss) = alone
    mesh = sharding.make_mesh(*shape)
    assert mesh.devices.shape == shape

    got = generate(mesh)
    params, loss = train(mesh, rollouts)

    for name in ("completion_PGC", "length_PG", "stopped_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(rollouts, name), err_msg=name)
    np.testing.assert_allclose(got.logp_PGC, rollouts.logp_PGC, atol=1e-5, rtol=0)
    np.testing.assert_allclose(loss, want_loss, atol=1e-5, rtol=0)
    kernel = params["layers"]["mlp"]["up"]["kernel"]  # [L, D, F]: fsdp splits D, tensor F
    assert kernel.addressable_shards[0].data.shape == (2, 32 // shape[1], 48 // shape[2])
    before = tiny.params()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, want_params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * RATE, rtol=1e-6),
        jax.device_get(params),
        want_params,
    )


def test_one_size_may_be_the_rest():
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.make_mesh(2, -1, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.num_row_shards(sharding.make_mesh(2, 2, 2)) == 4


@pytest.mark.parametrize("shape", [(3, 1, 1), (4, 1, 1), (16, 1, 1), (-1, 3, 1), (-1, 16, 1)])
def test_a_mesh_of_other_devices_than_there_are_is_refused(shape):
    with pytest.raises(ValueError, match=r"mesh\.data = .* the 8 devices"):
        sharding.make_mesh(*shape)


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = sharding.make_mesh(2, 2, 2)
    spec = lambda *args: sharding.sharding_of(mesh, *args).spec  # noqa: E731

    assert spec(("embed", "heads"), (6, 8)) == PartitionSpec("fsdp", "tensor")
    assert spec(("embed", "heads"), (6, 7)) == PartitionSpec("fsdp", None)
    assert spec(("rows", None), (4, 8)) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("rows", None), (6, 8)) == PartitionSpec("data", None)  # 6 is no multiple of 4
    assert spec(("rows", None), (3, 8)) == PartitionSpec(None, None)
