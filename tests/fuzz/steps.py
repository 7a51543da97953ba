"""Whole runs of one step with options at random: what the config accepts must run.

`python tests/fuzz/campaign.py --steps 30` makes them; each compiles its own programs.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import jax
from hypothesis import strategies as st
from kinds import TINY, Kind

from grpo_jax import train

_ONE_STEP = {
    "loop.num_steps": 1,
    "sft.num_steps": 1,
    "evaluation.num_problems": 2,
    "checkpoint.export": False,
    "compile_cache": False,
    "mesh.data": 1,
    "mesh.tensor": -1,
}

# Values of options, most of which are fit for some other options and not for others.
_VALUES = {
    "seed": [0, 2**31 - 1],
    "model.dtype": ["float32", "bfloat16"],
    "model.param_dtype": ["float32", "bfloat16"],
    "model.remat": ["none", "dots", "full"],
    "model.scan_layers": ["on", "off"],
    "model.attention": ["auto", "xla"],
    "model.width": [8, 24, 32],
    "model.num_kv_heads": [1, 2, 4],
    "data.max_prompt_tokens": [1, 8, 16],
    "data.overlong": ["refuse", "drop", "truncate"],
    "rewards.names": [("exact_answer",), ("math_answer", "answer_format")],
    "rewards.weights": [(1.0,), (0.0, -2.5), (1e30, 1e-30)],
    "rewards.max_failed_share": [0.0, 1.0],
    "batch.prompts": [1, 2, 4, 6],
    "batch.group": [1, 2, 3],
    "batch.minibatches": [1, 2],
    "batch.microbatch": [0, 1, 2],
    "rollout.max_tokens": [1, 8],
    "prompts.oversample": [1.0, 1.3, 3.0],
    "rollout.temperature": [1e-6, 1.0, 1e6],
    "rollout.top_k": [0, 1, 10**6],
    "rollout.top_p": [1e-9, 0.5, 1.0],
    "rollout.num_slots": [0, 1, 3, 100],
    "rollout.weights_dtype": ["auto", "int8"],
    "rollout.kv_cache_dtype": ["auto", "int8"],
    "rollout.compact": [True, False],
    "algorithm.num_iterations": [1, 2],
    "algorithm.baseline": ["mean", "leave_one_out", "length_weighted", "greedy", "none"],
    "algorithm.scale_by": ["none", "std", "sample_std", "batch_std", "mean"],
    "algorithm.aggregate": ["sum", "each"],
    "algorithm.credit": ["reward", "best", "rank"],
    "algorithm.whiten": ["none", "completions", "tokens"],
    "algorithm.kl_in": ["loss", "reward"],
    "algorithm.clip_low": [0.0, 0.2],
    "algorithm.clip_high": [0.0, 1e30],
    "algorithm.kl_coef": [0.0, 0.1],
    "algorithm.kl_estimator": ["k3", "k3_ratio"],
    "algorithm.entropy_coef": [0.0, -0.1],
    "algorithm.kl_target": [0.0, 1e-9, 0.1],
    "algorithm.kl_horizon": [1, 100],
    "algorithm.entropy_target": [0.0, 5.0],
    "algorithm.reference_refresh_steps": [0, 1, 2],
    "algorithm.reference_mix": [1e-9, 1.0],
    "algorithm.top_entropy_share": [1e-9, 0.2, 1.0],
    "algorithm.normalizer": ["token", "sequence", "constant"],
    "algorithm.mask_truncated": [True, False],
    "rollout_correction.level": ["none", "token", "sequence"],
    "rollout_correction.bound": ["truncate", "mask"],
    "optim.learning_rate": [1e-30, 1e-3, 1e30],
    "optim.warmup_steps": [0, 1, 50],
    "optim.schedule": ["constant", "linear", "cosine"],
    "optim.moments_dtype": ["float32", "bfloat16", "int8"],
    "optim.master_weights": [True, False],
    "optim.max_grad_norm": [0.0, 1e-30, 1.0],
    "optim.weight_decay": [0.0, 10.0],
    "guards.max_skipped": [1, 5],
    "loop.async_rollouts": [True, False],
    "loop.stall_timeout_s": [0.0, 3600.0],
    "evaluation.num_samples": [0, 2],
    "logging.samples_every_steps": [0, 1],
    "logging.num_samples": [0, 100],
    "logging.tensorboard": [True, False],
    "sft.microbatch": [0, 2, 3],
    "sft.max_tokens": [1, 56],
}  # fmt: skip

OPTIONS_OF_STEPS = _VALUES.keys() | _ONE_STEP.keys()

OPTIONS = st.lists(st.sampled_from(sorted(_VALUES)), max_size=6, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({n: st.sampled_from(_VALUES[n]) for n in names})
)


def read_options(options: dict[str, object], folder: Path) -> None:
    """Trains for a step, as the program does, and raises what ends it."""
    argv = ["--config", str(TINY), "--workdir", str(folder / "run")]
    argv += [f"--config.{name}={value}" for name, value in (_ONE_STEP | options).items()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            train.main(argv)
        finally:
            jax.clear_caches()
    assert (folder / "run" / "summary.json").exists()


STEPS = Kind("steps of accepted options", 1.0, OPTIONS, read_options)
