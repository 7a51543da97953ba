"""Memory of a step: adapters beside weights in 16, 8 or 4 bits, against all weights.

    python -m pip install -e ".[plan]" && python benchmarks/lora_memory.py
    python benchmarks/lora_memory.py --cards configs/shapes/qwen2.5-*.json
    python benchmarks/lora_memory.py --cards configs/shapes/qwen2.5-3b.json \
        --config recipes/gsm8k_3b_lora_24gb

Programs are compiled for a chip that need not be there (`grpo_jax/planning`). Without --cards:
Llama-3-8B's shape, rank 16 on all dense layers, one chip, with the reference of a KL term; a table
in GiB of what is held, and the peak of the learner's compiled programs and of the sampler's. Where
XLA finds that a program cannot fit, its peak is the least that its arrays take, with a >.

With --cards a table of models: the largest peak of each method, and the smallest card that has it.
The sampler's programs, whose layers are not in a loop, are compiled with 1 and 3 layers: arrays
grow by as much for each further layer. --arrays: nothing is compiled, and programs' own temporary
arrays are left out. --config: of a config alone, with its evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax import config as config_lib
from grpo_jax import plan
from grpo_jax.config.arguments import load_config
from grpo_jax.devices import sharding
from grpo_jax.planning import topologies
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.programs import Step
from grpo_jax.setup import lora
from grpo_jax.structs import Layer, ModelConfig, Rotary

LLAMA_8B = ModelConfig(
    family="llama", vocab_size=128_256, width=4096, mlp_width=14_336, layers=(Layer(),) * 32,
    num_heads=32, num_kv_heads=8, head_size=128, rotaries=(Rotary(500_000.0),), norm_eps=1e-5,
    max_position=8192, tied_head=False,
)  # fmt: skip
ALL = {"model.param_dtype": "bfloat16"}
CASES = {
    "all, moments float32": ALL,
    "all, moments bfloat16": ALL | {"optim.moments_dtype": "bfloat16"},
    "LoRA": {"lora.rank": 16},
    "LoRA, base int8": {"lora.rank": 16, "lora.base_dtype": "int8"},
    "LoRA, base nf4": {"lora.rank": 16, "lora.base_dtype": "nf4"},
}
LEARNING = ("score policy", "gradient", "optimizer_step")
SAMPLING = ("publish_layer", "admit", "decode", "evaluation admit", "evaluation decode")
CARDS = {16: 14.7, 24: 22.1, 48: 44.2, 80: 73.6}  # GB, and 92 % of them, in GiB as they are sold


def config_of(options: dict, prompts: int) -> ConfigDict:
    c = config_lib.default()
    c.data.path, c.model.path, c.model.dtype = "data", "model", "bfloat16"
    c.model.remat, c.algorithm.kl_coef = "full", 1e-3
    c.batch.prompts, c.batch.group, c.batch.microbatch = prompts, 8, 1
    c.data.max_prompt_tokens, c.rollout.max_tokens = 256, 512
    c.evaluation.num_problems = 0
    for name, value in options.items():
        section, leaf = name.split(".")
        c[section][leaf] = value
    return c


def step_of(c: ConfigDict, model: ModelConfig, devices, prompt_tokens: int = 0) -> Step:
    mesh = sharding.make_mesh(data=1, devices=devices)
    return Step(c, lora.adapted(model, c), mesh, Lengths.of(c, prompt_tokens))


def compiled(step: Step, names: tuple[str, ...]) -> dict[str, float]:
    """Peaks of programs in bytes, by name; infinite where XLA finds that one cannot fit."""
    return {program.name: program.peak for program in step.compile(names.__contains__)}


def least_of(held: dict[str, float]) -> dict[str, float]:
    """Bytes of the arrays that exist while a part's programs run."""
    always = held["weights"] + held["optimizer"] + held["reference"]
    return {
        "learner": always + held["gradients"],
        "sampler": always + held["rollout weights"] + held["cache"],
        "evaluation": always + held["evaluation"],
    }


def of_case(c: ConfigDict, devices):
    step = step_of(c, LLAMA_8B, devices)
    held = step.held()
    least = least_of(held)
    parts = {"learner": LEARNING, "sampler": SAMPLING}
    peaks = {part: max(compiled(step, names).values()) for part, names in parts.items()}
    return held, least, peaks


def peaks_by_name(c: ConfigDict, model: ModelConfig, devices, prompt_tokens: int, arrays: bool):
    """Peaks of the learner's programs and of the sampler's in bytes; `arrays`: of parts alone."""
    if arrays:
        return least_of(step_of(c, model, devices, prompt_tokens).held())
    found = compiled(step_of(c, model, devices, prompt_tokens), LEARNING[1:])
    one, three = (
        compiled(step_of(c, cut, devices, prompt_tokens), SAMPLING)
        for cut in (dataclasses.replace(model, layers=model.layers[:n]) for n in (1, 3))
    )
    more = (model.num_layers - 1) / 2
    return found | {name: one[name] + more * (three[name] - one[name]) for name in one}


def card(peak: float) -> str:
    fitting = [size for size, room in CARDS.items() if peak / 2**30 <= room]
    return f"{peak / 2**30:.1f} GiB: {f'{fitting[0]} GB' if fitting else 'none'}"


def show_cards(args, devices) -> None:
    cases = {"config": None} if args.config else {name: CASES[name] for name in args.only}
    print("| model |", " | ".join(cases), "| largest |")
    print("| --- |" + " --- |" * (len(cases) + 1))
    for file in args.cards:
        model, cells, largest = plan.read_shape(file), [], []
        for options in cases.values():
            is_case = options is not None
            c = config_of(options, args.prompts) if is_case else load_config(args.config, [])
            prompt_tokens = 0 if is_case else args.prompt_tokens
            found = peaks_by_name(c, model, devices, prompt_tokens, args.arrays)
            largest.append(max(found, key=found.get))
            cells.append(card(max(found.values())))
        print(f"| {Path(file).stem} |", " | ".join(cells), f"| {', '.join(largest)} |", flush=True)


def show_shares(args, devices) -> None:
    names = ("weights", "optimizer", "reference", "gradients", "rollout weights", "cache")
    print("| what learns |", " | ".join(names), "| learner | of all | sampler | of all |")
    print("| --- |" + " --- |" * (len(names) + 4))
    first = None
    for name in args.only:
        held, least, peaks = of_case(config_of(CASES[name], args.prompts), devices)
        peak = {part: least[part] if math.isinf(p) else p for part, p in peaks.items()}
        first = first or peak
        more = {part: ">" * math.isinf(p) for part, p in peaks.items()}
        cells = [f"{held[n] / 2**30:.2f}" for n in names]
        for part in ("learner", "sampler"):
            largest = max(first.values())  # the step's peak where all learns
            cells += [f"{more[part]}{peak[part] / 2**30:.2f}", f"{peak[part] / largest:.1%}"]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="its first chip is taken")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="some of the rows")
    parser.add_argument("--prompts", type=int, default=4, help="of a step; 8 completions each")
    parser.add_argument("--cards", nargs="+", help="files of config.json")
    parser.add_argument("--arrays", action="store_true", help="with --cards: compile nothing")
    parser.add_argument("--config", help="in place of the cases")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="the longest, of --config")
    args = parser.parse_args()
    _, devices = topologies.devices(args.topology)
    (show_cards if args.cards else show_shares)(args, devices[:1])


if __name__ == "__main__":
    main()
