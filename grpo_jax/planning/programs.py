"""Memory and cost of the programs of a step and an evaluation, compiled from shapes alone.

The sampler's and the learner's own jitted programs are compiled for the devices of a mesh that need
not be attached. Nothing is allocated: every argument is a shape with its sharding.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
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
from grpo_jax.devices.compiling import Call
from grpo_jax.kernels import gpu_decode
from grpo_jax.kernels.gpu_decode import TritonDecode
from grpo_jax.learner import actor_critic, train_state
from grpo_jax.learner.update import Update
from grpo_jax.models import policy
from grpo_jax.planning import hlo
from grpo_jax.planning.compiled import Compiled, Known, Program, bytes_per_device
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.rows import Rows
from grpo_jax.sampling import programs as sampling_programs
from grpo_jax.sampling.decode import Slots
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import critic as critic_lib
from grpo_jax.setup import lora as lora_setup
from grpo_jax.setup import reward_models, teacher
from grpo_jax.setup.engine import make_engine, make_evaluator
from grpo_jax.setup.learner import DEFAULT, MemoryPlan, make_learner, make_supervised_learner
from grpo_jax.structs import Experience, ModelConfig, Params

_STOP_IDS = (0,)  # any token: stop tokens change no shape


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """A batch of sampling: an engine samples `group` completions of each of `prompts` prompts."""

    engine: Engine
    published: Params
    prompts: int
    group: int
    temperature: float
    slots: Slots


def num_held_out(config: ConfigDict) -> int:
    """The number of problems in an evaluation, at most."""
    data, most = config.data, config.evaluation.num_problems
    if data.task:
        return min(data.num_eval, most)
    return most if data.eval_path or data.eval_split else 0


class Step:
    """The programs of one step of a config, with a model of some shape, on a mesh.

    It includes the programs of evaluations, which must fit too: a run with held-out problems begins
    with one.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: ModelConfig,
        mesh: Mesh,
        lengths: Lengths,
        fit: MemoryPlan = DEFAULT,
        *,
        known: Known | None = None,
    ):
        """Raises ValueError if the mesh does not divide the config's groups.

        Programs in `known` are not compiled again; new ones are added to it.
        """
        rules.check_devices(config, sharding.num_row_shards(mesh))
        self.config, self.model, self.mesh, self.lengths = config, model, mesh, lengths
        self.known = {} if known is None else known
        self._device = mesh.devices.flat[0]
        of_teacher, critic = teacher.shape(config), critic_lib.shape(config, model)
        self.learner = make_learner(config, model, mesh, fit, critic, of_teacher)
        self.teacher = None  # its weights
        if of_teacher is not None:
            self.teacher = teacher.like(config, of_teacher, mesh)
            pair = self.learner.prepare, self.learner.update
            prepare, update = teacher.given_to(*pair, self.teacher)
            self.learner = dataclasses.replace(self.learner, prepare=prepare, update=update)
        self.judges = reward_models.planned(config, mesh)
        self.engine = make_engine(config, model, _STOP_IDS, mesh)
        dtype = jnp.dtype(config.model.dtype)
        kept = jnp.dtype(config.model.param_dtype)
        self.state = train_state.state_like(model, mesh, self.learner.optimizer, kept)
        if critic is not None:
            own = train_state.state_like(critic, mesh, self.learner.critic.optimizer, kept)
            self.state = actor_critic.together(self.state, own)
        self.frozen = lora_setup.frozen_like(model, mesh, dtype)
        self.critic_frozen = None  # the weights under a critic's adapters
        if critic is not None:
            where = mesh, self.frozen
            self.critic_frozen = critic_lib.frozen_like(config, model, critic, *where)
            update = dataclasses.replace(self.learner.update, critic_frozen=self.critic_frozen)
            self.learner = dataclasses.replace(self.learner, update=update)
        self.weights = self._attached(self.state.params)
        self.reference = self._reference(dtype)
        self.rollout = self._drawing(
            self.engine,
            derived.prompts_begun(config),
            config.batch.group,
            config.rollout.temperature,
        )
        self.greedy = None  # None: the advantages read no greedy completions
        if config.algorithm.baseline == "greedy":
            self.greedy = self._drawing(self.engine, config.batch.prompts, 1, 0.0)
        self.evaluations = self._evaluations()
        self.rows = Rows(mesh)
        width, has_reference = self.engine.padded(lengths.prompt), self.reference is not None
        self.experience = self.rows.experience(
            config, self.learner, lengths.completion_PG, width, has_reference=has_reference
        )

    def _reference(self, dtype) -> Params | None:
        config, model, mesh = self.config, self.model, self.mesh
        if not config.algorithm.kl_coef:
            return None
        if self.frozen is None:
            return _cast(policy.param_like(model, mesh), dtype)
        if not config.lora.path:
            return self.frozen
        given = _cast(policy.trained_like(model, mesh), dtype)
        return self._attached(given)

    def _attached(self, trained: Params) -> Params:
        return lora_setup.attached_like(self.frozen, trained, self.model, self.mesh)

    def held(self) -> dict[str, float]:
        """Bytes of arrays on each device, by content, without the programs' own memory.

        Arrays that stay in host memory except during one program are left out.
        """
        params, rollout = (self.state.params, self.frozen), self.rollout
        kept, critic = self._kept_state(), getattr(self.state, "critic", None)
        evaluated = [
            bytes_per_device(d.published, but=params) + bytes_per_device(d.slots.cache)
            for d in self.evaluations.values()
        ]
        gradients = [u.zero_gradient.eval_shape()[0] for u in self._updates]
        return {
            "weights": bytes_per_device((params, critic and critic.params, self.critic_frozen)),
            "optimizer": bytes_per_device((kept.opt_state, critic and kept.critic.opt_state)),
            "reference": bytes_per_device(self._kept_reference(), but=params),
            "rollout weights": bytes_per_device(rollout.published, but=params),
            "cache": bytes_per_device(rollout.slots.cache),
            "evaluation": max(evaluated, default=0.0),  # weights and cache of the larger one
            "gradients": bytes_per_device(gradients),
            "rollouts": bytes_per_device(self.experience),
            **({} if self.teacher is None else {"teacher": bytes_per_device(self.teacher)}),
            **({"reward models": bytes_per_device(self._of_judges)} if self.judges else {}),
        }

    def compile(self, only: Callable[[str], bool] = lambda name: True) -> list[Compiled]:
        """Compiles all programs, or those that `only` selects, in the order of a step.

        Two at a time, since a compiler for TPUs uses one core.
        """
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(self._compile, (p for p in self.programs() if only(p.name))))

    def _compile(self, program: Program) -> Compiled:
        began = time.monotonic()
        with self._compiler_device():
            lowered = program.call.lower()
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
        """Makes the target the default device: kernels read their TPU's version from it."""
        absent = jax.default_backend() != self._device.platform
        return jax.default_device(self._device) if absent else contextlib.nullcontext()

    def _measured(self, program: Program, lowered: jax.stages.Lowered) -> Compiled:
        """Compiles a program; memory and cost of one run."""
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
                f"JAX {jax.__version__} cannot read the compiled {program.name}: the installed "
                'libtpu is not the one for this JAX. python -m pip install -e ".[plan]" installs '
                f"that one. The error: {str(error).splitlines()[0]}"
            ) from error
        return dataclasses.replace(
            nothing,
            arguments=memory.argument_size_in_bytes,
            results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporary=memory.temp_size_in_bytes,
            cost=hlo.cost(text, self.mesh, program.loops, program.read),
        )

    def programs(self) -> list[Program]:
        """The programs of engine and learner, with the other arrays that exist while they run."""
        learning = self._kept_state(), self.frozen, self._kept_reference(), self.teacher
        learning = *learning, self._of_judges, self.critic_frozen
        found = self._start() + self._supervised() + self._publishing(learning)
        found += self._sampling("", "rollout", self.rollout, learning)
        if self.greedy:
            found += self._sampling("greedy ", "rollout", self.greedy, learning)
        if derived.has_environment(self.config):
            found += self._later_turns(learning)
        found += self._judging(learning)
        prepare, update, experience = self.learner.prepare, self.learner.update, self.experience
        rollouts, length_PG = experience.rollouts, self.lengths.completion_PG
        if (critic := self.learner.critic) is not None:
            weights = self.critic_frozen, self.state.critic.params
            critic = lora_setup.attached_like(*weights, critic.model, self.mesh)
        read = self.weights, self.reference, rollouts, length_PG, critic
        scoring = [prepare.score, *([prepare.values.score] if critic else [])]
        for call in prepare.calls(*read):
            loops = int(call.args[1]) if call.program in scoring else 1
            found.append(Program.of(call, "update", learning, loops=loops))
        updates = derived.num_updates_per_step(self.config)
        gradients = [u.gradient for u in self._updates]
        steps = [u.optimizer_step for u in self._updates]
        for call in update.calls(self.state, experience, length_PG, self.frozen):
            loops = int(call.args[1]) if call.program in gradients else 1
            beside = (*learning, experience) if call.program in steps else learning
            found.append(Program.of(call, "update", beside, runs=updates, loops=loops))
        shown = Call(self.learner.learning_rate, (np.int32(0),))
        found.append(Program.of(shown, "update", (*learning, experience)))
        if self.learner.refresh_reference is not None:  # not in every step
            call = Call(self.learner.refresh_reference, (self.state.params, self.reference))
            found.append(Program.of(call, "update", learning, runs=0))
        for name, drawing in self.evaluations.items():
            found += self._sampling(f"{name} ", "evaluation", drawing, learning)
        return found

    @property
    def _of_judges(self) -> list[Params]:
        return [judge.params for judge in self.judges.values()]

    def _judging(self, learning: tuple) -> list[Program]:
        """The reward models' programs, as if their tokens were the policy's, and one more."""
        length_PG, found = self.lengths.completion_PG + 1, []
        rows = self.rows.rollouts(length_PG.shape, self.lengths.prompt, int(length_PG.max()))
        rows = rows.replace(chosen_PGC=self.rows.of(rows.completion_PGC.shape, jnp.bool_))
        for name, judge in self.judges.items():
            call = judge.values.call(judge.params, rows, length_PG, f"reward {name}")
            found.append(Program.of(call, "rollout", learning, loops=int(call.args[1])))
        return found

    def _supervised(self) -> list[Program]:
        """The supervised update by which a new model begins; not part of a step."""
        config = self.config
        if config.model.path or not derived.is_supervised(config):
            return []
        updates = derived.num_supervised_steps(config, config.data.num_train)
        model = dataclasses.replace(self.model, lora=None)  # a new model trains all parameters
        learner = make_supervised_learner(config, model, self.mesh, updates)
        kept = jnp.dtype(config.model.param_dtype)
        state = train_state.state_like(model, self.mesh, learner.optimizer, kept)
        shards = sharding.num_row_shards(self.mesh)
        shape = shards, -(-config.sft.batch // shards)  # whole texts; each shard is one group
        tokens = config.data.max_prompt_tokens + config.sft.max_tokens
        length_PG = np.full(shape, tokens, np.int32)
        chosen_PGC = self.rows.of((*shape, tokens), jnp.bool_)
        given = Experience(
            rollouts=self.rows.rollouts(shape, 0, tokens).replace(chosen_PGC=chosen_PGC),
            advantage=self.rows.of(shape, jnp.float32),
            action_PGC=self.rows.of((*shape, tokens), jnp.bool_),
            old_logp_PGC=None,
            ref_logp_PGC=None,
        )
        calls = learner.prepare.calls(state.params, None, given.rollouts, length_PG)
        calls += learner.update.calls(state, given, length_PG)
        return [Program.of(c, "supervised", (state,), "supervised ", runs=0) for c in calls]

    def _start(self) -> list[Program]:
        """The programs that make the initial state; not part of a step."""
        model, mesh, state = self.model, self.mesh, self.state
        key, dtype = jax.eval_shape(jax.random.key, 0), jax.tree.leaves(state.params)[0].dtype
        calls = []
        if not self.config.model.path:
            calls.append(policy.drawing(model, mesh, key, dtype))
        if model.lora is not None and not self.config.lora.path:
            calls.append(policy.drawing_adapters(model, mesh, key, dtype))
        calls.append(policy.counting_nonfinite(state.params, mesh))
        calls.append(train_state.starting(state.params, model, mesh, self.learner.optimizer))
        if critic := self.learner.critic:
            params = state.critic.params
            if not self.config.critic.path:
                calls.append(policy.drawing_head(critic.model, mesh, key, dtype))
            if critic.model.lora is not None:
                drawn = policy.drawing_adapters(critic.model, mesh, key, dtype)
                calls.append(dataclasses.replace(drawn, part="critic"))
            calls.append(
                dataclasses.replace(
                    train_state.starting(params, critic.model, mesh, critic.optimizer),
                    part="critic",
                )
            )
        return [Program.of(call, "start", (), runs=0) for call in calls]

    def _sampling(
        self, prefix: str, phase: str, drawing: _Drawing, learning: tuple
    ) -> list[Program]:
        """The programs of sampling, while the arrays of learning exist too.

        In a step all lanes decode for as many tokens as the longest completion has, or for the
        total of tokens divided by the lanes if that is more. An evaluation is not part of a step.
        """
        engine, published = drawing.engine, drawing.published
        length_PG = self.lengths.completion_PG[:, : drawing.group]
        lanes = drawing.slots.live_RW.size
        tokens = max(length_PG.max(), -(-length_PG.sum() // lanes)) - 1
        in_step, found = phase == "rollout", []
        asked = drawing.prompts, drawing.group, self.lengths.prompt, drawing.temperature
        looks = self.config.prompts.oversample > 1 and drawing is self.rollout
        for call in sampling_programs.first_turns(
            engine, published, *asked, keeps=self._keeps, looks=looks
        ):
            waves = -(-length_PG.size // lanes) if call.program is engine.admit else 1
            runs, loops, read = waves if in_step else 0, 1.0, {}
            if in_step and call.program in (engine.decode, engine.decode_kept):
                loops = tokens / engine.decoder.steps
                read = self._read_of_cache(int(tokens), lanes)
            found.append(Program.of(call, phase, (*learning, published), prefix, runs, loops, read))
        return found

    def _later_turns(self, learning: tuple) -> list[Program]:
        """The programs of later turns, as large as they may get; how often they run is not known.

        Those of evaluations are not listed again.
        """
        drawing, found = self.rollout, []
        longest = self.lengths.prompt + self.config.rollout.max_tokens
        where = drawing.engine, drawing.published, drawing.prompts, drawing.group
        asked = *where, self.lengths.prompt, longest, drawing.temperature
        how = {"keeps": self._keeps, "forks": derived.forks(self.config)}
        for call in sampling_programs.later_turns(*asked, **how):
            beside = *learning, drawing.published
            found.append(Program.of(call, "rollout", beside, "later ", runs=0))
        return found

    @property
    def _keeps(self) -> bool:
        """Whether turns go on in the slots of earlier ones, if these hold all completions."""
        return derived.has_environment(self.config) and self.config.environment.order == "fixed"

    def _publishing(self, learning: tuple) -> list[Program]:
        """The programs that publish the rollout's weights: part by part, then layer by layer."""
        published, found, made = self.rollout.published, [], []
        for call in self.engine.publish.calls(self.weights):
            if call.part:
                found.append(Program.of(call, "rollout", (*learning, list(made))))
                made.append(published[call.part])
            else:
                others = made, published["layers"][:-1]
                found.append(Program.of(call, "rollout", (*learning, *others), runs=call.times))
        return found

    def _kept_state(self) -> Any:
        """The state on the devices between updates."""
        if not self.config.optim.offload:
            return self.state
        state = self.state.replace(opt_state=())
        if self.learner.critic is not None:
            state = state.replace(critic=state.critic.replace(opt_state=()))
        return state

    @property
    def _updates(self) -> list[Update]:
        update = self.learner.update
        return [update] if self.learner.critic is None else [update.policy, update.critic]

    def _kept_reference(self) -> Any:
        return None if self.config.model.offload_reference else self.reference

    def _read_of_cache(self, tokens: int, lanes: int) -> dict[tuple[int, ...], float]:
        """By shape on a device, the mean share of a cache that a decode step of a kernel reads.

        `lanes` lanes decode `tokens` tokens each.
        """
        if not isinstance(self.engine.decoder.kv_cache, TritonDecode):
            return {}
        arrays = [x for _, own in self.rollout.slots.cache for x in jax.tree.leaves(own)]
        shapes = {x.sharding.shard_shape(x.shape) for x in arrays}
        share = gpu_decode.share_read(
            self.lengths.completion_PG.ravel() - 1, tokens, lanes, self.config.rollout.max_tokens
        )
        return dict.fromkeys(shapes, share)

    def _drawing(self, engine: Engine, prompts: int, group: int, temperature: float) -> _Drawing:
        params = self.weights
        like, changed = engine.publish.like(params), engine.publish.changed_parts(params)
        shared = {n: part for n, part in params.items() if n not in ("layers", *changed)}
        (slots, lanes), *_ = engine.layouts(prompts, group)
        empty = engine.empty.eval_shape(slots, lanes, engine.padded(self.lengths.prompt))
        return _Drawing(engine, like | shared, prompts, group, temperature, empty)

    def _evaluations(self) -> dict[str, _Drawing]:
        """Evaluations by name: one greedy completion per problem, and samples if configured."""
        asked, number = self.config.evaluation, num_held_out(self.config)
        engine = make_evaluator(self.config, self.engine)
        found = {"evaluation": self._drawing(engine, number, 1, 0.0)} if number else {}
        if number and asked.num_samples:
            found["samples"] = self._drawing(engine, number, asked.num_samples, asked.temperature)
        return found


def _cast(params: Any, dtype) -> Any:
    def cast(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        return x.astype(dtype)

    return jax.tree.map(cast, params)
