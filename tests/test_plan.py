"""The plan of a step: memory against what devices hold, costs against arithmetic, refusals."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import config as config_lib
from grpo_jax import parts, plan, policy, sharding
from grpo_jax.algorithm import update as update_lib
from grpo_jax.planning import advice, chips, hlo
from grpo_jax.planning import step as step_lib

pytestmark = pytest.mark.usefixtures("quick_compiling")

TINY = "tests/runs/tiny_config.py"


@pytest.fixture(scope="module")
def config():
    mesh = [f"--config.mesh.{name}=2" for name in ("data", "fsdp", "tensor")]
    return config_lib.load(TINY, ["--config.batch.prompts=16", *mesh])


@pytest.fixture(scope="module")
def step(config):
    mesh = sharding.make_mesh(2, 2, 2)
    return step_lib.Step(config, parts.model_shape(config), mesh, step_lib.Lengths.of(config))


def held_by_device(tree) -> set[int]:
    """Bytes of live arrays on each device."""
    held = dict.fromkeys(jax.devices(), 0)
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


def test_memory_is_what_the_devices_really_hold(config, step):
    """State, reference, published weights, cache and gradients, made on eight devices."""
    learner, engine, mesh = step.learner, step.engine, step.mesh
    tokenizer = policy.new(config.model, parts.tasks.load(config.data.task).make_tokenizer())
    params = policy.load_params(tokenizer, mesh, 0)
    reference = policy.load_params(tokenizer, mesh, 0)
    state = update_lib.start(params, step.model, mesh, learner.optimizer)
    published = engine.publish(state.params)
    shared = {id(x) for x in jax.tree.leaves(state.params)}
    own = [x for x in jax.tree.leaves(published) if id(x) not in shared]
    lanes = config.batch.group
    slots = engine.empty(config.batch.prompts // engine.shards, lanes, 16)
    gradients, *_ = learner.update.empty()

    held = step.held()

    really = {
        "weights": state.params,
        "optimizer": state.opt_state,
        "reference": reference,
        "rollout weights": own,
        "cache": (slots.prefix, slots.own),
        "gradients": gradients,
    }
    for name, arrays in really.items():
        assert held_by_device(arrays) == {held[name]}, name
    assert held["cache"] > held["rollout weights"] > held["weights"] > 0


def test_a_program_needs_its_arguments_and_what_lies_beside_them(step):
    """The optimizer's update takes the state and gives it back in the same place."""
    (program,) = step.compile(lambda name: name == "optimizer")
    held = step.held()

    arguments = held["weights"] + held["optimizer"] + held["gradients"]
    assert arguments <= program.arguments < 1.2 * arguments  # and sums, masks and counters
    assert program.results < 0.05 * arguments
    assert program.beside >= held["reference"]
    assert program.peak == program.beside + program.arguments + program.results + program.temporary
    assert program.runs == 4  # two passes of two minibatches


def cost_of(f, shape, axes=("fsdp",)) -> hlo.Cost:
    mesh = sharding.make_mesh(2, 4, 1)
    placed = NamedSharding(mesh, PartitionSpec(axes))
    text = jax.jit(f).lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)).compile()
    return hlo.cost(text.as_text(), mesh)


def test_a_loop_counts_as_often_as_it_runs():
    """Five products of [8, 64] with [64, 64], rows over four devices, inside seven of unknown end.

    Each 2 * 2 * 64 * 64 = 16,384 operations on a device.
    """

    def f(x, w, n):
        inner = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        go_on = lambda c: c[1] < n.sum()  # noqa: E731
        return jax.lax.while_loop(
            go_on, lambda c: (jax.lax.scan(inner, c[0], w)[0], c[1] + 1), (x, 0.0)
        )

    mesh = sharding.make_mesh(2, 4, 1)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    like = jax.ShapeDtypeStruct
    text = (
        jax.jit(f)
        .lower(
            like((8, 64), jnp.float32, sharding=place("fsdp")),
            like((5, 64, 64), jnp.float32, sharding=place()),
            like((4,), jnp.float32, sharding=place()),
        )
        .compile()
        .as_text()
    )
    once = hlo.cost(text, mesh, 1.0)
    assert once.flops == 5 * 2 * 2 * 64 * 64
    assert hlo.cost(text, mesh, 7.0).flops == 7 * once.flops
    assert not once.collectives


def test_bytes_sent_by_kind_and_axis():
    """A float32 [8, 64] in shards of two rows, 512 bytes: summed, and made whole."""
    summed = cost_of(lambda x: x.sum(0), (8, 64))
    whole = cost_of(
        lambda x: jax.lax.with_sharding_constraint(
            x * 2, NamedSharding(sharding.make_mesh(2, 4, 1), PartitionSpec())
        ),
        (8, 64),
    )
    assert summed.sent == {("all-reduce", ("fsdp",)): 2 * 64 * 4 * 3 / 4}
    assert whole.sent == {("all-gather", ("fsdp",)): 3 * 512}
    both = cost_of(lambda x: x.sum(0), (8, 64), axes=("data", "fsdp"))
    assert both.sent == {("all-reduce", ("data", "fsdp")): 2 * 64 * 4 * 7 / 8}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, use", ("tensor",)),
        ("replica_groups=[4,2]<=[8], use", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use", ("data",)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), use", ("data", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, use", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, use", ("tensor",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, use", ("fsdp",)),
        ("replica_groups={}, use", ("data", "fsdp", "tensor")),
    ],
)
def test_groups_of_devices_in_every_notation(text, axes):
    groups = hlo._groups(text, "all-reduce", 8)
    assert hlo._axes(groups, sharding.make_mesh(2, 2, 2)) == axes
    assert sorted(groups.ravel()) == list(range(8))


# A TPU's program: weights gathered and a product in a loop that goes two steps at a time, and a
# reduce-scatter, which is a fusion there. S(1) is the chip's own memory.
TPU = """
%cond (p: (s32[], f32[8,64])) -> pred[] {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,64]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %w = f32[32,64]{1,0:T(8,128)S(1)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %y = f32[8,32]{1,0:T(8,128)S(1)} convolution(%x, %w), dim_labels=bf_oi->bf
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[8,64]{1,0}) tuple(%next, %x)
}

%all-reduce-scatter (q: f32[8,64]) -> f32[2,64] {
  %q = f32[8,64]{1,0} parameter(0)
  %sum = f32[8,64]{1,0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %own = f32[2,64]{1,0} slice(%sum), slice={[0:2], [0:64]}
}

ENTRY %main (x: f32[8,64]) -> f32[2,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,64]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,64]{1,0}) while(%start), condition=%cond, body=%body
  %z = f32[8,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %r = f32[2,64]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_program_of_a_tpu():
    cost = hlo.cost(TPU, sharding.make_mesh(2, 4, 1))
    assert cost.flops == 3 * 2 * 8 * 32 * 64  # 0, 2 and 4 are below 6
    assert cost.sent == {
        ("all-gather", ("fsdp",)): 3 * 3 * 8 * 64 * 4,
        ("reduce-scatter", ("fsdp",)): 8 * 64 * 4 * 3 / 4,
    }
    # The loop reads x twice from memory, what is gathered stays on the chip; the fusion reads
    # [8, 64] and writes [2, 64].
    assert cost.bytes == pytest.approx(3 * 2 * 8 * 64 * 4 + (8 + 2) * 64 * 4, rel=0.01)  # counters


def test_the_smallest_change_that_fits(config, step):
    """A chip with room for the arrays but not for the gradient's activations."""

    def make(config) -> step_lib.Plan:
        full = config.model.remat == "full"
        size = 50.0 if full and config.batch.microbatch else 90.0 if full else 200.0
        program = step_lib.Compiled("gradient", "update", 1, 0, 0, 0, size, hlo.Cost(), 0.0)
        return step_lib.Plan("v5e:2x4", chip, dict(step.mesh.shape), 1, {}, [program])

    chip = chips.Chip("small", chips.RESERVED + 60, 1.0, 1.0, 1.0, 1.0, "", "")
    plan = make(config)
    assert not plan.fits
    tried = advice.smallest_fit(make, config, plan, step.model)
    assert [t.change for t in tried] == [
        {"batch.microbatch": 4},
        {"batch.microbatch": 4, "model.remat": "full"},
    ]
    assert [t.plan.fits for t in tried] == [False, True]


def test_meshes_split_heads_and_groups(config, step):
    plan = step_lib.Plan("v5e:2x4", chips.CHIPS["v5e"], dict(step.mesh.shape), 1, {}, [])
    found = [
        tuple(m[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor"))
        for m in advice.meshes(config, plan, step.model)
    ]
    assert (8, 1, 1) in found and (1, 2, 4) in found  # four heads
    assert (2, 2, 2) not in found and all(math.prod(m) == 8 and m[2] <= 4 for m in found)


def test_lengths_follow_their_mean():
    config = config_lib.load(TINY, ["--config.batch.prompts=400", "--config.rollout.max_tokens=50"])
    length_PG = step_lib.Lengths.of(config, mean=5).completion_PG
    assert 4.5 < length_PG.mean() < 5.5 and 1 == length_PG.min() < length_PG.max() <= 50
    assert (step_lib.Lengths.of(config).completion_PG == 50).all()


@pytest.mark.parametrize("topology", ["v5e", "v5e:8", "v9:2x2", "cpu:0", "v5e:2x2x2x2"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(ValueError, match=r"--topology .*expected one of v4, v5e"):
        chips.devices(topology)


def test_shapes_are_those_of_their_models():
    """Parameters of Qwen2.5-0.5B, 1.5B and 7B and of Llama-3-70B, as their model cards say."""
    counts = {"qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54, "qwen2.5-7b": 7.62, "llama-70b": 70.55}
    for name, billions in counts.items():
        model = plan.read_shape(f"configs/shapes/{name}.json")
        assert model.num_params / 1e9 == pytest.approx(billions, rel=0.005), name
    with pytest.raises(ValueError, match=r"there is no file .*configs/shapes/llama-70b\.json"):
        plan.read_shape("configs/shapes/nothing.json")


@pytest.mark.slow
def test_the_program_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "plan.json"
    overrides = ["--config.batch.prompts=8", "--config.batch.minibatches=1"]
    fewer = ["--config.algorithm.num_iterations=1", "--config.algorithm.kl_coef=0.0"]
    arguments = ["--config", TINY, "--topology", "cpu:8", "--json", str(file)]
    plan.main([*arguments, *overrides, *fewer])

    report = json.loads(file.read_text())
    assert [p["name"] for p in report["programs"]] == [
        *("publish", "admit", "decode"),
        *("gradient", "optimizer"),
    ]
    assert report["mesh"] == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert report["peak_bytes"] == max(p["peak_bytes"] for p in report["programs"])
    assert report["bytes_per_device"]["reference"] == 0
    assert list(report["sent_bytes"]["all-reduce"]) == ["data"]
    assert np.isclose(report["flops"], sum(p["flops"] for p in report["programs"]))
    printed = capsys.readouterr().out
    assert "parameters on 8 devices" in printed and "whether it fits is not known" in printed
