"""Reward for meaning what a reference means: the cosine of two embeddings.

The model is an encoder in a folder, as sentence-transformers keeps them. It runs in the reward
processes, on the CPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.rewards.completions import replies
from grpo_jax.rewards.text import accepted, text_fault

_POOLINGS = {"pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}
_ROWS = 32  # texts that are embedded at once
_MAX_TOKENS = 512
_MAX_CHARS = 20_000


def similarity(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    folder: str,
    rendered_prompts: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """Cosine of the embeddings of each completion and its answer, from -1 to 1.

    The best of a list of answers counts. `folder` holds an encoder of transformers with weights in
    safetensors, and its tokenizer. A token's embedding is its last layer; a text's is their mean,
    or that of the first or last token where `1_Pooling/config.json` says so. Texts are cut at the
    model's length, at most 512 tokens. A reply without text gives 0. Raises ValueError if a row
    holds no answer.
    """
    texts = [
        (t or "")[:_MAX_CHARS].strip() for t in replies(prompts, completions, rendered_prompts)
    ]
    answers = [accepted(value) for value in answer]
    wanted = {text for text in texts if text} | {a for row in answers for a in row}
    vector = _embedded(folder, sorted(wanted))
    return [
        max(float(vector[text] @ vector[a]) for a in row) if text else 0.0
        for text, row in zip(texts, answers, strict=True)
    ]


def _refuse(folder: Any = "") -> None:
    if not isinstance(folder, str) or not (Path(folder) / "config.json").is_file():
        raise ValueError(f"folder = {folder!r} must be a folder with config.json and an encoder")


similarity.needs, similarity.options, similarity.refuse = ("torch",), ("folder",), _refuse
similarity.column_faults = {"answer": text_fault}


def _embedded(folder: str, texts: Sequence[str]) -> dict[str, Any]:
    """The embedding of each text, of length 1."""
    embed, found = _embedder(folder), {}
    by_length = sorted(texts, key=len)  # little padding
    for i in range(0, len(by_length), _ROWS):
        rows = by_length[i : i + _ROWS]
        found |= zip(rows, embed(rows))
    return found


@functools.lru_cache(maxsize=4)
def _embedder(folder: str) -> Callable[[list[str]], Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    model = AutoModel.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
    )
    model.eval()
    limit = min(getattr(model.config, "max_position_embeddings", _MAX_TOKENS), _MAX_TOKENS)
    pooling = _pooling(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"

    @torch.inference_mode()
    def embed(texts: list[str]) -> Any:
        plain = [text.encode("utf-8", "replace").decode() for text in texts]
        given = tokenizer(
            plain, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        hidden_BTD = model(**given).last_hidden_state
        keep_BT1 = given["attention_mask"][..., None].to(hidden_BTD.dtype)
        if pooling == "first":
            vector_BD = hidden_BTD[:, 0]
        elif pooling == "last":
            last_B = given["attention_mask"].sum(1) - 1
            vector_BD = hidden_BTD[torch.arange(len(texts)), last_B]
        else:
            vector_BD = (hidden_BTD * keep_BT1).sum(1) / keep_BT1.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(vector_BD, dim=-1).numpy()

    return embed


def _pooling(folder: str) -> str:
    """How tokens become a text: "mean", "first" or "last"."""
    file = Path(folder) / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    told = json.loads(file.read_text(encoding="utf-8"))
    return next((how for name, how in _POOLINGS.items() if told.get(name)), "mean")
