import json

import pytest

from grpo_jax.data.problems import Problem, load_jsonl


def write(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_texts_and_messages(tmp_path):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "1+1?"}]
    path = write(
        tmp_path,
        "\ufeff" + json.dumps({"prompt": "2+2?", "answer": 4, "source": "ä"}),
        "",
        json.dumps({"source": None, "answer": "2", "prompt": messages}),
        "",
    )
    assert load_jsonl(path, "data.path") == [
        Problem("2+2?", {"answer": 4, "source": "ä"}),
        Problem(messages, {"answer": "2", "source": None}),
    ]


GOOD = '{"prompt": "1+1?", "answer": 2}'


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        ((GOOD, "", '{"prompt": "cut'), 3, ["not JSON", '{"prompt": "cut']),
        ((GOOD, "[1, 2]"), 2, ["list", "JSON object"]),
        (('{"question": "1+1?"}',), 1, ["no `prompt`", "question"]),
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
    path = write(tmp_path, *lines)
    with pytest.raises(ValueError) as error:
        load_jsonl(path, "data.eval_path")
    for word in ["data.eval_path", str(path), f"line {line}", *words]:
        assert word in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_file_is_refused(tmp_path, lines):
    with pytest.raises(ValueError, match=r"data\.path.*is empty"):
        load_jsonl(write(tmp_path, *lines), "data.path")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path.*absent.jsonl: No such file"):
        load_jsonl(tmp_path / "absent.jsonl", "data.path")
    with pytest.raises(ValueError, match=r"data\.path.*Is a directory"):
        load_jsonl(tmp_path, "data.path")
