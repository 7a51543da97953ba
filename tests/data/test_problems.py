import json

import datasets
import pytest

from grpo_jax.config import options
from grpo_jax.data.problems import Form, Problem, load, load_held_out, load_train
from grpo_jax.data.sources import Source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` converts lies in a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(tmp_path, *lines, name="problems.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def rows(*objects):
    return [json.dumps(x) for x in objects]


PLAIN = Form()


def load_lines(tmp_path, lines, form=PLAIN, option="data.path"):
    return load(Source(str(write(tmp_path, *lines)), options=(option, "", "")), form)


def refusal(tmp_path, lines, form=PLAIN, option="data.path"):
    with pytest.raises(ValueError) as error:
        load_lines(tmp_path, lines, form, option)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    return str(error.value)


MESSAGES = [{"role": "user", "content": "1+1?"}]
SYSTEM = [{"role": "system", "content": "Think."}]


def test_texts_and_messages(tmp_path):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "1+1?"}]
    problems = load_lines(
        tmp_path,
        [
            "\ufeff" + json.dumps({"prompt": "2+2?", "answer": 4, "source": "ä"}),
            "",
            json.dumps({"source": None, "answer": [1, {"a": 2}], "prompt": messages}),
            "",
        ],
    )
    assert problems == [
        Problem("2+2?", {"answer": 4, "source": "ä"}),
        Problem(messages, {"answer": [1, {"a": 2}], "source": None}),
    ]
    assert [p.where for p in problems] == [f"{tmp_path}/problems.jsonl, line {i}" for i in (1, 3)]


GOOD = '{"prompt": "1+1?", "answer": 2}'


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        ((GOOD, "", '{"prompt": "cut'), 3, ["not JSON", '{"prompt": "cut']),
        ((GOOD, "[1, 2]"), 2, ["list", "JSON object"]),
        (('{"question": "1+1?"}',), 1, ["no `prompt`", "question", "data.columns"]),
        (("{}",), 1, ["no `prompt`", "no columns"]),
        (('{"prompt": " "}',), 1, ["blank"]),
        (('{"prompt": 3}',), 1, ["int", "a text"]),
        (('{"prompt": null}',), 1, ["NoneType"]),
        (('{"prompt": []}',), 1, ["no text"]),
        (('{"prompt": ["hi"]}',), 1, ["str as message 0"]),
        (('{"prompt": [{"role": "user"}]}',), 1, ["`content` of message 0"]),
        (('{"prompt": [{"content": "hi"}]}',), 1, ["`role` of message 0"]),
        (('{"prompt": "a", "completions": 1}',), 1, ["`completions`", "Rename"]),
        ((GOOD, '{"prompt": "a"}'), 2, ["lacks answer", "line 1"]),
        ((GOOD, '{"prompt": "a", "answer": 1, "x": 1, "b": 2}'), 2, ["adds b, x"]),
        ((GOOD, '{"prompt": "a", "gold": 1}'), 2, ["lacks answer and adds gold"]),
        ((GOOD, b'{"prompt": "\xff"}'), 2, ["UTF-8"]),
        ((GOOD, "[" * 100_000), 2, ["not JSON"]),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, line, words):
    message = refusal(tmp_path, lines, option="data.eval_path")
    for word in ["data.eval_path", f"{tmp_path}/problems.jsonl", f"line {line}", *words]:
        assert word in message


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_file_is_refused(tmp_path, lines):
    assert "data.path" in refusal(tmp_path, lines) and "is empty" in refusal(tmp_path, lines)


# --- Renames --------------------------------------------------------------------------------------


def test_columns_are_renamed(tmp_path):
    lines = rows({"question": "1+1?", "answer": "so 2", "final": 2, "level": 1})
    form = Form(("prompt=question", "answer=final", "working=answer"))
    [problem] = load_lines(tmp_path, lines, form)
    assert problem == Problem("1+1?", {"answer": 2, "working": "so 2", "level": 1})


def test_columns_may_change_places(tmp_path):
    lines = rows({"prompt": "2", "answer": "1+1?"})
    [problem] = load_lines(tmp_path, lines, Form(("prompt=answer", "answer=prompt")))
    assert problem == Problem("1+1?", {"answer": "2"})


def test_renaming_a_column_that_is_not_there(tmp_path):
    message = refusal(tmp_path, rows({"problem": "1", "answer": "2"}), Form(("prompt=question",)))
    for word in ["data.columns", "line 1", "`question`", "`prompt`", "problem, answer"]:
        assert word in message


def test_renaming_onto_another_column(tmp_path):
    message = refusal(tmp_path, rows({"prompt": "1", "answer": "2", "x": 3}), Form(("answer=x",)))
    for word in ["data.columns", "`x`", "`answer` already", "line 1", "old_answer=answer"]:
        assert word in message


NESTED = {"prompt": "1+1?", "reward_model": {"ground_truth": "2", "x": {"y": 3}}, "a.b": 4}


def test_columns_within_structs(tmp_path):
    """As verl's data sets have them; the struct stays, for rewards that read it."""
    form = Form(("answer=reward_model.ground_truth", "deep=reward_model.x.y", "plain=a.b"))
    form = Form(form.columns, "{prompt} ({reward_model.x.y}, {answer})")
    [problem] = load_lines(tmp_path, rows(NESTED), form)
    assert problem.prompt == "1+1? (3, 2)"
    assert problem.columns == {
        "answer": "2", "deep": 3, "plain": 4, "reward_model": NESTED["reward_model"],
    }  # fmt: skip
    assert load_lines(tmp_path, rows({"prompt": "a", "x": None}), Form(("y=x.z",)))[0].columns == {
        "x": None, "y": None,
    }  # fmt: skip


def test_a_struct_without_the_column(tmp_path):
    message = refusal(tmp_path, rows(NESTED), Form(("answer=reward_model.truth",)))
    assert "`reward_model.truth`" in message and "it has reward_model.ground_truth" in message


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("question",), ["'question'", "ours=theirs"]),
        (("prompt=a,answer=b",), ["'prompt=a,answer=b'", "one text for each"]),
        (("=a",), ["'=a'"]),
        (("a=",), ["'a='"]),
        ((3,), ["3", "ours=theirs"]),
        (("prompt=a", "prompt=b"), ["'prompt' stands there twice"]),
        (("prompt=a", "answer=a"), ["'a' stands there twice"]),
    ],
)
def test_renames_of_another_form(columns, words):
    with pytest.raises(ValueError) as error:
        Form(columns)
    assert all(word in str(error.value) for word in ["data.columns", *words])


# --- Templates ------------------------------------------------------------------------------------


def test_a_template_makes_the_prompt(tmp_path):
    form = Form(prompt_template="{question} ({level})\nUse \\boxed{{}}. {question}")
    [problem] = load_lines(tmp_path, rows({"question": "a{b}", "level": 3}), form)
    assert problem.prompt == "a{b} (3)\nUse \\boxed{}. a{b}"
    assert problem.columns == {"question": "a{b}", "level": 3}


def test_a_template_sees_renamed_columns_and_may_extend_the_prompt(tmp_path):
    form = Form(("prompt=question",), "Q: {prompt}")
    assert load_lines(tmp_path, rows({"question": "1+1?"}), form) == [Problem("Q: 1+1?", {})]


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("{question}", {"prompt": "a", "x": 1}, ["{question}", "line 1", "prompt, x"]),
        ("{prompt.upper}", {"prompt": "a"}, ["{prompt.upper}", "no such column; it has prompt"]),
        (
            "{prompt}",
            {"prompt": MESSAGES},
            ["`prompt` is a list", "leave out data.prompt_template"],
        ),
        ("{prompt}", {"prompt": json.dumps(MESSAGES)}, ["`prompt` is a list"]),
        ("{x}", {"x": None}, ["`x` is null", "line 1"]),
        ("{x}", {"x": {"a": 1}}, ["`x` is a dict"]),
        ("Q: {x}{y}", {"x": " ", "y": ""}, ["line 1 `x`, `y` is blank"]),
    ],
)
def test_a_row_that_a_template_does_not_fit(tmp_path, template, row, words):
    message = refusal(tmp_path, rows(row), Form(prompt_template=template))
    assert all(word in message for word in ["data.prompt_template", *words]), message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("no column", ["no {column}"]),
        ("{{prompt}}", ["no {column}"]),
        ("{prompt} \\boxed{}", ["{} is not the name of a column", "{{ and }}"]),
        ("{prompt.}", ["{prompt.} is not"]),
        ("{prompt[0]}", ["{prompt[0]} is not"]),
        ("{prompt:>9}", ["{prompt:>9} is not"]),
        ("{prompt!r}", ["{prompt!r} is not"]),
        ("{prompt", ["expected '}'", "{{ and }}"]),
        ("prompt}", ["Single '}'"]),
    ],
)
def test_templates_of_another_form(template, words):
    with pytest.raises(ValueError) as error:
        Form(prompt_template=template)
    assert all(word in str(error.value) for word in ["data.prompt_template", *words]), error.value


# --- Chat -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "form", "expected"),
    [
        ("1+1?", Form(chat=True), MESSAGES),
        ("1+1?", Form(chat=True, system_prompt="Think."), SYSTEM + MESSAGES),
        (MESSAGES, Form(chat=True), MESSAGES),
        (MESSAGES, Form(system_prompt="Think."), SYSTEM + MESSAGES),
        (SYSTEM + MESSAGES, Form(system_prompt="Guess."), SYSTEM + MESSAGES),
        ("1+1", Form(prompt_template="{prompt}?", chat=True), MESSAGES),
    ],
)
def test_chats(tmp_path, prompt, form, expected):
    [problem] = load_lines(tmp_path, rows({"prompt": prompt}), form)
    assert problem.prompt == expected


def test_a_system_message_needs_a_chat(tmp_path):
    message = refusal(tmp_path, rows({"prompt": "1+1?"}), Form(system_prompt="Think."))
    assert all(word in message for word in ["data.system_prompt", "line 1", "data.chat to True"])


# --- Chats of other forms -------------------------------------------------------------------------


def test_messages_as_text(tmp_path):
    quoted = json.dumps(MESSAGES).replace('"', '""')
    path = write(tmp_path, "prompt,answer", f'"{quoted}",2', name="p.csv")
    assert load(Source(str(path))) == [Problem(MESSAGES, {"answer": 2})]
    message = refusal(tmp_path, rows({"prompt": json.dumps(MESSAGES)[:-2]}))
    assert all(w in message for w in ["line 1: `prompt` begins as", "Write the messages as JSON"])


CALLS = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"arguments": {"city": "Ulm"}}]},
    {"role": "tool", "content": "12"},
]
TOOLS = [{"name": "weather", "parameters": {"city": "a town"}}]


def test_keys_that_arrow_added_are_left_out(tmp_path):
    """Two rows with other arguments and tools: Arrow gives each the keys of both."""
    other = json.loads(json.dumps([CALLS, TOOLS]).replace("city", "zone"))
    lines = [{"prompt": p, "tools": t, "facts": {"a": None}} for p, t in ([CALLS, TOOLS], other)]
    datasets.Dataset.from_list(lines).to_parquet(tmp_path / "p.parquet")
    [stored, _] = datasets.Dataset.from_list(lines)
    assert stored["prompt"][1]["tool_calls"][0]["arguments"] == {"city": "Ulm", "zone": None}
    first, second = load(Source(str(tmp_path / "p.parquet")))
    assert first.prompt == [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [{"arguments": {"city": "Ulm"}}]},
        {"role": "tool", "content": "12"},
    ]
    assert first.arguments == {"tools": TOOLS} and first.columns["tools"] == TOOLS
    assert second.arguments == {"tools": other[1]}
    assert first.columns["facts"] == {"a": None}  # of rewards, which see the row as it is
    assert load_lines(tmp_path, rows(*lines)) == [first, second]


def test_null_that_stands_in_a_line_of_json_is_data(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"arguments": {"city": None}}], "name": None}
    [problem] = load_lines(tmp_path, rows({"prompt": [*MESSAGES, call, *MESSAGES]}))
    assert problem.prompt[1] == {"role": "assistant", "tool_calls": call["tool_calls"]}


@pytest.mark.parametrize("column", ["image", "images", "audio", "videos"])
def test_what_is_no_text_is_refused_by_name(tmp_path, column):
    message = refusal(tmp_path, rows({"prompt": "What is this?", column: [{"path": "x.png"}]}))
    assert f"line 1 has a column `{column}`" in message and f"left_out={column}" in message
    assert len(load_lines(tmp_path, rows({"prompt": "a", column: None}))) == 1
    form = Form((f"left_out={column}",))
    assert len(load_lines(tmp_path, rows({"prompt": "a", column: "x"}), form)) == 1


def test_arguments_of_the_chat_template(tmp_path):
    """The run's, and over them the row's."""
    form = Form(chat_template_kwargs=("enable_thinking=False", "effort=low", "n=[1, 2]"))
    own = {"prompt": MESSAGES, "chat_template_kwargs": {"effort": "high"}}
    other = {"prompt": MESSAGES, "chat_template_kwargs": None}
    first, second = load_lines(tmp_path, rows(own, other), form)
    assert first.arguments == {"enable_thinking": False, "effort": "high", "n": [1, 2]}
    assert second.arguments == {"enable_thinking": False, "effort": "low", "n": [1, 2]}
    message = refusal(tmp_path, rows({"prompt": "text"}), form)
    assert "data.chat_template_kwargs is set, but the prompt of" in message
    own["chat_template_kwargs"] = {"add_generation_prompt": False}
    assert "line 1: `chat_template_kwargs` has `add_gener" in refusal(tmp_path, rows(own), form)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("enable_thinking",), ["'enable_thinking' is not", "name=value"]),
        (("a-b=1",), ["'a-b=1' is not"]),
        ((3,), ["3 is not"]),
        (("a=1", "a=2"), ["'a=2' stands there twice"]),
        (("messages=[]",), ["has `messages`", "the program gives"]),
    ],
)
def test_arguments_of_another_form(arguments, words):
    with pytest.raises(ValueError) as error:
        Form(chat_template_kwargs=arguments)
    assert all(word in str(error.value) for word in ["data.chat_template_kwargs", *words])


# --- What a config names --------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """The section of a config whose dataset is a folder of two splits and two columns."""
    data = options.default().data
    for split in ("train", "test"):
        write(tmp_path, json.dumps({"question": split, "gold": 1}), name=f"{split}.jsonl")
    data.path, data.columns = str(tmp_path), ("prompt=question",)
    return data


def test_training_and_held_out_problems(data, tmp_path):
    assert load_train(data) == [Problem("train", {"gold": 1})]
    assert load_held_out(data) == []
    data.eval_split = "test"
    assert load_held_out(data) == [Problem("test", {"gold": 1})]
    data.split = "test"
    assert load_train(data) == [Problem("test", {"gold": 1})]
    data.eval_path, data.eval_split = str(tmp_path / "train.jsonl"), ""
    assert load_held_out(data) == [Problem("train", {"gold": 1})]


def test_held_out_options_are_named(data):
    data.eval_split = "dev"
    with pytest.raises(ValueError, match=r"data\.eval_split = 'dev': data\.path = .* train, test"):
        load_held_out(data)
    data.eval_path, data.eval_split = data.path, ""
    with pytest.raises(ValueError, match=r"data\.eval_split = '': data\.eval_path = "):
        load_held_out(data)


def test_each_path_has_its_configuration(data, tmp_path):
    readme = "---\nconfigs:\n"
    for name in ("a", "b"):
        readme += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
        write(tmp_path, json.dumps({"question": name}), name=f"{name}.jsonl")
    (tmp_path / "README.md").write_text(f"{readme}---\n")
    data.name, data.eval_path, data.eval_name = "b", data.path, "a"
    assert [p.prompt for p in load_train(data) + load_held_out(data)] == ["b", "a"]
    data.eval_path, data.eval_split = "", "train"
    assert [p.prompt for p in load_held_out(data)] == ["b"]


def test_a_file_has_no_held_out_split(data, tmp_path):
    data.path, data.eval_split = str(tmp_path / "train.jsonl"), "test"
    with pytest.raises(ValueError, match=r"data\.eval_split = 'test', but .* data\.eval_path"):
        load_held_out(data)


def test_gsm8k(shared):
    data = options.default().data
    data.path, data.eval_split = str(shared / "data" / "gsm8k"), "test"
    data.columns, data.chat = ("prompt=question",), True
    data.prompt_template = "{prompt}\nReason, and end with #### and the number."
    train, held_out = load_train(data), load_held_out(data)
    assert (len(train), len(held_out)) == (7473, 1319)
    [message] = held_out[0].prompt
    assert message["content"].startswith("Janet") and message["content"].endswith("the number.")
    assert held_out[0].columns["answer"].endswith("#### 18")
