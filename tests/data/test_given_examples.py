"""Rows in TRL's types: what each column means, and what is refused by file, row and column."""

from __future__ import annotations

import json

import pytest

from grpo_jax.data import examples, given
from grpo_jax.data.examples import Written, load
from grpo_jax.data.problems import Form
from grpo_jax.data.sources import Source

HI = {"role": "user", "content": "Hi"}
HEY = {"role": "assistant", "content": "Hey"}
NO = {"role": "assistant", "content": "No"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
SHAREGPT = [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hey"}]  # fmt: skip
AS_CHAT = [{"role": "system", "content": "Be"}, HI, HEY]


def read(rows, kind="example", form=Form()) -> list[Written]:  # noqa: B008
    return list(load(Source(given.give("data", rows)), form, kind))


def parts(row: Written):
    return row.prompt, *row.completions


# --- Kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"text": "Once"}, {}, (None, "Once")),
        ({"messages": [HI, HEY]}, {}, (None, [HI, HEY])),
        ({"messages": [HI, HEY]}, {"system_prompt": "Be"}, (None, AS_CHAT)),
        ({"conversations": SHAREGPT}, {}, (None, AS_CHAT)),
        ({"conversations": AS_CHAT}, {}, (None, AS_CHAT)),
        ({"prompt": "a", "completion": "b"}, {}, ("a", "b")),
        ({"prompt": "a", "completion": ""}, {}, ("a", "")),
        ({"q": "a", "s": "b"}, {"columns": ("prompt=q", "completion=s")}, ("a", "b")),
        ({"q": "a", "completion": "b"}, {"prompt_template": "Q: {q} A:"}, ("Q: a A:", "b")),
        ({"prompt": "a", "completion": [HEY]}, {}, ("a", "Hey")),
        ({"prompt": "Hi", "completion": "Hey"}, {"chat": True}, ([HI], [HEY])),
        ({"prompt": [HI], "completion": "Hey"}, {}, ([HI], [HEY])),
        ({"prompt": [HI], "completion": [HEY]}, {}, ([HI], [HEY])),
        ({"prompt": [HI], "completion": [{"from": "gpt", "value": "Hey"}]}, {}, ([HI], [HEY])),
        ({"prompt": [HI, HEY]}, {}, ([HI], [HEY])),
        ({"prompt": "Hi", "completion": None, "messages": [HI, HEY]}, {}, (None, [HI, HEY])),
        ({"prompt": "[" + json.dumps(HI) + "]", "completion": "Hey"}, {}, ([HI], [HEY])),
        ({"messages": [HI, CALL]}, {}, (None, [HI, CALL])),
    ],
)  # fmt: skip
def test_rows_to_imitate(row, form, expected):
    (found,) = read([row], form=Form(**form))
    assert parts(found) == expected
    assert found.where == "data, row 1" and not found.is_implicit


@pytest.mark.parametrize(
    ("row", "expected", "is_implicit"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("a", "b", "c"), False),
        ({"prompt": [HI], "chosen": [HEY], "rejected": [NO]}, ([HI], [HEY], [NO]), False),
        ({"prompt": [HI], "chosen": "Hey", "rejected": "No"}, ([HI], [HEY], [NO]), False),
        ({"chosen": [HI, HEY], "rejected": [HI, NO]}, ([HI], [HEY], [NO]), True),
        # As UltraFeedback, whose `prompt` is the first message of both chats.
        ({"prompt": "Hi", "chosen": [HI, HEY], "rejected": [HI, NO]}, ([HI], [HEY], [NO]), True),
        ({"prompt": [HI], "chosen": [HI, HEY], "rejected": [HI, NO]}, ([HI], [HEY], [NO]), True),
        # By characters, as TRL's `extract_prompt`, without the space before the difference.
        ({"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, ("Q: a A:", " b", " c"), True),
        ({"chosen": "Thank", "rejected": "Then"}, ("Th", "ank", "en"), True),
        ({"chosen": "ab", "rejected": "abc"}, ("a", "b", "bc"), True),
    ],
)
def test_pairs(row, expected, is_implicit):
    (found,) = read([row | {"margin": 0.5}], "pair")
    assert parts(found) == expected and found.is_implicit == is_implicit and found.value == 0.5
    assert read([row], "pair")[0].value == 0.0


@pytest.mark.parametrize("row", [
    {"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, {"chosen": "ab", "rejected": "abc"},
    {"chosen": [HI, HEY], "rejected": [HI, NO]}, {"chosen": "Thank", "rejected": "Then"},
])  # fmt: skip
def test_implicit_prompts_are_trls(row):
    trl = pytest.importorskip("trl.data_utils", reason="needs trl")
    (found,) = read([row], "pair")
    made = trl.extract_prompt(row)
    assert parts(found) == (made["prompt"], made["chosen"], made["rejected"])


def test_labels():
    rows = [{"prompt": "a", "completion": "b", "label": v} for v in (True, False, 1)]
    assert [row.value for row in read(rows, "unpaired")] == [True, False, True]
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    good, bad = read([pair], "unpaired")  # TRL's KTO takes pairs apart, too
    assert (parts(good), good.value) == (("a", "b"), True)
    assert (parts(bad), bad.value) == (("a", "c"), False)


def test_what_the_template_is_given():
    row = {"messages": [HI, HEY], "tools": json.dumps([TOOL]), "chat_template_kwargs": {"x": 1}}
    (found,) = read([row], form=Form(chat_template_kwargs=("x=2", "y=3")))
    assert found.arguments == {"tools": [TOOL], "x": 1, "y": 3}
    assert read([{"text": "a", "tools": None}])[0].arguments == {}


def test_the_same_rows_from_each_kind_of_file(tmp_path):
    """Parquet and Arrow give each message the keys of all, and CSV writes lists as text."""
    import datasets
    import pandas
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"prompt": [HI], "completion": [HEY | {"name": "x"}]},
        {"prompt": [{"role": "system", "content": "Be"}, HI], "completion": [NO]},
    ]
    expected = read(rows)
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "d.parquet")
    with (
        pa.OSFile(str(tmp_path / "d.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    as_text = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    pandas.DataFrame(as_text).to_csv(tmp_path / "d.csv", index=False)
    for name in ("d.jsonl", "d.parquet", "d.arrow", "saved", "d.csv"):
        found = list(load(Source(str(tmp_path / name)), Form(), "example"))
        assert [parts(row) for row in found] == [parts(row) for row in expected], name


# --- What is refused ------------------------------------------------------------------------------

BAD = {
    "example": [
        ({"prompt": "a"}, ("`completion`", "it has prompt", "data.columns")),
        ({"completion": "a"}, ("a `completion` and no `prompt`", "it has completion")),
        ({"prompt": "a", "completion": 7}, ("`completion` is a int: 7",)),
        ({"prompt": 7, "completion": "a"}, ("`prompt` is a int: 7",)),
        ({"prompt": " ", "completion": "a"}, ("`prompt` is blank",)),
        ({"text": " "}, ("`text` is blank",)),
        ({"text": ["a"]}, ("`text` has a str as message 0",)),
        ({"messages": []}, ("`messages` holds no message",)),
        ({"messages": [{"content": "a"}]}, ("`messages` has no text as `role` of message 0",)),
        ({"messages": [{"role": "user"}]}, ("no text as `content` of message 0",)),
        (
            {"messages": [HI, {"role": "user", "content": [{"type": "image"}]}]},
            ("'image' in `content` of message 1",),
        ),
        ({"conversations": [{"from": "gpt"}]}, ("`conversations` has no text as `content`",)),
        ({"messages": '[{"role": "user", "content": }]'}, ("`messages` begins as a list",)),
        ({"messages": [HI, HEY], "tools": "f"}, ("`tools` is 'f'",)),
        ({"text": "a", "image": "b"}, ("a column `image`",)),
        ({"prompt": "a", "completion": [HI, HEY]}, ("a chat of 2 messages", "data.chat")),
    ],
    "pair": [
        ({"prompt": "a", "chosen": "b"}, ("no `rejected`", "it has prompt, chosen")),
        ({"prompt": "a"}, ("no `chosen` and no `rejected`",)),
        ({"prompt": "a", "chosen": "b", "rejected": [NO]}, ("a text and the other a chat",)),
        ({"chosen": "b", "rejected": "c"}, ("no common start", "no `prompt`")),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, ("`margin` is 'x'",)),
        ({"prompt": "a", "chosen": "b", "rejected": 1.5}, ("`rejected` is a float: 1.5",)),
    ],
    "unpaired": [
        ({"prompt": "a", "completion": "b"}, ("no `label`", "it has prompt, completion")),
        ({"prompt": "a", "completion": "b", "label": "yes"}, ("`label` is 'yes'", "true")),
        ({"prompt": "a", "completion": "b", "label": 2}, ("`label` is 2",)),
        ({"prompt": "a", "label": True}, ("no `completion`",)),
    ],
}


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [(kind, *case) for kind, cases in BAD.items() for case in cases],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_rows_are_refused_by_file_row_and_column(kind, row, words, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("\n\n" + json.dumps(row))
    with pytest.raises(ValueError) as error:
        list(load(Source(str(file)), Form(), kind))
    for word in ("data.path", "d.jsonl, line 3", *words):
        assert word in str(error.value)


def test_rows_have_the_columns_of_the_first(tmp_path):
    with pytest.raises(
        ValueError, match=r"data, row 2 lacks text and adds messages, compared with"
    ):
        read([{"text": "a"}, {"messages": [HI]}])
    with pytest.raises(ValueError, match=r"data\.chat = True makes a prompt a chat, and `text`"):
        read([{"text": "a"}], form=Form(chat=True))


def test_which_rows_are_given():
    of = lambda row, kind: examples.is_of(Source(given.give("d", [row])), Form(), kind)  # noqa: E731
    assert of({"prompt": "a", "completion": "b"}, "example") and of({"text": "a"}, "example")
    assert of({"prompt": [HI, HEY]}, "example") and not of({"prompt": [HI]}, "example")
    assert not of({"prompt": "a", "answer": "b"}, "example")
    assert of({"chosen": "a", "rejected": "b"}, "pair") and not of({"prompt": "a"}, "pair")
