import os
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode, prompt_indices

SHARED = Path(os.environ.get("GRPO_JAX_SHARED", "../shared"))


@pytest.mark.parametrize(("num_problems", "per_step"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 1)])
def test_every_epoch_visits_each_problem_once(num_problems, per_step):
    steps = [prompt_indices(3, step, num_problems, per_step) for step in range(num_problems * 4)]
    assert {len(s) for s in steps} == {per_step}
    epochs = np.concatenate(steps).reshape(-1, num_problems)  # per_step * 4 whole epochs
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(num_problems)] * len(epochs))


def test_steps_follow_from_seed_and_step_alone():
    a = [prompt_indices(0, step, 100, 32) for step in range(20)]
    b = [prompt_indices(0, step, 100, 32) for step in reversed(range(20))]
    np.testing.assert_array_equal(a, b[::-1])
    assert not np.array_equal(a[0], prompt_indices(1, 0, 100, 32))
    epochs = np.concatenate(a)[:600].reshape(6, 100)
    assert len({tuple(e) for e in epochs}) == 6  # each epoch has its own order
    assert not np.array_equal(epochs[0], np.arange(100))


def test_no_repeat_within_a_step_of_one_epoch():
    for step in range(12):  # 12 steps of 8 are one epoch of 96
        assert len(set(prompt_indices(5, step, 96, 8))) == 8


class WordTokenizer:
    """One token a word, after a start token 1; a template that names roles by a token."""

    def __call__(self, text):
        return {"input_ids": [1, *(len(w) for w in text.split())] if text != "none" else []}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt and tokenize and return_dict
        if messages[0]["role"] == "tool":
            raise TypeError("no tools")
        return {"input_ids": [len(messages), 99]}


def test_encode_texts_and_messages():
    problems = [
        Problem("a bb ccc", {}),
        Problem([{"role": "user", "content": "hi"}], {}),
    ]
    assert encode(problems, WordTokenizer(), 4) == [[1, 1, 2, 3], [1, 99]]


def test_encode_names_prompts_over_the_limit():
    problems = [Problem(t, {}) for t in ("a b", "c d e f", "a", "g h i j k")]
    with pytest.raises(ValueError) as error:
        encode(problems, WordTokenizer(), 3)
    words = ["data.max_prompt_tokens = 3", "problem 1", "5 tokens", "'c d e f'", "2 of 4", "6"]
    for word in words:
        assert word in str(error.value)
    assert len(encode(problems, WordTokenizer(), 6)) == 4


def test_encode_refuses_what_gives_no_tokens():
    with pytest.raises(ValueError, match=r"Problem 1 .*data\.max_prompt_tokens = 3.*'none'"):
        encode([Problem("a", {}), Problem("none", {})], WordTokenizer(), 3)
    with pytest.raises(ValueError, match=r"Problem 0 .*TypeError: no tools"):
        encode([Problem([{"role": "tool", "content": "x"}], {})], WordTokenizer(), 3)


def test_encode_with_a_real_chat_template():
    folder = SHARED / "tokenizers" / "qwen2.5-instruct"
    if not folder.is_dir():
        pytest.skip(f"no Qwen2.5 tokenizer in {folder}; set GRPO_JAX_SHARED")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "1+1?"}]
    chat, text = encode([Problem(messages, {}), Problem("1+1?", {})], tokenizer, 512)
    assert tokenizer.decode(chat).endswith("1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert all(type(i) is int for i in chat + text) and tokenizer.decode(text) == "1+1?"
    gpt2 = SHARED / "tokenizers" / "gpt2"
    with pytest.raises(ValueError, match="with a chat template"):
        encode([Problem(messages, {})], AutoTokenizer.from_pretrained(gpt2), 512)
