"""A user's environments and tools: what they are, and what is refused before anything compiles."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from grpo_jax.environments import contract as contract_lib
from grpo_jax.rewards import given, registry

HERE = "odd_environments"


@pytest.fixture
def read():
    """`contract.read`, whose processes end with the test."""
    made = []

    def read(classes=(), tools=(), **more):
        classes = [f"{HERE}:{c}" if ":" not in c else c for c in classes]
        tools = [f"{HERE}:{t}" if ":" not in t else t for t in tools]
        made.append(contract_lib.read(classes, tools, **more))
        return made[-1]

    yield read
    for one in made:
        one.close()


def test_tools_and_methods_are_shown_as_transformers_writes_them(read):
    import odd_environments
    from transformers.utils import get_json_schema

    found = read(["Counter"], ["multiply", "later"])
    kind = found.kind({})
    counter = odd_environments.Counter()
    want = [odd_environments.multiply, odd_environments.later, counter.double, counter.increment]
    assert list(found.schemas({})) == [get_json_schema(f) for f in want]
    assert (kind.class_name, kind.gives_reward, kind.responds, kind.takes_all) == (
        *("Counter", True, False), True
    )  # fmt: skip
    assert found.reward_names == ("Counter",)
    assert HERE in found.home.setup.sources


def test_what_reset_takes(read):
    kind = read(["Draws"]).kind({})
    assert kind.takes == ("problem", "seed", "rollout_seed") and kind.needs == ("problem",)
    assert kind.responds and not kind.gives_reward and not kind.takes_all


def test_several_classes_are_chosen_by_a_column(read):
    found = read([f"a={HERE}:Counter", f"b={HERE}:Guess"], ["multiply"])
    names = lambda name: [s["function"]["name"] for s in found.schemas({"environment": name})]  # noqa: E731
    assert names("a") == ["multiply", "double", "increment"] and names("b") == ["multiply"]
    assert found.given_to_reset({"environment": "a", "word": "x"}) == {"word": "x"}
    for name in ("c", None):
        with pytest.raises(ValueError, match=f"`environment` is {name!r}. It must be one of"):
            found.schemas({"environment": name})


@pytest.mark.parametrize(
    ("classes", "tools", "words"),
    [
        ([], ["without_hints"], ["environment.tools", "missing a type hint", "Args:"]),
        ([], ["without_docs"], ["without_docs", "no docstring", "odd_environments.py, line"]),
        ([], ["nope"], ["environment.tools", "there is no 'nope'"]),
        ([], ["multiply", "multiply"], ["both called 'multiply'"]),
        ([], ["os:sep"], ["is a str, which cannot be called"]),
        (["Countr"], [], ["there is no 'Countr'", "Did you mean Counter"]),
        (["no_such_module:X"], [], ["cannot be imported", "No module named 'no_such_module'"]),
        (["Counter", "Guess"], [], ['"name=module:Class" where there are several']),
        (["NeedsArguments"], [], ["needs the arguments url", "made without any"]),
        (["NoReset"], [], ["without a method `reset`"]),
        (["BadTool"], [], ["method tool: Argument a is missing a type hint"]),
        (["RaisesAtStart"], [], ["cannot be made: OSError: the server is down", "in __init__"]),
        (["ImportsJax"], [], ["cannot be made: ", "jax"]),
        (["Silent"], [], ["no public method that could be a tool"]),
    ],
)
def test_what_is_refused(read, classes, tools, words):
    with pytest.raises(ValueError) as error:
        read(classes, tools)
    for word in words:
        assert word in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_module_that_imports_jax_is_told_why(read, tmp_path, monkeypatch):
    (tmp_path / "wants_jax.py").write_text("import jax\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="processes of environments are without JAX"):
        read(["wants_jax:X"])


def test_rows_are_tried_before_a_run(read):
    found = read(["Draws"])
    found.check([({"problem": "p"}, "a.jsonl, line 1")], 5.0)
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 has no column `problem`, which Draws"):
        found.check([({"problem": 1}, "line 1"), ({"question": 1}, "a.jsonl, line 2")], 5.0)
    found = read(["RaisesAtReset"])
    what = "line 1: .*reset raised RuntimeError: no database here .*line .*in reset"
    with pytest.raises(ValueError, match=what):
        found.check([({"prompt": 1}, "line 1")], 5.0)
    found = read([f"a={HERE}:Faults", f"b={HERE}:Counter"])
    rows = [({"environment": "b"}, "line 1"), ({"environment": "a", "at_reset": "hang"}, "line 2")]
    with pytest.raises(ValueError, match=r"line 2: .*reset took longer than 1 s"):
        found.check(rows, 1.0)
    rows[1][0]["at_reset"] = "die"
    with pytest.raises(ValueError, match=r"line 2: .*its process ended with status 7"):
        found.check(rows, 5.0)


def test_objects_of_a_notebook_come_by_value(read):
    code = re.sub(r"^ {8}", "", """
        class Notebook:
            def reset(self, **row):
                return word
            def look(self) -> str:
                '''Looks.'''
                return word
        word = "by value"
    """, flags=re.M)  # fmt: skip
    names = {"__name__": "__main__"}
    exec(code, names)
    entry = given.give(names["Notebook"])
    assert entry == "python:Notebook"
    found = read([entry])
    assert found.kind({}).class_name == "Notebook"


def test_rewards_that_take_environments_are_told_apart():
    rewards = registry.load([f"{HERE}:counted", "exact_answer"], [1.0, 1.0])
    assert [contract_lib.takes_environments(r) for r in rewards] == [True, False]


def test_the_processes_import_no_jax_nor_torch():
    code = (
        "import sys\nfrom grpo_jax.environments import forking, child, contract, live\n"
        "assert not {'jax', 'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
