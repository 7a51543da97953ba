"""What the tests of whole runs share."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import pytest
import shared_programs
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> str:
    """A cache folder of the session's own; GRPO_JAX_TEST_CACHE keeps one between sessions."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' folders lie in the session's
        folder = folder.parent
    return os.environ.get("GRPO_JAX_TEST_CACHE") or str(folder / "cache")


@pytest.fixture
def compile_cache(cache_folder, monkeypatch):
    """Programs of this process compile into the session's folder, and no longer after the test."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", cache_folder)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it goes on writing where it began to


@pytest.fixture
def one_device(compile_cache, monkeypatch):
    """This process sees one of its devices, as the processes that are `alone` do.

    So most programs of a run are in the session's folder already, whichever test compiled them, or
    in this process.
    """
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: first)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    shared_programs.share(monkeypatch.setattr)


@pytest.fixture(scope="session")
def alone(cache_folder) -> dict[str, str]:
    """The environment of a process with one device, which keeps all that it compiles."""
    return _alone(os.environ, cache_folder)


@pytest.fixture(scope="session")
def alone_optimized(cache_folder, optimized) -> dict[str, str]:
    """The same of a process that compiles programs as users do."""
    return _alone(optimized, cache_folder)


def _alone(environment: Mapping[str, str], cache_folder: str) -> dict[str, str]:
    flags = environment["XLA_FLAGS"].split()
    kept = [f for f in flags if "xla_force_host_platform_device_count" not in f]
    return environment | {
        "XLA_FLAGS": " ".join(kept),
        "XDG_CACHE_HOME": cache_folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
