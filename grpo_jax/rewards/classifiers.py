"""Rewards by encoders that classify texts, such as toxicity or entailment: on the CPU, by torch.

A decoder with a score is a reward model (`model:FOLDER`) and runs on the devices; most classifiers
are BERT and its kin, of which a small one is fast enough in the reward processes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.rewards.completions import last_text_of, replies
from grpo_jax.rewards.registry import bound, split_call

_ROWS = 32  # texts that are classified at once
_MAX_CHARS = 20_000
_MAX_TOKENS = 512


def classifier(
    prompts: list[Any],
    completions: list[Any],
    folder: str,
    label: str = "",
    against: str = "",
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """The probability of `label` for the text of each completion after its thinking.

    `folder` holds a sequence classifier of transformers with weights in safetensors, and its
    tokenizer. `label` may be left out where there is one label, or two, of which the second counts.
    `against` is "prompt" or the name of a column: the classifier then reads that text and the
    completion as a pair, as for entailment. Texts are cut at the model's length, at most 512
    tokens. Probabilities are softmax over labels, or a sigmoid for models of several labels at
    once; a model of one label gives its raw score. A completion without text gives the value of an
    empty text. Raises ValueError if a column is missing.
    """
    texts = [t or "" for t in replies(prompts, completions, rendered_prompts)]
    if against == "prompt":
        first = [last_text_of(prompt) for prompt in prompts]
    elif against and against not in columns:
        raise ValueError(f"there is no column {against!r}, which `against` names")
    else:
        first = list(map(str, columns[against])) if against else None
    classify, number = _model(folder), _label(folder, label)[0]
    cut = lambda text: text[:_MAX_CHARS].encode("utf-8", "replace").decode()  # noqa: E731
    pairs = (
        [(cut(a), cut(b)) for a, b in zip(first, texts)] if first else [(cut(t),) for t in texts]
    )
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))  # little padding
    values = np.zeros(len(pairs))
    for start in range(0, len(order), _ROWS):
        part = order[start : start + _ROWS]
        values[part] = classify([pairs[i] for i in part])[:, number]
    return values.tolist()


def _label(folder: Any, label: Any) -> tuple[int, int]:
    """The number of a label in a folder's config.json, and how many there are."""
    file = Path(str(folder)) / "config.json"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} is no folder with a config.json and a classifier")
    settings = json.loads(file.read_text(encoding="utf-8"))
    names = [str(n) for n in settings.get("architectures") or ()]
    if not any(n.endswith("ForSequenceClassification") for n in names):
        raise ValueError(
            f"{file} is of {', '.join(names) or 'no architecture'}, and not of a classifier of "
            "texts (ForSequenceClassification), so that its labels would be random"
        )
    by_number = settings.get("id2label") or {str(i): f"LABEL_{i}" for i in range(2)}
    labels = [str(by_number[key]) for key in sorted(by_number, key=int)]
    if not label and len(labels) <= 2:
        return len(labels) - 1, len(labels)
    if label not in labels:
        raise ValueError(f"label = {label!r} is none of {folder}'s: {', '.join(labels)}")
    return labels.index(label), len(labels)


def _refuse(folder: Any = "", label: Any = "", against: Any = "") -> None:
    _label(folder, label)
    if not isinstance(against, str):
        raise ValueError(f'against = {against!r} must be "prompt" or the name of a column')


classifier.needs, classifier.options = ("torch",), ("folder", "label", "against")
classifier.refuse = _refuse
classifier.columns = lambda against="", **_: [against] if against not in ("", "prompt") else []


def function(after: str) -> Callable:
    """The reward function of an entry "classifier:FOLDER#label", or with (against="prompt")."""
    where, arguments = split_call(after)
    folder, _, label = where.partition("#")
    given = {"folder": folder, **({"label": label} if label else {}), **(arguments or {})}
    return bound(classifier, given, f"classifier:{after}")


@functools.lru_cache(maxsize=4)
def _model(folder: str) -> Callable[[list[tuple[str, ...]]], np.ndarray]:
    """What gives the values [B, labels] of texts or pairs of texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    model, told = AutoModelForSequenceClassification.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if told["missing_keys"]:
        raise ValueError(
            f"{folder} lacks the tensors {sorted(told['missing_keys'])[:3]}: they would be random"
        )
    model.eval()
    settings = model.config
    most = getattr(settings, "max_position_embeddings", _MAX_TOKENS)
    if getattr(settings, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        most -= settings.pad_token_id + 1  # their positions begin after the pad token's
    limit = min(most, _MAX_TOKENS, tokenizer.model_max_length)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    several = settings.problem_type == "multi_label_classification"

    @torch.inference_mode()
    def classify(rows: list[tuple[str, ...]]) -> np.ndarray:
        given = tokenizer(
            *map(list, zip(*rows)),
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        logits_BL = model(**given).logits
        if several:
            return torch.sigmoid(logits_BL).numpy()
        return (logits_BL if logits_BL.shape[1] == 1 else torch.softmax(logits_BL, -1)).numpy()

    return classify
