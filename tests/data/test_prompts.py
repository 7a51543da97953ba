from typing import ClassVar

import numpy as np
import pytest

from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode, prompt_indices


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
    """One token a word, after a start token 1; a template that names roles by a word."""

    def __call__(self, texts, add_special_tokens, verbose):
        assert isinstance(texts, list) and not verbose
        rows = [[len(w) for w in text.split()] for text in texts]
        return {"input_ids": [[1] * add_special_tokens + row if row else [] for row in rows]}

    special_tokens_map: ClassVar = {"eos_token": "."}
    bos_token = "<s>"

    def get_chat_template(self, tools=None):
        return """{%- for m in messages %}
            {%- if m.role == "tool" %}{{ raise_exception("no\ntools") }}{% endif %}
            {{- m.role + " " + m.content }}
        {%- endfor %}"""


def texts(*prompts):
    return [Problem(p, {"number": i}, f"p.jsonl, line {i + 1}") for i, p in enumerate(prompts)]


def test_encode_texts_and_messages():
    problems = texts("a bb ccc", [{"role": "user", "content": "hi"}], "dd")
    encoded = encode(problems, WordTokenizer(), 4)
    assert encoded.prompt_ids == [[1, 1, 2, 3], [4, 2], [1, 2]]  # "user hi" has no start token
    assert encoded.problems == problems
    assert encoded.num_dropped == encoded.num_truncated == 0


# With the start token: 3, 5, 2 and 6 tokens.
LENGTHS = ("a b", "c dd e ff", "a", "g h i j kkk")


def test_encode_refuses_prompts_over_the_limit():
    with pytest.raises(ValueError) as error:
        encode(texts(*LENGTHS), WordTokenizer(), 3)
    words = ["data.max_prompt_tokens = 3", "prompt of p.jsonl, line 2", "5 tokens", "'c dd e ff'"]
    for word in [*words, "2 of 4", "at least 6", "data.overlong"]:
        assert word in str(error.value)
    assert len(encode(texts(*LENGTHS), WordTokenizer(), 6).prompt_ids) == 4


def test_encode_drops_prompts_over_the_limit():
    encoded = encode(texts(*LENGTHS), WordTokenizer(), 3, "drop")
    assert encoded.prompt_ids == [[1, 1, 1], [1, 1]]
    assert [p.columns["number"] for p in encoded.problems] == [0, 2]
    assert (encoded.num_dropped, encoded.num_truncated) == (2, 0)


def test_encode_refuses_to_drop_all():
    with pytest.raises(ValueError, match=r"max_prompt_tokens = 1,.*leave none.*to at least 6\.$"):
        encode(texts(*LENGTHS), WordTokenizer(), 1, "drop")


def test_encode_keeps_the_end_of_prompts_over_the_limit():
    encoded = encode(texts(*LENGTHS), WordTokenizer(), 3, "truncate")
    assert encoded.prompt_ids == [[1, 1, 1], [2, 1, 2], [1, 1], [1, 1, 3]]
    assert (encoded.num_dropped, encoded.num_truncated) == (0, 2)
    assert encoded.problems == texts(*LENGTHS)


@pytest.mark.parametrize("overlong", ["refuse", "drop", "truncate"])
def test_encode_of_prompts_within_the_limit(overlong):
    encoded = encode(texts(*LENGTHS), WordTokenizer(), 6, overlong)
    assert [len(ids) for ids in encoded.prompt_ids] == [3, 5, 2, 6]
    assert (encoded.num_dropped, encoded.num_truncated) == (0, 0)


def test_encode_refuses_what_gives_no_tokens():
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2 .*data\.max_prompt_tokens = 3.*' '"):
        encode(texts("a", " "), WordTokenizer(), 3, "drop")
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1 .*TemplateError: no tools"):
        encode(texts([{"role": "tool", "content": "x"}]), WordTokenizer(), 3)


def test_encode_refuses_half_of_a_character():
    """JSON can write it, and no tokenizer takes it."""
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2 holds '\\ud83d', half of a character"):
        encode(texts("a", "b \ud83d", "c"), WordTokenizer(), 3)


def tokenizer_of(shared, name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "tokenizers" / name)


def test_encode_with_a_real_chat_template(shared):
    tokenizer = tokenizer_of(shared, "qwen2.5-instruct")
    chats = [
        [{"role": "user", "content": "1+1?"}],
        [
            {"role": "system", "content": "Think <|im_end|> ä."},
            {"role": "user", "content": "a\n\n b"},
            {"role": "assistant", "content": " c "},
            {"role": "user", "content": "d"},
        ],
    ]
    *encoded, text = encode(texts(*chats, "1+1?"), tokenizer, 512).prompt_ids
    for messages, ids in zip(chats, encoded):
        whole = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert ids == whole["input_ids"]
    assert tokenizer.decode(encoded[0]).endswith("1+1?<|im_end|>\n<|im_start|>assistant\n")
    assert all(type(i) is int for i in encoded[0] + text) and tokenizer.decode(text) == "1+1?"


TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}


def test_encode_as_transformers_does(shared):
    """A message that is continued, tools, parts of text, and calls without content."""
    tokenizer = tokenizer_of(shared, "qwen2.5-instruct")
    asked = {"role": "user", "content": "1+1?"}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chats = [
        [asked, {"role": "assistant", "content": "<think>\nIt is"}],
        [asked],
        [
            asked,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
        ],
    ]
    arguments = [{}, {"tools": [TOOL]}, {"tools": [TOOL]}]
    problems = [Problem(c, {}, arguments=given) for c, given in zip(chats, arguments)]
    encoded = encode(problems, tokenizer, 512)
    for chat, given, ids in zip(chats, arguments, encoded.prompt_ids):
        continues = chat[-1]["role"] == "assistant"
        text = tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            continue_final_message=continues,
            add_generation_prompt=not continues,
            **given,
        )
        assert ids == tokenizer(text)["input_ids"]
    first, second, third = map(tokenizer.decode, encoded.prompt_ids)
    assert first.endswith("<|im_start|>assistant\n<think>\nIt is")
    assert '"name": "f"' in second and "<tool_response>\n2\n" in third
    assert encoded.reads == {"messages", "tools", "add_generation_prompt"}


def test_a_text_that_was_rendered_begins_once(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    begin = tokenizer.bos_token_id
    problems = texts("<s>[user] hi", "[user] hi", "<s>", "<s><s>hi")
    rendered, plain, alone, twice = encode(problems, tokenizer, 64).prompt_ids
    assert rendered[0] == begin and begin not in rendered[1:]
    assert plain[0] == begin and begin not in plain[1:]
    assert alone == [begin] and twice[:2] == [begin] * 2 != twice[1:3]
    assert rendered == tokenizer("<s>[user] hi", add_special_tokens=False)["input_ids"]


def test_a_template_without_system_messages(shared):
    class NoSystem(WordTokenizer):
        def get_chat_template(self, tools=None):
            return "{{ raise_exception('System role not supported') }}"

    chat = [{"role": "system", "content": "Be {short}."}, {"role": "user", "content": "hi"}]
    with pytest.raises(ValueError) as error:
        encode(texts("a", chat), NoSystem(), 64)
    for words in ("p.jsonl, line 2", "System role not supported", "leave data.system_prompt empty"):
        assert words in str(error.value)
    assert r"data.prompt_template = 'Be {{short}}.\n\n{prompt}'" in str(error.value)
    with pytest.raises(ValueError, match="Mend the row, or give the template what it asks for"):
        encode(texts(chat[1:]), NoSystem(), 64)


def test_templates_tell_how_far_they_are():
    told = []
    chats = texts(*[[{"role": "user", "content": "hi"}]] * 3)
    encode(chats, WordTokenizer(), 9, on_text=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_encode_of_messages_without_a_chat_template(shared):
    tokenizer = tokenizer_of(shared, "gpt2")
    problems = texts("1+1?", [{"role": "user", "content": "1+1?"}])
    with pytest.raises(
        ValueError, match=r"line 2 is a list of messages.*the tokenizer has no chat template"
    ):
        encode(problems, tokenizer, 512)
