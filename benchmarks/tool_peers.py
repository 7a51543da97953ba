"""Training with a tool beside TRL: `python benchmarks/tool_peers.py`.

Both libraries train the same random Qwen2-shaped model by GRPO for some steps, with the same tool
as a plain function, Qwen2.5's chat template and a reward that costs nothing. Each of 64 episodes
calls the tool twice and then answers: tokens are forced, so that both do the same work. Prints each
library's steps per second after those that warm up, with a tool that answers at once and with one
that takes 0.1 s; `--json FILE` writes them. Runs of the two take turns.

Needs the extra `bench`; the chat template is that of TRL's package.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

PROMPTS, GROUP = 8, 8
TOOLS = {"at_once": "multiply", "0.1 s": "multiply_slowly"}
MAX_TOKENS = 192  # of an episode
ANSWER = "The answer is 408."
_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call>".split()


def messages(tool: str) -> list[dict[str, Any]]:
    """What follows the question in each episode."""
    call = {"name": tool, "arguments": {"a": 12, "b": 34}}
    said = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function"} | {"function": call}],
    }
    result = {"role": "tool", "name": tool, "content": "408"}
    return [said, result, said, result, {"role": "assistant", "content": ANSWER}]


def questions() -> list[list[dict[str, str]]]:
    """Questions of as many tokens each."""
    return [[{"role": "user", "content": f"What is 12 times {n}?"}] for n in range(30, 90)]


def make_tokenizer() -> Any:
    """Byte pairs learned from the template, so that a prompt has as many tokens as usual."""
    import tokenizers
    import transformers
    from trl.chat_template_utils import qwen2_5_chat_template as template

    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator([template, ANSWER, "What is times ?"] * 2, trainer)
    model = json.loads(learned.to_str())["model"]
    rules = transformers.Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules.backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.add_tokens(["<tool_call>", "</tool_call>"])
    made.chat_template = template
    return made


def script(tokenizer: Any, tool: str) -> list[int]:
    """The ids of an episode after its prompt, up to its last stop token."""
    import tool_of_peers
    from transformers.utils import get_json_schema

    schema = [get_json_schema(getattr(tool_of_peers, tool))]
    ids = lambda said, **how: list(  # noqa: E731
        tokenizer.apply_chat_template(said, tools=schema, tokenize=True, return_dict=False, **how)
    )
    asked = questions()
    begun = [ids(question, add_generation_prompt=True) for question in asked]
    assert len(set(map(len, begun))) == 1, "questions differ in length"
    whole = ids([*asked[0], *messages(tool)])
    assert whole[: len(begun[0])] == begun[0]
    rest = whole[len(begun[0]) :]
    return rest[: len(rest) - rest[::-1].index(tokenizer.eos_token_id)]


def make_model(folder: Path) -> None:
    """Random weights as a Hugging Face folder."""
    import functools

    import jax
    import workload

    from grpo_jax import keys
    from grpo_jax.models import parameters
    from grpo_jax.models.hf.export import save

    tokenizer = make_tokenizer()
    model = dataclasses.replace(
        workload.SHAPES["tiny"], max_position=1024, vocab_size=-(-len(tokenizer) // 64) * 64
    )
    params = jax.jit(functools.partial(parameters.init, model))(keys.key_for(0, "init"))
    save(folder, params, model, source=None, dtype="float32", tokenizer=tokenizer)


def reward(completions, **columns):
    """Says something of a conversation, so that groups have a gradient."""
    return [float(n % 2) for n in range(len(completions))]


def _told(seconds: list[float], calls: Any) -> None:
    print(json.dumps({"seconds": seconds, "calls": calls}), flush=True)


def ours(folder: str, case: str, steps: int) -> None:
    """Trains with grpo_jax, and prints the seconds of each step."""
    import jax.numpy as jnp
    import tool_of_peers
    from transformers import AutoTokenizer

    import grpo_jax
    from grpo_jax.sampling import decode

    told = script(AutoTokenizer.from_pretrained(folder), TOOLS[case])
    script_T = jnp.array([*told, *[0] * MAX_TOKENS], jnp.int32)
    usual = decode.choose

    def choose(decoder, hidden_RWD, head_DV, key_RW2, time_RW, temperature):
        _, logp_RW = usual(decoder, hidden_RWD, head_DV, key_RW2, time_RW, temperature)
        return script_T[jnp.clip(time_RW, 0, len(script_T) - 1)], logp_RW

    decode.choose = choose
    ends, rows = [time.perf_counter()], []

    def on_step(step):
        if step.number:
            ends.append(time.perf_counter())
            rows.append(step.metrics)

    grpo_jax.train(
        folder,
        [reward],
        [{"prompt": question} for question in questions()],
        workdir=tempfile.mkdtemp(),
        tools=[getattr(tool_of_peers, TOOLS[case])],
        callbacks=[on_step],
        **{
            "batch.prompts": PROMPTS, "batch.group": GROUP, "rollout.max_tokens": MAX_TOKENS,
            "loop.num_steps": steps, "algorithm.kl_coef": 0.04, "optim.learning_rate": 1e-6,
            "optim.schedule": "constant", "optim.warmup_steps": 0, "environment.max_turns": 3,
            "data.max_prompt_tokens": 512, "checkpoint.every_steps": 0, "evaluation.every_steps": 0,
            "model.dtype": "float32", "environment.observation_tokens": 32,
        },
    )  # fmt: skip
    _told([b - a for a, b in itertools.pairwise(ends)], rows[-1].get("environment/calls"))


def trl(folder: str, case: str, steps: int, threads: int) -> None:
    """The same with TRL."""
    import datasets
    import tool_of_peers
    import torch
    import transformers
    import trl as library

    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    told = torch.tensor(script(tokenizer, TOOLS[case]))
    schema = [transformers.utils.get_json_schema(getattr(tool_of_peers, TOOLS[case]))]
    asked = tokenizer.apply_chat_template(
        questions()[0], tools=schema, add_generation_prompt=True, return_dict=False
    )

    class Forced(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            token = told[min(input_ids.shape[1] - len(asked), len(told) - 1)]
            others = torch.arange(scores.shape[1]) != token
            return scores.masked_fill(others[None], -torch.inf)

    generate = model.generate
    model.generate = lambda *args, **how: generate(*args, **how, logits_processor=[Forced()])
    ends: list[float] = []

    class Timed(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            ends.append(time.perf_counter()) if not ends else None

        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    config = library.GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, num_iterations=1,
        max_completion_length=MAX_TOKENS, temperature=1.0, beta=0.04, learning_rate=1e-6,
        lr_scheduler_type="constant", max_grad_norm=1.0, max_steps=steps, shuffle_dataset=False,
        report_to=[], logging_steps=1000, save_strategy="no", disable_tqdm=True,
        max_tool_calling_iterations=3,
    )  # fmt: skip
    trainer = library.GRPOTrainer(
        model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": questions()}), callbacks=[Timed()],
        tools=[getattr(tool_of_peers, TOOLS[case])],
    )  # fmt: skip
    trainer.train()
    calls = trainer._metrics["train"]["tools/call_frequency"] or [
        row["tools/call_frequency"] for row in trainer.state.log_history if len(row) > 5
    ]
    _told([b - a for a, b in itertools.pairwise(ends)], calls[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--steps", type=int, default=6, help="of each run, with two that warm up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of TRL")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--run", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run == "ours":
        return ours(args.folder, args.cases[0], args.steps)
    if args.run == "trl":
        return trl(args.folder, args.cases[0], args.steps, args.threads)
    import timing

    found: dict[str, Any] = {"environment": timing.environment(), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for case in args.cases:
            seconds: dict[str, list[float]] = {"ours": [], "trl": []}
            for _ in range(args.repeats):
                for name, own in seconds.items():
                    own += _run(name, folder, case, args)
            medians = {name: statistics.median(own) for name, own in seconds.items()}
            ratio = medians["trl"] / medians["ours"]
            found["cases"][case] = {"ratio": ratio, "medians": medians, "seconds": seconds}
            print(
                f"tool {case:<8} ours {medians['ours']:.3f} s a step, TRL {medians['trl']:.3f} s: "
                f"{ratio:.2f} times",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def _run(name: str, folder: str, case: str, args: argparse.Namespace) -> list[float]:
    """Seconds of one run's steps after the two that warm up."""
    command = [
        sys.executable, __file__, "--run", name, "--cases", case, "--folder", folder,
        "--steps", str(args.steps), "--threads", str(args.threads),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not lines:
        raise SystemExit(f"A run of {name} ended with status {done.returncode}.")
    told = json.loads(lines[-1])
    assert told["calls"] == 2, f"{name} made {told['calls']} calls an episode"
    return told["seconds"][2:]


if __name__ == "__main__":
    main()
