"""The same completions and the same update on any mesh of eight devices and on one device alone."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

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
    scorer, optimizer = Scorer(tiny.MODEL, mesh, Sampling()), optax.sgd(RATE, momentum=0.9)
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
    return state, metrics["policy/loss"]


@pytest.fixture(scope="module")
def alone():
    mesh = tiny.one_device()
    rollouts = generate(mesh)
    state, loss = jax.device_get(train(mesh, rollouts))
    return rollouts, (state.params, loss)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_mesh_changes_nothing(alone, shape):
    rollouts, (want_params, want_loss) = alone
    mesh = sharding.make_mesh(*shape)
    assert mesh.devices.shape == shape

    got = generate(mesh)
    state, loss = train(mesh, rollouts)
    params = state.params

    for name in ("completion_PGC", "length_PG", "stopped_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(rollouts, name), err_msg=name)
    np.testing.assert_allclose(got.logp_PGC, rollouts.logp_PGC, atol=1e-5, rtol=0)
    np.testing.assert_allclose(loss, want_loss, atol=1e-5, rtol=0)
    kernel = params["layers"]["mlp"]["up"]["kernel"]  # [L, D, F]: fsdp splits D, tensor F
    assert kernel.addressable_shards[0].data.shape == (2, 32 // shape[1], 48 // shape[2])
    moment = state.opt_state[0].trace["layers"]["mlp"]["up"]["kernel"]  # over data shards, too
    assert moment.addressable_shards[0].data.size * 8 == moment.size
    before = tiny.params()
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, want_params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * RATE, rtol=1e-6),
        jax.device_get(params),
        want_params,
    )


def test_slots_are_refilled_and_compacted_in_each_shard():
    """Fourteen prompts on two devices, eight completions at once; and all at once, compacted."""
    prompts, stops = PROMPTS + PROMPTS[:6], (tiny.STOP, 4, 17)
    two = Mesh(np.array(jax.devices()[:2]).reshape(2, 1, 1), sharding.MESH_AXES)
    key, got, shapes = keys.key_for(0, "rollout", 0), [], []
    for mesh, num_slots in ((tiny.one_device(), 0), (two, 8), (two, 0)):
        decoder = Decoder(tiny.MODEL, mesh, Sampling(), stops, 16)
        engine = Engine(decoder, num_slots=num_slots, compact=num_slots == 0 and mesh is two)
        params = engine.publish(place(mesh))
        got.append(engine.generate(params, prompts, group=4, key=key, temperature=1.0))
        shapes.append({shape[:2] for shape in engine.shapes})
    assert shapes == [{(14, 4)}, {(1, 4)}, {(7, 4), (14, 1)}]
    for rollouts in got[1:]:
        for name in ("completion_PGC", "length_PG", "stopped_PG"):
            np.testing.assert_array_equal(getattr(rollouts, name), getattr(got[0], name), name)
        np.testing.assert_allclose(rollouts.logp_PGC, got[0].logp_PGC, atol=1e-5, rtol=0)


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
