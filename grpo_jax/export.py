"""Writes a checkpoint of a run as a Hugging Face folder, to serve, share or train from.

    python -m grpo_jax.export --workdir runs/a --step best --out models/a

A run exports its last state by itself; this is for others, and for runs that were stopped. To begin
another run from a step, give it the folder as model.path.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grpo_jax import cli
from grpo_jax.config import arguments, parsers, record
from grpo_jax.devices import sharding
from grpo_jax.messages.console import say
from grpo_jax.run import workdir
from grpo_jax.setup.model import find_model, trained_params
from grpo_jax.trainers import exporting, model_card


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    file = Path(args.workdir) / "config.json"
    if not file.exists():
        raise ValueError(f"--workdir {args.workdir} is not the folder of a run: no {file}.")
    kept = record.read(file)["options"]
    cli.show_devices()
    found = find_model(f"{args.workdir}@{args.step}", "--workdir", may_score=True)
    out = Path(args.out or Path(args.workdir) / "exports" / f"step_{found.step}")
    if (out / "config.json").exists():
        raise ValueError(f"--out {out} holds a model already. Name another folder, or delete it.")
    params, frozen = trained_params(found, sharding.make_mesh())
    dtype = args.dtype or kept.get("checkpoint.export_dtype", "auto")
    exporting.write(found.policy, out, params, dtype, frozen)
    _, number = found.saved
    workdir.note_export(out, step=found.step, updates=number)
    model_card.write(out, found.policy, kept, step=found.step)
    say(f"{found.said}\nIt is in {out}.")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = parsers.export()
    return arguments.parse(parser, argv)[0]


if __name__ == "__main__":
    cli.main(main)
