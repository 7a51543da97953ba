"""A tiny random model and its rollouts, for tests in several folders."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from grpo_jax.devices import sharding
from grpo_jax.kernels import rotary
from grpo_jax.kernels.norm import Residual
from grpo_jax.learner import logprobs
from grpo_jax.models import frequencies, parameters, transformer
from grpo_jax.models.block import Block
from grpo_jax.models.lanes import PackedInputs
from grpo_jax.structs import (
    Layer,
    LinearScaling,
    ModelConfig,
    QueryGrowth,
    Rollouts,
    Rotary,
)

STOP = 1

MODEL = ModelConfig(
    family="qwen3",
    vocab_size=40,
    width=32,
    mlp_width=48,
    layers=(Layer(),) * 2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    rotaries=(Rotary(10_000.0),),
    norm_eps=1e-6,
    max_position=64,
    tied_head=False,
    qk_norm="head",
)


def one_device() -> Mesh:
    """A mesh of the first device: eight devices with the same work take eight times as long."""
    return sharding.make_mesh(devices=jax.devices()[:1])


# As Gemma and OLMo are: norms before and after branches or after alone, of heads or of all, capped
# and scaled scores, windows, two kinds of rotary and layers without positions.
GEMMA = dataclasses.replace(
    MODEL,
    layers=(Layer(window=3, rotary=1), Layer()),
    rotaries=(Rotary(1000.0, LinearScaling(4.0)), Rotary(100.0)),
    tied_head=True,
    norms="both",
    norm_offset=1.0,
    activation="gelu_tanh",
    attention_scale=0.2,
    attention_cap=4.0,
    embed_factor=32**0.5,
    logit_cap=5.0,
)
OLMO = dataclasses.replace(
    MODEL,
    layers=(Layer(), Layer(window=3, rotary=1)),
    rotaries=(Rotary(100.0, amplitude=1.2), Rotary(1.0, share=0.0)),
    qk_norm="whole",
    norms="after",
    query_growth=QueryGrowth(0.3, 4),
    residual_factor=0.5,
    logit_factor=0.5,
)


@functools.cache
def init(model: ModelConfig):
    """The program that makes a model's parameters from a key."""
    return jax.jit(functools.partial(parameters.init, model))


@functools.cache
def _host_params(seed: int, model: ModelConfig):
    params = init(model)(jax.random.key(seed))
    # Initialized kernels give nearly uniform logits; these make tokens and layers matter.
    scale = {"kernel": 8.0, "embedding": 40.0, "scale": 1.0}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(x) * np.float32(scale[path[-1].key]), params
    )


def params(seed: int = 0, model: ModelConfig = MODEL):
    """Fresh float32 parameters whose logits have a deviation near 1."""
    return jax.tree.map(jnp.array, _host_params(seed, model))


def rollouts(prompts: int = 4, group: int = 3, tokens: int = 5, seed: int = 0) -> Rollouts:
    """Random prompts of 1 to 6 tokens and completions of 1 to `tokens`, with zeros in the padding.

    The first completion is only its stop token; the last one is cut at the limit. The sampler's
    log-probabilities are random: only a metric may read them.
    """
    rng = np.random.default_rng(seed)
    prompt_length_P = rng.integers(1, 7, prompts, dtype=np.int32)
    prompt_length_P[0] = 1
    length_PG = rng.integers(1, tokens + 1, (prompts, group), dtype=np.int32)
    length_PG[0, 0], length_PG[-1, -1] = 1, tokens
    stopped_PG = np.ones((prompts, group), bool)
    stopped_PG[-1, -1] = False
    t_Q, t_C = np.arange(6), np.arange(tokens)
    prompt_PQ = rng.integers(2, MODEL.vocab_size, (prompts, 6), dtype=np.int32)
    completion_PGC = rng.integers(2, MODEL.vocab_size, (prompts, group, tokens), dtype=np.int32)
    is_stop = stopped_PG[..., None] & (t_C == length_PG[..., None] - 1)
    completion_PGC = np.where(is_stop, STOP, completion_PGC)
    action_PGC = t_C < length_PG[..., None]
    logp_PGC = rng.uniform(-4, -1, completion_PGC.shape).astype(np.float32)
    return Rollouts(
        prompt_PQ=np.where(t_Q < prompt_length_P[:, None], prompt_PQ, 0).astype(np.int32),
        prompt_length_P=prompt_length_P,
        completion_PGC=np.where(action_PGC, completion_PGC, 0).astype(np.int32),
        logp_PGC=np.where(action_PGC, logp_PGC, 0).astype(np.float32),
        length_PG=length_PG,
        stopped_PG=stopped_PG,
    )


def completion_states(params, config: ModelConfig, *rows, **options):
    """Hidden states [P, G, C, D] that predict the tokens of completions padded to one length."""
    inputs = PackedInputs.of(*rows)
    states = transformer.completion_states(params, config, inputs, **options)
    return inputs.by_completion(states)


def logp(scorer, params, rollouts: Rollouts):
    """Log-probabilities of the completions, float32 [P, G, C], one completion per row."""
    return _logp_by(scorer)(params, rollouts)


@functools.lru_cache(maxsize=4)
def _logp_by(scorer):
    """The program of `logp`."""

    @jax.jit
    def of(params, rollouts: Rollouts):
        completion_PGC = rollouts.completion_PGC
        target_BT = completion_PGC.reshape(-1, completion_PGC.shape[-1])
        head = parameters.head_kernel(params)
        hidden_BTD = scorer.hidden(params, rollouts)
        logp_BT, _ = logprobs.token_logprobs(hidden_BTD, head, target_BT, scorer.sampling)
        return logp_BT.reshape(completion_PGC.shape)

    return of


def _plain_attention(q, k, v):
    """Causal, each query head with a copy of its keys and values."""
    length, heads = q.shape[0], q.shape[1]
    inv_freq = frequencies.of(MODEL.rotaries[0], MODEL.head_size)
    angles = rotary.rotary(jnp.arange(length), inv_freq)
    q, k = (rotary.rotate(x, angles) for x in (q, k))
    k, v = (jnp.repeat(x, heads // k.shape[1], axis=1) for x in (k, v))
    score = jnp.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    score = jnp.where(np.tril(np.ones((length, length), bool))[None], score, -jnp.inf)
    return jnp.einsum("nts,snh->tnh", jax.nn.softmax(score), v), None


def plain_log_probs(params, ids):
    """Log-probabilities over the vocabulary after each token of one row, [T, V]."""
    x = params["embed"]["embedding"][ids]
    for i in range(MODEL.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        block = Block(MODEL, MODEL.layers[i])
        x = block.apply({"params": layer}, Residual.of(x), _plain_attention)[0].sum()
    scale = params["norm"]["scale"]
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + MODEL.norm_eps) * scale[None]
    return jax.nn.log_softmax(x @ parameters.head_kernel(params))


def unstacked(layers, config: ModelConfig) -> list:
    """Each layer's own parameters, as sampling reads them."""
    stacks = parameters.layer_stacks(layers, config)
    return [jax.tree.map(lambda x: x[turn], stack) for stack, turn in stacks]  # noqa: B023


def run_on_a_gpu(file: str, optimized: dict[str, str]) -> None:
    """Runs a test's file as a program, since this process uses the CPU."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU")
    environment = optimized | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, file], env=environment, check=True, timeout=300)
