"""Servers of `peers.py` for given completions: a supervised step, and one of DPO.

Both libraries read the same rows of token ids. Ours times what a step of `grpo_jax.sft` and
`grpo_jax.dpo` does, from rows on the host to new parameters; TRL's is from the callback at a step's
begin to that at its end, so without what collates rows into a batch. Neither computes a reference
in a step: both score it once before.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 64  # rows are made for so many
WARM_UP = 6  # steps that are not timed; ours compiles a size of rows in some of them


@dataclasses.dataclass(frozen=True)
class GivenWork:
    """Rows of a step, and how TRL batches them."""

    pairs: bool = False  # DPO; False: supervised
    batch: int = 64  # rows, or pairs
    prompt_tokens: int = 16
    completion_tokens: int = 112  # limit
    mean_tokens: int = 0  # geometric lengths of this mean, cut at the limit; 0: all at the limit
    trl_rows: int = 0  # rows that TRL computes at once; 0: the whole batch
    trl_padding_free: bool = False  # rows one after the other, without attention to each other
    trl_by_length: bool = False  # TRL draws rows of like length together, so others than ours

    @property
    def answers(self) -> int:
        return 2 if self.pairs else 1

    def rows(self, n: int) -> list[tuple[list[int], list[list[int]]]]:
        """Prompt, and one completion or two, of each row of step n; 1 ends a completion."""
        rng, found = np.random.default_rng([n, 13]), []
        for _ in range(self.batch):
            prompt = rng.integers(2, 512, self.prompt_tokens).tolist()
            answers = []
            for _ in range(self.answers):
                length = self.completion_tokens
                if self.mean_tokens:
                    length = min(2 + int(rng.geometric(1 / self.mean_tokens)), length)
                answers.append([*rng.integers(2, 512, length - 1).tolist(), 1])
            found.append((prompt, answers))
        return found

    def tokens(self, rows: list) -> int:
        """Tokens of rows, a prompt for each of its completions."""
        return sum(self.answers * len(prompt) + sum(map(len, rest)) for prompt, rest in rows)


_SPREAD = GivenWork(completion_tokens=256, mean_tokens=64)
CASES = {
    "sft": dataclasses.replace(_SPREAD, trl_rows=8),
    "sft_whole": _SPREAD,
    "sft_padding_free": dataclasses.replace(_SPREAD, trl_rows=8, trl_padding_free=True),
    "sft_by_length": dataclasses.replace(_SPREAD, trl_rows=8, trl_by_length=True),
    "sft_equal": GivenWork(trl_rows=8),
    "sft_equal_whole": GivenWork(),
    "dpo": GivenWork(pairs=True, batch=16, prompt_tokens=192, completion_tokens=64),
}


# --- Ours -----------------------------------------------------------------------------------------


def ours(folder: str, case: str) -> Callable[[int], dict[str, Any]]:
    """A step of ours: (its number) -> seconds, tokens, and a number that both must agree on."""
    import jax
    import timing
    import workload

    from grpo_jax.config import loading, options
    from grpo_jax.data.examples import Example, Pair
    from grpo_jax.devices import sharding
    from grpo_jax.learner import train_state
    from grpo_jax.learner.row_sizes import CompiledSizes
    from grpo_jax.models.hf.weights import load_params
    from grpo_jax.setup.learner import make_supervised_learner
    from grpo_jax.trainers import given, preference, rollout, sft

    work = CASES[case]
    workload.use_all_cores(workload.Work())
    row, config = preference.PAIRS if work.pairs else sft.SFT, options.default()
    schedule = config[row.section]
    schedule.batch, schedule.num_steps, schedule.learning_rate = work.batch, STEPS, 1e-6
    schedule.max_tokens, config.data.max_prompt_tokens = work.completion_tokens, work.prompt_tokens
    loading.settle(config)
    model, mesh = workload.SHAPES["tiny"], sharding.make_mesh()
    learner = make_supervised_learner(
        config, model, mesh, STEPS, row.component(config), row.section, row.group
    )
    params = load_params(Path(folder), model, mesh)
    run = types.SimpleNamespace(
        config=config,
        mesh=mesh,
        prepare=learner.prepare,
        measuring=dataclasses.replace(learner.prepare, with_old=True, sizes=CompiledSizes()),
        weights=lambda train: train.params,
    )
    state = types.SimpleNamespace(
        train=train_state.start(params, model, mesh, learner.optimizer), reference=None
    )

    def encoded(n: int) -> list[Any]:
        ids = lambda x: np.array(x, np.int32)  # noqa: E731
        rows = work.rows(n)
        if not work.pairs:
            return [Example(ids(prompt), ids(answer)) for prompt, (answer,) in rows]
        found = [preference.Row(Pair(ids(p), *map(ids, answers))) for p, answers in rows]
        laid_out = row.rollouts(found, given.num_shards(run), config)
        logp_PGC, _ = given.log_probs(run, state, laid_out)
        ref_PG = np.where(laid_out.chosen_PGC[..., : logp_PGC.shape[-1]], logp_PGC, 0).sum(-1)
        return [one._replace(ref_logp=tuple(r.tolist())) for one, r in zip(found, ref_PG)]

    numbers = [encoded(n) for n in range(STEPS)] if work.pairs else []

    def update(rows: list[Any]) -> dict[str, Any]:
        laid_out = row.rollouts(rows, given.num_shards(run), config)
        experience = row.experience(run, state, rows, rollout.device_rows(run, laid_out))
        state.train, metrics = learner.update(state.train, experience, 0)
        return metrics

    def step(n: int) -> dict[str, Any]:
        rows = numbers[n] if work.pairs else encoded(n)
        began = time.process_time()
        metrics, seconds = timing.timed(lambda: update(rows))
        cpu_s = time.process_time() - began
        told = jax.device_get(metrics)
        agrees = float(told["preference/logp_chosen" if work.pairs else row.loss])
        tokens = work.tokens(work.rows(n))
        return {"step": seconds, "cpu_s": cpu_s, "tokens": tokens, "agrees": agrees}

    return step


# --- TRL's ----------------------------------------------------------------------------------------


def serve_trl(folder: str, case: str, threads: int, tokenizer: Any, say: Callable) -> None:
    """Trains with TRL; waits for a line of input before each step, and says a row after it."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(threads)
    work = CASES[case]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, Any] = {}

    class Paced(transformers.TrainerCallback):
        def __init__(self):
            say({"ready": True})

        def on_step_begin(self, args, state, control, **kwargs):
            if sys.stdin.readline().strip() != "step":
                os._exit(0)
            seen.update(agrees=0.0, tokens=0)
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter(), time.process_time()
            seconds, cpu_s = (a - b for a, b in zip(now, self.began))
            say({"step": seconds, "cpu_s": cpu_s, **seen})

    at_once = work.trl_rows or work.batch
    common = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": work.batch // at_once, "learning_rate": 1e-6,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "max_steps": STEPS,
        "report_to": [], "logging_steps": 1000, "save_strategy": "no", "disable_tqdm": True,
        "max_length": None,
        "train_sampling_strategy": "group_by_length" if work.trl_by_length else "sequential",
    }  # fmt: skip
    rows = [row for n in range(STEPS) for row in work.rows(n)]
    text = lambda ids: "".join("<eos>" if i == 1 else chr(0x4E00 + i) for i in ids)  # noqa: E731
    if work.pairs:
        columns = {
            "prompt": [text(prompt) for prompt, _ in rows],
            "chosen": [text(answers[0]) for _, answers in rows],
            "rejected": [text(answers[1]) for _, answers in rows],
        }
        config = trl.DPOConfig(**common, beta=0.1, precompute_ref_log_probs=True)
        trainer_class = trl.DPOTrainer
    else:
        whole = [prompt + answer for prompt, (answer,) in rows]
        labels = [[-100] * len(prompt) + answer for prompt, (answer,) in rows]
        columns = {"input_ids": whole, "labels": labels}
        if work.trl_by_length:
            columns["length"] = [len(ids) for ids in whole]
        config = trl.SFTConfig(**common, padding_free=work.trl_padding_free)
        trainer_class = trl.SFTTrainer
    trainer = trainer_class(
        model=model, args=config, processing_class=tokenizer, callbacks=[Paced()],
        train_dataset=datasets.Dataset.from_dict(columns),
    )  # fmt: skip
    learn = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        there = inputs["attention_mask"].sum() if "attention_mask" in inputs else None
        seen["tokens"] += inputs["input_ids"].numel() if there is None else int(there)
        loss = learn(model, inputs, *args, **kwargs)
        seen["agrees"] += float(loss)
        if work.pairs:
            seen["agrees"] = trainer._metrics["train"]["logps/chosen"][-1]
        return loss

    trainer.training_step = training_step
    trainer.train()


# --- Both -----------------------------------------------------------------------------------------


def compared(case: str, rows: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Medians of each library after the steps that warm up; both did the same work."""
    work, found = CASES[case], {}
    for ours, trl in zip(*rows.values()):
        if not work.trl_by_length:
            assert ours["tokens"] == trl["tokens"], "the two did not do the same work"
            np.testing.assert_allclose(ours["agrees"], trl["agrees"], rtol=1e-3)
    for name, own in rows.items():
        timed = own[WARM_UP:]
        found[name] = {
            "step": statistics.median(row["step"] for row in timed),
            "tokens_per_s": statistics.median(row["tokens"] / row["step"] for row in timed),
            "tokens_per_cpu_s": statistics.median(row["tokens"] / row["cpu_s"] for row in timed),
            "cpu_seconds": [round(row["cpu_s"], 3) for row in own],
            "seconds": [round(row["step"], 3) for row in own],
            "all_tokens_per_s": sum(row["tokens"] for row in timed)
            / sum(row["step"] for row in timed),
        }
    return found


def tell(case: str, found: dict[str, dict[str, float]]) -> float:
    """Prints a case; returns ours over TRL's tokens per second, of the medians."""
    ours, trl = found["ours"], found["trl"]
    ratio = ours["tokens_per_s"] / trl["tokens_per_s"]
    of_all = ours["all_tokens_per_s"] / trl["all_tokens_per_s"]
    print(
        f"{case:<17} ours {ours['step']:.3f} s, {ours['tokens_per_s']:,.0f} tokens/s; TRL "
        f"{trl['step']:.3f} s, {trl['tokens_per_s']:,.0f} tokens/s: {ratio:.2f} times "
        f"(of all tokens and seconds {of_all:.2f}); of a processor's seconds "
        f"{ours['tokens_per_cpu_s']:,.0f} and {trl['tokens_per_cpu_s']:,.0f}: "
        f"{ours['tokens_per_cpu_s'] / trl['tokens_per_cpu_s']:.2f} times",
        flush=True,
    )
    return ratio
