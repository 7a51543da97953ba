"""Given completions as tokens, and which are trained on: as transformers and TRL have it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from grpo_jax.data import examples, masks, templates
from grpo_jax.data.examples import Written
from grpo_jax.data.masks import Limits
from grpo_jax.data.problems import Form

WIDE = Limits(1000, 1000)
HI = {"role": "user", "content": "Hi"}
HEY = {"role": "assistant", "content": "Hey ä."}
MORE = {"role": "user", "content": "More?"}
NO = {"role": "assistant", "content": "No"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
ROWS = [  # in TRL's types; all of one format in a dataset
    {"prompt": "The sky is", "completion": " blue."},
    {"text": "Once upon a time."},
    {"prompt": [HI], "completion": [HEY]},
    {"prompt": [HI, HEY, MORE], "completion": [NO]},
    {"messages": [HI, HEY, MORE, NO]},
    {"messages": [{"role": "system", "content": "Be brief."}, HI, HEY]},
    {"messages": [HI, HEY, MORE]},
    {"messages": [HI, CALL, {"role": "tool", "content": "2"}, NO], "tools": [TOOL]},
    {"prompt": [HI], "completion": [CALL, {"role": "tool", "content": "2"}, NO]},
]
ASSISTANT = [row for row in ROWS if "text" not in row and not isinstance(row.get("prompt"), str)]
MARKED = (  # writes its marks, and the end of a turn after the message that follows
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


RENDERER = templates.Renderer()  # one for all tests: its process takes seconds to start


@pytest.fixture(scope="module")
def tokenizer(shared):
    from transformers import AutoTokenizer

    with RENDERER:
        yield AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5-instruct")


@pytest.fixture
def with_template(tokenizer):
    """Sets another chat template for one test."""
    before = tokenizer.chat_template
    yield lambda template: setattr(tokenizer, "chat_template", template) or tokenizer
    tokenizer.chat_template = before


def encoded(rows, tokenizer, loss_on="completion", limits=WIDE, kind="example", form=Form()):  # noqa: B008
    found = [
        w
        for i, row in enumerate(rows)
        for w in examples.written(row, f"d.jsonl, line {i + 1}", "data.path", form, kind)
    ]
    stops = [tokenizer.eos_token_id]
    return masks.encode(found, kind, tokenizer, stops, limits, loss_on=loss_on, renderer=RENDERER)


def labels(example) -> list[int]:
    """Its tokens, those that are not trained on as -100, as TRL has them."""
    chosen = example.chosen
    trained = np.ones(len(example.completion_ids), bool) if chosen is None else chosen
    completion = np.where(trained, example.completion_ids, -100)
    return [-100] * len(example.prompt_ids) + completion.tolist()


def whole(example) -> list[int]:
    return [*example.prompt_ids.tolist(), *example.completion_ids.tolist()]


def one_row(row):
    """A dataset that is mapped without a cache, whose names of files take longer than this test."""
    from datasets import Dataset

    return Dataset.from_list([dict(row)]).to_iterable_dataset()


# --- Against TRL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "all"])
def test_the_masks_are_trls(loss_on, tokenizer, with_template):
    """Of `completion_only_loss`, `assistant_only_loss`, and neither."""
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="needs trl")
    from trl.chat_template_utils import get_training_chat_template

    rows, by_turn = ROWS, []
    if loss_on == "assistant":
        rows, by_turn = ASSISTANT, encoded(ASSISTANT, tokenizer, loss_on).examples
        with_template(get_training_chat_template(tokenizer))
    ours = encoded(rows, tokenizer, loss_on).examples
    arguments = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", max_length=None, shuffle_dataset=False,
        assistant_only_loss=loss_on == "assistant",
    )  # fmt: skip
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, completion_only_loss=loss_on != "all", chat_template=None
    )
    for row, example in zip(rows, ours, strict=True):
        made = sft.SFTTrainer._prepare_dataset(
            trainer, one_row(row), tokenizer, arguments, False, None, "train"
        )
        made = next(iter(made))
        assert whole(example) == made["input_ids"]
        assert labels(example)[1:] == made["labels"][1:]  # nothing predicts a first token
        assert set(labels(example)) != {-100}
    for example, plain in zip(ours, by_turn):
        # TRL's template for Qwen2.5 counts the line feed that opens a turn as the assistant's; it
        # is a part of what the model is given, and turn by turn it is not trained on.
        more = np.flatnonzero(np.array(labels(example)) != labels(plain))
        assert {tokenizer.decode(whole(example)[i - 1 : i + 1]) for i in more} <= {"assistant\n"}


def test_pairs_are_trls(tokenizer):
    """The prompt, and both completions with the token that ends them."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None)
    rows = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "Human: a thing. AI: thanks", "rejected": "Human: a thing. AI: thorn"},
        {"prompt": [HI], "chosen": [HEY], "rejected": [NO]},
        {"chosen": [HI, HEY], "rejected": [HI, NO]},
    ]
    for row in rows:
        (ours,) = encoded([row], tokenizer, kind="pair").examples
        trainer = SimpleNamespace(_tokenizer=tokenizer)
        made = dpo.DPOTrainer._prepare_dataset(trainer, one_row(row), tokenizer, arguments, "train")
        made = next(iter(made))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert getattr(ours, name).tolist() == made[name], (row, name)


# --- By hand --------------------------------------------------------------------------------------


def test_a_completion_goes_on_with_the_prompts_tokens(tokenizer):
    (row,) = encoded([{"prompt": "The sky is", "completion": " blue."}], tokenizer).examples
    assert tokenizer.decode(row.prompt_ids) == "The sky is" and row.chosen is None
    assert tokenizer.decode(row.completion_ids) == " blue.<|im_end|>"
    ends = {"prompt": "The sky is", "completion": " blue.<|im_end|>"}
    assert encoded([ends], tokenizer).examples[0].completion_ids.tolist() == (
        row.completion_ids.tolist()
    )  # once


def test_the_assistants_turns_by_the_templates_marks(tokenizer, with_template):
    chat = {"messages": [HI, HEY, MORE, NO]}
    (plain,) = encoded([chat], tokenizer, "assistant").examples
    (marked,) = encoded([chat], with_template(MARKED), "assistant").examples
    for example in (plain, marked):
        trained = example.completion_ids[example.chosen]
        assert tokenizer.decode(trained) == "Hey ä.<|im_end|>\nNo<|im_end|>\n"
    by_transformers = tokenizer.apply_chat_template(
        chat["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert by_transformers["assistant_masks"][1:] == marked.chosen.astype(int).tolist()


def test_marks_that_leave_out_the_end_are_noticed(tokenizer, with_template):
    late = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    found = encoded([{"messages": [HI, HEY]}], with_template(late), "assistant")
    assert found.num_unmarked == 1
    assert encoded([{"messages": [HI, HEY]}], with_template(MARKED), "assistant").num_unmarked == 0


def test_a_template_that_ends_no_turn_gets_a_stop_token(tokenizer, with_template):
    open_ended = MARKED.replace("<|im_end|>\n", "\n").replace("generation %", "generation %")
    row = {"prompt": [HI], "completion": [HEY]}
    for loss_on in ("completion", "assistant"):
        found = encoded([row], with_template(open_ended), loss_on)
        (example,) = found.examples
        assert found.num_ended == 1 and example.completion_ids[-1] == tokenizer.eos_token_id
        assert example.chosen is None or example.chosen[-1]


def test_a_prompt_that_the_assistant_began_goes_on(tokenizer):
    """The completion is what the model adds to its own open turn."""
    begun = {"prompt": [HI, {"role": "assistant", "content": "Hey"}], "completion": " you"}
    (example,) = encoded([begun], tokenizer).examples
    assert tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\nHey")
    assert tokenizer.decode(example.completion_ids) == " you<|im_end|>\n"


@pytest.mark.parametrize(
    ("row", "loss_on", "words"),
    [
        ({"prompt": "The sk", "completion": "y is"}, "completion",
         ("line 2", "no prefix", "' sk'", "reach over the end")),
        ({"text": "A text."}, "assistant", ("line 2 is a text", "sft.loss_on")),
        ({"messages": [HI, MORE]}, "assistant", ("line 2 has no token of an assistant",)),
        ({"text": "\ud83d"}, "completion", ("line 2 holds", "half of a character")),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned_are_refused_by_their_number(row, loss_on, words, tokenizer):
    first = ROWS[4] if loss_on == "assistant" else ROWS[0]
    with pytest.raises(ValueError) as error:
        encoded([first, row], tokenizer, loss_on)
    for word in ("d.jsonl, line 2", *words):
        assert word in str(error.value)


def test_templates_that_change_earlier_turns_are_refused_by_name(tokenizer, with_template):
    """As Qwen3's, which takes the thinking out of all turns but the last."""
    strips = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    thinks = {"role": "assistant", "content": "<think>x</think>Hey"}
    with_template(strips)
    assert encoded([{"messages": [HI, thinks]}], tokenizer, "assistant").examples
    with pytest.raises(ValueError, match=r"writes message 1 of d\.jsonl, line 2 otherwise when"):
        encoded(
            [{"messages": [HI, HEY]}, {"messages": [HI, thinks, MORE, NO]}], tokenizer, "assistant"
        )
    opens = strips.replace("<|assistant|>", "<|assistant|><think>")
    with pytest.raises(ValueError, match=r"line 1 is no prefix .*<think>'.* writes the prompt"):
        encoded([{"prompt": [HI], "completion": [HEY]}], with_template(opens))


def test_rows_that_are_too_long(tokenizer):
    """Refused, dropped or cut as it is asked for, and counted; a text as a whole."""
    rows = [
        {"prompt": "The sky is", "completion": " blue."},  # 3 tokens, and 3 with the end
        {"prompt": "The sky is", "completion": " blue and very wide today."},  # 3 and 7
        {"prompt": "The sky above us is", "completion": " blue."},  # 5 and 3
    ]
    of = lambda *limits: encoded(rows, tokenizer, limits=Limits(*limits))  # noqa: E731
    lengths = lambda found: [(len(e.prompt_ids), len(e.completion_ids)) for e in found.examples]  # noqa: E731
    assert lengths(of(5, 7)) == [(3, 3), (3, 7), (5, 3)]
    with pytest.raises(ValueError) as error:
        of(5, 6)
    for word in ("sft.max_tokens = 6", "line 2", "7 tokens", "1 of 3", "sft.too_long"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match=r"max_prompt_tokens = 4.*line 3 has 5.*data\.overlong"):
        of(4, 7)
    dropped = of(4, 6, "drop", "drop")
    assert lengths(dropped) == [(3, 3)] and dropped.num_dropped == 2
    cut = of(4, 6, "truncate", "truncate")
    assert lengths(cut) == [(3, 3), (3, 6), (4, 3)] and cut.num_truncated == 2
    assert tokenizer.decode(cut.examples[2].prompt_ids) == " sky above us is"
    assert cut.examples[1].completion_ids[-1] != tokenizer.eos_token_id
    (text,) = encoded([{"text": "The sky is blue."}], tokenizer, limits=Limits(1, 6)).examples
    assert len(whole(text)) == 6
    short = Limits(1, 5, too_long="truncate")
    (text,) = encoded([{"text": "The sky is blue."}], tokenizer, limits=short).examples
    assert tokenizer.decode(whole(text)) == "The sky is blue."


def test_a_chat_that_is_cut_before_the_assistant_is_dropped(tokenizer):
    chat = {"messages": [{"role": "system", "content": "Be brief."}, HI, HEY]}
    limits = Limits(9, 12, too_long="truncate")
    found = encoded([chat], tokenizer, "assistant", limits)
    assert found.examples == [] and found.num_dropped == 1


def test_values_of_pairs_and_labels(tokenizer):
    pair = {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 2}
    (found,) = encoded([pair], tokenizer, kind="pair").examples
    assert found.margin == 2.0 and found.chosen_ids[-1] == tokenizer.eos_token_id
    good, bad = encoded([pair], tokenizer, kind="unpaired").examples
    assert (good.label, bad.label) == (True, False)
    assert good.completion_ids.tolist() == found.chosen_ids.tolist()
    assert bad.completion_ids.tolist() == found.rejected_ids.tolist()


def test_an_implicit_prompt_may_end_within_a_token(tokenizer):
    """A shared beginning of both answers belongs to it; the tokens that both share are taken."""
    row = Written("w", "A: th", ("ank you", "orn"), is_implicit=True, value=0.0)
    (pair,) = masks.encode([row], "pair", tokenizer, [tokenizer.eos_token_id], WIDE).examples
    assert tokenizer.decode(pair.prompt_ids) == "A:"
    assert tokenizer.decode(pair.chosen_ids) == " thank you<|im_end|>"
