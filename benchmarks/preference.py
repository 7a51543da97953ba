"""Times an update on pairs that share their prompt's computation beside the same without sharing.

    python benchmarks/preference.py --prompt_tokens 192 --completion_tokens 64 --prompts 8

Both learn from the same pairs by the same loss (APO zero, the only one that is a sum over its
completions). Sharing has a pair as a group of two; without it each completion has its own copy of
the prompt, as in libraries that pad pairs into rows. Step by step one goes first, then the other.
Prints the ratio of seconds: with prompts three times as long as answers it is to be at most 0.65.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
import workload
from workload import Work

from grpo_jax import keys
from grpo_jax.algorithm.preference_losses import PairLoss, UnpairedLoss
from grpo_jax.algorithm.preferences import Preference
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import optim, train_state
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.update import make_update
from grpo_jax.models import parameters
from grpo_jax.structs import Experience, Rollouts, Sampling

LOSSES = {
    "shared": PairLoss(Preference("apo_zero")),
    "twice": UnpairedLoss(Preference("apo_zero_unpaired")),
}


def pairs(work: Work, n: int) -> Rollouts:
    """Random pairs of step n; answers are as long as the limit, or half to twice `mean_tokens`."""
    rng, group = np.random.default_rng([n, 11]), (work.prompts, 2)
    vocab, limit, mean = work.shape.vocab_size, work.completion_tokens, work.mean_tokens
    length_PG = np.full(group, limit, np.int32)
    if mean:
        length_PG = rng.integers(max(mean // 2, 1), min(2 * mean, limit) + 1, group, np.int32)
    ids_PGC = rng.integers(2, vocab, (*group, limit), np.int32)
    return Rollouts(
        prompt_PQ=rng.integers(2, vocab, (work.prompts, work.prompt_tokens), np.int32),
        prompt_length_P=np.full(work.prompts, work.prompt_tokens, np.int32),
        completion_PGC=np.where(np.arange(limit) < length_PG[..., None], ids_PGC, 0),
        logp_PGC=np.zeros((*group, limit), np.float32),
        length_PG=length_PG,
        stopped_PG=np.ones(group, bool),
    )


def experience(rollouts: Rollouts) -> Experience:
    """With a reference of random log-probabilities, and the first of each pair as the chosen."""
    group, limit = rollouts.length_PG.shape, rollouts.completion_PGC.shape[-1]
    desirable_PG = np.arange(rollouts.length_PG.size).reshape(group) % 2 == 0
    return Experience(
        rollouts=rollouts,
        advantage=np.zeros(group, np.float32),
        action_PGC=np.arange(limit) < rollouts.length_PG[..., None],
        old_logp_PGC=None,
        ref_logp_PGC=None,
        ref_logp_PG=(-6.0 * rollouts.length_PG).astype(np.float32),
        desirable_PG=desirable_PG,
    )


def apart(rollouts: Rollouts) -> Rollouts:
    """The same completions, each with its own copy of the prompt."""
    twice = lambda x: np.repeat(x, 2, axis=0)  # noqa: E731
    alone = lambda x: x.reshape(-1, 1, *x.shape[2:])  # noqa: E731
    return Rollouts(
        prompt_PQ=twice(rollouts.prompt_PQ),
        prompt_length_P=twice(rollouts.prompt_length_P),
        completion_PGC=alone(rollouts.completion_PGC),
        logp_PGC=alone(rollouts.logp_PGC),
        length_PG=alone(rollouts.length_PG),
        stopped_PG=alone(rollouts.stopped_PG),
    )


class Arm:
    """One way to update, with its own copy of the model."""

    def __init__(self, work: Work, loss: Any):
        self.mesh, model = sharding.make_mesh(), work.shape
        scorer = Scorer(
            model, self.mesh, Sampling(), jnp.dtype(work.dtype), remat=work.remat, whole=True
        )
        optimizer = optim.adamw(
            lambda step: 1e-6, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
        )
        self._update = make_update(scorer, loss, optimizer, num_minibatches=1)
        shardings = train_state.param_shardings(model, self.mesh)
        init = jax.jit(lambda key: parameters.init(model, key), out_shardings=shardings)
        params = init(keys.key_for(0, "init"))
        self._state = train_state.start(params, model, self.mesh, optimizer)

    def __call__(self, experience: Experience) -> dict[str, Any]:
        placed = transfer.shard_rows(self.mesh, experience)
        self._state, metrics = self._update(self._state, placed, 0)
        return metrics


def main() -> None:
    """Prints seconds of an update by arm, and their ratio: median, and the middle half."""
    work, args = timing.arguments(__doc__.splitlines()[0])
    workload.use_all_cores(work)
    arms = {name: Arm(work, loss) for name, loss in LOSSES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for n in range(args.steps + 2):
        given = pairs(work, n)
        data = {"shared": experience(given), "twice": experience(apart(given))}
        losses = {}
        for name in sorted(arms, reverse=bool(n % 2)):
            metrics, took = timing.timed(lambda name=name: arms[name](data[name]))  # noqa: B023
            losses[name] = float(metrics["preference/loss"])
            if n >= 2:
                seconds[name].append(took)
        # A pair's loss is the sum of its completions', whose mean is over twice as many.
        np.testing.assert_allclose(losses["shared"], 2 * losses["twice"], rtol=1e-3)
    print(timing.environment(), dataclasses.asdict(work))
    for name, took in seconds.items():
        print(f"{name}: {statistics.median(took):.4f} s an update, of {len(took)}")
    ratios = sorted(s / t for s, t in zip(seconds["shared"], seconds["twice"]))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"shared / twice: {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}); bar 0.65")


if __name__ == "__main__":
    main()
