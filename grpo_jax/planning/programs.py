"""The compiled programs of one step and an evaluation, from shapes alone: what they need and cost.

The sampler's and the learner's own jitted programs are compiled for the devices of a mesh that need
not be attached. Nothing is allocated: every argument is a shape with its sharding.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.config import derived, rules
from grpo_jax.devices import sharding
from grpo_jax.kernels import gpu_decode
from grpo_jax.kernels.gpu_decode import TritonDecode
from grpo_jax.learner import packing, scoring, train_state
from grpo_jax.models import parameters, policy
from grpo_jax.planning import hlo
from grpo_jax.planning.compiled import Compiled, Known, Program, bytes_per_device
from grpo_jax.sampling.decode import Slots
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup.engine import make_engine, make_evaluator
from grpo_jax.setup.learner import USUAL, Fit, make_learner
from grpo_jax.structs import Experience, ModelConfig, Params, Rollouts

_STOP_IDS = (0,)  # which tokens end a completion changes no shape


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long the prompts and completions of a step are, in tokens."""

    prompt: int  # the longest
    completion_PG: np.ndarray

    @staticmethod
    def of(config: ConfigDict, prompt: int = 0, mean: int = 0) -> Lengths:
        """All at the config's limits, or prompts up to `prompt` and completions of a mean length.

        Completions then end at every token with the same chance, as those of a model do that has
        not learned when to stop.
        """
        shape, limit = (config.batch.prompts, config.batch.group), config.rollout.max_tokens
        length_PG = np.full(shape, limit)
        if mean:
            drawn_PG = np.random.default_rng(config.seed).geometric(1 / mean, shape)
            length_PG = np.minimum(drawn_PG, limit)
        return Lengths(prompt or config.data.max_prompt_tokens, length_PG.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """Completions that an engine draws at once."""

    engine: Engine
    published: Params
    slots: Slots
    lanes: int  # of a slot
    temperature: np.float32 | None


def num_held_out(config: ConfigDict) -> int:
    """Problems of an evaluation, at most."""
    data, most = config.data, config.evaluation.num_problems
    if data.task:
        return min(data.num_eval, most)
    return most if data.eval_path or data.eval_split else 0


class Step:
    """The programs of one step of a config, with a model of some shape, on a mesh.

    And those of its evaluations, which must fit too: a run with held-out problems begins with one.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: ModelConfig,
        mesh: Mesh,
        lengths: Lengths,
        fit: Fit = USUAL,
        *,
        known: Known | None = None,
    ):
        """Raises ValueError where the config's groups do not split over the mesh.

        Programs that are in `known` are not compiled again; others are added.
        """
        rules.check_devices(config, sharding.num_row_shards(mesh))
        self.config, self.model, self.mesh, self.lengths = config, model, mesh, lengths
        self.known = {} if known is None else known
        self._device = mesh.devices.flat[0]
        self.learner = make_learner(config, model, mesh, fit)
        self.engine = make_engine(config, model, _STOP_IDS, mesh)
        dtype = jnp.dtype(config.model.dtype)
        kept = jnp.dtype(config.model.param_dtype)
        self.state = train_state.state_like(model, mesh, self.learner.optimizer, kept)
        self.reference = _cast(policy.param_like(model, mesh), dtype)
        if not config.algorithm.kl_coef:
            self.reference = None
        self.published = self.engine.published_like(self.state.params)
        self.slots = self._slots()
        self.evaluations = self._evaluations()
        self.experience = self._experience()
        self.carry = self.learner.update.empty.eval_shape()

    def held(self) -> dict[str, float]:
        """Bytes on each device by what they hold, before a program's own.

        What lies in the host's memory but for one program, which then needs it, is left out.
        """
        shared = bytes_per_device(self._shared(self.engine))
        evaluated = [
            bytes_per_device(d.published)
            - bytes_per_device(self._shared(d.engine))
            + bytes_per_device(d.slots.cache)
            for d in self.evaluations.values()
        ]
        return {
            "weights": bytes_per_device(self.state.params),
            "optimizer": bytes_per_device(self._kept_state().opt_state),
            "reference": bytes_per_device(self._kept_reference()),
            "rollout weights": bytes_per_device(self.published) - shared,
            "cache": bytes_per_device(self.slots.cache),
            "evaluation": max(evaluated, default=0.0),  # weights and cache
            "gradients": bytes_per_device(self.carry[0]),
            "rollouts": bytes_per_device(self.experience),
        }

    def compile(self, only: Callable[[str], bool] = lambda name: True) -> list[Compiled]:
        """All programs, in the order in which a step runs them, or those of some names.

        Two at a time: a compiler for TPUs uses one core.
        """
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(self._compile, (p for p in self._programs() if only(p.name))))

    def _compile(self, program: Program) -> Compiled:
        began = time.monotonic()
        with self._compiler_device():
            lowered = program.lower()
        asked = dict(self.mesh.shape), program.loops, dict(program.read)
        text = f"{asked} {lowered.as_text()}"
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.known:
            self.known[key] = self._measured(program, lowered)
        once = self.known[key]
        return dataclasses.replace(
            once,
            name=program.name,
            phase=program.phase,
            runs=program.runs,
            beside=program.beside,
            cost=once.cost.times(program.runs),
            compile_s=time.monotonic() - began,
        )

    def _compiler_device(self) -> AbstractContextManager:
        """A kernel asks the default device for which TPU it is made."""
        absent = jax.default_backend() != self._device.platform
        return jax.default_device(self._device) if absent else contextlib.nullcontext()

    def _measured(self, program: Program, lowered: jax.stages.Lowered) -> Compiled:
        """What one run needs and costs."""
        nothing = Compiled(program.name, program.phase, 1, 0.0, 0.0, 0.0, 0.0, hlo.Cost(), 0.0)
        try:
            with self._compiler_device():
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dataclasses.replace(nothing, error=str(error).splitlines()[0])
        memory = compiled.memory_analysis()
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"JAX {jax.__version__} cannot read the compiled {program.name}: it is of "
                'another libtpu than this JAX is made for. python -m pip install -e ".[plan]" '
                f"brings that one. It says: {str(error).splitlines()[0]}"
            ) from error
        return dataclasses.replace(
            nothing,
            arguments=memory.argument_size_in_bytes,
            results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            cost=hlo.cost(text, self.mesh, program.loops, program.read),
        )

    def _programs(self) -> list[Program]:
        config, length_PG = self.config, self.lengths.completion_PG
        state, params = self.state, self.state.params
        size = bytes_per_device
        reference = self._kept_reference()
        learning = size((self._kept_state(), reference))  # held through the whole step
        lanes = self.slots.live_RW.size
        waves = -(-length_PG.size // lanes)
        tokens = max(length_PG.max(), -(-length_PG.sum() // lanes)) - 1
        temperature = np.float32(config.rollout.temperature) or None
        drawing = _Drawing(self.engine, self.published, self.slots, self._lanes, temperature)
        admit, decode = self._sampling("", "rollout", drawing, learning)
        loops, read = tokens / self.engine.decoder.steps, self._read_of_cache(int(tokens), lanes)
        programs = self._publishing(learning) + [
            dataclasses.replace(admit, runs=waves),
            dataclasses.replace(decode, runs=1, loops=loops, read=read),
        ]
        everything = np.arange(self.learner.scorer.groups_in_shard(self.experience.rollouts))
        scored = (self.reference is not None) + derived.needs_old_pass(config)
        if scored:
            read = self.reference if self.reference is not None else params
            packed = self._packed(everything)
            programs.append(
                Program(
                    "score",
                    "update",
                    lambda: self.learner.prepare.fill.lower(
                        read, packed.number, self.experience.rollouts, *packed.arrays
                    ),
                    scored,
                    int(packed.number),
                    learning - size(params if self.reference is None else reference),
                )
            )
        update, minibatches = self.learner.update, config.batch.minibatches
        runs = derived.num_updates_per_step(config)
        first = self._packed(everything[::minibatches])
        programs += [
            Program(
                "gradient",
                "update",
                lambda: update.add.lower(
                    params, first.number, self.carry, self.experience, *first.arrays
                ),
                runs,
                int(first.number),
                learning - size(params),
            ),
            Program(
                "optimizer",
                "update",
                lambda: update.finish.lower(
                    state, self.carry, self.experience.action_PGC, np.int32(0)
                ),
                runs,
                1,
                size((reference, self.experience)) - size(self.experience.action_PGC),
            ),
        ]
        for name, drawing in self.evaluations.items():
            programs += self._sampling(f"{name} ", "evaluation", drawing, learning)
        return programs

    def _sampling(
        self, prefix: str, phase: str, drawing: _Drawing, learning: float
    ) -> list[Program]:
        """What draws completions, beside what is held for learning; not run in a step."""
        engine, slots = drawing.engine, drawing.slots
        beside = learning - bytes_per_device(self._shared(engine))
        start = drawing.published, drawing.temperature
        at_once = engine.read_at_once(slots.live_RW.shape[0] // engine.shards)
        prompts = self._prompts(at_once * engine.shards, drawing.lanes)
        enough = self._rows((engine.shards,), jnp.int32, "slots")
        return [
            Program(
                f"{prefix}admit",
                phase,
                lambda: engine.admit.lower(*start, slots, *prompts),
                0,
                1,
                beside,
            ),
            Program(
                f"{prefix}decode",
                phase,
                lambda: engine.decode.lower(*start, -1, 1, enough, slots),
                0,
                1,
                beside,
            ),
        ]

    def _publishing(self, learning: float) -> list[Program]:
        """What makes the rollout's weights, beside so many bytes: part by part, then by layer."""
        engine, params, published = self.engine, self.state.params, self.published
        programs = []

        def add(name: str, lower: Callable, part: Params, runs: int, made: Any) -> None:
            beside = learning - bytes_per_device(part) + bytes_per_device(made)
            programs.append(Program(name, "rollout", lower, runs, 1, beside))

        changed = engine.changed_parts(params)
        for i, name in enumerate(changed):
            lower = functools.partial(engine.publish_part[name].lower, params[name])
            made = [published[name] for name in changed[:i]]
            add(f"publish {name}", lower, params[name], 1, made)
        layers, last = parameters.layer_stacks(params["layers"], self.model)[-1]
        made = [published[name] for name in changed] + published["layers"][:-1]
        lower = functools.partial(engine.publish_layer.lower, layers, np.int32(last))
        add("publish layer", lower, layers, self.model.num_layers, made)
        return programs

    def _kept_state(self) -> Any:
        """The state as it lies on the devices while it is not updated."""
        return self.state.replace(opt_state=()) if self.config.optim.offload else self.state

    def _kept_reference(self) -> Any:
        return None if self.config.model.offload_reference else self.reference

    def _shared(self, engine: Engine) -> list[Any]:
        """Weights that sampling reads where they are: nothing about them changes."""
        changed = ["layers", *engine.changed_parts(self.state.params)]
        return [part for name, part in self.state.params.items() if name not in changed]

    def _read_of_cache(self, tokens: int, lanes: int) -> dict[tuple[int, ...], float]:
        """By shape on a device, the share of a cache that a token reads, where a kernel skips.

        Of so many lanes that decode so many tokens each, the mean.
        """
        if not isinstance(self.engine.decoder.kv_cache, TritonDecode):
            return {}
        arrays = [x for _, own in self.slots.cache for x in jax.tree.leaves(own)]
        shapes = {x.sharding.shard_shape(x.shape) for x in arrays}
        share = gpu_decode.share_read(
            self.lengths.completion_PG.ravel() - 1, tokens, lanes, self.config.rollout.max_tokens
        )
        return dict.fromkeys(shapes, share)

    def _slots(self):
        config = self.config
        (slots, self._lanes), *_ = self.engine.layouts(config.batch.prompts, config.batch.group)
        width = self.engine.padded(self.lengths.prompt)
        return self.engine.empty.eval_shape(slots, self._lanes, width)

    def _evaluations(self) -> dict[str, _Drawing]:
        """By name: held-out problems answered once greedily, and if asked for by samples."""
        asked, number = self.config.evaluation, num_held_out(self.config)
        engine = make_evaluator(self.config, self.engine)
        published = engine.published_like(self.state.params)
        width = engine.padded(self.lengths.prompt)
        kinds = {"evaluation": (1, None)} if number else {}
        if number and asked.num_samples:
            temperature = np.float32(asked.temperature) or None
            kinds["samples"] = (asked.num_samples, temperature)
        found = {}
        for name, (group, temperature) in kinds.items():
            (slots, lanes), *_ = engine.layouts(number, group)
            like = engine.empty.eval_shape(slots, lanes, width)
            found[name] = _Drawing(engine, published, like, lanes, temperature)
        return found

    def _prompts(self, number: int, lanes: int) -> tuple[Any, ...]:
        width = self.engine.padded(self.lengths.prompt)
        shapes = (number, width), (number,), (number,), (number, lanes, 2), (number, lanes)
        dtypes = jnp.int32, jnp.int32, jnp.int32, jnp.uint32, jnp.bool_
        return tuple(self._rows(s, d, "slots") for s, d in zip(shapes, dtypes))

    def _rows(self, shape: tuple[int, ...], dtype, axis: str = "rows") -> jax.ShapeDtypeStruct:
        axes = (axis,) + (None,) * (len(shape) - 1)
        placed = sharding.sharding_of(self.mesh, axes, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def _experience(self) -> Experience:
        prompts, group = self.lengths.completion_PG.shape
        limit = self.config.rollout.max_tokens
        tokens = scoring.cut_to(limit, int(self.lengths.completion_PG.max()))
        rows = self._rows
        width = self.engine.padded(self.lengths.prompt)
        per_token = lambda dtype: rows((prompts, group, tokens), dtype)  # noqa: E731
        rollouts = Rollouts(
            prompt_PQ=rows((prompts, width), jnp.int32),
            prompt_length_P=rows((prompts,), jnp.int32),
            completion_PGC=per_token(jnp.int32),
            logp_PGC=per_token(jnp.float32),
            length_PG=rows((prompts, group), jnp.int32),
            stopped_PG=rows((prompts, group), jnp.bool_),
        )
        return Experience(
            rollouts=rollouts,
            advantage_PG=rows((prompts, group), jnp.float32),
            action_PGC=per_token(jnp.bool_),
            old_logp_PGC=per_token(jnp.float32) if derived.needs_old_pass(self.config) else None,
            ref_logp_PGC=per_token(jnp.float32) if self.reference is not None else None,
        )

    def _packed(self, groups_P: np.ndarray) -> packing.Microbatches:
        known = self.experience.rollouts.replace(length_PG=self.lengths.completion_PG)
        return self.learner.scorer.microbatches(known, groups_P)


def _cast(params: Any, dtype) -> Any:
    def cast(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        return x.astype(dtype)

    return jax.tree.map(cast, params)
