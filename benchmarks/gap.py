"""How far the sampler's log-probabilities are from the scorer's, by the precision of rollouts.

    python benchmarks/gap.py --model ../shared/models/stories260K
    python benchmarks/gap.py --model runs/quickstart/export --prompt 5+7-9-1+2= 3-2+8+1=

Completes the prompts many times with each precision of activations, weights and cache, scores the
completions as training does, at the precision of the activations, and prints a table of absolute
differences in nats, and of how often the ratio of scorer to sampler is large.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import keys
from grpo_jax.devices import sharding, transfer
from grpo_jax.kernels.kv_cache import RingCache
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import policy
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Sampling

CACHES = WEIGHTS = ("auto", "int8")


def gaps(ours: policy.Policy, params, prompts, args, dtype, weights: str, cache: str):
    """Scorer's minus sampler's log-probability of every token that was drawn, float32 [tokens]."""
    mesh, sampling = sharding.make_mesh(data=jax.device_count()), Sampling()
    decoder = Decoder(
        ours.model,
        mesh,
        sampling,
        ours.stop_ids,
        args.tokens,
        dtype,
        weights=weights,
        kv_cache=RingCache(int8=cache == "int8"),
    )
    engine = Engine(decoder)
    rollouts = engine.generate(
        engine.publish(params),
        prompts,
        group=args.group,
        key=keys.key_for(0, "rollout", 0),
        temperature=1.0,
    )
    prepare = make_prepare(
        Scorer(ours.model, mesh, sampling, dtype),
        scale_by="none",
        mask_truncated=False,
        with_old=True,
    )
    placed = transfer.shard_rows(mesh, (rollouts, np.zeros_like(rollouts.length_PG, np.float32)))
    experience = jax.device_get(prepare(prepare.log_probs(params, None, placed[0]), placed[1]))
    return (experience.old_logp_PGC - rollouts.logp_PGC)[experience.action_PGC]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--prompt", nargs="+", default=["Once upon a time", "The cat"])
    parser.add_argument("--group", type=int, default=64, help="completions of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="completion limit")
    args = parser.parse_args()
    ours = policy.read(args.model)
    params = policy.load_params(ours, sharding.make_mesh(data=jax.device_count()), seed=0)
    prompts = [ours.tokenizer(text)["input_ids"] for text in args.prompt]
    print("| activations | weights | cache | tokens | mean | max | ratio above 2 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (jnp.float32, jnp.bfloat16):
        for weights in WEIGHTS:
            for cache in CACHES:
                gap = gaps(ours, params, prompts, args, dtype, weights, cache)
                size = np.abs(gap)
                print(
                    f"| {jnp.dtype(dtype)} | {weights} | {cache} | {len(gap):,} | "
                    f"{size.mean():.1e} | {size.max():.1e} | {(gap > np.log(2)).mean():.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
