"""The plan of a step: memory against what devices hold, costs against arithmetic, refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from grpo_jax import plan
from grpo_jax.config import loading
from grpo_jax.data import tasks
from grpo_jax.devices import chips, sharding
from grpo_jax.kernels.gpu_decode import TritonDecode
from grpo_jax.learner import train_state
from grpo_jax.messages import console as messages_console
from grpo_jax.models import policy
from grpo_jax.planning import advice, gpu_targets, hlo, hlo_text, report, topologies
from grpo_jax.planning import plan as planning_plan
from grpo_jax.planning.compiled import Compiled
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.plan import Plan
from grpo_jax.planning.programs import Step
from grpo_jax.planning.topologies import Chip
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import model as model_lib

TINY = "tests/helpers/tiny_config.py"


@pytest.fixture(scope="module")
def config():
    mesh = [f"--config.mesh.{name}=2" for name in ("data", "fsdp", "tensor")]
    return loading.load(TINY, ["--config.batch.prompts=16", *mesh])


@pytest.fixture(scope="module")
def step(config):
    mesh = sharding.make_mesh(2, 2, 2)
    return Step(config, model_lib.model_shape(config), mesh, Lengths.of(config))


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
    tokenizer = model_lib.new(config.model, tasks.load(config.data.task).make_tokenizer())
    params = policy.load_params(tokenizer, mesh, 0)
    reference = policy.load_params(tokenizer, mesh, 0)
    state = train_state.start(params, step.model, mesh, learner.optimizer)
    published = engine.publish(state.params)
    shared = {id(x) for x in jax.tree.leaves(state.params)}
    own = [x for x in jax.tree.leaves(published) if id(x) not in shared]
    lanes = config.batch.group
    slots = engine.empty(config.batch.prompts // engine.shards, lanes, 16)
    gradients, *_ = learner.update.zero_gradient()

    held = step.held()

    really = {
        "weights": state.params,
        "optimizer": state.opt_state,
        "reference": reference,
        "rollout weights": own,
        "cache": slots.cache,
        "gradients": gradients,
    }
    for name, arrays in really.items():
        assert held_by_device(arrays) == {held[name]}, name
    assert min(held[name] for name in really) > 0


def test_a_program_needs_its_arguments_and_what_lies_beside_them(step):
    """The optimizer's update takes the state and gives it back in the same place."""
    (program,) = step.compile(lambda name: name == "optimizer_step")
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
    groups = hlo_text.groups(text, "all-reduce", 8)
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


@pytest.mark.parametrize(
    ("out", "window", "pairs"),
    [
        (6, "size=3", 6 * 3),  # no padding: every output meets three inputs
        (8, "size=3 pad=1_1", 8 * 3 - 2),  # the first and the last meet two
        (3, "size=3 stride=2", 3 * 3),
        (4, "size=3 rhs_dilate=2", 4 * 3),
        (3, "size=3 stride=2 pad=0_0 lhs_dilate=1 rhs_dilate=1", 3 * 3),
    ],
)
def test_the_windows_of_a_convolution(out, window, pairs):
    labels = "dim_labels=b0f_0io->b0f"
    text = f"""
ENTRY %main (x: f32[2,8,4], w: f32[3,4,5]) -> f32[2,{out},5] {{
  %x = f32[2,8,4]{{2,1,0}} parameter(0)
  %w = f32[3,4,5]{{2,1,0}} parameter(1)
  ROOT %y = f32[2,{out},5]{{2,1,0}} convolution(%x, %w), window={{{window}}}, {labels}
}}
"""
    cost = hlo.cost(text, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    assert cost.flops == 2 * 2 * 4 * 5 * pairs


# A GPU's program: a product, which is a fusion, and its result copied into a part of an array.
GPU = """
%product (a: bf16[128,64], b: bf16[64,32]) -> bf16[128,32] {
  %a = bf16[128,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  ROOT %dot = bf16[128,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%into (all: bf16[28,128,32], at: s32[], one: bf16[128,32]) -> bf16[28,128,32] {
  %all = bf16[28,128,32]{2,1,0} parameter(0)
  %one = bf16[128,32]{1,0} parameter(2)
  %part = bf16[1,128,32]{2,1,0} bitcast(%one)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %update = bf16[28,128,32]{2,1,0} dynamic-update-slice(%all, %part, %at, %zero, %zero)
}

ENTRY %main (a: bf16[128,64], b: bf16[64,32], all: bf16[28,128,32], at: s32[]) -> bf16[28,128,32] {
  %a = bf16[128,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %all = bf16[28,128,32]{2,1,0} parameter(2)
  %at = s32[] parameter(3)
  %y = bf16[128,32]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
  %start = ((bf16[28,128,32]{2,1,0}, s32[], bf16[128,32]{1,0}), bf16[28,128,32]{2,1,0}, u32[]) \
fusion-start(%all, %at, %y), kind=kLoop, calls=%into
  ROOT %done = bf16[28,128,32]{2,1,0} fusion-done(%start)
}
""".replace("\\\n", "")


def test_a_program_of_a_gpu():
    cost = hlo.cost(GPU, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    product, copy = (128 * 64 + 64 * 32 + 128 * 32) * 2, 2 * 128 * 32 * 2
    assert cost.flops == 2 * 128 * 64 * 32
    assert cost.bytes == pytest.approx(product + copy, abs=16)  # and where it goes
    assert [k.flops for k in cost.kernels] == [cost.flops, 0.0]
    # The product as long as its arithmetic, then the copy, in both of two runs.
    in_turn = cost.times(2.0).in_turn(flops=1.0, bandwidth=10.0)
    assert in_turn == pytest.approx(2 * (cost.flops + copy / 10), abs=4)


def test_a_kernel_that_reads_a_part_of_an_operand():
    text = """
ENTRY %main (q: bf16[8,64], kept: bf16[8,128,64]) -> bf16[8,64] {
  %q = bf16[8,64]{1,0} parameter(0)
  %kept = bf16[8,128,64]{2,1,0} parameter(1)
  %copy = bf16[8,128,64]{2,1,0} copy(%kept)
  %once = bf16[8,64]{1,0} custom-call(%q, %copy), custom_call_target="a_kernel"
  ROOT %out = bf16[8,64]{1,0} custom-call(%once, %copy), custom_call_target="a_kernel"
}
"""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    cost = lambda **more: hlo.cost(text, mesh, **more).bytes  # noqa: E731
    others, kept = 4 * 2 * 8 * 64, 2 * 8 * 128 * 64
    assert cost() == others + 4 * kept
    assert cost(read={(8, 128, 64): 0.25}) == others + 2.5 * kept  # a copy takes all of it


def test_a_kernel_that_changes_an_operand_in_place():
    """One position of a cache; of what is not a cache all is written."""
    text = """
ENTRY %main (q: bf16[8,64], kept: bf16[8,128,64]) -> bf16[8,128,64] {
  %q = bf16[8,64]{1,0} parameter(0)
  %kept = bf16[8,128,64]{2,1,0} parameter(1)
  %both = (bf16[8,64]{1,0}, bf16[8,128,64]{2,1,0}) custom-call(%q, %kept), \
custom_call_target="a_kernel", output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}, x=1
  ROOT %out = bf16[8,128,64]{2,1,0} get-tuple-element(%both), index=1
}
"""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    cost = lambda **more: hlo.cost(text, mesh, **more).bytes  # noqa: E731
    query, kept = 2 * 8 * 64, 2 * 8 * 128 * 64
    assert cost() == 2 * query + 2 * kept
    assert cost(read={(8, 128, 64): 0.25}) == 2 * query + 0.25 * kept


@pytest.mark.parametrize(("after", "beside"), [("%w", False), ("%y", True)])
def test_what_is_sent_while_products_are_computed(after, beside):
    """Weights are gathered, waited for at once or after a product."""
    gathered = "%w = bf16[128,64]{1,0} all-gather-done(%start)"
    product = (
        "%y = bf16[32,128]{1,0} dot(%a, %v), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    )
    lines = [gathered, product] if after == "%w" else [product, gathered]
    text = f"""
ENTRY %main (a: bf16[32,64], v: bf16[128,64], own: bf16[32,64]) -> bf16[128,64] {{
  %a = bf16[32,64]{{1,0}} parameter(0)
  %v = bf16[128,64]{{1,0}} parameter(1)
  %own = bf16[32,64]{{1,0}} parameter(2)
  %start = (bf16[32,64]{{1,0}}, bf16[128,64]{{1,0}}) all-gather-start(%own), \
replica_groups=[2,4]<=[8], dimensions={{0}}
  {lines[0]}
  {lines[1]}
  ROOT %z = bf16[128,64]{{1,0}} copy(%w)
}}
"""
    cost = hlo.cost(text, sharding.make_mesh(2, 4, 1))
    sent, product = 3 * 32 * 64 * 2, 2 * 32 * 128 * 64
    assert cost.sent == {("all-gather", ("fsdp",)): sent}
    # A second for each byte, and half of that time for the product.
    waited = sent - sent / 2 if beside else sent
    found = cost.times(2.0).waited(flops=2 * product / sent, link=1.0)
    assert found == {("all-gather", ("fsdp",)): pytest.approx(2 * waited)}
    chip = Chip("slow", None, 2 * product / sent, 1e30, 1.0, None, "", None, "")
    seconds = Compiled("", "", 1, 0, 0, 0, 0, cost, 0.0).seconds(chip)
    assert seconds["in turn"] == pytest.approx(sent / 2 + waited)
    assert sum(cost.waited(flops=0.1 * product / sent, link=1.0).values()) == (
        0.0 if beside else sent
    )


ROOM = 60.0
HELD = {"weights": 8.0, "optimizer": 16.0, "reference": 4.0, "gradients": 8.0}
HELD |= {"rollout weights": 8.0, "cache": 2.0, "rollouts": 0.0, "evaluation": 10.0}


def tries_of(config, step, beside: dict[str, float], held=lambda config: HELD):
    """What is tried where the programs need so much beside the arrays of some config."""
    chip = Chip("small", ROOM + 1, 1.0, 1.0, 1.0, 1.0, "", ROOM, "")

    def make(config) -> Plan:
        sizes, arrays = dict(beside), held(config)
        if "gradient" in sizes:
            sizes["gradient"] /= 2 if config.batch.microbatch else 1
            sizes["gradient"] /= 4 if config.model.remat == "full" else 1
        always = arrays["weights"] + arrays["optimizer"] + arrays["reference"]
        programs = [
            Compiled(name, "", 1, always, 0, 0, size, hlo.Cost(), 0.0)
            for name, size in sizes.items()
        ]
        return Plan("v5e:2x4", chip, dict(config.mesh), 1, arrays, programs)

    trial = advice.Trial(config, step.model, make, held, ROOM)
    return list(advice.smallest_fit(trial, make(config)))


def test_the_smallest_change_that_fits(config, step):
    """28 bytes of arrays and a gradient of 160, 80, 20, and 40 with the second alone: of 60."""
    tried = tries_of(config, step, {"gradient": 160.0})
    assert [t.change for t in tried] == [
        {"batch.microbatch": 4},
        {"batch.microbatch": 4, "model.remat": "full"},
        {"model.remat": "full"},
    ]
    assert [t.fits for t in tried] == [False, True, False]


def test_what_is_needless_in_the_end_is_left_out(config, step):
    """Of a gradient of 100 computing more again leaves 25: smaller microbatches are not needed."""
    tried = tries_of(config, step, {"gradient": 100.0})
    assert [(t.change, t.fits) for t in tried[1:]] == [
        ({"batch.microbatch": 4, "model.remat": "full"}, True),
        ({"model.remat": "full"}, True),
    ]


def offloaded(config) -> dict[str, float]:
    """What devices hold, the optimizer's state by its width; meshes change nothing."""
    share = {"float32": 1, "bfloat16": 1 / 2, "int8": 1 / 4}[config.optim.moments_dtype]
    held = HELD | {"optimizer": 16.0 * share}
    if config.optim.offload:
        held["optimizer"] = 0.0
    if config.model.offload_reference:
        held["reference"] = 0.0
    return held


def test_what_changes_no_number_comes_first(config, step):
    """28 and 40 beside them: slots and memory of the host are tried, and the optimizer's helps."""
    changes = [t.change for t in tries_of(config, step, {"decode": 40.0}, offloaded)]
    assert [list(change) for change in changes] == [["rollout.num_slots"], ["optim.offload"]]


def test_numbers_are_rounded_last_and_by_little_first(config, step):
    """8 of weights and 58 beside them: nothing fits, and what helps nothing is dropped again."""
    changes = [t.change for t in tries_of(config, step, {"decode": 58.0}, offloaded)]
    helped = {"optim.offload": True, "model.offload_reference": True}
    on_meshes = [c for c in changes if "mesh.tensor" in c]
    assert on_meshes and all(helped.items() <= c.items() for c in on_meshes)
    after = changes[changes.index(on_meshes[-1]) + 1 :]
    assert [c.keys() - helped.keys() for c in after] == [
        {"rollout.num_slots"},
        {"rollout.kv_cache_dtype"},
        {"rollout.weights_dtype"},
        {"model.param_dtype"},
    ]
    never = lambda config: offloaded(config) | {"weights": 70.0}  # noqa: E731
    refused = tries_of(config, step, {"optimizer_step": 1.0}, never)
    assert all(t.plan is None and "arrays alone" in t.refusal for t in refused)
    assert {"optim.moments_dtype": "int8"}.items() <= refused[-2].change.items()


@pytest.mark.parametrize(
    ("fits", "tries"),
    [
        (100, [16, 32, 64, 128, 96, 112, 104]),  # 96 fits and 104 does not: within an eighth
        (3, [4, 2, 3]),  # 8 does not
        (10**9, [16, 32, 64, 128, 256, 300]),  # no more are there
        (0, [4, 2, 1]),
    ],
)
def test_the_longest_completion_that_fits(config, step, fits, tries):
    chip = Chip("small", ROOM, 1.0, 1.0, 1.0, 1.0, "", ROOM, "")

    def make(config) -> Plan:
        size = 2 * ROOM if config.rollout.max_tokens > fits else 0.0
        only = Compiled("decode", "", 1, 0, 0, 0, size, hlo.Cost(), 0.0)
        return Plan("v5e:2x4", chip, dict(config.mesh), 1, HELD, [only])

    trial = advice.Trial(config, step.model, make, lambda config: HELD, ROOM)
    assert config.rollout.max_tokens == 8
    found = list(advice.longest(trial, make(config), most=300))
    assert [t.tokens for t in found] == tries
    assert [t.fits for t in found] == [n <= fits for n in tries]


def test_a_mesh_is_tried_with_its_smallest_microbatch(config, step):
    changes = [t.change for t in tries_of(config, step, {"gradient": 1e6, "decode": 1e6})]
    sizes: dict[tuple, list] = {}
    for change in changes:
        if "mesh.tensor" in change:
            mesh = change["mesh.data"] * change["mesh.fsdp"], change["mesh.tensor"]
            sizes.setdefault(mesh, []).append(change.get("batch.microbatch"))
    assert (2, 4) in sizes and len(sizes) > 1
    assert all(shards in found for (shards, _), found in sizes.items())


def test_meshes_split_heads_and_groups(config, step):
    found = [
        tuple(m[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor"))
        for m in advice.meshes(config, step.model)
    ]
    assert (8, 1, 1) in found and (1, 2, 4) in found  # four heads
    assert (2, 2, 2) not in found and all(math.prod(m) == 8 and m[2] <= 4 for m in found)


def test_a_change_is_checked_as_a_config_is(config):
    with pytest.raises(ValueError, match=r"batch\.minibatches"):
        advice.changed(config, {"batch.minibatches": config.batch.prompts + 1})


def test_a_program_is_compiled_once(config, step):
    """Where the optimizer's state lies changes no program, but what is beside it."""
    known, found = {}, []
    for offload in (False, True):
        changed = advice.changed(config, {"optim.offload": offload})
        there = Step(changed, step.model, step.mesh, step.lengths, known=known)
        found += there.compile(lambda name: name == "score reference")
    here, offloaded = found
    assert here.beside - offloaded.beside == step.held()["optimizer"] > 0
    assert there.held()["optimizer"] == 0
    assert offloaded.cost == here.cost and offloaded.temporary == here.temporary > 0
    assert len(known) == 1


def test_lengths_follow_their_mean():
    config = loading.load(TINY, ["--config.batch.prompts=400", "--config.rollout.max_tokens=50"])
    length_PG = Lengths.of(config, mean=5).completion_PG
    assert 4.5 < length_PG.mean() < 5.5 and 1 == length_PG.min() < length_PG.max() <= 50
    assert (Lengths.of(config).completion_PG == 50).all()


@pytest.mark.parametrize(
    "topology", ["v5e", "v5e:8", "v9:2x2", "cpu:0", "v5e:2x2x2x2", "h100", "h100:3", "h100:2x4"]
)
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(ValueError, match=r"--topology .*expected one of v4, v5e"):
        topologies.devices(topology)


@pytest.mark.parametrize(
    ("name", "units", "side", "links"),
    [("v4", 8, 128, 6), ("v5e", 4, 128, 4), ("v5p", 8, 128, 6), ("v6e", 4, 256, 4)],
)
def test_the_rates_of_a_tpu(name, units, side, links):
    """Its matrix units give the published rate at its clock; it has two links a dimension."""
    chip = topologies.CHIPS[name]
    assert 2 * units * side**2 * chip.clock == pytest.approx(chip.flops, rel=0.005)
    rates = chips.chip(f"TPU {name}")
    assert chip.link * links / 2 == pytest.approx(rates.ici_bytes_per_s)
    assert chip.usable == rates.hbm_bytes - 2**28 and chip.memory == rates.hbm_bytes


@pytest.mark.parametrize("name", gpu_targets.NAMES)
def test_a_gpu_as_the_compiler_is_told_of_it(name):
    told = dict(re.findall(r"^  (\w+): (\S+)$", gpu_targets.target(name), re.M))
    chip = gpu_targets.chip(name)
    # The published rate is all multiprocessors' at some clock: dense bfloat16, 512 to 4,096 sums a
    # cycle of each, consumer's halved where they add in float32.
    sums = chip.bf16_flops / 2 / int(told["core_count"]) / float(told["clock_rate_ghz"]) / 1e9
    assert 240 < sums < 4096 * 1.1
    assert float(told["device_memory_size"]) == chip.hbm_bytes
    assert topologies.GPUS[name].usable == pytest.approx(0.92 * chip.hbm_bytes)
    assert int(told["shared_memory_per_block_optin"]) < int(told["shared_memory_per_core"])
    # 2 operations a lane and cycle give the published rate of float32, in 1e12 a second.
    lanes = int(told["core_count"]) * int(told["fpus_per_core"])
    float32 = lanes * 2 * float(told["clock_rate_ghz"]) / 1e3
    published = {"a100-40gb": 19.5, "a100": 19.5, "h100": 67, "h200": 67, "b200": 75, "l4": 30.3,
                 "l40s": 91.6, "rtx4090": 82.6, "rtx5090": 104.8}  # fmt: skip
    assert float32 == pytest.approx(published[name], rel=0.01)
    multiprocessors = {"a100": 108, "h100": 132, "h200": 132, "b200": 148, "l4": 58, "l40s": 142,
                       "rtx4090": 128, "rtx5090": 170}  # fmt: skip
    assert int(told["core_count"]) == multiprocessors[name.removesuffix("-40gb")]
    # KiB of a multiprocessor and its threads, CUDA programming guide, by compute capability.
    major, minor = re.search(r"major: (\d+) minor: (\d+)", gpu_targets.target(name)).groups()
    kib, threads = {"8.0": (164, 2048), "8.9": (100, 1536), "9.0": (228, 2048),
                    "10.0": (228, 2048), "12.0": (100, 1536)}[f"{major}.{minor}"]  # fmt: skip
    assert int(told["shared_memory_per_core"]) == kib * 1024
    assert int(told["threads_per_core_limit"]) == threads


@pytest.mark.parametrize(
    ("level", "iterations", "kl_coef", "share", "passes"),
    [
        ("none", 1, 0.0, 1.0, 0),
        ("none", 1, 0.05, 1.0, 1),  # of the reference
        ("none", 2, 0.05, 1.0, 2),  # and of the policy before its first update
        ("token", 1, 0.0, 1.0, 0),
        ("sequence", 1, 0.0, 1.0, 1),  # a completion is weighed whole before its first update
        ("sequence", 1, 0.05, 1.0, 2),
        ("none", 1, 0.0, 0.2, 1),  # for the entropies
    ],
)
def test_passes_before_the_first_update(level, iterations, kl_coef, share, passes):
    """As many as a run makes; and the gradient is given what they find, or it could not be made."""
    options = [f"rollout_correction.level={level}", f"algorithm.num_iterations={iterations}"]
    options += [f"algorithm.kl_coef={kl_coef}", "batch.minibatches=1"]
    options += [f"algorithm.top_entropy_share={share}"]
    config = loading.load(TINY, [f"--config.{option}" for option in options])
    model, mesh = model_lib.model_shape(config), tiny.one_device()
    step = Step(config, model, mesh, Lengths.of(config))

    programs = {program.name: program for program in step.programs()}

    needs_old = passes - bool(kl_coef)
    assert ("score policy" in programs) == bool(needs_old)
    assert ("score reference" in programs) == bool(kl_coef)
    assert (step.experience.old_logp_PGC is not None) == bool(needs_old)
    assert (step.experience.top_entropy_PGC is not None) == ("select" in programs) == (share < 1)
    programs["gradient"].call.lower()


@pytest.mark.parametrize(
    ("options", "drawn", "weights"),
    [
        # 8 held-out problems, one lane a slot, of the rollout's 4 x 4 slots as many as are needed;
        # the rollout's weights are those that learn, and so are the evaluation's.
        ([], {"evaluation": (8, 1)}, "same"),
        (["rollout.num_slots=4"], {"evaluation": (4, 1)}, "same"),
        (["evaluation.num_problems=3"], {"evaluation": (3, 1)}, "same"),
        # Samples share their prompt: 16 completions in slots of 4 lanes.
        (["evaluation.num_samples=4"], {"evaluation": (8, 1), "samples": (4, 4)}, "same"),
        # A rollout in 8 bits is not what is evaluated.
        (
            ["rollout.kv_cache_dtype=int8", "rollout.weights_dtype=int8"],
            {"evaluation": (8, 1)},
            "exact",
        ),
        (["evaluation.num_problems=0"], {}, None),
        (["data.num_eval=0"], {}, None),
    ],
)
def test_an_evaluation_must_fit_too(options, drawn, weights):
    config = loading.load(TINY, [f"--config.{option}" for option in options])
    model, mesh = model_lib.model_shape(config), tiny.one_device()
    step = Step(config, model, mesh, Lengths.of(config))

    assert {n: d.slots.live_RW.shape for n, d in step.evaluations.items()} == drawn
    names = [program.name for program in step.programs()]
    for name in drawn:
        assert {f"{name} admit", f"{name} decode"} < set(names)
    assert len([name for name in names if "admit" in name]) == 1 + len(drawn)
    # Float32: a token's keys and values of one layer of 2 heads of 8; 8 tokens of a completion and
    # 16 of its prompt.
    per_slot = lambda lanes: 2 * 2 * 8 * 4 * (16 + lanes * 8)  # noqa: E731
    caches = [slots * per_slot(lanes) for slots, lanes in drawn.values()]
    # Layers are copied one by one for sampling; the rest is read where it is.
    copied = step.held()["evaluation"] - max(caches, default=0)
    layer = sum(x.size for x in jax.tree.leaves(step.state.params["layers"]))
    assert copied == (4 * layer if drawn else 0)
    if weights == "exact":
        assert step.held()["rollout weights"] < copied
    for program in step.programs():
        if program.name in ("admit", "evaluation admit"):  # as many prompts as there are slots
            (main,) = re.findall(r"func.func public @main\(.*", program.call.lower().as_text())
            (read,) = re.findall(r"tensor<(\d+)x16xi32>", main)
            of_rollout = 1 if "rollout.num_slots=4" in options else 4  # in groups of 4
            of_evaluation = min(4, drawn["evaluation"][0]) if drawn else 0
            assert int(read) == (of_rollout if program.name == "admit" else of_evaluation)
        if program.name in ("evaluation admit", "evaluation decode"):
            program.call.lower()
            assert program.runs == 0  # in a step
            # Beside it lies what learns and the reference, but for what it reads where it is.
            held = step.held()
            learning = held["weights"] + held["optimizer"] + held["reference"]
            read = held["weights"] - 4 * layer
            assert program.beside == pytest.approx(learning - read, abs=64)  # and counters
    arrays = planning_plan.arrays_alone({name: 0.0 for name in step.held()} | {"evaluation": 7.0})
    assert arrays == 7.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_float32_network_are_exact(dtype):
    """On every device: by default a GPU takes 11 bits of each number, and a TPU 8."""
    config = loading.load(TINY, [f"--config.model.dtype={dtype}"])
    model, mesh = model_lib.model_shape(config), tiny.one_device()
    step = Step(config, model, mesh, Lengths.of(config))
    asked = {}
    for program in step.programs():
        text = program.call.lower().as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        if products:
            asked[program.name] = {"precision = [HIGHEST, HIGHEST]" in line for line in products}
    names = {"admit", "decode", "score policy", "score reference", "gradient"}
    names |= {"evaluation admit", "evaluation decode", "supervised gradient"}
    assert asked == {name: {dtype == "float32"} for name in names}


def test_tokens_between_two_looks_at_the_host_change_no_count(config, step):
    """Of a program with a loop inside the loop that ends by what it computes."""
    there = Step(config, step.model, step.mesh, step.lengths)
    decoder = dataclasses.replace(there.engine.decoder, steps=5)
    engine = Engine(decoder, num_slots=there.engine.num_slots)
    there.rollout = dataclasses.replace(there.rollout, engine=engine)

    one, five = (
        found.compile(lambda name: name == "decode")[0].cost.flops for found in (step, there)
    )

    assert five == pytest.approx(one, rel=1e-3)


def test_of_the_cache_of_a_kernel_that_skips_a_share_is_read(config, step):
    """About half of it, where all completions are of the limit's length."""
    there = Step(config, step.model, step.mesh, step.lengths)
    there.engine = Engine(
        dataclasses.replace(there.engine.decoder, kv_cache=TritonDecode(), max_tokens=1024)
    )
    there.config = loading.load(TINY, ["--config.rollout.max_tokens=1024"])
    there.lengths = Lengths.of(there.config)
    there.rollout = there._drawing(there.engine, *there.lengths.completion_PG.shape, 1.0)

    read = there._read_of_cache(1023, there.lengths.completion_PG.size)

    size = step.model.num_kv_heads, step.model.head_size
    (shape,) = read
    assert math.prod(shape) * 8 == there.lengths.completion_PG.size * 1024 * math.prod(size)
    # Of 16 blocks none at the first token, one at the next 64, and so on.
    assert read[shape] == pytest.approx((64 * 15 * 16 / 2 + 62 * 16) / (1023 * 16))
    assert step._read_of_cache(1023, 8) == {}


def _no_cuda() -> bool:
    return importlib.util.find_spec("jax_cuda13_plugin") is None


@pytest.mark.skipif(not _no_cuda(), reason="the compiler is installed")
def test_what_gpus_need_is_named():
    with pytest.raises(ValueError, match=r"h200:1: the CUDA compiler .*\.\[gpu\]"):
        topologies.devices("h200:1")


@pytest.mark.skipif(_no_cuda(), reason="needs the extra cuda12 or cuda13, but no GPU")
@pytest.mark.parametrize("topology", ["h200:1", "a100:8", "b200:8", "l4:4", "rtx5090:1"])
def test_a_step_is_compiled_for_gpus_that_are_not_there(topology, tmp_path):
    """With the kernels of GPUs, which are compiled too; arrays are those of the step on a CPU."""
    options = ["model.dtype=bfloat16", "model.width=256", "batch.prompts=16"]
    memory = {}
    for name in (topology, "cpu:" + topology[-1]):
        file = tmp_path / "plan.json"
        subprocess.run(
            [sys.executable, "-m", "grpo_jax.plan", "--config", TINY, "--topology", name]
            + ["--json", str(file), *(f"--config.{o}" for o in options)],
            check=True,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""},
        )
        memory[name] = json.loads(file.read_text())["bytes_per_device"]
    here, there = memory.values()
    arrays = here.keys() - {"activations", "cache"}
    assert {name: here[name] for name in arrays} == {name: there[name] for name in arrays}
    assert here["cache"] >= there["cache"]  # in whole blocks of the kernel
    assert 0.2 < here["activations"] / there["activations"] < 5


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
        *("init_params", "count_nonfinite", "init_state"),
        *(f"supervised {n}" for n in ("reorder", "reorder", "advantages")),
        *(f"supervised {n}" for n in ("zero_gradient", "gradient", "optimizer_step")),
        *("publish_layer", "empty_slots", "admit", "decode"),
        *("reorder", "reorder", "advantages", "zero_gradient", "gradient", "optimizer_step"),
        "learning_rate",
        *("evaluation empty_slots", "evaluation admit", "evaluation decode"),
    ]
    assert report["mesh"] == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert report["peak_bytes"] == max(p["peak_bytes"] for p in report["programs"])
    assert report["bytes_per_device"]["reference"] == 0
    assert list(report["sent_bytes"]["all-reduce"]) == ["data"]
    assert np.isclose(report["flops"], sum(p["flops"] for p in report["programs"]))
    printed = capsys.readouterr().out
    assert "parameters on 8 devices" in printed and "so it is unknown whether it fits" in printed


def test_no_head_is_cut_on_80_columns(monkeypatch):
    """With and without rates, and large numbers beside the longest names."""
    axes = ("data", "fsdp", "sequence", "tensor")
    gather = hlo.Collective("all-gather", axes, 8, 123_456e9, 1.0, "")
    cost = hlo.Cost(flops=98_765e12, bytes=123_456e9, collectives=(gather,))
    programs = [
        Compiled(name, "update", runs, 0.0, 2.0**40, 0.0, 0.0, cost, 1.0)
        for name, runs in (("supervised optimizer_step", 128), ("evaluation empty_slots", 0))
    ]
    rates = {"flops": 1e15, "bandwidth": 3e12, "link": 4e11}
    without = Chip("c", None, None, None, None, None, "", None, "")
    for chip in (without, dataclasses.replace(without, **rates)):
        mesh = {"data": 64, "fsdp": 8, "sequence": 4, "tensor": 8}
        plan = Plan("cpu:16384", chip, mesh, 123_456_789_012, {"weights": 2.0**40}, programs)
        out = io.StringIO()
        for module in (report, messages_console):
            monkeypatch.setattr(module, "console", Console(file=out, width=80, highlight=False))
        report.show(plan)
        text = out.getvalue()
        assert "\N{HORIZONTAL ELLIPSIS}" not in text and max(map(len, text.splitlines())) <= 80
        for head in ("program", "runs", "peak GiB", "TFLOP", "GB", "sent GB", "waited for, s"):
            assert f" {head} " in text
        assert "data 64 x fsdp 8 x sequence 4 x tensor 8" in text and "16384 devices" in text
        assert ("least s" in text) == ("308.640" in text) == (chip.flops is not None)


def by_hand(flops: float) -> Plan:
    """A plan of one program on a chip of 1e15 operations and 1e12 bytes a second."""
    chip = Chip("c", 2.0**30, 1e15, 1e12, 1e11, None, "", 2.0**30, "")
    cost = hlo.Cost(flops=flops, bytes=3e12)
    program = Compiled("gradient", "update", 1, 0.0, 2.0**20, 0.0, 0.0, cost, 1.0)
    return Plan("c:1", chip, {"data": 1}, 1000, {"weights": 4000.0}, [program])


def test_a_plan_says_what_bounds_a_program():
    for flops, bound in ((1e15, "memory"), (9e15, "compute")):
        (program,) = by_hand(flops).as_json()["programs"]
        assert program["bound"] == bound
        assert program["seconds"][bound] == max(3.0, flops / 1e15)


def test_changes_that_were_tried_and_those_that_were_refused(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(report, "console", Console(file=out, width=100, highlight=False))
    tried = [
        advice.Tried({"optim.offload": True}, by_hand(1e15)),
        advice.Tried({"mesh.fsdp": 3}, None, refusal="it does not divide"),
        advice.Tried({"mesh.fsdp": 2}, None, arrays=2.0**31),
    ]
    report.show_tried("Changes", tried)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["│", "optim.offload", "=", "True", "│", "yes", "│", "0.00", "│", "3.0", "│"] in lines
    assert ["│", "mesh.fsdp", "=", "3", "│", "refused", "│", "│", "│"] in lines
    assert ["│", "mesh.fsdp", "=", "2", "│", "no", "│", "over", "2.00", "│", "│"] in lines
