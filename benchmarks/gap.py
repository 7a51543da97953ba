"""How far the sampler's log-probabilities are from the scorer's, by the precision of rollouts.

    python benchmarks/gap.py --model ../shared/models/stories260K
    python benchmarks/gap.py --model runs/quickstart/export --prompt 5+7-9-1+2= 3-2+8+1=
    python benchmarks/gap.py --model ../shared/models/stories260K --lora 16

Completes the prompts many times with each precision of activations, weights and cache, scores the
completions as training does, at the precision of the activations, and prints a table of absolute
differences in nats, and of how often the ratio of scorer to sampler is large. With --lora it
compares changed weights, the same change as an adapter beside them or beside a base in codes, and
one that is merged to sample.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import keys
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.devices import sharding, transfer
from grpo_jax.kernels import dense
from grpo_jax.kernels.dense import Adapted
from grpo_jax.kernels.kv_cache import RingCache
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import lora, policy
from grpo_jax.models.hf import targets
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Sampling

CACHES = WEIGHTS = ("auto", "int8")


def gaps(
    ours: policy.Policy, params, prompts, args, dtype, weights: str, cache: str, merge: bool = False
):
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
        merge=merge,
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
        AdvantageOptions(scale_by="none"),
        mask_truncated=False,
        with_old=True,
    )
    placed = transfer.shard_rows(mesh, (rollouts, np.zeros_like(rollouts.length_PG, np.float32)))
    experience = jax.device_get(prepare(prepare.log_probs(params, None, placed[0]), placed[1]))
    return (experience.old_logp_PGC - rollouts.logp_PGC)[experience.action_PGC]


def adapted(ours: policy.Policy, params, args, dtype, base: str = "auto"):
    """The model with adapters on all dense layers, as large as an RL run makes them.

    B is drawn so that the change of a kernel has --change of the kernel's own norm.
    """
    spec = targets.Spec(args.lora, 2.0 * args.lora)
    model = dataclasses.replace(ours.model, lora=targets.lora_of(ours.model, spec, base=base))
    adapters = lora.init(model, jax.random.key(0))
    frozen = lora.frozen_as(model, params, dtype)
    weights = lora.attached(frozen, adapters, model)

    def one(path, node):
        if not isinstance(node, Adapted):
            return node
        b = jax.random.normal(jax.random.key(len(str(path))), node.b.shape)
        full = node.replace(kernel=jnp.zeros(node.kernel.shape), b=b)
        size = jnp.linalg.norm(dense.plain(node.kernel).astype(jnp.float32)) * args.change
        return node.replace(b=b * size / jnp.linalg.norm(dense.plain(full)))

    weights = jax.tree_util.tree_map_with_path(one, weights, is_leaf=dense.is_node)
    return dataclasses.replace(ours, model=model), weights


def compare_adapters(ours: policy.Policy, params, prompts, args) -> None:
    print("| activations | adapter | tokens | mean | 99th percentile | max | mean / without |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (jnp.bfloat16, jnp.float32):
        with_adapter, weights = adapted(ours, params, args, dtype)
        in_codes = {base: adapted(ours, params, args, dtype, base) for base in ("int8", "nf4")}
        cases = {
            "none: weights as changed": (ours, lora.merged(weights, jnp.float32), False),
            "beside the weights": (with_adapter, weights, False),
            **{f"beside a base in {base}": (*of, False) for base, of in in_codes.items()},
            "merged to sample": (with_adapter, weights, True),
        }
        first = None
        for name, (model, read, merge) in cases.items():
            size = np.abs(gaps(model, read, prompts, args, dtype, "auto", "auto", merge))
            first = first or size.mean()
            print(
                f"| {jnp.dtype(dtype)} | {name} | {len(size):,} | {size.mean():.2e} | "
                f"{np.quantile(size, 0.99):.2e} | {size.max():.2e} | {size.mean() / first:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--prompt", nargs="+", default=["Once upon a time", "The cat"])
    parser.add_argument("--group", type=int, default=64, help="completions of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="completion limit")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: none")
    parser.add_argument("--change", type=float, default=0.02, help="of a kernel by its adapter")
    args = parser.parse_args()
    ours = policy.read(args.model)
    params = policy.load_params(ours, sharding.make_mesh(data=jax.device_count()), seed=0)
    prompts = [ours.tokenizer(text)["input_ids"] for text in args.prompt]
    if args.lora:
        return compare_adapters(ours, params, prompts, args)
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
