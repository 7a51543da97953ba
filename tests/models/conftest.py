"""A small model's folder, and a tokenizer of five words."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from hf_model import save_random_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Llama of 20 tensors with its own head, in one file."""
    folder = tmp_path_factory.mktemp("saved")
    save_random_model(folder, "Llama", {})
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of `saved` that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "one": 3, "two": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
