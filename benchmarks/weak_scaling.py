"""Weak scaling by compilation: what a step costs each device as devices and batch grow together.

    python benchmarks/weak_scaling.py

compiles the step of four layers of a Qwen2.5-0.5B shape for v5p slices of 8 to 4,096 chips, one
prompt of eight completions for each chip, and writes docs/weak_scaling.json and .png. No TPU is
needed, but `pip install -e ".[plan]"`. Eight chips share the weights (fsdp), the others are copies
(data), as a run that grows by copies would have them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from grpo_jax import plan as plan_lib
from grpo_jax.config import options
from grpo_jax.messages.console import say
from grpo_jax.metrics import curves
from grpo_jax.planning import plan as planning_plan
from grpo_jax.planning import topologies as topologies_lib
from grpo_jax.planning.lengths import Lengths
from grpo_jax.structs import Layer

TOPOLOGIES = ("v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16", "v5p:16x16x16")
SHAPE, LAYERS, FSDP = "configs/shapes/qwen2.5-0.5b.json", 4, 8
COMPLETION = PROMPT = 64
OUT = Path("docs/weak_scaling.json")
MEASURES = {"flops": "operations", "bytes": "bytes of memory", "sent": "bytes sent"}


def compiled(topology: str) -> dict:
    """Costs of a step on each device of a topology, by measure and program."""
    chip, devices = topologies_lib.devices(topology)
    config = options.default()
    config.model.dtype, config.model.remat = "bfloat16", "full"
    config.algorithm.kl_coef, config.rollout.max_tokens = 0.001, COMPLETION
    config.data.max_prompt_tokens, config.mesh.fsdp = PROMPT, FSDP
    config.batch.prompts = config.batch.microbatch = len(devices)
    model = dataclasses.replace(plan_lib.read_shape(SHAPE), layers=(Layer(),) * LAYERS)
    lengths = Lengths.of(config)
    plan = planning_plan.plan(config, model, topology, chip, devices, lengths)
    programs = {
        p.name: {"flops": p.cost.flops, "bytes": p.cost.bytes, "sent": sum(p.cost.sent.values())}
        for p in plan.programs
    }
    sent = plan.as_json()["sent_bytes"]
    return {"topology": topology, "devices": len(devices), "programs": programs, "sent": sent}


def total(row: dict, measure: str) -> float:
    return sum(p[measure] for p in row["programs"].values())


def draw(rows: list[dict], file: Path) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained", facecolor="white")
    ax = figure.subplots()
    curves.frame(ax)
    for (measure, name), color in zip(MEASURES.items(), curves.COLORS):
        first = total(rows[0], measure)
        ax.plot(
            [r["devices"] for r in rows],
            [total(r, measure) / first for r in rows],
            marker="o",
            color=color,
            label=f"{name}: {first:.3g} on 8",
        )
    ax.axhspan(0.9, 1.1, color="#3c8d5a", alpha=0.12, label="within 10 %", linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set(ylim=(0, None))
    ax.set_xlabel("devices", fontsize=8.5)
    ax.set_ylabel("on each device, against 8 devices", fontsize=8.5)
    ax.set_xticks([r["devices"] for r in rows], [f"{r['devices']:,}" for r in rows])
    ax.minorticks_off()
    title = "Four layers of Qwen2.5-0.5B's shape on v5p, one prompt of 8 for each chip"
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    ax.legend(frameon=False, fontsize=8)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)


def main(topologies: list[str]) -> None:
    rows = []
    for topology in topologies or TOPOLOGIES:
        row = compiled(topology)
        rows.append(row)
        say(f"{row['devices']:>6,} " + " ".join(f"{m} {total(row, m):.4g}" for m in MEASURES))
        OUT.write_text(json.dumps(rows, indent=1) + "\n")
        draw(rows, OUT.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
