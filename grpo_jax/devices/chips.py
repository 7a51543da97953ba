"""Published figures of accelerators: arithmetic, memory, links between devices.

A device is a JAX device: a whole chip, or half of a TPU v7x chip. Published rates are ceilings that
no program reaches: an H200 of 989e12 operations per second multiplies large bfloat16 matrices at
790e12.
"""

from __future__ import annotations

import dataclasses
import re

_GIB = 2**30  # the "GB" of a data sheet are GiB


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device."""

    name: str
    bf16_flops: float  # dense bfloat16 operations per second, summed in float32
    hbm_bytes_per_s: float
    hbm_bytes: float  # in total; the runtime keeps a part for itself
    ici_bytes_per_s: float  # to others in its slice or host, over all links together
    source: str


_TPU = "Google Cloud documentation, "
_ADA = "NVIDIA Ada GPU architecture whitepaper 2.1 (2023), appendix A; "

# The first pattern that fits a whole device_kind counts.
_CHIPS = (
    (
        "TPU v4",
        Chip(
            "TPU v4", 275e12, 1200e9, 32 * _GIB, 6 * 50e9,
            _TPU + "TPU v4; links: Jouppi et al. 2023, arXiv:2304.01433, table 4",
        ),
    ),
    (
        "TPU v5 lite|TPU v5e",
        Chip("TPU v5e", 197e12, 819e9, 16 * _GIB, 200e9, _TPU + "TPU v5e"),
    ),
    ("TPU v5|TPU v5p", Chip("TPU v5p", 459e12, 2765e9, 95 * _GIB, 600e9, _TPU + "TPU v5p")),
    (
        "TPU v6 lite|TPU v6e",
        Chip("TPU v6e", 918e12, 1638e9, 32 * _GIB, 400e9, _TPU + "TPU v6e"),
    ),
    (  # a chip has two devices
        "TPU7x",
        Chip(
            "TPU v7x", 2307e12 / 2, 7380e9 / 2, 96 * _GIB, 600e9 / 2, _TPU + "TPU7x (Ironwood)"
        ),
    ),
    (
        r".*\bA100.*40GB.*",
        Chip("A100 40GB", 312e12, 1555e9, 40 * _GIB, 300e9, "NVIDIA A100 datasheet (2022)"),
    ),
    (
        r".*\bA100\b.*",
        Chip("A100 80GB", 312e12, 2039e9, 80 * _GIB, 300e9, "NVIDIA A100 datasheet (2022), SXM"),
    ),
    (
        r".*\bH100 PCIe\b.*",
        Chip("H100 PCIe", 756e12, 2000e9, 80 * _GIB, 300e9, "NVIDIA H100 datasheet (2023)"),
    ),
    (
        r".*\bH100 NVL\b.*",
        Chip("H100 NVL", 835e12, 3938e9, 94 * _GIB, 300e9, "NVIDIA H100 datasheet (2024)"),
    ),
    (
        r".*\bH100\b.*",
        Chip("H100", 989e12, 3350e9, 80 * _GIB, 450e9, "NVIDIA H100 datasheet (2023), SXM"),
    ),
    (
        r".*\bH200 NVL\b.*",
        Chip("H200 NVL", 835e12, 4800e9, 141 * _GIB, 450e9, "NVIDIA H200 datasheet (2024)"),
    ),
    (
        r".*\bH200\b.*",
        Chip("H200", 989e12, 4800e9, 141 * _GIB, 450e9, "NVIDIA H200 datasheet (2024), SXM"),
    ),
    (
        r".*\bGH200 480GB\b.*",  # the number is the memory of the CPU
        Chip("GH200", 989e12, 4000e9, 96 * _GIB, 450e9, "NVIDIA GH200 datasheet (2023)"),
    ),
    (
        r".*\bGB200\b.*",
        Chip("GB200", 2500e12, 8000e9, 186 * _GIB, 900e9, "NVIDIA GB200 NVL72 datasheet (2025)"),
    ),
    (
        r".*\bB200\b.*",
        Chip("B200", 2250e12, 7700e9, 180 * _GIB, 900e9, "NVIDIA HGX B200 datasheet (2025)"),
    ),
    (
        r".*\bL40S\b.*",
        Chip("L40S", 362e12, 864e9, 48 * _GIB, 32e9, "NVIDIA L40S datasheet (2023)"),
    ),
    (
        r".*\bL4\b.*",
        Chip("L4", 121e12, 300e9, 24 * _GIB, 32e9, "NVIDIA L4 datasheet (2023)"),
    ),
    (
        r".*\bRTX 4090",
        Chip("RTX 4090", 165.2e12, 1008e9, 24 * _GIB, 32e9, _ADA + "links: PCIe 4.0 x16"),
    ),
    (
        r".*\bRTX 5090",
        Chip(
            "RTX 5090", 209.5e12, 1792e9, 32 * _GIB, 64e9,
            "NVIDIA RTX Blackwell GPU architecture whitepaper 1.1 (2025), appendix A; "
            "links: PCIe 5.0 x16",
        ),
    ),
)  # fmt: skip


def chip(device_kind: str) -> Chip | None:
    """The chip of this JAX `device_kind`; None if it is not in the table, as a CPU."""
    for pattern, found in _CHIPS:
        if re.fullmatch(pattern, device_kind):
            return found
    return None
