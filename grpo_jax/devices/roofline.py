"""The roofline of a step: the least time of its arithmetic and memory traffic on given devices.

It counts matrix products and attention (the body on every token, each prompt once for its group,
the LM head on completion tokens) and the bytes that decoding must read. It counts nothing twice: a
program that recomputes, pads or copies is slower than its roofline.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from grpo_jax.structs import Array, ModelConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations and bytes of all devices together; `bytes_each` is per device."""

    flops: float
    bytes_shared: float = 0.0  # read once, by any device
    bytes_each: float = 0.0  # read by every device: weights that each holds whole

    def times(self, number: float) -> Work:
        return Work(self.flops * number, self.bytes_shared * number, self.bytes_each * number)

    def seconds(self, flops_per_s: float, bytes_per_s: float, devices: int = 1) -> float:
        """Seconds of arithmetic or of traffic, whichever is longer; rates are of one device."""
        arithmetic = self.flops / (flops_per_s * devices)
        traffic = (self.bytes_shared / devices + self.bytes_each) / bytes_per_s
        return max(arithmetic, traffic)


def forward(model: ModelConfig, prompt_length_P: Array, length_PG: Array) -> Work:
    """One pass over prompts and their completions; with its gradient it is three."""
    prompt_P, length_PG = (np.asarray(x, np.float64) for x in (prompt_length_P, length_PG))
    tokens = prompt_P.sum() + length_PG.sum()
    pairs = (prompt_P**2 / 2).sum()  # pairs of a query and a key that it sees
    pairs += (length_PG * prompt_P[:, None] + length_PG**2 / 2).sum()
    attention = 4.0 * model.num_layers * model.num_heads * model.head_size * pairs
    return Work(2.0 * _body(model) * tokens + attention + 2.0 * _head(model) * length_PG.sum())


def rollout(
    model: ModelConfig,
    prompt_length_P: Array,
    length_PG: Array,
    *,
    weights: float,
    cache: float,
    weight_shards: int = 1,
) -> Work:
    """Sampling these completions, all at once: weights are read once for each token position.

    `weights`: bytes of all weights that a token is multiplied with, in the rollout's dtype.
    `cache`: bytes of a token's keys and values in all layers, in the cache's dtype.
    `weight_shards`: the number of devices that the weights are split over. A prompt's cache is read
    once for the tokens of its group. Logits are written and read three times, in float32.
    """
    prompt_P, length_PG = (np.asarray(x, np.float64) for x in (prompt_length_P, length_PG))
    own = cache * (length_PG**2 / 2).sum()
    prefix = cache * (prompt_P * length_PG.max(axis=1)).sum()
    logits = 3 * 4.0 * model.vocab_size * length_PG.sum()
    flops = forward(model, prompt_length_P, length_PG).flops
    return Work(flops, own + prefix + logits, weights * length_PG.max() / weight_shards)


def _head(model: ModelConfig) -> int:
    return model.vocab_size * model.width


def _body(model: ModelConfig) -> int:
    """The number of weights that every token is multiplied with."""
    return model.num_params - _head(model) * (1 if model.tied_head else 2)
