"""Tags, marks of steps, patterns and JSON, by hand; open-r1's values are of its own functions."""

import pytest

from grpo_jax.rewards import registry
from grpo_jax.rewards.structured import json_schema, schema_fault
from grpo_jax.rewards.tags import pattern_fault, reasoning_steps, regex, soft_tags, strict_tags

GOOD = "<think>\nhm\n</think>\n<answer>\n5\n</answer>"


@pytest.mark.parametrize(
    ("text", "strict", "soft"),
    [
        (GOOD, 1.0, 1.0),
        (GOOD + "\n", 1.0, 1.0),
        (GOOD + "\nand more", 0.0, 1.0),  # open-r1's format_reward: 1
        ("So\n" + GOOD, 0.0, 1.0),
        ("<think>\nhm\n</think>\n<answer>5</answer>", 0.0, 0.5),
        ("<think>hm</think><answer>5</answer>", 0.0, 0.0),
        (GOOD + "\n</answer>", 0.0, 0.75),  # open-r1's format_reward: 1
        ("<think>\na\n<think>\nb\n</think>\n<answer>\n5\n</answer>", 0.0, 0.75),
        ("<answer>\n5\n</answer>\n<think>\nhm\n</think>", 0.0, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_tags(text, strict, soft):
    assert strict_tags([""], [text]) == [strict]
    assert soft_tags([""], [text]) == [soft]


def test_tags_of_other_names_and_a_prompt_that_opens_the_first():
    text = "<reasoning>\na\n</reasoning>\n<answer>\nb\n</answer>"
    assert strict_tags([""], [text], tags=["reasoning", "answer"]) == [1.0]
    assert soft_tags([""], [text], tags=["reasoning"]) == [1.0]
    rest = ["hm\n</think>\n<answer>\n5\n</answer>"]
    assert strict_tags(["a"], rest) == [0.0] and soft_tags(["a"], rest) == [0.75]
    assert strict_tags(["a"], rest, rendered_prompts=["a<think>\n"]) == [1.0]
    assert soft_tags(["a"], rest, rendered_prompts=["a<think>\n"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Step 1: a\nStep 2: b", 2 / 3),
        ("1. a\n2. b", 1 / 3),  # a number counts at the start alone
        ("First, a. Next, b. Finally, c. Second, d.", 1.0),
        ("a\n- b\n* c", 2 / 3),
        ("nothing", 0.0),
    ],
)
def test_reasoning_steps(text, value):
    assert reasoning_steps([""], [text]) == pytest.approx([value])


def test_least_steps():
    assert reasoning_steps([""], ["Step 1: a"], least=1) == [1.0]


def test_regex():
    completions = ["see [1]", "<think>[2]</think> none", "<think>[3]"]
    assert regex([""] * 3, completions, pattern=r"\[\d\]") == [1.0, 1.0, 1.0]
    assert regex([""] * 3, completions, pattern=r"\[\d\]", after_think=True) == [1.0, 0.0, 0.0]
    assert regex([""] * 3, completions, pattern=r"see .*", whole=True) == [1.0, 0.0, 0.0]
    assert regex([""] * 2, ["A", "b"], pattern=["(?i)a", "a"]) == [1.0, 0.0]  # a column
    assert pattern_fault("a") is None and "no regular expression" in pattern_fault("(")
    assert pattern_fault(None) == "is null"


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
}


@pytest.mark.parametrize(
    ("text", "any_json", "by_schema"),
    [
        ('{"age": 5}', 1.0, 1.0),
        ('Here:\n```json\n{"age": 5}\n```\nDone.', 1.0, 1.0),
        ('<think>{"age": 1}</think>{"age": "5"}', 1.0, 0.0),
        ('{"age": -1}', 1.0, 0.0),
        ("{}", 1.0, 0.0),
        ("[1, 2]", 1.0, 0.0),
        ("NaN", 0.0, 0.0),
        ('{"age": 5', 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
        ("9" * 10_000, 0.0, 0.0),  # too many digits for an integer
        ("", 0.0, 0.0),
    ],
)
def test_json(text, any_json, by_schema):
    assert json_schema([""], [text]) == [any_json]
    pytest.importorskip("jsonschema")
    assert json_schema([""], [text], schema=SCHEMA) == [by_schema]


def test_a_schema_of_each_row_and_none_from_the_network():
    pytest.importorskip("jsonschema")
    rows = ['{"type": "string"}', None]
    assert json_schema([""] * 2, ['"a"', "3"], schema=rows) == [1.0, 1.0]
    assert json_schema([""] * 2, ["3", "3"], schema=rows) == [0.0, 1.0]
    assert schema_fault({"type": "nothing"}) and not schema_fault(SCHEMA) and not schema_fault(None)
    far = {"items": {"$ref": "http://127.0.0.1:9/schema.json"}}
    assert "leads out of it" in schema_fault(far)
    near = {"$defs": {"a": {"type": "string"}}, "items": {"$ref": "#/$defs/a"}}
    assert json_schema([""] * 2, ['["a"]', "[3]"], schema=near) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("regex(pattern='(')", "pattern is no regular expression"),
        ("strict_tags(tags=['a', 'a'])", "different names"),
        ("soft_tags(tags='think')", "list of different names"),
        ("reasoning_steps(least=0)", "at least 1"),
        ("numeric_answer(relative=-1)", "relative = -1 must be a number, 0 or more"),
        ("rouge(kind='rouge9')", "rouge1, rouge2, rougeL"),
        ("cosine_length(right=(1,))", "right = (1,) must be two numbers"),
        ("language_consistency(language='xx')", "no code of a language"),
        ("language_consistency(by='word')", "script"),
        ("clean_language(words=[])", "list of words"),
        ("right_steps(without='a')", "finite number"),
        ("similarity(folder='nowhere')", "folder with config.json"),
        ("similarity", "needs the argument 'folder'"),
        ("soft_overlong(buffer=-1)", "0 or more"),
    ],
)
def test_arguments_are_refused_before_a_run(entry, words):
    with pytest.raises(ValueError, match=r"rewards\.names") as error:
        registry.load((entry,), (1.0,))
    assert words in str(error.value)


def test_a_library_that_is_missing_is_told_before_a_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'bleu' needs sacrebleu.*pip install sacrebleu"):
        registry.load(("bleu",), (1.0,))
    with pytest.raises(ValueError, match="needs better-profanity"):
        registry.load(("clean_language",), (1.0,))
    assert registry.load(("clean_language(words=['darn'])",), (1.0,))
