"""Traces of some steps, and the table of where devices spent their time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from grpo_jax import profile
from grpo_jax.devices.phases import Trace, phase
from grpo_jax.metrics import trace as trace_lib


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A folder with a trace of steps 2 and 3 of four, each a small update and something unnamed."""

    @jax.jit
    def learn(x):
        def layer(x, _):
            with jax.named_scope("mlp"):
                return jnp.tanh(x @ x), None

        with jax.named_scope("update"):
            return jax.lax.scan(layer, x, None, length=5)[0]

    folder = tmp_path_factory.mktemp("traced")
    copy = jax.jit(lambda x: jnp.sin(x) + 1)
    x, settled = jnp.eye(200), []
    with Trace(folder, (2, 3)) as trace:
        for step in range(1, 5):
            trace.begin(step, lambda step=step: settled.append(step))
            with phase("update"):
                copy(learn(x)).block_until_ready()
    assert settled == [2, 4]  # before the first, and after the last
    return folder


def _events(folder):
    """All events of the trace, by line."""
    data = jax.profiler.ProfileData.from_file(str(trace_lib.newest_trace(folder)))
    return [[(e, dict(e.stats)) for e in line.events] for p in data.planes for line in p.lines]


def test_the_steps_asked_for_and_their_phases_are_in_it(traced):
    events = [event for line in _events(traced) for event in line]
    assert [s["step_num"] for e, s in events if e.name == "step"] == [2, 3]
    assert sum(e.name == "update" for e, _ in events) == 2
    assert list(traced.glob("plugins/profile/*/*.trace.json.gz"))  # for Perfetto


def test_operations_have_their_phase_and_part(traced):
    found = trace_lib.operations(trace_lib.newest_trace(traced))
    assert {o.phase for o in found} == {"update", "other"}
    longest = next(o for o in found if o.phase == "update" and "mlp" in o.part)
    assert longest.part.startswith("mlp/") and longest.calls == 2 * 5
    assert longest.program.startswith("jit_learn(")
    assert {o.calls for o in found if o.name.startswith("while")} == {2}  # a step, not a layer


def test_the_table_adds_up(traced):
    """To the time in which some operation ran: what lies in a loop is not counted twice."""
    busy_ns = 0.0
    for line in _events(traced):
        end = 0.0
        for event, stats in sorted(line, key=lambda e: e[0].start_ns):
            if "hlo_op" in stats and event.duration_ns > 0:
                until = event.start_ns + event.duration_ns
                busy_ns += max(0.0, until - max(end, event.start_ns))
                end = max(end, until)
    found = trace_lib.operations(trace_lib.newest_trace(traced))
    rows = trace_lib.rows(found, top=2)
    assert sum(row["seconds"] for row in rows) == pytest.approx(busy_ns / 1e9, rel=1e-6)
    update, other = ([r for r in rows if r["phase"] == name] for name in ("update", "other"))
    assert len(update) == 3 and update[0]["seconds"] >= update[1]["seconds"]
    assert update[2]["name"].endswith(" others") and len(other) == 1
    for own in (update, other):
        assert sum(row["share"] for row in own) == pytest.approx(1.0)
    assert sum(row["calls"] for row in rows) == sum(o.calls for o in found)


class _Event(NamedTuple):
    start_ns: float
    duration_ns: float
    op: str
    name: str = ""

    @property
    def stats(self):
        return [("hlo_op", self.op), ("hlo_module", "m"), ("program_id", 7)] if self.op else []


def test_an_operation_is_counted_without_those_inside_it():
    #  while  0 ------------------ 100        after 100 - 110
    #     a     10 -- 30     b 50 - 90
    #            c 12-17
    events = [
        _Event(0, 100, "while"), _Event(10, 20, "a"), _Event(12, 5, "c"), _Event(50, 40, "b"),
        _Event(55, 9, ""), _Event(100, 10, "after"),
    ]  # fmt: skip
    alone = dict(trace_lib._alone(reversed(events), nested=True))
    assert {name: ns for (_, name), ns in alone.items()} == {
        "while": 40, "a": 15, "c": 5, "b": 40, "after": 10
    }  # fmt: skip
    assert {program for program, _ in alone} == {"m(7)"}


def test_kernels_of_a_graph_on_a_gpu():
    """They overlap, and one is called after the operation that it computes, if after any."""
    events = [
        _Event(0, 50, "command_buffer_8", "nvjet_sm90"),
        _Event(40, 20, "command_buffer_8", "loop_add_fusion_2"),
    ]
    alone = dict(trace_lib._alone(events, nested=False))
    assert alone == {("m(7)", "nvjet_sm90"): 50, ("m(7)", "loop_add_fusion_2"): 20}
    scopes = {"loop_add_fusion.2": "jit(f)/update/mlp/add", "while": "jit(f)/update/while"}
    assert trace_lib._scope(scopes, "loop_add_fusion_2") == "jit(f)/update/mlp/add"
    assert trace_lib._scope(scopes, "while") == "jit(f)/update/while"
    assert trace_lib._scope(scopes, "nvjet_sm90") == ""


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(decode)/shard_map/rollout/decode/while/body/Block/mlp/mlp._tokens/up/dot_general",
         "decode/Block/mlp/up/dot_general"),
        ("jit(add_shard)/shard_map/update/while/body/closed_call/transpose(jvp(vocabulary))/mul",
         "vocabulary/mul (backward)"),
        ("jit(add_shard)/update/while/body/transpose(jvp())/checkpoint/rematted_computation/"
         "Block/mlp/mul", "Block/mlp/mul (again)"),
        ("jit(finish)/update/(optimizer/reduce_sum:optimizer/reduce_sum)", "optimizer/reduce_sum"),
        ("jit(f)/sin", ""),
    ],
)  # fmt: skip
def test_a_part_is_what_stands_below_the_phase(scope, part):
    assert trace_lib._part(scope) == part


def test_a_folder_without_a_trace(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"profile\.steps"):
        profile.main(["--workdir", str(tmp_path)])


def test_the_program_prints_the_table(traced, capsys):
    profile.main(["--workdir", str(traced), "--top", "1"])
    text = capsys.readouterr().out
    assert "update:" in text and "others" in text and "learn(" in text
