"""Programs are counted once, and not after the end; options are those that XLA has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import tiny

from grpo_jax.devices import compiling as compiling_lib
from grpo_jax.devices import sharding
from grpo_jax.devices.compiling import Compiling


@pytest.fixture
def quickly(request):
    """Whether JAX is asked to compile quickly."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", request.param)
    yield request.param
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("quickly", [False], indirect=True)
def test_options_of_gpus_are_asked_for_where_xla_has_them(quickly, monkeypatch):
    """A program with an option that is unknown cannot be compiled."""
    mesh = tiny.one_device()
    own = compiling_lib.options(mesh)
    level, library = {"xla_backend_optimization_level": 1}, "xla_cpu_experimental_ynn_fusion_type"
    assert own in (level, level | {library: "LIBRARY_FUSION_TYPE_DOT"})
    assert compiling_lib.options_of_decoding(mesh) == level
    monkeypatch.setattr(sharding, "is_gpu", lambda mesh: True)
    merger, split = "xla_gpu_dot_merger_threshold_mb", "xla_gpu_experimental_force_split_k"
    assert compiling_lib.options_of_decoding(mesh) == own | {merger: 0, split: 1}

    assert not compiling_lib._is_known("xla_gpu_there_is_no_such_option", 1)

    monkeypatch.setattr(compiling_lib, "_is_known", lambda name, value: name == merger)
    assert compiling_lib.options(mesh) == {}
    assert compiling_lib.options_of_decoding(mesh) == {merger: 0}


@pytest.mark.parametrize("quickly", [True], indirect=True)
def test_a_cpu_compiles_more_quickly_where_jax_was_asked_to(quickly, monkeypatch):
    quick = compiling_lib.options(tiny.one_device())
    jax.jit(lambda x: x + 1, compiler_options=quick)(1.0)
    assert quick["xla_cpu_parallel_codegen_split_count"] == 1
    emitters = "xla_cpu_use_fusion_emitters"  # jaxlib 0.11.2 has no such option any more
    assert quick.get(emitters, False) is False

    monkeypatch.setattr(compiling_lib, "_is_known", lambda name, value: name == emitters)
    assert compiling_lib.options(tiny.one_device()) == {emitters: False}


def test_programs_are_counted_where_they_are_compiled():
    x = jnp.ones(3)
    with Compiling() as compiling:
        program = jax.jit(lambda x: jnp.sin(x) * 3.25)
        program(x)
        program(x)  # compiled already
        first = compiling.since_last()
        again = compiling.since_last()
    jax.jit(lambda x: jnp.cos(x) * 4.25)(x)
    assert first["programs"] == again["programs"] == compiling.programs == 1
    assert first["time/compile_s"] > 0 == again["time/compile_s"]
