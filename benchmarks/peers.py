"""A step of grpo_jax beside one of TRL, at equal work: `python benchmarks/peers.py`.

Cases of GRPO: both run the same random Qwen2-shaped model, prompts, group size, forced lengths, KL
term and a reward that costs nothing, in a process each on the same cores. Steps alternate, so that
whatever else slows the machine slows both. TRL runs without gradient checkpointing, its faster
setting.
Prints medians and ratios (TRL's seconds over ours); `--json FILE` writes them.

Cases `sft` and `dpo` train on given completions (`given_peers.py`), and have tokens per second.

Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import given_peers

CASES = {
    "equal": {},
    "spread": {"mean_tokens": 16},
    "long_prompt": {"prompt_tokens": 192},
}


# --- The two servers: a step for each line of input, a line of JSON for each step -----------------


def _serve(step) -> None:
    print(json.dumps({"ready": True}), flush=True)
    for n, line in enumerate(sys.stdin):
        if line.strip() != "step":
            break
        print(json.dumps(step(n)), flush=True)


def serve_ours(folder: str, case: str) -> None:
    if case in given_peers.CASES:
        return _serve(given_peers.ours(folder, case))
    import timing
    import workload

    from grpo_jax.devices import sharding
    from grpo_jax.models.hf.weights import load_params

    work = workload.Work(**CASES[case])
    workload.use_all_cores(work)
    params = load_params(Path(folder), work.shape, sharding.make_mesh())
    runner = workload.Step(work, params)

    def step(n: int) -> dict:
        began = time.perf_counter()
        rollouts, rollout_s = timing.timed(lambda: runner.rollout(n))
        experience, prepare_s = timing.timed(lambda: runner.prepare(rollouts))
        _, update_s = timing.timed(lambda: runner.update(experience))
        return {
            "step": time.perf_counter() - began, "rollout": rollout_s, "prepare": prepare_s,
            "update": update_s, "tokens": int(rollouts.length_PG.sum()),
        }  # fmt: skip

    _serve(step)


def serve_trl(folder: str, case: str, threads: int) -> None:
    if case in given_peers.CASES:
        say = lambda row: print(json.dumps(row), flush=True)  # noqa: E731
        return given_peers.serve_trl(folder, case, threads, _tokenizer(), say)
    import datasets
    import jax
    import numpy as np
    import torch
    import transformers
    import trl
    import workload

    from grpo_jax import keys

    torch.set_num_threads(threads)
    work = workload.Work(**CASES[case])
    tokenizer = _tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lengths = {"step": 0}

    class EndAtLength(transformers.LogitsProcessor):
        """The stop token alone at a completion's length, and never before."""

        def __init__(self, prompt_tokens: int, length_B):
            self.prompt_tokens, self.length_B = prompt_tokens, torch.from_numpy(length_B)

        def __call__(self, input_ids, scores):
            ends_B = input_ids.shape[1] - self.prompt_tokens + 1 >= self.length_B
            is_stop_V = torch.arange(scores.shape[1]) == workload.STOP
            return scores.masked_fill(is_stop_V[None] != ends_B[:, None], -torch.inf)

    generate, seen = model.generate, {}

    def forced(*args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        key = keys.key_for(0, "rollout", lengths["step"])
        rows = np.arange(ids.shape[0])
        row_keys = jax.vmap(lambda r: jax.random.fold_in(key, r))(rows)
        length_B = np.asarray(
            workload.lengths_of(
                jax.random.key_data(row_keys), work.completion_tokens, work.mean_tokens
            )
        )
        processor = EndAtLength(ids.shape[1], length_B)
        began = time.perf_counter()
        out = generate(*args, **kwargs, logits_processor=[processor])
        seen["rollout"] = time.perf_counter() - began
        seen["tokens"] = int(length_B.sum())
        return out

    model.generate = forced

    class Paced(transformers.TrainerCallback):
        """Waits for a line before each step, and answers after it."""

        def __init__(self):
            print(json.dumps({"ready": True}), flush=True)

        def on_step_begin(self, args, state, control, **kwargs):
            if sys.stdin.readline().strip() != "step":
                os._exit(0)
            lengths["step"] = state.global_step
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds = time.perf_counter() - self.began
            print(json.dumps({"step": seconds, **seen}), flush=True)

    def reward(completion_ids, **kwargs):
        return [float(ids[0] % 2) for ids in completion_ids]

    rows = work.prompts * work.group
    prompts = [
        "".join(chr(0x4E00 + i) for i in row)
        for n in range(64)
        for row in np.random.default_rng([n, 7])
        .integers(2, work.shape.vocab_size, (work.prompts, work.prompt_tokens))
        .tolist()
    ]
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows, num_generations=work.group, num_iterations=1,
        max_completion_length=work.completion_tokens, temperature=1.0, beta=0.04 * work.kl,
        learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1.0, max_steps=64,
        shuffle_dataset=False, report_to=[], logging_steps=1000, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}), callbacks=[Paced()],
    )  # fmt: skip
    trainer.train()


def _tokenizer():
    """One character for each of 512 tokens."""
    import tokenizers
    import transformers

    vocab = {"<pad>": 0, "<eos>": 1} | {chr(0x4E00 + i): i for i in range(2, 512)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


# --- The run --------------------------------------------------------------------------------------


def _make_model(folder: Path) -> None:
    """Random weights as a Hugging Face folder."""
    import functools

    import jax
    import workload

    from grpo_jax import keys
    from grpo_jax.models import parameters
    from grpo_jax.models.hf.export import save

    model = dataclasses.replace(workload.SHAPES["tiny"], max_position=1024)
    params = jax.jit(functools.partial(parameters.init, model))(keys.key_for(0, "init"))
    save(folder, params, model, source=None, dtype="float32", tokenizer=_tokenizer())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--cases", nargs="+", default=list(CASES), choices=[*CASES, *given_peers.CASES]
    )
    parser.add_argument("--steps", type=int, default=12, help="timed, after those that warm up")
    parser.add_argument("--threads", type=int, default=2, help="of TRL")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve == "ours":
        return serve_ours(args.folder, args.cases[0])
    if args.serve == "trl":
        return serve_trl(args.folder, args.cases[0], args.threads)
    import timing

    found = {"ratios": {}, "rollout_ratios": {}, "medians": {}, "steps": args.steps}
    found["environment"] = timing.environment() | _versions()
    with tempfile.TemporaryDirectory() as folder:
        _make_model(Path(folder))
        for case in args.cases:
            medians = _alternate(folder, case, args.steps, args.threads)
            ours, trl = medians["ours"], medians["trl"]
            found["medians"][case] = medians
            if case in given_peers.CASES:
                found["ratios"][case] = given_peers.tell(case, medians)
                continue
            found["ratios"][case] = trl["step"] / ours["step"]
            found["rollout_ratios"][case] = trl["rollout"] / ours["rollout"]
            print(
                f"{case:<12} ours {ours['step']:.3f} s (rollout {ours['rollout']:.3f}, reference "
                f"{ours['prepare']:.3f}, update {ours['update']:.3f}); TRL {trl['step']:.3f} s "
                f"(rollout {trl['rollout']:.3f}): {found['ratios'][case]:.2f} times, rollout "
                f"{found['rollout_ratios'][case]:.2f} times",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("trl", "torch", "transformers")}


def _alternate(folder: str, case: str, steps: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians of each program's timings; their steps take turns."""
    servers = {}
    for name in ("ours", "trl"):
        command = [
            sys.executable, __file__, "--serve", name, "--cases", case, "--folder", folder,
            "--threads", str(threads),
        ]  # fmt: skip
        servers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    try:
        for server in servers.values():
            _answer(server)
        rows: dict[str, list[dict]] = {name: [] for name in servers}
        for _ in range(steps + _warm_up(case)):
            for name, server in servers.items():
                server.stdin.write("step\n")
                server.stdin.flush()
                rows[name].append(_answer(server))
    finally:
        for server in servers.values():
            server.kill()
    if case in given_peers.CASES:
        return given_peers.compared(case, rows)
    tokens = [[row["tokens"] for row in rows[name]] for name in rows]
    assert tokens[0] == tokens[1], "the two did not do the same work"
    return {
        name: {key: statistics.median(row[key] for row in own[2:]) for key in own[0]}
        for name, own in rows.items()
    }


def _warm_up(case: str) -> int:
    return given_peers.WARM_UP if case in given_peers.CASES else 2


def _answer(server: subprocess.Popen) -> dict:
    for line in server.stdout:
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    raise SystemExit(f"A server ended with status {server.wait()}.")


if __name__ == "__main__":
    main()
