"""Similarity of texts to reference texts, for problems whose answer no rule can check.

F1 measures common words, BLEU common n-grams, ROUGE the overlap of summaries. sacrebleu and
rouge-score compute BLEU and ROUGE, so that the values are comparable with published ones.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from grpo_jax.evaluation import estimates
from grpo_jax.evaluation.estimates import Tally
from grpo_jax.rewards.text import word_f1

_ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Scores of B texts against their references."""

    by_name: dict[
        str, np.ndarray
    ]  # float64 [B]: f1, rouge1, rouge2, rougeL in 0..1, bleu in 0..100
    bleu_part_BX: np.ndarray  # matching and all n-grams, n = 1..4 each; both lengths

    def tallies(self) -> dict[str, Tally]:
        """F1 and ROUGE as means over the texts, BLEU over the corpus."""
        means = {n: estimates.mean(v) for n, v in self.by_name.items() if n != "bleu"}
        return means | {"bleu": Tally(self.bleu_part_BX, _bleu_of_sums, 0.0, 100.0)}


def require() -> None:
    """Raises ValueError, saying what to install, if sacrebleu or rouge-score is missing."""
    missing = []
    for package, module in (
        ("sacrebleu", "sacrebleu"),
        ("rouge-score", "rouge_score.rouge_scorer"),
    ):
        try:
            __import__(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise ValueError(
            f"evaluation.reference needs {' and '.join(missing)}, not installed: "
            f"pip install {' '.join(missing)}, or set evaluation.reference to ''."
        )


def score(texts: list[str], references: list[str]) -> TextScores:
    """F1, BLEU and ROUGE of each text against its reference; ValueError as for `require`.

    BLEU is sacrebleu's with its defaults (13a tokens, exponential smoothing); for single texts with
    effective order, as sacrebleu recommends. ROUGE is the F-measure of rouge-score without
    stemming; its tokens are the letters a-z and digits, so other scripts score 0.
    """
    require()
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

    corpus, single = BLEU(), BLEU(effective_order=True)
    scorer = rouge_scorer.RougeScorer(list(_ROUGES))
    rows: dict[str, list[float]] = {name: [] for name in ("f1", "bleu", *_ROUGES)}
    parts = []
    for text, reference in zip(texts, references, strict=True):
        rows["f1"].append(word_f1(text, reference))
        rows["bleu"].append(single.sentence_score(text, [reference]).score)
        for name, value in scorer.score(reference, text).items():
            rows[name].append(value.fmeasure)
        found = corpus.corpus_score([text], [[reference]])
        parts.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return TextScores({n: np.array(v) for n, v in rows.items()}, np.array(parts))


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    from sacrebleu.metrics import BLEU

    def bleu(row: np.ndarray) -> float:
        counts = [int(x) for x in row]
        return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9]).score

    return np.apply_along_axis(bleu, -1, sums)
