"""Supervised training on worked solutions, the usual start before reinforcement learning.

`python -m grpo_jax.sft --config configs/sft.py` trains the model of the config, or a new one, on a
task's demonstrations or on a dataset with `prompt` and `completion`. `grpo_jax.train` runs it
first when `model.path` is empty. The loss is the mean cross-entropy of the completions' tokens,
stop token included.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import compiling, hosts, inputs, optim, options, program, sharding, workdir
from grpo_jax import metrics as metrics_lib
from grpo_jax import parts as parts_lib
from grpo_jax import policy as policy_lib
from grpo_jax.algorithm import logprobs
from grpo_jax.algorithm import update as update_lib
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.data import problems as problems_lib
from grpo_jax.data import prompts as prompts_lib
from grpo_jax.data import streams, tasks
from grpo_jax.models import transformer
from grpo_jax.phases import phase
from grpo_jax.structs import Array, Params, Rollouts, Sampling, TrainState, pad_rows
from grpo_jax.watchdog import Watchdog

Rows = list[tuple[list[int], list[int]]]  # prompt ids, completion ids


def run(config: ConfigDict, folder: Path) -> Path:
    """Trains, or goes on with the training in `folder`; returns the Hugging Face folder it exports.

    Raises ValueError for what a user can mend, and `workdir.Stopped` once the run was asked to stop
    and has saved.
    """
    export = folder / "export"
    mesh = sharding.make_mesh(**config.mesh)
    workdir.open_for(config, folder)
    now = inputs.date(config.data.date, folder)
    policy, batches, read = _source(config, now, folder / "source")
    inputs.hold(folder, read)
    if (export / "config.json").exists():
        return export
    policy = policy_lib.keep(policy, folder / "source")
    num_steps = config.sft.num_steps
    schedule = optim.schedule(
        config.sft.learning_rate,
        warmup_steps=config.sft.warmup_steps,
        kind="cosine",
        num_updates=num_steps,
        end_fraction=0.0,
    )
    optimizer = parts_lib.make_optimizer(config, schedule, config.sft.weight_decay, clip_norm=1.0)
    scorer = parts_lib.make_scorer(config, policy.model, mesh, Sampling())
    update = _make_update(scorer, optimizer, config.sft.microbatch or config.sft.batch, config)
    checkpoints = Checkpoints(
        config.checkpoint.folder or folder / "checkpoints",
        keep=2,
        max_failed=config.checkpoint.max_failed,
    )
    with phase("start"):
        state = _start(checkpoints, policy, mesh, optimizer, config)
    first = int(state.num_updates)
    writers = metrics_lib.Writers(
        folder,
        first_step=first + 1,
        tensorboard=config.logging.tensorboard,
        wandb_project="",
        config=options.flatten(config),
        enabled=hosts.is_first(),
    )
    with (
        workdir.StopSignal(config.checkpoint.save_before_s) as stop,
        Watchdog(config.loop.stall_limit_s) as watchdog,
        metrics_lib.Progress(num_steps, first_step=first, every_steps=100, noun="sft") as bar,
    ):
        stops, rows = False, batches(first)
        for step in range(first, num_steps):
            started = time.monotonic()
            watchdog.phase(f"Supervised update {step + 1}")
            with phase("sft"):
                state, values = update(state, rows)
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
            due = every and (step + 1) % every == 0
            stops = stop.asked()
            checkpoints.poll()
            if step + 1 < num_steps and (stops or due):
                checkpoints.save(state, {})
            if stops and step + 1 < num_steps:
                checkpoints.close()
                raise _stopped(stop, step + 1, folder)
    checkpoints.close()
    writers.close()
    policy_lib.export(policy, export, state, config.checkpoint.export_dtype)
    if stops:  # at the last step: what comes after this training is asked to stop, too
        raise _stopped(stop, num_steps, folder)
    return export


def _stopped(stop: workdir.StopSignal, step: int, folder: Path) -> workdir.Stopped:
    return workdir.Stopped(
        f"Stopped by {stop.name} at supervised step {step}; all is saved in {folder}. "
        "The same command continues the run."
    )


def _start(checkpoints: Checkpoints, policy, mesh: Mesh, optimizer, config) -> TrainState:
    dtype, number = jnp.dtype(config.model.param_dtype), checkpoints.latest()
    if number is not None:
        like = update_lib.state_like(policy.model, mesh, optimizer, dtype)
        return checkpoints.restore(number, like)
    params = policy_lib.load_params(policy, mesh, config.seed, dtype)
    return update_lib.start(params, policy.model, mesh, optimizer)


# --- Data -----------------------------------------------------------------------------------------


def _source(config: ConfigDict, now: datetime, kept: Path | None = None):
    """The policy to train, a function from a step to its rows, and the sums of what is read.

    The rows follow from the seed and the step. `now`: the time that chat templates are told.
    """
    task = tasks.load(config.data.task) if config.data.task else None
    if config.model.path:
        policy = policy_lib.read(config.model.path, kept=kept)
    else:
        policy = policy_lib.new(config.model, task.make_tokenizer())
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
    encoded = parts_lib.encode(problems, policy, config, "training problems", now)
    problems, prompt_ids = encoded.problems, encoded.prompt_ids
    read = {
        "training problems": inputs.of_problems(problems, prompt_ids),
        "model": inputs.of_model(policy),
    }
    stop = policy.tokenizer.eos_token_id
    stop = policy.stop_ids[0] if stop is None else stop

    def rows(step: int) -> Rows:
        index = prompts_lib.prompt_indices(config.seed, step, len(problems), config.sft.batch)
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


def _loss_sums(params: Params, scorer: update_lib.Scorer, part: Rollouts):
    """Summed cross-entropy of one microbatch, with (count, sum) for the mean."""
    target_BT = part.completion_PGC[:, 0]
    weight_BT = (jnp.arange(target_BT.shape[1])[None] < part.length_PG).astype(jnp.float32)
    total, _, _ = logprobs.loss(
        lambda logp, entropy, terms: -logp,
        scorer.sampling,
        scorer.along,
        scorer.hidden(params, part),
        transformer.head_kernel(params),
        target_BT,
        weight_BT,
        {},
    )
    return total, ({"loss": total, "count": weight_BT.sum()}, {})


def _make_update(scorer: update_lib.Scorer, optimizer, size: int, config: ConfigDict):
    """A function `(state, rows) -> (state, metrics)`; microbatches differ in length."""
    shards = sharding.num_row_shards(scorer.mesh) * scorer.parts

    def through(params: Params, _, carry: update_lib.Carry, part: Rollouts) -> update_lib.Carry:
        sums_of = lambda params, part: _loss_sums(params, scorer, part)  # noqa: E731
        return update_lib.add_gradient(
            sums_of,
            params,
            carry,
            sharding.split_within_shard(scorer.mesh, part, scorer.row_axis),
        )

    empty, add = update_lib.make_adding(scorer, through, sums=("loss", "count"), maxima=())

    like = update_lib.state_like(scorer.model, scorer.mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, like)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiling.options(scorer.mesh),
    )
    def apply(state: TrainState, carry) -> tuple[TrainState, dict[str, Array]]:
        grads, sums, _ = update_lib.over_shards(scorer, carry)
        loss = sums["loss"] / sums["count"]
        grads = jax.tree.map(lambda g: g / sums["count"], grads)
        state, values = update_lib.apply_gradient(state, optimizer, grads, loss)
        return state, values | {"sft/loss": loss, "tokens": sums["count"]}

    def update(state: TrainState, rows: Rows) -> tuple[TrainState, dict[str, Array]]:
        carry = empty()
        for number, part in enumerate(_microbatches(rows, size, shards, config), 1):
            carry = add(state.params, np.int32(1), carry, sharding.shard_rows(scorer.mesh, part))
            if number % compiling.MAX_IN_FLIGHT == 0:
                jax.block_until_ready(carry)
        return apply(state, carry)

    return update


def main(argv: list[str]) -> None:
    config, folder = program.run_arguments(argv, "Trains a model on worked solutions.")
    if not config.sft.num_steps:
        raise ValueError("sft.num_steps = 0: nothing to train. Set it above 0.")
    program.use_all_cores(config, parts_lib.model_shape(config, folder).num_params)
    program.use_nan_checks(config.debug.nans)
    if config.compile_cache:
        program.use_compile_cache(config.mesh)
    metrics_lib.say(f"The trained model is in {run(config, folder)}.")


if __name__ == "__main__":
    program.main(main)
