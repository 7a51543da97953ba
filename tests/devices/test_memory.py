"""What is said of memory: how much is in use, and what to change where there is too little."""

from __future__ import annotations

import mmap

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.devices import memory
from grpo_jax.devices.phases import PHASES, phase

_GIB = 2**30


@pytest.mark.parametrize(
    ("text", "asked"),
    [  # as backends wrote them
        ("RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes.", 2**46),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.",
            4770354232,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB.", 3 * 2**29),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 2.50GiB (2684354560B) on device "
            "ordinal 0",
            5 * 2**29,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 22.00G of 15.48G hbm.\n Exceeded hbm capacity by 6.52G.",
            22 * _GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Attempting to reserve 4.00G at the bottom of memory. That was not "
            "possible. There are 1.92G free, 0B reserved, and 1.92G reservable.",
            4 * _GIB,
        ),
        ("RESOURCE_EXHAUSTED: a message of another time", None),
    ],
)
def test_what_was_asked_for_is_read_from_the_message(text, asked):
    assert memory._asked_bytes(text) == asked


def test_a_phase_that_runs_out_says_so():
    """By an allocation that no machine has room for: 2**44 numbers are 65,536 GiB."""
    with pytest.raises(memory.OutOfMemory) as info, phase("update"), phase("rollout"):
        jnp.ones(2**44, jnp.float32).block_until_ready()
    message = str(info.value)
    assert "phase rollout" in message and "65,536.00 GiB" in message
    assert all(name in message for name in ("rollout.num_slots", "rollout.max_tokens"))
    with pytest.raises(ValueError, match=r"phase update.*batch\.microbatch.*model\.remat.*fsdp"):
        with phase("update"):
            jax.jit(lambda: jnp.ones(2**44, jnp.float32))().block_until_ready()


def test_other_errors_stay_as_they_are():
    def fail(x):
        raise FileNotFoundError("gone")

    with pytest.raises(jax.errors.JaxRuntimeError, match="gone"), phase("update"):
        jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), 1.0).block_until_ready()
    with pytest.raises(AssertionError):
        with phase("lunch"):
            pass


def test_there_is_advice_for_each_phase():
    assert memory._REMEDIES.keys() == set(PHASES)


class _Device:
    device_kind = "NVIDIA H200"

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_usage_is_that_of_the_fullest_device(monkeypatch):
    stats = [
        {"bytes_in_use": n * _GIB, "peak_bytes_in_use": (5 - n) * _GIB, "bytes_limit": 9 * _GIB}
        for n in (1, 3)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: [_Device(s) for s in stats])
    usage = memory.usage()
    assert usage["memory/device_gib"] == 3 and usage["memory/device_peak_gib"] == 4
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1024 bytes.")
    assert "NVIDIA H200, which has 9.0 GiB, 1.0 of them in use" in str(
        memory.refusal("update", error)
    )


def test_a_cpu_tells_of_the_process_alone():
    before = memory.usage()
    assert before.keys() == {"memory/process_gib"}
    grown = lambda: memory.usage()["memory/process_gib"] - before["memory/process_gib"]  # noqa: E731
    with mmap.mmap(-1, 1 << 30):  # asked for, and not touched: nobody holds it
        assert grown() < 0.2
    held = bytearray(b"x" * (512 << 20))
    assert 0.4 < grown() < 0.8
    del held
