"""The reward `code`: which block is run, formats of tests, comparison, partial credit, the pool."""

import json
import math
from fractions import Fraction

import pytest

from grpo_jax.data.problems import Problem
from grpo_jax.rewards import programs, registry
from grpo_jax.rewards.pool import Limits as PoolLimits
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.programs import last_block
from grpo_jax.rewards.sandbox import cases, plain
from grpo_jax.rewards.sandbox.cases import Call, Checks, Script
from grpo_jax.rewards.sandbox.client import Sandbox
from grpo_jax.rewards.sandbox.comparing import same_output, same_value

ADD = "a, b = map(int, input().split())\nprint(a + b)"
STACK = """
class Empty(KeyError): pass
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, x): self.items.append(x)
    def pop(self):
        if not self.items: raise Empty("nothing")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __contains__(self, x): return x in self.items
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other): return Stack(self.items + other.items)
    def __mul__(self, n): return Stack(self.items * n)
    def __enter__(self): return self
    def __exit__(self, *error): self.items.clear()
def reverse(values): values.reverse()
def apply(f, x): return f(f(x))
def half(x):
    from fractions import Fraction
    print("half of", x)
    return Fraction(x, 2)
LIMIT = 7
"""


def reward(text, tests, **more):
    columns = {n: [more.pop(n)] for n in ("entry_point", "test_setup_code") if n in more}
    return programs.code(["p"], [f"```python\n{text}\n```"], [tests], **columns, **more)[0]


@pytest.mark.parametrize(
    ("text", "thinking", "block"),
    [
        ("```python\n1\n```", False, "1\n"),
        ("```\n1\n```\nand\n```py\n2\n\n3\n```\nthat is it", False, "2\n\n3\n"),
        ("```python\n1\n```\n```text\noutput\n```", False, "1\n"),
        ("```Python\n1\n```", False, "1\n"),
        ("  ```python\n  if 1:\n    2\n  ```", False, "if 1:\n  2\n"),
        ("<think>```python\n1\n```</think>\n```python\n2\n```", False, "2\n"),
        ("```python\n1\n```</think>\nno code", True, None),
        ("<think>```python\n1\n```", False, None),
        ("```python\n1\n```", True, None),
        ("```python\nnever closed", False, None),
        ("```python\n1\n```\n```python\ncut", False, "1\n"),
        ("print(1)", False, None),
        ("", False, None),
        ("```cpp\n1\n```", False, None),
        ("```python\nx = '''\n```\n'''\n```", False, "x = '''\n"),
    ],
)
def test_the_last_closed_block_after_thinking_counts(text, thinking, block):
    assert last_block(text, thinking) == block


CALLS = [Call("add", [1, 2], {}, (3,)), Call("add", [3, 4], {}, (7,))]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ([{"stdin": "1 2", "stdout": "3"}], [Script("1 2", "3")]),
        ({"stdin": "1 2", "stdout": "3"}, [Script("1 2", "3")]),
        ([{"call": "add", "args": [1, 2], "result": 3}], CALLS[:1]),
        ([{"call": "add", "kwargs": {"a": 1}, "result": 3}], [Call("add", [], {"a": 1}, (3,))]),
        # open-r1: verification_info
        (
            {"language": "python", "test_cases": [
                {"input": "1 2", "output": "3", "type": "stdin_stdout", "fn_name": None}]},
            [Script("1 2", "3")],
        ),
        (
            {"test_cases": [{"fn_name": "add", "input": [1, 2], "output": 3,
                             "type": "function_call"}]},
            CALLS[:1],
        ),
        # APPS, TACO, verl
        ({"inputs": ["1 2", ["3", "4"]], "outputs": ["3", "7"]},
         [Script("1 2", "3"), Script("3\n4", "7")]),
        ({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, [7]]},
         [CALLS[0], Call("add", [3, 4], {}, ([7], 7))]),
        ({"fn_name": "f", "inputs": ["[1]\n\"x\""], "outputs": ["true"]},
         [Call("f", [[1], "x"], {}, (True,))]),
        ({"assert_case": ["assert add(1, 2) == 3"]}, Checks("asserts", ("assert add(1, 2) == 3",))),
        # LiveCodeBench, DeepCoder
        ([{"input": "1 2", "output": "3", "testtype": "stdin"}], [Script("1 2", "3")]),
        ([{"input": "1\n2", "output": "3", "testtype": "functional",
           "metadata": {"func_name": "add"}}], CALLS[:1]),
        # MBPP, HumanEval, KodCode
        (["assert add(1, 2) == 3"], Checks("asserts", ("assert add(1, 2) == 3",))),
        ("x = 1\nassert add(x, 2) == 3", Checks("asserts", ("assert add(x, 2) == 3",), "\nx = 1")),
        ("def check(c):\n    assert c(1) == 2",
         Checks("check", ("def check(c):\n    assert c(1) == 2",), "", "add")),
        ("def test_add(): pass", Checks("pytest", ("def test_add(): pass",))),
    ],
)  # fmt: skip
def test_formats_of_data_sets(value, read):
    assert cases.read(value, entry="add" if isinstance(value, str) else "") == read
    if not isinstance(value, str):
        assert cases.read(json.dumps(value)) == read
    assert cases.fault_of(value) is None


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "neither text nor cases"),
        (7, "neither text nor cases"),
        ([], "no case"),
        ([{"stdin": "1"}], "neither stdout"),
        ([{"call": "f"}], "lack `result`"),
        ([7], "a int as case 0"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"language": "rust", "test_cases": []}, "only Python"),
        ([{"input": "1", "output": "2", "type": "function_call"}], "lack `fn_name`"),
        ([{"stdout": "1"}, {"call": "f", "result": 1}], "one kind"),
        ("assert (", "no Python"),
        ("x = 1", "no test function"),
        ("[" * 10_000, "no Python"),
    ],
)
def test_what_is_no_test_is_refused(value, fault):
    if fault == "lack `fn_name`":
        with pytest.raises(ValueError, match=fault):
            cases.read(value)
    else:
        assert fault in cases.fault_of(value)


def test_check_without_its_entry_point_is_refused():
    with pytest.raises(ValueError, match="entry_point"):
        cases.read("def check(c): assert c(1)")


def test_outputs_are_compared():
    assert same_output("3\n", "3") and same_output("a  \nb\n\n", "a\nb")
    assert same_output("0.3333333 x", "0.3333332 x") and same_output("1.0", "1.00")
    assert not same_output("3.1", "3") and not same_output("a b", "a\nb")
    assert (
        not same_output("0.34", "0.33") and not same_output("", "x") and not same_output("A", "a")
    )
    assert same_output("a  b", "a b") and not same_output("nan", "1.0")


def test_values_are_compared():
    assert same_value((1, [2]), [1, [2]]) and same_value({1: "x"}, {"1": "x"})
    assert same_value({1, 2}, [2, 1]) and not same_value({1, 2}, [1, 1, 2])
    assert same_value(1, 1.0) and same_value(0.1 + 0.2, 0.3) and same_value(Fraction(1, 2), 0.5)
    assert not same_value(True, 1) and not same_value(1, True) and not same_value("1", 1)
    assert not same_value([1, 2], [1]) and not same_value(None, 0) and same_value(None, None)
    assert not same_value(math.nan, 1.0) and not same_value(10**400, 0.5)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(10**40), 1.5, "ü\0", [1, [2]], (1, (2,)), {1: {"a"}}, b"\xff", 2 + 3j,
     Fraction(1, 3), {}, (), set()],
)  # fmt: skip
def test_values_pass_between_processes_as_they_were(value):
    got = plain.unpacked(json.loads(json.dumps(plain.packed(value))))
    assert got == value and type(got) is type(value)


def test_subclasses_pass_as_plain_values():
    class Equal(int):
        def __eq__(self, other):
            return True

    assert type(plain.unpacked(plain.packed([Equal(3)]))[0]) is int
    with pytest.raises(plain.OpaqueError):
        plain.packed(object())


def test_whole_programs():
    tests = [{"stdin": "1 2", "stdout": "3\n"}, {"stdin": "5 6", "stdout": "11"}]
    assert reward(ADD, tests) == 1
    assert reward("print(3)", tests) == 0.5 and reward("print(3)", tests, partial=False) == 0
    assert reward(ADD + "\nraise SystemExit(1)", tests) == 0
    assert reward("import sys\n" + ADD + "\nsys.exit(0)", tests) == 1
    assert reward("this is no Python", tests) == 0
    assert reward("import sys\nprint(sum(map(int, sys.stdin.read().split())))", tests) == 1
    assert reward("import os\nprint(sum(map(int, open(0).read().split())))", tests) == 1
    assert programs.code(["p"], ["no code"], [tests]) == [0.0]


def test_functions():
    tests = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}
    assert reward("def add(a, b): return a + b", tests) == 1
    assert reward("class Solution:\n    def add(self, a, b): return a + b", tests) == 1
    assert reward("def add(a, b): return 3", tests) == 0.5
    assert reward("def add(a, b):\n    if a == 1: raise ValueError\n    return 7", tests) == 0.5
    # The process ends in the first call; the second case has a new one.
    assert (
        reward("import os\ndef add(a, b):\n    if a == 1: os._exit(0)\n    return 7", tests) == 0.5
    )
    assert reward("def other(a, b): return a + b", tests) == 0


PYTEST = """
import pytest
from solution import *
import solution

@pytest.mark.parametrize("n", [1, 2])
def test_class(n):
    s = Stack([1] * n)
    s.push(5)
    assert len(s) == n + 1 and s[n] == 5 and list(s) == [1] * n + [5] and 5 in s
    assert s.pop() == 5 and isinstance(s, solution.Stack)

def test_own_errors():
    with pytest.raises(Empty, match="nothing") as error:
        Stack().pop()
    assert isinstance(error.value, KeyError)

def test_operators():
    assert Stack([1]) + Stack([2]) == Stack([1, 2]) and Stack([1]) != Stack([2])
    assert list(Stack([1]) * 2) == [1, 1]

def test_changed_in_place():
    values = [1, 2]
    reverse(values)
    assert values == [2, 1]

def test_callbacks():
    assert apply(lambda x: x + 1, 3) == 5 and LIMIT == 7

def test_values_and_output(capsys):
    assert half(3) == 1.5
    assert capsys.readouterr().out == "half of 3\\n"

def test_block():
    with Stack([1]) as s:
        assert len(s) == 1
    assert len(s) == 0
"""


def test_pytest_files():
    assert reward(STACK, PYTEST) == 1
    assert reward(STACK.replace("values.reverse()", "pass"), PYTEST) == 7 / 8
    assert reward("def nothing(): pass", PYTEST) == 0
    assert reward("syntax error", PYTEST) == 0


def test_asserts_and_checks():
    tests = ["assert add(1, 2) == 3", "assert add(x, 2) == 4"]
    assert reward("def add(a, b): return a + b", tests, test_setup_code="x = 2") == 1
    assert reward("def add(a, b): return 3", tests, test_setup_code="x = 2") == 0.5
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    assert reward("def add(a, b): return a + b", check, entry_point="add") == 1
    assert reward("def add(a, b): return a - b", check, entry_point="add") == 0
    leet = {"import_prefix": "", "test_code": check, "entry_point": "Solution().add"}
    assert reward("class Solution:\n    def add(self, a, b): return a + b", leet) == 1


def test_programs_draw_the_same_numbers_each_time():
    said = []
    for _ in range(2):
        with Sandbox() as sandbox:
            program = "import random\nprint(random.random(), hash('a'))"
            said += [sandbox.script(program).output for _ in range(2)]
    assert len(set(said)) == 1 and said[0]


def test_what_a_program_leaves_is_not_there_for_the_next():
    look = "import os, sys\nprint(os.path.exists('x'), 'mark' in sys.__dict__)"
    make = "import sys\nopen('x', 'w').close()\nsys.mark = 1"
    tests = [{"stdin": "", "stdout": "False False"}]
    assert reward(make, tests) == 0 and reward(look, tests) == 1


def test_time_for_a_case_and_for_all():
    tests = [{"stdin": str(i), "stdout": str(i)} for i in range(6)]
    slow = "i = int(input())\nif i == 1:\n    while True: pass\nprint(i)"
    logged = []
    log = {"log_metric": lambda *pair: logged.append(pair)}
    assert reward(slow, tests, timeout_s=1.0, total_s=30.0, **log) == pytest.approx(5 / 6)
    assert logged == [("code_missing", 0.0), ("code_stopped", 1.0)]
    # 1 s for all: what is left of it ends in case 1, and nothing runs after that.
    assert reward(slow, tests, timeout_s=1.0, total_s=1.0) == pytest.approx(1 / 6)


def test_in_the_workers():
    """One completion in a call; a program that hangs costs neither its worker nor its group."""
    rewards = registry.load(["code(timeout_s=1.0, total_s=3.0)"], [1.0])
    assert rewards[0].gives_accuracy and registry.flag(rewards[0], "one_by_one")
    texts = [ADD, "while True: pass", "print(3)", "import os\nos.kill(os.getppid(), 9)"]
    tests = [{"stdin": "1 2", "stdout": "3"}, {"stdin": "3 3", "stdout": "6"}]
    with Pool(rewards, num_workers=1, limits=PoolLimits(seconds=60.0)) as pool:
        pool.wait_ready()
        pids = [worker.process.pid for worker in pool._workers]
        scores = pool.score(
            ["p"] * 4, [f"```python\n{t}\n```" for t in texts], {"tests": [tests] * 4}, group=4
        )
        assert [worker.process.pid for worker in pool._workers] == pids
    assert scores.by_name["code"].tolist() == [1.0, 0.0, 0.5, 0.0]
    assert not scores.failures


def test_a_run_asks_what_can_be_isolated(monkeypatch):
    from ml_collections import ConfigDict

    from grpo_jax.rewards.sandbox import isolation
    from grpo_jax.setup import rewards as setup

    kept = dict.fromkeys(isolation._MEANINGS, True) | {"connects": False}
    monkeypatch.setattr(isolation, "found", lambda: (kept, {"faults": {}}))
    options = {"names": ("code",), "weights": (1.0,), "accuracy": "", "start_timeout_s": 9.0}
    options |= {"on_failure": "unknown", "timeout_s": 10.0, "memory_limit_gib": 4.0, "by_step": ()}
    config = ConfigDict({"rewards": options | {"code_isolation": "full"}})
    with pytest.raises(ValueError, match=r"rewards.code_isolation = .*the network"):
        setup.load_rewards(config)
    config.rewards.code_isolation = "limits"
    assert setup.load_rewards(config)[0].name == "code"
    for name, value in (("timeout_s", 8.0), ("memory_limit_gib", 2.0)):
        short = ConfigDict(config.to_dict())
        short.rewards[name] = value
        with pytest.raises(ValueError, match=rf"rewards.{name} = {value:g} ends a worker before"):
            setup.load_rewards(short)
    config.rewards.names, config.rewards.code_isolation = ("exact_answer",), "full"
    assert setup.load_rewards(config)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("code(timeout_s=0)", "timeout_s = 0 must be a number above 0"),
        ("code(memory_mib='1')", "memory_mib = '1'"),
        ("code(partial=2)", "partial = 2"),
        ("code(preload='numpy')", "preload = 'numpy'"),
        ("code(time=2)", "time"),
    ],
)
def test_wrong_arguments_are_refused(entry, said):
    with pytest.raises(ValueError, match=r"rewards\.names") as refused:
        registry.load([entry], [1.0])
    assert said in str(refused.value)


def test_a_missing_column_is_refused():
    with pytest.raises(ValueError, match="needs a column `tests`, and row 1"):
        registry.refuse_columns(registry.load(["code"], [1.0]), [Problem("p", {}, where="row 1")])
    rows = [Problem("p", {"tests": value}, where="row 2") for value in (["assert f()"], "x = 1")]
    faults = registry.faulty_rows(registry.load(["code"], [1.0]), rows)
    assert list(faults) == [1] and "row 2: column `tests` cannot be read as tests" in faults[1]
