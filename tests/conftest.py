"""Eight CPU devices, programs that compile quickly, no network, and the folder of shared data.

The environment is set when pytest imports this file, before any test imports JAX. Test folders are
not packages, so file names are unique.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_flags = os.environ.get("XLA_FLAGS", "").split()
_flags = [flag for flag in _flags if "xla_force_host_platform_device_count" not in flag]
os.environ["XLA_FLAGS"] = " ".join([*_flags, "--xla_force_host_platform_device_count=8"])
# Programs of tests take longer to compile than to run. So, XLA takes a sixth of the time to compile
# one, and a user's options compile the quickstart; GRPO_JAX_TEST_OPTIMIZED=1 has all as users do.
_QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones have no such option
    _QUICK += ["--xla_cpu_use_fusion_emitters=false"]
if not os.environ.get("GRPO_JAX_TEST_OPTIMIZED"):
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *_QUICK])
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # of each operation; nothing here reads them
# Hundreds of processes import the package, and each would compile its modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Threads of products of tiny matrices only wait for each other, which keeps the cores busy.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _is_local(family: int, address: object) -> bool:
    if family == socket.AF_UNIX:
        return True
    host = address[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _guarded(connect):
    def connect_locally(self, address):
        if not _is_local(self.family, address):
            raise PermissionError(f"A test tried to reach {address}; tests use no network.")
        return connect(self, address)

    return connect_locally


socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)


@pytest.fixture(scope="session", autouse=True)
def same_programs() -> None:
    """A program that this process has compiled is not compiled again."""
    import compile_once  # imports JAX, which pytest's first process does without
    import jax

    compile_once.install()
    # Without a folder to keep programs in, JAX would compute their names for nothing.
    jax.config.update("jax_enable_compilation_cache", False)
    # What was imported and collected stays; tracing makes many objects, and few circles of them.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and small models; GRPO_JAX_SHARED, or beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("GRPO_JAX_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: {folder} does not exist (set GRPO_JAX_SHARED)")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a disk of 1 MB of its own, which can be filled."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs, as root has")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def optimized() -> dict[str, str]:
    """The environment of a process that compiles programs as users do."""
    kept = {n: v for n, v in os.environ.items() if n != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    flags = [flag for flag in kept["XLA_FLAGS"].split() if flag not in _QUICK]
    return kept | {"XLA_FLAGS": " ".join(flags)}
