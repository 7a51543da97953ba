"""The same completions and the same update on any mesh of eight devices and on one device alone."""

from __future__ import annotations

import dataclasses

import jax
import made_once
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from grpo_jax import keys
from grpo_jax.algorithm import losses
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.train_state import start, state_like
from grpo_jax.learner.update import make_update
from grpo_jax.models import parameters
from grpo_jax.models.lora import Weights
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Experience, Sampling

PROMPTS = [[7], [5, 6, 7, 8], [30, 2], [11, 12, 13], [3, 3], [39], [9, 8, 7], [20]]
GROUP, LIMIT, RATE, STEPS = 2, 6, 0.5, 5
# data, fsdp, tensor, sequence
MESHES = [(8, 1, 1, 1), (2, 4, 1, 1), (1, 2, 4, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 1, 4)]


def place(mesh, model=tiny.MODEL):
    """A tiny model's parameters where this mesh wants them."""
    axes = parameters.logical_axes(model)
    params = tiny.params(model=model)
    return jax.device_put(params, sharding.tree_shardings(mesh, axes, params))


def steps(mesh, model=tiny.MODEL, number=STEPS, with_old=True, terms=None, **scoring):
    """Rollouts and loss of each of some GRPO steps, and the state after them.

    The optimizer is plain descent: one like Adam makes whole steps of what is rounding.
    """
    decoder = Decoder(model, mesh, Sampling(), (tiny.STOP,), LIMIT)
    engine = made_once.engine(decoder, compact=False)
    scorer, optimizer = Scorer(model, mesh, Sampling(), **scoring), optax.sgd(RATE, 0.9)
    reference, objective = None, losses.Objective(entropy_coef=0.01)
    if with_old:
        reference = jax.tree.map(lambda x: x * 1.1, place(mesh, model))
        objective = losses.Objective(kl_coef=0.1, entropy_coef=0.01, **terms or {})
    scoring = dataclasses.replace(scorer, scan_layers=True)  # as it has them in any case
    how = {"mask_truncated": False, "with_old": with_old}
    prepare = made_once.prepare(scoring, AdvantageOptions(), **how)
    update = make_update(scorer, PolicyLoss(objective), optimizer, num_minibatches=1)
    state = start(place(mesh, model), model, mesh, optimizer)
    rollouts, loss = [], []
    for n in range(number):
        params, key = engine.publish(state.params), keys.key_for(0, "rollout", n)
        rollouts.append(engine.generate(params, PROMPTS, group=GROUP, key=key, temperature=1.0))
        action_PGC = np.arange(LIMIT) < rollouts[-1].length_PG[..., None]
        reward_PG = (action_PGC * (rollouts[-1].completion_PGC % 3)).sum(-1).astype(np.float32)
        placed = transfer.shard_rows(mesh, (rollouts[-1], reward_PG))
        state, metrics = update(
            state, prepare(prepare.log_probs(state.params, reference, placed[0]), placed[1]), 0
        )
        loss.append(float(metrics["policy/loss"]))
    return rollouts, loss, state


@pytest.fixture(scope="module")
def alone():
    rollouts, loss, state = steps(tiny.one_device())
    return rollouts, loss, jax.device_get(state.params)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_mesh_changes_nothing(alone, shape):
    wanted, want_loss, want_params = alone
    mesh = sharding.make_mesh(*shape)
    assert mesh.devices.shape == (*shape[:2], shape[3], shape[2])

    rollouts, loss, state = steps(mesh)
    params = state.params

    assert_same_rollouts(rollouts, wanted)
    np.testing.assert_allclose(loss, want_loss, atol=1e-5, rtol=0)
    kernel = params["layers"]["mlp"]["up"]["kernel"]  # [L, D, F]: fsdp splits D, tensor F
    assert kernel.addressable_shards[0].data.shape == (2, 32 // shape[1], 48 // shape[2])
    moment = state.opt_state[0].trace["layers"]["mlp"]["up"]["kernel"]  # over all devices
    assert moment.addressable_shards[0].data.size * 8 == moment.size
    assert_moved_alike(params, want_params, tiny.MODEL)


def assert_same_rollouts(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        for name in ("completion_PGC", "length_PG", "stopped_PG"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        np.testing.assert_allclose(got.logp_PGC, want.logp_PGC, atol=2e-5, rtol=0)


def assert_moved_alike(params, want_params, model):
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), tiny.params(model=model), want_params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5),
        jax.device_get(params),
        want_params,
    )


# A surrogate of whole completions, whose tokens lie on devices of their own with a "sequence" axis.
WHOLE = {"ratio": "sequence", "normalizer": "sequence", "max_sequence_drift": 1e-3}


@pytest.fixture(scope="module")
def alone_by_completion():
    _, loss, state = steps(tiny.one_device(), number=2, terms=WHOLE)
    return loss, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("shape", "scan_layers"), [((2, 2, 2, 1), False), ((1, 2, 2, 2), True)], ids=str
)
def test_a_mesh_changes_nothing_of_an_objective_of_whole_completions(
    alone_by_completion, shape, scan_layers
):
    """With layers one by one, and in a loop as on one device."""
    want_loss, want_params = alone_by_completion

    mesh = sharding.make_mesh(*shape)
    _, loss, state = steps(mesh, number=2, terms=WHOLE, scan_layers=scan_layers)

    np.testing.assert_allclose(loss, want_loss, atol=1e-5, rtol=0)
    assert_moved_alike(state.params, want_params, tiny.MODEL)


@pytest.mark.parametrize(("model", "kv_heads"), [("GEMMA", 1), ("OLMO", 2)])
def test_a_mesh_changes_nothing_of_another_family(model, kv_heads):
    """With one key-value head, attention is split by row over the tensor axis."""
    model = dataclasses.replace(getattr(tiny, model), num_kv_heads=kv_heads)
    wanted, want_loss, want_state = steps(tiny.one_device(), model, 1, with_old=False)

    rollouts, loss, state = steps(sharding.make_mesh(2, 2, 2), model, 1, with_old=False)

    assert_same_rollouts(rollouts, wanted)
    assert np.abs(rollouts[0].logp_PGC).max() > 0.5  # tokens were not certain
    np.testing.assert_allclose(loss, want_loss, atol=1e-5, rtol=0)
    assert_moved_alike(state.params, jax.device_get(want_state.params), model)


def test_a_row_is_split_over_its_devices():
    """Four devices of one row compute a quarter of it each."""
    operations = []
    for mesh in (tiny.one_device(), sharding.make_mesh(1, 1, 1, 4, devices=jax.devices()[:4])):
        scorer, optimizer = Scorer(tiny.MODEL, mesh, Sampling()), optax.sgd(RATE)
        update = make_update(scorer, PolicyLoss(losses.Objective()), optimizer, num_minibatches=1)
        rollouts = tiny.rollouts(8, 4, 32)
        experience = Experience(
            rollouts=transfer.shard_rows(mesh, rollouts),
            advantage=rollouts.length_PG.astype(np.float32),
            action_PGC=rollouts.logp_PGC < 0,
            old_logp_PGC=None,
            ref_logp_PGC=None,
        )
        rows = scorer.microbatches(rollouts, np.arange(8))
        assert rows.number == 1
        state = state_like(tiny.MODEL, mesh, optimizer)
        carry = jax.eval_shape(update.zero_gradient)
        args = Weights(state.params), rows.number, carry, experience, *rows.arrays
        program = update.gradient.trace(*args).lower().compile()
        operations.append(program.cost_analysis()["flops"])
    assert operations[1] < operations[0] / 3


def test_each_shard_reads_its_share_of_the_prompts_at_once():
    decoder = Decoder(tiny.MODEL, sharding.make_mesh(4, 2), Sampling(), (tiny.STOP,), 8)
    for num_read, slots, at_once in ((32, 64, 4), (33, 64, 5), (32, 3, 3), (0, 7, 7)):
        assert Engine(decoder, num_read=num_read).read_at_once(slots) == at_once


def test_slots_are_refilled_and_compacted_in_each_shard():
    """Fourteen prompts on two devices, eight completions at once; and all at once, compacted.

    The same where four devices of one shard have slots of their own each, and share the MLP.
    """
    prompts, stops = PROMPTS + PROMPTS[:6], (tiny.STOP, 4, 17)
    one, two = tiny.one_device(), sharding.make_mesh(devices=jax.devices()[:2])
    four = sharding.make_mesh(1, 1, 4, devices=jax.devices()[:4])
    key, got, shapes = keys.key_for(0, "rollout", 0), [], []
    for mesh, num_slots in ((one, 0), (two, 8), (two, 0), (four, 16), (four, 0)):
        decoder = Decoder(tiny.MODEL, mesh, Sampling(), stops, 16)
        compact = num_slots == 0 and mesh is not one
        engine = made_once.engine(decoder, num_slots=num_slots, compact=compact)
        params = engine.publish(place(mesh))
        got.append(engine.generate(params, prompts, group=4, key=key, temperature=1.0))
        shapes.append({shape[:2] for shape in engine.shapes})
    assert shapes == [{(14, 4)}, {(1, 4)}, {(7, 4), (14, 1)}, {(1, 4)}, {(4, 4), (8, 1)}]
    for rollouts in got[1:]:
        for name in ("completion_PGC", "length_PG", "stopped_PG"):
            np.testing.assert_array_equal(getattr(rollouts, name), getattr(got[0], name), name)
        np.testing.assert_allclose(rollouts.logp_PGC, got[0].logp_PGC, atol=1e-5, rtol=0)


def test_a_group_waits_for_the_shard_that_trains_on_it():
    """Eight prompts, of which each of four shards is given two, in both places the same two."""
    mesh = sharding.make_mesh(2, 2, 2)
    engine = Engine(Decoder(tiny.MODEL, mesh, Sampling(), (tiny.STOP,), LIMIT))

    queues = engine._queues([[1]] * 8, group=3, lanes=2, limit=LIMIT)

    trained = {
        s.device: set(np.asarray(s.data).tolist())
        for s in transfer.shard_rows(mesh, np.arange(8)).addressable_shards
    }
    for queue, devices in zip(queues, mesh.devices.reshape(4, 2), strict=True):
        assert [len(turn.rows) for turn in queue] == [2, 1, 2, 1]
        assert [{row // 3 for turn in queue for row in turn.rows}] * 2 == [
            trained[d] for d in devices
        ]
    # One prompt alone is spread over all.
    spread = engine._queues([[1]], 8, 2, LIMIT)
    assert [[list(turn.rows) for turn in queue] for queue in spread] == [
        [[0, 1]],
        [[2, 3]],
        [[4, 5]],
        [[6, 7]],
    ]


def test_one_size_may_be_the_rest():
    assert sharding.make_mesh().shape == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert sharding.make_mesh(2, -1, 2).shape["fsdp"] == 2
    assert sharding.make_mesh(2, 1, 1, -1).shape["sequence"] == 4
    assert sharding.num_slot_shards(sharding.make_mesh(2, 1, 2, 2)) == 4
    assert sharding.num_row_shards(sharding.make_mesh(2, 2, 2)) == 4


@pytest.mark.parametrize("shape", [(3, 1, 1), (4, 1, 1), (16, 1, 1), (-1, 3, 1), (-1, 16, 1)])
def test_a_mesh_of_other_devices_than_there_are_is_refused(shape):
    with pytest.raises(ValueError, match=r"mesh\.data = .* the 8 devices"):
        sharding.make_mesh(*shape)


def test_a_row_over_several_processes_is_refused():
    """Rows are sampled apart and scored together; four devices of two processes stand for it."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        process_index: int
        platform: str = "cpu"
        device_kind: str = "cpu"
        client: None = None

    devices = [Device(n, n // 2) for n in range(4)]
    assert sharding.make_mesh(2, 1, 1, 2, devices=devices).shape["sequence"] == 2
    with pytest.raises(
        ValueError, match=r"mesh.sequence = 4 .* one row over devices of 2 processes"
    ):
        sharding.make_mesh(1, 1, 1, 4, devices=devices)


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = sharding.make_mesh(2, 2, 2)
    spec = lambda *args: sharding.sharding_of(mesh, *args).spec  # noqa: E731

    assert spec(("embed", "heads"), (6, 8)) == PartitionSpec("fsdp", "tensor")
    assert spec(("embed", "heads"), (6, 7)) == PartitionSpec("fsdp", None)
    assert spec(("rows", None), (4, 8)) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("rows", None), (6, 8)) == PartitionSpec("data", None)  # 6 is no multiple of 4
    assert spec(("rows", None), (3, 8)) == PartitionSpec(None, None)
