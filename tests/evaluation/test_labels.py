"""Rows of pairs, scores and labels from rewards, by hand."""

import numpy as np
import pytest

from grpo_jax.evaluation import labels
from grpo_jax.rewards.scores import Scores

NAN = float("nan")
PROMPTS = [{"prompt": "p"}, {"prompt": [{"role": "user", "content": "q"}], "tools": [1]}]
TEXTS = ["a", "b", "c", "d", "e", "f"]


def scores(*reward) -> Scores:
    reward_B = np.array(reward, np.float32)
    none = {"f": np.zeros(len(reward))}
    return Scores(reward_B, {"f": reward_B / 2}, {"f": np.isnan(reward_B)}, none)


def rows(kind, *reward, texts=TEXTS, **how):
    return labels.rows(kind, PROMPTS, texts, scores(*reward), **how)


def test_pairs_are_the_best_and_the_worst():
    found, left_out = rows("pairs", 0.5, 2.0, -1.0, 0.0, NAN, 3.0)
    assert found == [
        {"prompt": "p", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": -1},
        {**PROMPTS[1], "chosen": "f", "rejected": "d", "score_chosen": 3, "score_rejected": 0},
    ]
    assert not left_out


@pytest.mark.parametrize(
    ("reward", "how", "why"),
    [
        ((1, 1, 1, 0, 2, 0), {}, "do not differ enough"),
        ((1, 1.5, 1, 0, 2, 0), {"margin": 0.5}, "do not differ enough"),
        ((NAN, 1, NAN, 0, 2, 0), {}, "fewer than two rewards"),
        ((1, 0, 1, 0, 2, 0), {"texts": ["a", "a", "a", "d", "e", "f"]}, "one text"),
    ],
)
def test_prompts_without_a_pair(reward, how, why):
    found, left_out = rows("pairs", *reward, **how)
    assert [row["chosen"] for row in found] == ["e"]
    ((told, count),) = left_out.items()
    assert why in told and count == 1


def test_scores_and_labels():
    found, left_out = rows("scores", 0.5, 2, -1, 0, NAN, 3)
    assert found[1] == {"prompt": "p", "completion": "b", "score": 2.0, "rewards": {"f": 1.0}}
    assert len(found) == 5 and dict(left_out) == {"completions without a reward": 1}
    found, _ = rows("labels", 0.5, 2, -1, 0, NAN, 3, threshold=0.5)
    assert [row["label"] for row in found] == [True, True, False, False, True]
    assert found[0] == {"prompt": "p", "completion": "a", "label": True}
