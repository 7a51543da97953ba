"""Rows of training data from completions and their rewards: pairs, scores, or labels.

P prompts     G completions of each
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.scores import Scores

KINDS = {
    "pairs": "prompt, chosen, rejected: the best and the worst completion of each prompt",
    "scores": "prompt, completion, score, and the rewards by name: every completion",
    "labels": "prompt, completion, label: whether the score is at least --threshold",
}


def rows(
    kind: str,
    prompts: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    scores: Scores,
    *,
    margin: float = 0.0,
    threshold: float = 0.0,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of some prompts' completions, and how many prompts or completions are left out, why.

    `prompts`: what each prompt's rows begin with: `prompt`, and what its chat template is given.
    `texts`: of P * G completions, prompt by prompt. A completion without a reward is left out. A
    pair's rewards must differ by more than `margin`, and its texts; of equal rewards the first
    completion is taken.
    """
    group = len(texts) // max(len(prompts), 1)
    reward_PG = scores.reward_B.astype(np.float64).reshape(len(prompts), group)
    found: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for p, (prompt, reward_G) in enumerate(zip(prompts, reward_PG)):
        text_G = texts[p * group : (p + 1) * group]
        if kind == "pairs":
            pair, why = _pair(text_G, reward_G, margin)
            found += [{**prompt, **pair}] if pair else []
            left_out[why] += not pair
            continue
        for g, (text, reward) in enumerate(zip(text_G, reward_G)):
            if np.isnan(reward):
                left_out["completions without a reward"] += 1
            elif kind == "labels":
                label = bool(reward >= threshold)
                found.append({**prompt, "completion": text, "label": label})
            else:
                each = _by_name(scores, p * group + g)
                found.append({**prompt, "completion": text, "score": float(reward), **each})
    return found, +left_out


def _pair(
    text_G: Sequence[str], reward_G: np.ndarray, margin: float
) -> tuple[dict[str, Any] | None, str]:
    known = np.flatnonzero(~np.isnan(reward_G))
    if len(known) < 2:
        return None, "prompts with fewer than two rewards"
    best, worst = known[reward_G[known].argmax()], known[reward_G[known].argmin()]
    if not reward_G[best] - reward_G[worst] > margin:
        return None, "prompts whose rewards do not differ enough"
    if text_G[best] == text_G[worst]:
        return None, "prompts whose best and worst completion are one text"
    return {
        "chosen": text_G[best],
        "rejected": text_G[worst],
        "score_chosen": float(reward_G[best]),
        "score_rejected": float(reward_G[worst]),
    }, ""


def _by_name(scores: Scores, row: int) -> dict[str, Any]:
    values = {name: float(value_B[row]) for name, value_B in scores.by_name.items()}
    return {"rewards": {name: None if np.isnan(v) else v for name, v in values.items()}}
