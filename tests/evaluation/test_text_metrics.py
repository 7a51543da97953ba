"""F1 by hand; BLEU and ROUGE as sacrebleu and rouge-score give them when asked directly."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from grpo_jax.evaluation import estimates, text_metrics
from grpo_jax.rewards.text import token_f1, word_f1


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("The cat sat.", "a cat sat", 1.0),  # articles, case and full stop do not count
        ("the cat sat on the mat", "cat mat", 2 * 2 / (4 + 2)),  # words: cat sat on mat
        ("cat cat cat", "cat cat dog", 2 * 2 / (3 + 3)),  # cat is common twice
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "the", 0.0),
        ("The!", "", 0.0),  # an article alone is a word
        ("A", "a.", 1.0),
        ("!", "", 1.0),  # both have no words
        ("theatre", "atre", 0.0),  # articles are whole words
    ],
)
def test_f1(text, reference, f1):
    assert word_f1(text, reference) == pytest.approx(f1)
    # One definition serves the metric and the reward.
    assert text_metrics.score([text], [reference]).by_name["f1"] == pytest.approx([f1])
    if reference:  # the reward refuses an answer without words
        assert token_f1([""], [text], answer=[reference]) == pytest.approx([f1])


def _texts(n: int) -> tuple[list[str], list[str]]:
    """References of 8 to 15 words, and texts that share most of them; one is short, one empty."""
    rng = np.random.default_rng(0)
    words = "the cat dog sat ran on mat red big house and then saw it play with ball".split()
    references = [list(rng.choice(words, rng.integers(8, 16))) for _ in range(n)]
    texts = [[w if rng.random() < 0.8 else rng.choice(words) for w in r] for r in references]
    texts[0], texts[1] = [], texts[1][:3]
    return [" ".join(t) for t in texts], [" ".join(r) + "." for r in references]


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts, references = _texts(60)
    scores = text_metrics.score(texts, references)
    whole = sacrebleu.corpus_bleu(texts, [references]).score
    assert 20 < whole < 80
    tally = scores.tallies()["bleu"]
    assert tally.value == pytest.approx(whole, abs=1e-9)
    each = [sacrebleu.sentence_bleu(t, [r]).score for t, r in zip(texts, references)]
    np.testing.assert_allclose(scores.by_name["bleu"], each, atol=1e-9)
    assert abs(np.mean(each) - whole) > 0.1  # the corpus is not the mean of its texts
    # sacrebleu's own bootstrap: the half-width of the same interval, by percentiles.
    theirs = sacrebleu.BLEU().corpus_score(texts, [references], n_bootstrap=1000)
    found = estimates.estimate(tally)
    assert found.low < whole < found.high
    assert (found.high - found.low) / 2 == pytest.approx(theirs._ci, rel=0.15)


def test_rouge_is_rouge_scores():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    texts, references = _texts(20)
    scores = text_metrics.score(texts, references)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    rows = [scorer.score(r, t) for t, r in zip(texts, references)]
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [row[name].fmeasure for row in rows]
        np.testing.assert_allclose(scores.by_name[name], each)
        assert scores.tallies()[name].value == pytest.approx(np.mean(each))
        assert 0.2 < np.mean(each) < 1


@pytest.mark.parametrize("missing", ["sacrebleu", "rouge_score"])
def test_a_missing_package_is_named(missing, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"pip install {missing.replace('_', '-')}, or"):
        text_metrics.score(["a"], ["b"])
