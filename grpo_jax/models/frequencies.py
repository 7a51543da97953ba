"""The rotary frequencies with which a model was trained, by layer kind.

The order of operations is Hugging Face's: one unit in the last place of a frequency moves its angle
by up to 0.008 at position 131,071. Pairs that are not rotated have a frequency of zero. So
attention and its kernels know only one form of rotation: the whole head, in halves.
"""

from __future__ import annotations

import math

import numpy as np

from grpo_jax.structs import (
    LinearScaling,
    LongScaling,
    ModelConfig,
    RopeScaling,
    Rotary,
    YarnScaling,
)


def of(rotary: Rotary, head_size: int, longest: int = 0) -> np.ndarray:
    """Radians per position of each rotary pair, float32 [H/2], for rows of `longest` tokens."""
    dims = turning(rotary, head_size)
    exponent = np.arange(0, dims, 2, dtype=np.float32)
    exponent = exponent / np.float32(head_size if rotary.proportional else dims)
    # NumPy's float32 power is up to two units in the last place off; torch rounds from more digits.
    power = (rotary.theta ** exponent.astype(np.float64)).astype(np.float32)
    freq, scaling = np.float32(1) / power, rotary.scaling
    if isinstance(scaling, RopeScaling):
        freq = _llama3(freq, scaling)
    elif isinstance(scaling, LinearScaling):
        freq = freq / np.float32(scaling.factor)
    elif isinstance(scaling, YarnScaling):
        freq = _yarn(power, rotary.theta, dims, scaling)
    elif isinstance(scaling, LongScaling):
        is_long = longest > scaling.original_max_position
        divisor = np.array(scaling.long if is_long else scaling.short, np.float32)
        freq = np.float32(1) / (divisor * power)
    return np.pad(freq, (0, head_size // 2 - len(freq)))


def turning(rotary: Rotary, head_size: int) -> int:
    """The number of a head's dimensions that are rotated."""
    return 2 * int(head_size * rotary.share / 2)


def amplitudes(rotary: Rotary, model: ModelConfig) -> np.ndarray | None:
    """Factors of cosine and sine of each pair, float32 [H/2]; None: all are 1.

    They include the attention scale if it is not H ** -0.5, as its square root in queries and in
    keys. Rotation is in float32, so this costs no rounding, and kernels need not know it.
    """
    scale = 1.0
    if model.attention_scale is not None:
        scale = math.sqrt(model.attention_scale * math.sqrt(model.head_size))
    if rotary.amplitude == scale == 1:
        return None
    pairs = np.full(model.head_size // 2, scale)
    pairs[: turning(rotary, model.head_size) // 2] *= rotary.amplitude
    return pairs.astype(np.float32)


def _llama3(freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    original, low, high = (
        np.float32(x)
        for x in (scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor)
    )
    factor, one = np.float32(scaling.factor), np.float32(1)
    # torch divides a number by an array as the array's reciprocal times the number.
    wavelength = one / freq * np.float32(2 * np.pi)
    # Frequencies of few turns are divided by the factor, those of many turns are kept, between them
    # a straight line.
    kept = (one / wavelength * original - low) / (high - low)
    between = (one - kept) * freq / factor + kept * freq
    slow = np.where(wavelength > original / low, freq / factor, between)
    return np.where(wavelength < original / high, freq, slow)


def _yarn(power: np.ndarray, theta: float, dims: int, scaling: YarnScaling) -> np.ndarray:
    def pair_of(turns: float) -> float:
        """The pair index, as a fraction, that makes `turns` turns within the original length."""
        turn = scaling.original_max_position / (turns * 2 * math.pi)
        return dims * math.log(turn) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0.0
    one = np.float32(1)
    ramp = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = one - np.clip(ramp, 0, 1)
    slow = one / (np.float32(scaling.factor) * power)
    return slow * (one - kept) + one / power * kept
