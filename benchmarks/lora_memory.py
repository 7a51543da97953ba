"""Memory of a step of an 8B model: adapters beside weights in 16, 8 or 4 bits, against all weights.

    python -m pip install -e ".[plan]" && python benchmarks/lora_memory.py
    python benchmarks/lora_memory.py --topology h100:1

Llama-3-8B's shape, rank 16 on all dense layers, one chip, with the reference of a KL term. Programs
are compiled for a chip that need not be there (`grpo_jax/planning`). Prints a table in GiB: what is
held, and the peak of the learner's compiled programs and of the sampler's. Where XLA finds that a
program cannot fit, its peak is the least that its arrays take, with a >.
"""

from __future__ import annotations

import argparse
import math

from grpo_jax import config as config_lib
from grpo_jax.devices import sharding
from grpo_jax.planning import topologies
from grpo_jax.planning.programs import Lengths, Step
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
SAMPLING = ("publish_layer", "admit", "decode")


def of_case(options: dict, devices, rows: int):
    c = config_lib.default()
    c.data.path, c.model.path, c.model.dtype = "data", "model", "bfloat16"
    c.model.remat, c.algorithm.kl_coef = "full", 1e-3
    c.batch.prompts, c.batch.group, c.batch.microbatch = rows, 8, 1
    c.data.max_prompt_tokens, c.rollout.max_tokens = 256, 512
    c.evaluation.num_problems = 0
    for name, value in options.items():
        section, leaf = name.split(".")
        c[section][leaf] = value
    mesh = sharding.make_mesh(data=1, devices=devices)
    step = Step(c, lora.adapted(LLAMA_8B, c), mesh, Lengths.of(c))
    held = step.held()
    always = held["weights"] + held["optimizer"] + held["reference"]
    least = {
        "learner": always + held["gradients"],
        "sampler": always + held["rollout weights"] + held["cache"],
    }
    found = {
        program.name: program.peak for program in step.compile({*LEARNING, *SAMPLING}.__contains__)
    }
    peaks = {
        "learner": max(found[name] for name in LEARNING if name in found),
        "sampler": max(found[name] for name in SAMPLING if name in found),
    }
    return held, least, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="its first chip is taken")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="some of the rows")
    parser.add_argument("--prompts", type=int, default=4, help="of a step; 8 completions each")
    args = parser.parse_args()
    _, devices = topologies.devices(args.topology)
    names = ("weights", "optimizer", "reference", "gradients", "rollout weights", "cache")
    print("| what learns |", " | ".join(names), "| learner | of all | sampler | of all |")
    print("| --- |" + " --- |" * (len(names) + 4))
    first = None
    for name in args.only:
        options = CASES[name]
        held, least, peaks = of_case(options, devices[:1], args.prompts)
        peak = {part: least[part] if math.isinf(p) else p for part, p in peaks.items()}
        first = first or peak
        more = {part: ">" * math.isinf(p) for part, p in peaks.items()}
        cells = [f"{held[n] / 2**30:.2f}" for n in names]
        for part in ("learner", "sampler"):
            largest = max(first.values())  # the step's peak where all learns
            cells += [f"{more[part]}{peak[part] / 2**30:.2f}", f"{peak[part] / largest:.1%}"]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
