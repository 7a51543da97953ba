"""Texts as ids without control tokens: tokenizers that treat spaces in their own ways."""

from __future__ import annotations

import chat_families
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.environments.frames import make_frame, slot
from grpo_jax.environments.observations import Observations
from grpo_jax.environments.spelling import Spelling


def made(tokens, *, metaspace=None):
    """A tokenizer of single characters and of some added tokens."""
    characters = ["▁", *(chr(code) for code in range(32, 127)), "\n"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace)
        backend.decoder = decoders.Metaspace(prepend_scheme=metaspace)
    else:
        backend.decoder = decoders.Fuse()
    backend.add_tokens([t if isinstance(t, AddedToken) else AddedToken(t) for t in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_runs_of_spaces_that_are_added_tokens_are_kept():
    """As in GPT-NeoX's tokenizer: they are no control tokens, and their ids stay."""
    tokenizer = made(["<|a|>", "  ", "\n\n"])
    spelling = Spelling(tokenizer)
    assert spelling.control.values() == {"<|a|>"} or [*spelling.control.values()] == ["<|a|>"]
    text = "x  y\n\nz"
    assert spelling.plain(text) == spelling.full(text) == tokenizer.encode(text)
    assert len(spelling.plain(text)) == 5
    assert len(spelling.plain("<|a|>")) == 5 and spelling.full("<|a|>") == [len(tokenizer) - 3]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_text_in_the_middle_has_no_space_of_a_start(scheme):
    spelling = Spelling(made(["<|a|>"], metaspace=scheme))
    (control,) = spelling.control
    assert [control, *spelling.plain("b c")] == spelling.full("<|a|>b c")
    assert spelling.plain("b c", is_start=True) == spelling.full("b c")
    assert spelling.text(spelling.full("<|a|>b c")).replace(" ", "") == "<|a|>bc"


@pytest.mark.parametrize("said", ["x", "  x\n", "", " ", "<|e|> x"])
def test_white_space_that_a_control_token_swallows(said):
    """As in Phi-3's tokenizer, where `<|user|>` takes the line feed after it."""
    tokens = [AddedToken("<|u|>", rstrip=True), AddedToken("<|e|>", lstrip=True)]
    spelling = Spelling(made([*tokens, "<|z|>"]))
    frame = make_frame(f"<|u|>\n{slot(0)}\n<|e|>{slot(1)}<|z|>", None, spelling)
    ids = frame.ids({slot(0): said, slot(1): " y "}, spelling)
    one_render = spelling.full(f"<|u|>\n{said}\n<|e|> y <|z|>")
    if said == "<|e|> x":  # one rendering would read a control token
        assert spelling.text(ids) == "<|u|><|e|> x<|e|> y <|z|>" and len(ids) == 13
    else:
        assert ids == one_render


def test_a_control_token_that_is_a_word_of_the_vocabulary():
    """A tokenizer of words finds `stop` in its vocabulary, also where it is no added token."""
    words = {"<unk>": 0, "stop": 1, "go": 2, "s": 3, "t": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["stop"])
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert 1 in spelling.full("go stop go")
    assert 1 not in spelling.plain("go stop go") and spelling.plain("go")[0] == 2


def test_guards_mark_only_what_is_spelled():
    spelling = Spelling(chat_families.qwen()[0])
    ids = spelling.plain("a<think>b") + spelling.full("<think>") + spelling.plain("c")
    text, mark = spelling.guarded(ids)
    assert text == f"a<{mark}think>b<think>c" and text.replace(mark, "") == spelling.text(ids)


def test_a_text_that_was_not_read_whole_has_a_mark():
    """Few tokens may hold so many characters that only the ends of a text are read."""
    spelling = Spelling(made(["<|a|>", " " * 186]))  # of 2048 characters 13 tokens
    (cut,) = Observations(spelling, 16).fitted(["x" + " " * 10**5 + "y"])
    assert cut[0] == "x" and cut[-1] == "y" and "..." in cut
    assert len(spelling.plain(cut)) <= 16
