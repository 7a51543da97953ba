"""Tokenizers of generated tasks, for models made from scratch: a token for each word of the task.

They split text like Qwen2, the family of such a model, because version 5 of transformers applies
Qwen2's splitting to every folder of that family, whatever the folder says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import AddedToken, PreTrainedTokenizerFast, Qwen2Tokenizer

# A text of one token that opens a call of a tool, and one that ends it: a small model need not
# learn to spell JSON.
CALL, CALL_END = "<tool_call>", "</tool_call>"


def call_pieces(name: str, *arguments: tuple[str, bool]) -> list[str]:
    """What stands around the arguments of a call: before the first, between them, after the last.

    `arguments`: their names, and whether they are texts, which stand in quotes. The pieces are
    tokens if they are `marks` of `make`.
    """
    pieces, before = [], f'{CALL}{{"name": "{name}", "arguments": {{'
    for i, (argument, is_text) in enumerate(arguments):
        quote = '"' if is_text else ""
        pieces.append(f'{before}{", " if i else ""}"{argument}": {quote}')
        before = quote
    return [*pieces, f"{before}}}}}{CALL_END}"]


def make(
    characters: str, words: Iterable[str] = (), marks: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each character and word, and for each of `marks`.

    Words are read as tokens after a space, such as " Oslo", and "####" anywhere. `marks` are texts
    that are tokens wherever a policy writes them; what an environment says never becomes one.
    """
    words = list(words)
    letters = sorted(set("".join(words)))
    vocabulary = ["<pad>", "<eos>", *characters, *letters, "Ġ", "Ċ", "##", "####"]  # Ċ: line feed
    merges = []
    for word in words:
        # Each word grows from its space by a letter at a time, so that no two words disturb each
        # other; the beginnings are tokens that nothing uses.
        for i, letter in enumerate(word):
            merge = (f"Ġ{word[:i]}", letter)
            if merge not in merges:
                merges.append(merge)
                vocabulary.append("".join(merge))
    rules = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocabulary))},
        merges=[*merges, ("#", "#"), ("##", "##")],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=rules.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # decoders have no token types
    )
    made.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    return made
