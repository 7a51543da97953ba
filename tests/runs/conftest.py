"""What the tests of whole runs share."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable, Iterator, Mapping

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
    with _caching(cache_folder, monkeypatch):
        yield


@contextlib.contextmanager
def _caching(cache_folder: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    patch.setenv("XDG_CACHE_HOME", cache_folder)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()  # it has noted that there is none
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it goes on writing where it began to


@pytest.fixture
def one_device(compile_cache, monkeypatch):
    """This process sees one of its devices, as the processes that are `alone` do.

    So most programs of a run are in the session's folder already, whichever test compiled them, or
    in this process.
    """
    _see(1, monkeypatch)
    shared_programs.share(monkeypatch.setattr)


def _see(number: int, patch: pytest.MonkeyPatch) -> None:
    first = jax.devices()[:number]
    patch.setattr(jax, "devices", lambda *backend: first)
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="module")
def runs_here(cache_folder) -> Callable[..., str]:
    """A function that runs a program of the package in this process, on so many of its devices.

    It gives what the program prints.
    """

    def run(program: str, argv: list[str], devices: int = 1) -> str:
        with (
            pytest.MonkeyPatch.context() as patch,
            _caching(cache_folder, patch),
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            _see(devices, patch)
            shared_programs.share(patch.setattr)
            importlib.import_module(f"grpo_jax.{program}").main(argv)
        return said.getvalue()

    return run


@pytest.fixture(scope="module")
def drive_here(cache_folder) -> Callable[[list[dict]], list[str]]:
    """As `driving.drive`, but in this process, which has the programs of other runs.

    Its sums may be rounded otherwise than those of a process that is `alone`: with eight devices
    it has more threads.
    """
    from drive import do, install

    def drive(jobs: list[dict]) -> list[str]:
        with (
            pytest.MonkeyPatch.context() as patch,
            _caching(cache_folder, patch),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            _see(1, patch)
            install(patch.setattr)
            return [do(job) for job in jobs]

    return drive


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
