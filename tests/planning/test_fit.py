"""The choice of microbatch and recomputing by memory, its numbers, and that a run keeps it."""

from __future__ import annotations

import json
from typing import ClassVar

import jax
import numpy as np
import pytest
import tiny

from grpo_jax.config import loading
from grpo_jax.devices import sharding, transfer
from grpo_jax.models.lora import Weights
from grpo_jax.planning import fit as fit_lib
from grpo_jax.planning import hlo
from grpo_jax.planning.advice import changed
from grpo_jax.planning.compiled import Compiled
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.programs import Step
from grpo_jax.planning.topologies import Chip
from grpo_jax.setup.learner import MemoryPlan, make_learner, make_scorer
from grpo_jax.structs import Experience, Sampling

P, G, Q, C = 4, 4, 16, 8
ALL, ONE = P * (Q + G * (C - 1)), Q + C - 1  # tokens of an update, and of one completion

LIMIT = "batch.memory_limit_gib"


@pytest.fixture(scope="module")
def config():
    options = [f"batch.prompts={P}", f"batch.group={G}", "batch.minibatches=1"]
    options += ["algorithm.num_iterations=1", "model.remat=auto", "batch.microbatch=-1"]
    return loading.load("tests/helpers/tiny_config.py", [f"--config.{o}" for o in options])


class _Once(Step):
    """A step that compiles a fit's program the first time alone."""

    compiled: ClassVar = {}

    def __init__(self, *args, known):
        self._args = args

    def compile(self, only):
        if self._args[-1] not in self.compiled:
            super().__init__(*self._args)
            self.compiled[self._args[-1]] = super().compile(only)
        return self.compiled[self._args[-1]]


def test_a_smaller_limit_computes_more_again_then_takes_fewer_tokens(config, monkeypatch, capsys):
    monkeypatch.setattr(fit_lib, "Step", _Once)
    lengths = Lengths.of(config)
    choose = lambda limit, config=config: fit_lib.choose(  # noqa: E731
        config, tiny.MODEL, tiny.one_device(), lengths, limit
    )
    peak = lambda fit: _Once.compiled[fit][0].peak  # noqa: E731

    largest = choose(1e12)
    assert largest == MemoryPlan("none", ALL)
    dots = choose(peak(largest) - 1)
    assert dots == MemoryPlan("dots", ALL)
    full = choose(peak(dots) - 1)
    assert full == MemoryPlan("full", ALL)
    least = choose(peak(full) - 1)
    assert least == MemoryPlan("full", ONE)
    assert peak(least) < peak(full) < peak(dots) < peak(largest)
    assert choose(1.0) == least  # nothing fits
    assert f'"full" and microbatches of {ONE} tokens a row' in capsys.readouterr().out
    # The option holds before what the device has; without either it is the usual.
    assert choose(1e12, changed(config, {LIMIT: peak(dots) / 2**30})) == dots
    assert choose(None) == MemoryPlan()


@pytest.mark.parametrize(
    ("flops", "bandwidth", "resource"), [(1.0, 1e30, "flops"), (1e30, 1.0, "bytes")]
)
def test_the_fastest_on_the_chip_is_taken(config, monkeypatch, flops, bandwidth, resource):
    """Where arithmetic takes all the time that with the least of it, and so for memory."""
    monkeypatch.setattr(fit_lib, "Step", _Once)
    chip = Chip("slow", 1e12, flops, bandwidth, 1.0, None, "", 1e12, "")
    arguments = config, tiny.MODEL, tiny.one_device(), Lengths.of(config), 1e12

    chosen = fit_lib.choose(*arguments, chip)

    spent = {f: getattr(p.cost, resource) for f, (p,) in _Once.compiled.items() if f.tokens == ALL}
    assert {f.remat for f in spent} == {"none", "dots", "full"}
    assert spent[chosen] == min(spent.values()) < max(spent.values())
    assert chosen.remat == "none" or resource == "bytes"


def test_more_tokens_are_taken_while_that_is_faster(config, monkeypatch):
    """Of 100 bytes: a size of 8 would be faster, but one of 4 is not."""
    seconds, sizes = {1: 5.0, 2: 4.0, 4: 4.5, 8: 1.0}, [1, 2, 4, 8]

    class Measured(Step):
        def __init__(self, *args, known):
            self.fit = args[-1]

        def compile(self, only):
            kernel = hlo.Kernel(seconds[self.fit.tokens], 0.0, 1.0)
            cost = hlo.Cost(kernels=(kernel,))
            return [Compiled("gradient", "", 1, 10.0 * self.fit.tokens, 0, 0, 0, cost, 0.0)]

    monkeypatch.setattr(fit_lib, "Step", Measured)
    monkeypatch.setattr(fit_lib, "_sizes", lambda *_: sizes)
    monkeypatch.setattr(fit_lib, "usual_tokens", lambda _: 1)
    chip = Chip("some", 1e12, 1.0, 1.0, 1.0, None, "", 1e12, "")
    arguments = config, tiny.MODEL, tiny.one_device(), Lengths.of(config)
    assert fit_lib.choose(*arguments, 100.0, chip).tokens == 2
    assert fit_lib.choose(*arguments, 15.0, chip).tokens == 1
    assert fit_lib.choose(*arguments, 100.0).tokens == 8  # rates are not known
    seconds[4] = 3.0
    assert fit_lib.choose(*arguments, 100.0, chip).tokens == 8


def test_the_gradient_is_the_same(config):
    rollouts = tiny.rollouts(P, G, C)
    mesh = tiny.one_device()
    experience = Experience(
        rollouts=transfer.shard_rows(mesh, rollouts),
        advantage=rollouts.length_PG - np.float32(4),
        action_PGC=rollouts.logp_PGC < 0,
        old_logp_PGC=None,
        ref_logp_PGC=rollouts.logp_PGC,
    )
    found, counts = [], []
    for chosen in (MemoryPlan("none", ALL), MemoryPlan("full", ONE)):
        learner = make_learner(config, tiny.MODEL, mesh, chosen)
        microbatches = learner.scorer.microbatches(rollouts, np.arange(P))
        counts.append(microbatches.number)
        carry = learner.update.zero_gradient()
        grads, sums, _ = learner.update.gradient(
            Weights(tiny.params()), microbatches.number, carry, experience, *microbatches.arrays
        )
        found.append((grads, sums["loss"]))
    assert counts[0] == 1 and counts[1] > P
    assert np.abs(found[0][0]["layers"]["mlp"]["up"]["kernel"]).max() > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


def test_a_run_keeps_its_choice(config, tmp_path, monkeypatch):
    asked = []

    def choose(*args):
        asked.append(args)
        return MemoryPlan("full", 100 * len(asked))

    monkeypatch.setattr(fit_lib, "choose", choose)
    of_run = lambda config: fit_lib.of_run(config, tiny.MODEL, tiny.one_device(), Q, tmp_path)  # noqa: E731

    first = of_run(config)
    assert first == of_run(config) == MemoryPlan("full", 100)
    assert asked[0][5] is None  # the rates of a CPU
    assert json.loads((tmp_path / "fit.json").read_text())["chosen"] == {
        "remat": "full",
        "tokens": 100,
    }
    # Another limit asks for another choice; a config that leaves nothing open for none.
    assert of_run(changed(config, {LIMIT: 1.0})) == MemoryPlan("full", 200)
    closed = changed(config, {"batch.microbatch": 2, "model.remat": "none"})
    assert of_run(closed) == MemoryPlan() and len(asked) == 2


@pytest.mark.parametrize(
    ("layers", "on_gpu", "in_a_loop"),
    [("on", True, True), ("off", False, False), ("auto", False, True), ("auto", True, False)],
)
def test_layers_in_a_loop_or_apart(config, monkeypatch, layers, on_gpu, in_a_loop):
    monkeypatch.setattr(sharding, "is_gpu", lambda mesh: on_gpu)

    scorer = make_scorer(
        changed(config, {"model.scan_layers": layers}), tiny.MODEL, tiny.one_device(), Sampling()
    )

    assert scorer.scan_layers == in_a_loop
