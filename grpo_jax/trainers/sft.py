"""Supervised training on worked solutions, the usual start before reinforcement learning.

It trains the model of the config, or a new one, on a task's demonstrations or on a dataset with
`prompt` and `completion`. `grpo_jax.train` runs it first when `model.path` is empty. The loss is
the mean cross-entropy of the completions' tokens, stop token included.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.config.dotted import flatten
from grpo_jax.data import problems as problems_lib
from grpo_jax.data import prompts, streams, tasks
from grpo_jax.devices import by_shard, compiling, sharding, transfer
from grpo_jax.devices.phases import phase
from grpo_jax.hosts import processes
from grpo_jax.hosts.watchdog import Watchdog
from grpo_jax.learner import accumulate, logprobs, optim, train_state
from grpo_jax.learner.accumulate import Carry
from grpo_jax.learner.scoring import Scorer
from grpo_jax.messages.progress import Progress
from grpo_jax.metrics import writers as writers_lib
from grpo_jax.models import parameters
from grpo_jax.models import policy as policy_lib
from grpo_jax.run import claim, workdir
from grpo_jax.run import stop as stop_lib
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.setup import inputs, model
from grpo_jax.setup.data import encode
from grpo_jax.setup.learner import make_optimizer, make_scorer
from grpo_jax.setup.run_folder import open_for
from grpo_jax.structs import Array, Params, Rollouts, Sampling, TrainState, pad_rows
from grpo_jax.trainers import exporting

Rows = list[tuple[list[int], list[int]]]  # prompt ids, completion ids


def run(config: ConfigDict, folder: Path, stop: stop_lib.StopSignal | None = None) -> Path:
    """Trains, or goes on with the training in `folder`; returns the Hugging Face folder it exports.

    `stop`: as the caller hears of it; without, the training listens itself. Raises ValueError for
    what a user can mend, and `stop.Stopped` once the run was asked to stop and has saved.
    """
    with claim.held(), stop or stop_lib.StopSignal(config.checkpoint.save_before_s) as stop:
        return _run(config, folder, stop)


def _run(config: ConfigDict, folder: Path, stop: stop_lib.StopSignal) -> Path:
    export = folder / "export"
    mesh = sharding.make_mesh(**config.mesh)
    with phase("start"), stop.nothing_to_lose():
        open_for(config, folder)
        now = inputs.date(config.data.date, folder)
        policy, batches, read = _source(config, folder / "source", now)
        inputs.hold(folder, read)
        if (export / "config.json").exists():
            return export
        policy = policy_lib.keep(policy, folder / "source")
        optimizer, update = _learner(config, policy, mesh)
        checkpoints = Checkpoints(
            config.checkpoint.folder or folder / "checkpoints",
            keep=2,
            max_failed=config.checkpoint.max_failed,
            on_saved=functools.partial(workdir.note_saved, folder),
        )
        state = _start(checkpoints, policy, mesh, optimizer, config, folder)
    state = _train(config, folder, stop, checkpoints, state, update, batches)
    with stop.nothing_to_lose(stop_lib.PATIENCE_S):
        exporting.export(policy, export, state, config.checkpoint.export_dtype)
        updates = int(state.num_updates)
        workdir.note_export(export, step=updates, updates=updates)
        if stop.asked():  # what comes after this training is asked to stop, too
            raise stop_lib.Stopped(_stopped(stop, config.sft.num_steps, folder))
    return export


def _train(
    config: ConfigDict,
    folder: Path,
    stop: stop_lib.StopSignal,
    checkpoints: Checkpoints,
    state: TrainState,
    update: Callable,
    batches: Callable[[int], Rows],
) -> TrainState:
    """The state after the last step. Raises `stop.Stopped` once all is saved."""
    num_steps, first = config.sft.num_steps, int(state.num_updates)
    writers = writers_lib.Writers(
        folder,
        first_step=first + 1,
        tensorboard=config.logging.tensorboard,
        wandb_project="",
        config=flatten(config),
        enabled=processes.is_first(),
    )
    with (
        closing(writers),
        Watchdog(config.loop.stall_timeout_s) as watchdog,
        Progress(num_steps, first_step=first, every_steps=100, noun="sft") as bar,
    ):
        rows = batches(first)
        for step in range(first, num_steps):
            started = time.monotonic()
            watchdog.phase(f"Supervised update {step + 1}")
            leave = functools.partial(_saved, checkpoints, state, stop, step, folder)
            with phase("sft"):
                with stop.leaving(leave) as over:
                    state, values = update(state, rows, over)
                rows = batches(step + 1) if step + 1 < num_steps else []  # meanwhile
                values = {name: float(value) for name, value in jax.device_get(values).items()}
            values["sft/tokens_per_s"] = values.pop("tokens") / (time.monotonic() - started)
            if values.pop("skipped"):
                raise ValueError(
                    f"sft: loss or gradient of update {step} is not finite "
                    f"(loss {values['sft/loss']}). Lower sft.learning_rate = "
                    f"{config.sft.learning_rate}."
                )
            writers.scalars(step + 1, values)
            bar.update(step + 1, values)
            every = config.sft.checkpoint_every_steps
            checkpoints.poll()
            if step + 1 == num_steps:
                break
            if stop.asked():
                raise stop_lib.Stopped(_saved(checkpoints, state, stop, step + 1, folder))
            if every and (step + 1) % every == 0:
                claim.check()
                checkpoints.save(state, {})
        checkpoints.close()
    return state


def _saved(
    checkpoints: Checkpoints, state: TrainState, stop: stop_lib.StopSignal, step: int, folder: Path
) -> str:
    """Saves what the run holds after `step`, and says so."""
    if step:
        claim.check()
        checkpoints.save(state, {})
    checkpoints.close()
    return _stopped(stop, step, folder)


def _stopped(stop: stop_lib.StopSignal, step: int, folder: Path) -> str:
    return (
        f"Stopped by {stop.name} at supervised step {step}; all is saved in {folder}. "
        "The same command continues the run."
    )


def _start(
    checkpoints: Checkpoints, policy, mesh: Mesh, optimizer, config: ConfigDict, folder: Path
) -> TrainState:
    again = config.checkpoint.begin_again
    dtype, number = jnp.dtype(config.model.param_dtype), checkpoints.latest(begin_again=again)
    if number is None:
        workdir.begin(folder, checkpoints.folder, again=again)
    else:
        like = train_state.state_like(policy.model, mesh, optimizer, dtype)
        return checkpoints.restore(number, like)
    params = policy_lib.load_params(policy, mesh, config.seed, dtype)
    return train_state.start(params, policy.model, mesh, optimizer)


# --- Data -----------------------------------------------------------------------------------------


def _source(config: ConfigDict, kept: Path, now: datetime):
    """The policy to train, a function from a step to its rows, and the sums of what is read.

    The rows follow from the seed and the step. `kept`: what the run keeps of its
    source; `now`: the time that chat templates are told.
    """
    task = tasks.load(config.data.task) if config.data.task else None
    if config.model.path:
        policy = policy_lib.read(config.model.path, kept=kept)
    else:
        policy = model.new(config.model, task.make_tokenizer())
    policy.check_length(config.data.max_prompt_tokens, config.sft.max_tokens, "sft.max_tokens")
    if task:
        problems, _ = task.generate(config.data.num_train, config.data.num_eval, config.seed)
        solution = task.worked_solution
    else:
        problems = problems_lib.load_train(config.data)
        for problem in problems:
            if not isinstance(problem.columns.get("completion"), str):
                raise ValueError(
                    f"data.path: {problem.where} has no text as column `completion` to train on; "
                    f"it has prompt, {', '.join(problem.columns)}. data.columns can rename one, "
                    "such as completion=solution."
                )
        solution = lambda problem, rng: problem.columns["completion"]  # noqa: E731
    encoded = encode(problems, policy, config, "training problems", now)
    problems, prompt_ids = encoded.problems, encoded.prompt_ids
    read = {
        "training problems": inputs.of_problems(problems, prompt_ids),
        "model": inputs.of_model(policy),
    }
    stop = policy.tokenizer.eos_token_id
    stop = policy.stop_ids[0] if stop is None else stop

    def rows(step: int) -> Rows:
        index = prompts.prompt_indices(config.seed, step, len(problems), config.sft.batch)
        rng = streams.stream(config.seed, "solutions", step)
        texts = [solution(problems[i], rng) for i in index]
        encoded = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for i, ids in zip(index, encoded):
            policy.refuse_unknown(ids, f"The worked solution of {problems[i].where}")
            if len(ids) >= config.sft.max_tokens:
                raise ValueError(
                    f"sft.max_tokens = {config.sft.max_tokens}, but the worked solution of "
                    f"{problems[i].where} has {len(ids) + 1} tokens with its stop token. "
                    "Raise the limit."
                )
        return [(prompt_ids[i], [*ids, stop]) for i, ids in zip(index, encoded)]

    return policy, rows, read


def _bucket(longest: int, limit: int, parts: int = 4) -> int:
    """`longest` rounded up to a quarter of the limit: few lengths, each compiled once."""
    step = -(-limit // parts)
    return min(limit, -(-longest // step) * step)


def _microbatches(rows: Rows, size: int, shards: int, config: ConfigDict) -> Iterator[Rollouts]:
    """The rows, those of like length together, each part padded to its longest completion.

    A part that does not split into `shards` is filled with rows of no completion.
    """
    rows = sorted(rows, key=lambda row: len(row[1]))
    longest_prompt = max(len(prompt) for prompt, _ in rows)
    width = _bucket(longest_prompt, config.data.max_prompt_tokens)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        tokens = _bucket(len(part[-1][1]), config.sft.max_tokens)
        part = part + [([0], [])] * (-len(part) % shards)
        prompt_PQ, prompt_length_P = pad_rows([prompt for prompt, _ in part], width)
        completion_PC, length_P = pad_rows([completion for _, completion in part], tokens)
        yield Rollouts(
            prompt_PQ,
            prompt_length_P,
            completion_PC[:, None],
            np.zeros(completion_PC[:, None].shape, np.float32),
            length_P[:, None],
            np.ones((len(part), 1), bool),
        )


# --- The update -----------------------------------------------------------------------------------


def _learner(config: ConfigDict, policy: policy_lib.Policy, mesh: Mesh):
    """The optimizer, and the update as `_make_update` gives it."""
    schedule = optim.schedule(
        config.sft.learning_rate,
        warmup_steps=config.sft.warmup_steps,
        kind="cosine",
        num_updates=config.sft.num_steps,
        end_fraction=0.0,
    )
    optimizer = make_optimizer(config, schedule, config.sft.weight_decay, clip_norm=1.0)
    scorer = make_scorer(config, policy.model, mesh, Sampling())
    size = config.sft.microbatch or config.sft.batch
    return optimizer, _make_update(scorer, optimizer, size, config)


def _loss_sums(params: Params, scorer: Scorer, part: Rollouts):
    """Summed cross-entropy of one microbatch, with (count, sum) for the mean."""
    target_BT = part.completion_PGC[:, 0]
    weight_BT = (jnp.arange(target_BT.shape[1])[None] < part.length_PG).astype(jnp.float32)
    total, _, _ = logprobs.loss(
        lambda logp, entropy, terms: -logp,
        scorer.sampling,
        scorer.along,
        scorer.hidden(params, part),
        parameters.head_kernel(params),
        target_BT,
        weight_BT,
        {},
    )
    return total, ({"loss": total, "count": weight_BT.sum()}, {})


def _make_update(scorer: Scorer, optimizer, size: int, config: ConfigDict):
    """A function `(state, rows) -> (state, metrics)`; microbatches differ in length.

    Its `before_donating()` is called once it has the gradients; until then the state is whole.
    """
    shards = sharding.num_row_shards(scorer.mesh) * scorer.parts

    def through(params: Params, _, carry: Carry, part: Rollouts) -> Carry:
        sums_of = lambda params, part: _loss_sums(params, scorer, part)  # noqa: E731
        return accumulate.add_gradient(
            sums_of,
            params,
            carry,
            by_shard.split_within_shard(scorer.mesh, part, scorer.row_axis),
        )

    empty, add = accumulate.make_adding(scorer, through, sums=("loss", "count"), maxima=())

    like = train_state.state_like(scorer.model, scorer.mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, like)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiling.options(scorer.mesh),
    )
    def apply(state: TrainState, carry) -> tuple[TrainState, dict[str, Array]]:
        grads, sums, _ = accumulate.over_shards(scorer, carry)
        loss = sums["loss"] / sums["count"]
        grads = jax.tree.map(lambda g: g / sums["count"], grads)
        state, values = accumulate.apply_gradient(state, optimizer, grads, loss)
        return state, values | {"sft/loss": loss, "tokens": sums["count"]}

    is_compiled = False

    def update(
        state: TrainState, rows: Rows, before_donating: Callable[[], None] = lambda: None
    ) -> tuple[TrainState, dict[str, Array]]:
        nonlocal is_compiled
        carry = empty()
        for number, part in enumerate(_microbatches(rows, size, shards, config), 1):
            carry = add(state.params, np.int32(1), carry, transfer.shard_rows(scorer.mesh, part))
            if number % compiling.MAX_IN_FLIGHT == 0:
                jax.block_until_ready(carry)
        if not is_compiled:  # by now: it takes long, and may be given up
            apply.lower(state, carry).compile()
            is_compiled = True
        jax.block_until_ready(carry)
        before_donating()
        return apply(state, carry)

    return update
