"""Tokenizers of Hugging Face folders, and the tokens that end a completion."""

from __future__ import annotations

import copy
import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import transformers
from hf_model import edit_json

from grpo_jax import generate
from grpo_jax.config import options
from grpo_jax.data.problems import Problem
from grpo_jax.models import policy
from grpo_jax.models.hf.tokenizer import load_tokenizer, stop_ids
from grpo_jax.setup.data import encode

# --- Tokenizer ----------------------------------------------------------------------------------


def test_a_missing_or_broken_tokenizer_is_refused(folder, tokenizer):
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder)("two").input_ids == [4]
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "generation, config, ids",
    [
        (7, 9, (1, 7)),
        ([9, 7], None, (1, 7, 9)),
        (None, 9, (1, 9)),
        (None, None, (1,)),
        (1, [1, 2], (1,)),
    ],
)
def test_stop_ids(folder, tokenizer, generation, config, ids):
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    edit_json(folder / "config.json", eos_token_id=config)
    assert stop_ids(folder, tokenizer, 48) == ids


def test_stop_ids_that_are_none_or_no_ids_are_refused(folder, tokenizer):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id = '</s>' must be a token id"):
        stop_ids(folder, tokenizer, 48)
    edit_json(folder / "config.json", eos_token_id=None)
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="names no token that ends a completion"):
        stop_ids(folder, bare, 48)


@pytest.mark.parametrize("number", [48, 2**31, 2**40])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_ids_past_the_vocabulary_are_refused(folder, tokenizer, number, file):
    (folder / "generation_config.json").write_text("{}")
    edit_json(folder / file, eos_token_id=[1, number])
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id = .* the id {number} is past"):
        stop_ids(folder, tokenizer, 48)


def test_an_end_of_text_past_the_vocabulary_is_refused(folder, tokenizer):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=r"eos_token '<eos>': the id 1 is past .* vocab_size = 1,"):
        stop_ids(folder, tokenizer, 1)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_tokenizer_is_the_one_that_transformers_chooses(shared, tmp_path, family):
    folder = Path(shutil.copytree(shared / "tokenizers" / "qwen2.5-instruct", tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    want = transformers.AutoTokenizer.from_pretrained(folder)
    got = load_tokenizer(folder)
    assert type(got) is type(want)
    assert got.special_tokens_map == want.special_tokens_map and len(got) == len(want)
    chat = [
        {"role": "user", "content": "How many are 12345 + 678?\n\n\tAnd don't  guess: ½ é 东京"}
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in (got, want)]
    assert texts[0] == texts[1] and got(texts[0]).input_ids == want(texts[1]).input_ids


# --- Tokens past the vocabulary -----------------------------------------------------------------


def test_a_token_without_an_embedding_is_refused_where_a_text_holds_it(folder, tokenizer):
    """A padding token that was added, while the model was not resized: it runs without."""
    added = copy.deepcopy(tokenizer)
    added.add_tokens([f"word{i}" for i in range(43)])
    added.add_special_tokens({"pad_token": "<filling>"})
    added.save_pretrained(folder)
    read = policy.read(str(folder))
    assert read.model.vocab_size == 48 and len(read.tokenizer) == 49
    read.refuse_unknown(read.tokenizer("one word42").input_ids, "row 1")
    ids = read.tokenizer("one <filling>").input_ids
    with pytest.raises(ValueError, match=r"row 2 holds the token '<filling>' \(id 48\), for which"):
        read.refuse_unknown(ids, "row 2")
    edit_json(folder / "config.json", vocab_size=4)
    with pytest.raises(ValueError, match="They do not belong together"):
        policy.read(str(folder))


def test_prompts_and_solutions_with_such_a_token_are_refused_by_their_place(folder, tokenizer):
    added = copy.deepcopy(tokenizer)
    added.add_tokens([f"word{i}" for i in range(44)])
    added.save_pretrained(folder)
    read, config = policy.read(str(folder)), options.default()
    problems = [Problem(text, {}, f"f.jsonl, row {i}") for i, text in enumerate(["one", "word43"])]
    with pytest.raises(ValueError, match=r"of f\.jsonl, row 1 holds the token 'word43' \(id"):
        encode(problems, read, config, "training problems", datetime.now())
    assert encode(problems[:1], read, config, "training problems", datetime.now()).prompt_ids == [
        [3]
    ]
    with pytest.raises(ValueError, match="--prompt holds the token 'word43'"):
        generate.encode_prompt(read, Problem("one word43", {}, "--prompt"), 4, "--max-tokens")
