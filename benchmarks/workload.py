"""A GRPO step of a given shape on random weights and prompts, in the pieces that are timed.

Everything but the lengths of completions is what `grpo_jax.train` runs. Lengths are forced, so that
two programs, or two versions of one, do the same work: the stop token stands in place of the drawn
one at a completion's length, and another in its own before. A length is drawn from the completion's
own random key, and the mean of lengths is told to the programs in the temperature's last bits, so
that the same ones serve all.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from grpo_jax import cli, keys
from grpo_jax.config import loading, options
from grpo_jax.devices import sharding, transfer
from grpo_jax.kernels import nf4
from grpo_jax.learner import scoring, train_state
from grpo_jax.models import lora, parameters
from grpo_jax.sampling import decode, engine
from grpo_jax.sampling.early_stop import FirstGroups
from grpo_jax.setup.engine import make_engine
from grpo_jax.setup.learner import make_learner
from grpo_jax.setup.lora import adapted, frozen_like
from grpo_jax.structs import Layer, ModelConfig, Rollouts, Rotary

STOP = 1
_LENGTH_FOLD = 2**31 - 1  # no token stands there: the fold that a completion's length comes from
_MEAN_BIT = 2.0**-20  # of the temperature: a mean of m tokens makes it 1 + m * 2 ** -20


def shape(layers, width, heads, kv, size, mlp, vocab, tied, family="qwen2") -> ModelConfig:
    """A decoder as Qwen2.5's, or of "qwen3", of these sizes."""
    return ModelConfig(
        family=family, vocab_size=vocab, width=width, mlp_width=mlp, layers=(Layer(),) * layers,
        num_heads=heads, num_kv_heads=kv, head_size=size, rotaries=(Rotary(1e6),), norm_eps=1e-6,
        max_position=32768, tied_head=tied, qkv_bias=family == "qwen2",
        qk_norm="head" if family == "qwen3" else "",
    )  # fmt: skip


SHAPES = {
    "tiny": shape(4, 256, 4, 2, 64, 688, 512, True),
    "qwen2.5-0.5b": shape(24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen3-0.6b": shape(28, 1024, 16, 8, 128, 3072, 151936, True, "qwen3"),
    "qwen2.5-1.5b": shape(28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-7b": shape(28, 3584, 28, 4, 128, 18944, 152064, False),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """One step's sizes."""

    model: str = "tiny"
    prompts: int = 8
    group: int = 8
    prompt_tokens: int = 32
    completion_tokens: int = 64  # limit
    mean_tokens: int = 0  # geometric lengths of this mean, cut at the limit; 0: all at the limit
    kl: bool = True
    dtype: str = "float32"
    microbatch: int = 0  # prompts; 0: as the program chooses
    remat: str = "dots"
    layers: str = "auto"  # as `config.model.scan_layers`
    attention: str = "auto"
    decoding: str = "xla"  # its attention
    cache: str = "auto"
    decode_steps: int = 0  # tokens between two looks at the host; 0: as the program chooses
    param_dtype: str = "float32"
    moments: str = "float32"
    master_weights: bool = False
    offload: bool = False  # the optimizer's state
    offload_reference: bool = False
    num_slots: int = 0  # completions decoded at once; 0: all
    compact: bool = True
    preset: str = ""  # of the objective; "": the options' defaults
    lora: int = 0  # rank of adapters on all dense layers; 0: all weights are trained
    base: str = "auto"  # as `config.lora.base_dtype`

    @property
    def shape(self) -> ModelConfig:
        model = SHAPES[self.model]
        return adapted(model, self.config()) if self.lora else model

    def config(self) -> ConfigDict:
        """The options of `grpo_jax.train` that make this step."""
        config = options.default()
        config.batch.prompts, config.batch.group = self.prompts, self.group
        config.batch.microbatch = self.microbatch
        config.rollout.max_tokens = self.completion_tokens
        config.rollout.compact, config.rollout.kv_cache_dtype = self.compact, self.cache
        config.rollout.attention = self.decoding
        config.algorithm.kl_coef = 0.04 * self.kl
        config.model.dtype, config.model.param_dtype = self.dtype, self.param_dtype
        config.model.remat, config.model.attention = self.remat, self.attention
        config.model.scan_layers = self.layers
        config.optim.moments_dtype, config.optim.master_weights = self.moments, self.master_weights
        config.optim.offload = self.offload
        config.model.offload_reference = self.offload_reference
        config.rollout.num_slots = self.num_slots
        config.algorithm.preset = self.preset
        config.lora.rank, config.lora.base_dtype = self.lora, self.base
        loading.settle(config)
        return config


def lengths_of(key_B2: Any, limit: int, mean: Any) -> Any:
    """The forced length of each completion, int32 [B], from its key's data uint32 [B, 2].

    Geometric of that mean, from 1 and cut at the limit; all at the limit for a mean of 0, all of n
    tokens for one of -n.
    """

    def uniform(key_2):
        key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, _LENGTH_FOLD))

    u_B, mean = jax.vmap(uniform)(key_B2), jnp.float32(mean)
    length_B = 1 + jnp.floor(jnp.log1p(-u_B) / jnp.log1p(-1.0 / jnp.maximum(mean, 1.5)))
    alike = jnp.where(mean == 0, limit, -mean)
    return jnp.where(mean > 0, jnp.clip(length_B, 1, limit), alike).astype(jnp.int32)


def force_lengths(work: Work) -> None:
    """From here on, completions of this process end at their forced lengths."""

    def choose(decoder, hidden_RWD, head_DV, key_RW2, time_RW, temperature):
        mean = jnp.round((temperature - 1) / _MEAN_BIT)
        length_B = lengths_of(key_RW2.reshape(-1, 2), work.completion_tokens, mean)
        ends_RW = time_RW + 1 >= length_B.reshape(time_RW.shape)
        token_RW, logp_RW = _CHOOSE(decoder, hidden_RWD, head_DV, key_RW2, time_RW, temperature)
        other_RW = jnp.where(token_RW == STOP, STOP + 1, token_RW)
        return jnp.where(ends_RW, STOP, other_RW), logp_RW

    decode.choose = choose


_CHOOSE = decode.choose


def use_all_cores(work: Work) -> None:
    """What `grpo_jax.train` does with a CPU; call it before anything uses JAX."""
    cli.use_all_cores(work.config(), work.shape.num_params)


def frozen(work: Work, mesh: Any) -> Any:
    """Random frozen weights under adapters; of kernels in codes, random codes."""
    like = frozen_like(work.shape, mesh, jnp.dtype(work.dtype))

    def one(path, x):
        key = jax.random.key(zlib.crc32(str(path).encode()))
        name = lora.dense.name_of(path)

        @functools.partial(jax.jit, out_shardings=x.sharding)
        def make():
            if name == "codes":
                return jax.random.bits(key, x.shape, jnp.uint8).astype(x.dtype)
            if name in ("kernel", "embedding"):
                return 0.02 * jax.random.normal(key, x.shape, x.dtype)
            usual = {"levels": nf4.SCALE_LEVELS, "largest": 0.01, "mean": 0.05, "bias": 0.0}
            scale = 3e-4 if "kernel" in str(path) else 1.0  # of codes in int8, and of norms
            return jnp.broadcast_to(usual.get(name, scale), x.shape).astype(x.dtype)

        return make()

    return jax.tree_util.tree_map_with_path(one, like)


class Step:
    """The compiled pieces of a step, and the state that they hand on."""

    def __init__(self, work: Work, params: Any = None):
        self.work = work
        use_all_cores(work)
        self.mesh = mesh = sharding.make_mesh()
        config, model = work.config(), work.shape
        force_lengths(work)
        self.engine = make_engine(config, model, (STOP,), mesh)
        if work.decode_steps:
            decoder = dataclasses.replace(self.engine.decoder, steps=work.decode_steps)
            old = self.engine
            self.engine = engine.Engine(decoder, num_slots=old.num_slots, compact=old.compact)
        learner = make_learner(config, model, mesh)
        self._prepare, self._update = learner.prepare, learner.update
        if params is None:
            dtype = jnp.dtype(work.param_dtype)
        if params is None and work.lora:
            params = lora.init(model, keys.key_for(0, "init"))
        elif params is None:
            like = train_state.state_like(model, mesh, learner.optimizer, dtype).params
            init = lambda key: jax.tree.map(  # noqa: E731
                lambda x: x.astype(dtype), parameters.init(model, key)
            )
            shardings = jax.tree.map(lambda x: x.sharding, like)
            params = jax.jit(init, out_shardings=shardings)(keys.key_for(0, "init"))
        self.frozen = frozen(work, mesh) if work.lora else None
        self.ref_params = self.frozen if work.kl else None
        if work.kl and not work.lora:
            copy = lambda x: jnp.array(x, work.dtype, copy=True)  # noqa: E731
            self.ref_params = jax.tree.map(copy, params)
            if work.offload_reference:
                self.ref_params = transfer.to_host_memory(self.ref_params)
        self.state = train_state.start(params, model, mesh, learner.optimizer)
        if work.offload:
            self.state = self.state.replace(opt_state=transfer.to_host_memory(self.state.opt_state))

    @property
    def weights(self) -> Any:
        """The tree that the network reads."""
        return lora.attached(self.frozen, self.state.params, self.work.shape)

    def prompts(self, n: int) -> list[list[int]]:
        """Random prompts of step n."""
        rng = np.random.default_rng([n, 7])
        shape = (self.work.prompts, self.work.prompt_tokens)
        return rng.integers(2, self.work.shape.vocab_size, shape).tolist()

    def rollout(
        self, n: int, mean: int | None = None, first: FirstGroups | None = None
    ) -> Rollouts:
        """Step n's rollouts; `mean` overrides the work's mean length; `first` as in the engine."""
        mean = self.work.mean_tokens if mean is None else mean
        return self.engine.generate(
            self.engine.publish(self.weights), self.prompts(n), group=self.work.group,
            key=keys.key_for(0, "rollout", n), temperature=1 + mean * _MEAN_BIT, first=first,
        )  # fmt: skip

    def prepare(self, rollouts: Rollouts):
        """Advantages for a reward that costs nothing, and the reference's log-probabilities."""
        limit = rollouts.completion_PGC.shape[-1]
        longest = scoring.cut_to(limit, int(rollouts.length_PG.max()))
        rollouts = rollouts.replace(
            completion_PGC=rollouts.completion_PGC[..., :longest],
            logp_PGC=rollouts.logp_PGC[..., :longest],
        )
        reward_PG = (rollouts.completion_PGC[..., 0] % 2).astype(np.float32)
        rollouts, reward_PG = transfer.shard_rows(self.mesh, (rollouts, reward_PG))
        reference = transfer.to_device_memory(self.ref_params)
        log_probs = self._prepare.log_probs(self.weights, reference, rollouts)
        return jax.block_until_ready(self._prepare(log_probs, reward_PG))

    def update(self, experience) -> None:
        self.state, metrics = self._update(self.state, experience, 0, frozen=self.frozen)
        jax.block_until_ready(metrics)
