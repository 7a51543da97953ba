"""Trains a policy by GRPO: `python -m grpo_jax.train --config configs/quickstart.py`.

Run again with the same workdir, it goes on where it was stopped.
"""

from __future__ import annotations

import time

from grpo_jax import definitions, loop, parts, program, report, sft
from grpo_jax.metrics import print_title, say


def main(argv: list[str]) -> None:
    config, folder = program.run_arguments(argv, "Trains a policy by GRPO.")
    program.use_all_cores(config, parts.model_shape(config, folder).num_params)
    program.use_nan_checks(config.debug.nans)
    if config.compile_cache:
        program.use_compile_cache(config.mesh, traced=bool(config.profile.steps))
    model_path, began = config.model.path, time.monotonic()
    if not model_path:  # a new model learns the form of answers from worked solutions first
        parts.refuse_early(config, folder)
        print_title(f"Supervised start: {config.sft.num_steps} updates on worked solutions")
        model_path = str(sft.run(config, folder / "bootstrap"))
    print_title(f"GRPO: {config.loop.num_steps} steps of {config.batch.prompts} prompts")
    for line in definitions.in_force(config):
        say(line)
    summary = loop.run(config, folder, model_path, spent_s=time.monotonic() - began)
    ask = summary.pop("ask", None)
    report.summary_table(summary)
    if ask:
        say(f"Ask it:\n{ask}")


if __name__ == "__main__":
    program.main(main)
