"""Which chip a device is, and that the table tells rates of devices in their units."""

from __future__ import annotations

import pytest

from grpo_jax.devices import chips
from grpo_jax.devices.chips import chip
from grpo_jax.planning import topologies


@pytest.mark.parametrize(
    ("device_kind", "name", "flops"),
    [
        ("TPU v4", "TPU v4", 275e12),
        ("TPU v5 lite", "TPU v5e", 197e12),
        ("TPU v5e", "TPU v5e", 197e12),
        ("TPU v5", "TPU v5p", 459e12),
        ("TPU v5p", "TPU v5p", 459e12),
        ("TPU v6 lite", "TPU v6e", 918e12),
        ("TPU7x", "TPU v7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA H200", "H200", 989e12),
        ("NVIDIA GH200 480GB", "GH200", 989e12),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB", 312e12),
        ("NVIDIA B200", "B200", 2250e12),
        ("NVIDIA GB200", "GB200", 2500e12),
        ("NVIDIA L4", "L4", 121e12),
        ("NVIDIA L40S", "L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", 209.5e12),
    ],
)
def test_a_device_is_found_by_its_kind(device_kind, name, flops):
    found = chip(device_kind)
    assert (found.name, found.bf16_flops) == (name, flops)


@pytest.mark.parametrize(
    ("device_kind", "bytes_per_s"),
    [
        ("TPU v4", 300e9),
        ("TPU v5e", 200e9),
        ("TPU v5p", 600e9),
        ("TPU v6e", 400e9),
        ("TPU7x", 300e9),
        ("NVIDIA A100-SXM4-40GB", 300e9),
        ("NVIDIA A100-SXM4-80GB", 300e9),
        ("NVIDIA H100 80GB HBM3", 450e9),
        ("NVIDIA H200", 450e9),
        ("NVIDIA B200", 900e9),
        ("NVIDIA L4", 32e9),
    ],
)
def test_the_links_of_a_device(device_kind, bytes_per_s):
    """All of them together, one way."""
    assert chip(device_kind).ici_bytes_per_s == bytes_per_s


@pytest.mark.parametrize(
    ("device_kind", "bytes_per_s", "gib"),
    [
        ("TPU v4", 1200e9, 32),
        ("TPU v5e", 819e9, 16),
        ("TPU v5p", 2765e9, 95),
        ("TPU v6e", 1638e9, 32),
        ("TPU7x", 7380e9 / 2, 96),
        ("NVIDIA H100 80GB HBM3", 3350e9, 80),
        ("NVIDIA H200", 4800e9, 141),
        ("NVIDIA A100-SXM4-40GB", 1555e9, 40),
        ("NVIDIA A100-SXM4-80GB", 2039e9, 80),
        ("NVIDIA L4", 300e9, 24),
    ],
)
def test_the_memory_of_a_device(device_kind, bytes_per_s, gib):
    found = chip(device_kind)
    assert (found.hbm_bytes_per_s, found.hbm_bytes) == (bytes_per_s, gib * 2**30)


@pytest.mark.parametrize(
    "device_kind", ["cpu", "TPU v4 lite", "NVIDIA A1000", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_no_chip_is_guessed(device_kind):
    assert chip(device_kind) is None


def test_the_rates_of_a_device_that_a_run_has():
    class Device:
        device_kind = "TPU v4"

    found = topologies.of_device(Device)
    assert (found.flops, found.bandwidth, found.link) == (275e12, 1200e9, 100e9)
    Device.device_kind = "NVIDIA H200"
    assert topologies.of_device(Device).link == 450e9
    Device.device_kind = "cpu"
    assert topologies.of_device(Device) is None


@pytest.mark.parametrize("one", [c for _, c in chips._CHIPS], ids=lambda c: c.name)
def test_rates_are_in_their_units(one):
    """A slip of a thousand would leave these bounds, which all accelerators of a decade keep."""
    assert 5e13 < one.bf16_flops < 1e16
    assert 2e11 < one.hbm_bytes_per_s < 2e13
    assert 1e10 < one.hbm_bytes < 1e12
    assert 1e10 < one.ici_bytes_per_s < 2e12
    assert 50 < one.bf16_flops / one.hbm_bytes_per_s < 1000  # operations per byte at the crossover
