import collections
import functools
import json
import re
import subprocess
import sys
from fractions import Fraction

import adversarial
import perturbed
import pytest
from growth import processor_s

from grpo_jax.rewards.answers import answer_fault, extract_answer
from grpo_jax.rewards.exact import exact_answer
from grpo_jax.rewards.math_answer import math_answer, same_mathematics


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"$\sqrt{2}$", r"\sqrt2"),
        ("1/2", r"\frac12"),
        ("0.5", r"\dfrac{1}{2}"),
        ("1,234", "1234"),
        (r"50\%", "50%"),
        ("x=5", "5"),
        ("5", "x = 5"),
        ("(1,2)", "( 1, 2 )"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("1,2", "2, 1"),
        (r"\text{Monday}", "Monday"),
        (r"3\pi/2", r"\frac{3\pi}{2}"),
        (r"5\text{ cm}", "5"),
        (r"10^\circ", "10"),
        ("10", r"10^{\circ}"),
        ("10", "10°"),
        ("8+4i", "4i+8"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix}0.5\\2\end{pmatrix}"),
        (r"x \in [1,2]", "[1,2]"),
        (r"\{x=1,y=2\}", "x=1,y=2"),
        (r"\{x=1,y=2\}", r"\{y=2,x=1\}"),
        (r"\text{(F)}", "F"),
        (r"\frac{\sqrt{3}}{2}", "sqrt(3)/2"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"e^{i\pi/4}", r"\frac{\sqrt2}{2}(1+i)"),
        (r"0.\overline{3}", "1/3"),
        ("5", "5 apples"),
        ("10,000", "10 000"),
        (r"1\frac{2}{3}", "5/3"),
        ("(0,1)", "0<x<1"),
        (r"[1,\infty)", r"x\ge 1"),
        (r"2\sqrt{3}", "sqrt(12)"),
        (r"5\text{ square units}", "5"),
        (r"1.85\ \text{USD}", r"\$1.85"),
        (r"5\text{ cm}^2", r"5\text{ cm}^2"),
        (r"(-\infty,1)\cup(2,\infty)", "(-∞, 1) ∪ (2, ∞)"),
        ("10101_2", "10101"),
        ("x=3,x=-3", "3,-3"),
        (r"\pm 3", "3,-3"),
        ("y=2x+3", "2x-y=-3"),
        ("2^{2008} - 2", "2^{2008}-2"),
        (r"\frac{1}{3},\frac18", r"\frac{1}{8}, \frac{1}{3}"),
        ("(2,3),(4,5)", "(4,5),(2,3)"),
        (r"\frac{1}{2}", "2^{-1}"),
        ("6!", "720"),
        ("f(x)=2x", "2x"),
        (r"\left(\frac12, 3\right)", "(0.5,3)"),
        ("1 1/2", "3/2"),
        (r"\ln 2", "ln(2)"),
        ("5!", "120"),
        (r"50\%", "0.5"),
        (r"\text{even}", "even"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"-\frac{2}{3}", r"\frac{-2}{3}"),
        (".185", "0.185"),
        ("072", "72"),
        ("3x^2", "3*x**2"),
        (r"\binom{10}{3}", "120"),
        (r"10\text{ inches}", "10 inch"),
        (r"\frac{5}{6} \text{ hours}", "5/6"),
        (r"7\text{ or }9", r"\{7,9\}"),
        ("x=1,x=2", "x=2,x=1"),
        ("x=1,y=2", "y=2,x=1"),
        (r"\sqrt{x^2}", "|x|"),
        (r"\frac{1}{2x}", "(2x)^{-1}"),
        (r"2\cos^2 x - 1", r"\cos 2x"),
        (r"3\text{ miles}", "3 mile"),
        (r"\dfrac{1}{29,\!322,\!216}", "1/29322216"),
    ],
)
def test_equal(one, other):
    assert same_mathematics(one, other) and same_mathematics(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1/3", "0.333"),
        ("1/3", "0.333333"),
        ("5", "5x"),
        ("12", "1,2"),
        ("(0,1]", "[0,1]"),
        ("5", "5m"),
        ("5", "5d"),
        (r"5\text{ cm}", r"5\text{ m}"),
        ("5", "2x=5"),
        ("(1,2)", r"\{1,2\}"),
        ("(1,2)", "1,2"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "(1,2,3)"),
        ("x=1,y=2", "a=1,b=2"),
        ("x=1,y=2", "x=2,y=1"),
        ("x=1,x=2", "x=1,x=3"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\\3\end{pmatrix}"),
        ("east", "seat"),
        ("0", "1 000"),
        ("0", r"5\,000"),
        ("10^{-30}", "10^{-31}"),
        ("10101_2", "10101_3"),
        ("3", "9^{9^{9^9}}"),
        ("9^{9^{9^9}}", "9^{9^{9^8}}"),
        ("72", "99999999!"),
        ("72", "10^{10^{10}}"),
        ("5", "x=5,y=3"),
        ("5", "1,5"),
        ("11/2", "1 1/2"),
        ("72", "7 2"),
        ("9", "7 2"),
        ("(0,1)", "(0,9^{9^{9^9}})"),
        ("x", "y"),
        ("2x", "x^2"),
        (r"\pi", "3.14159"),
        ("5", "5 million"),
        ("x=5", "y=5"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\frac12", "nan"),
        (r"\infty", r"-\infty"),
        ("0/0", "1/0"),
        (r"50\%", "0.05"),
        (r"\sqrt{2}", "1.41421356"),
        ("(1,2)", "[1,2]"),
        ("8+4i", "8-4i"),
        ("-3", "3"),
        ("0", r"\frac{0}{0}"),
        ("x<5", r"x\le 5"),
        ("2:3", "3:2"),
        ("1,234", "1.234"),
        ("5", r"5\%x"),
        ("72", "7'2"),
        (r"\sqrt{x^2}", "x"),
        ("x^2", "x^3"),
        ("(x+1)^2", "x^2+1"),
        ("f(x)", "x"),
        ("5", "5 thousand"),
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        (r"\text{Monday}", r"\text{Tuesday}"),
        ("A", "B"),
    ],
)
def test_different(one, other):
    assert not same_mathematics(one, other) and not same_mathematics(other, one)


def test_math_answer_by_row():
    answers = ["so $\\boxed{\\frac{1}{2}}$.", "9 - 1 = 8\n#### 8", 8, "\\sqrt{8}", "x + y", 0.5]
    completions = [
        "The answer is 2/4.",
        [{"role": "assistant", "content": "\\boxed{2^3}"}],
        "8",
        "<think>\\boxed{3}</think>\\boxed{2\\sqrt2}",
        "\\boxed{y+x}",
        "\\boxed{0.51}",
    ]
    rewards = math_answer([""] * 6, completions, answer=answers, level=[1] * 6)
    assert rewards == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]


def test_a_row_without_answer_is_refused():
    with pytest.raises(ValueError, match="`answer` is null"):
        math_answer([""], ["#### 1"], answer=[None])
    assert math_answer.column_faults == {"answer": answer_fault}


def test_nothing_is_printed():
    strange = [
        r"\frac{",
        "1/0",
        r"\frac{0}{0}",
        "x=\\",
        "2^{2^{x}}",
        "(1,2,",
        r"\frac{x}{0}",
        "x<y<",
    ]
    code = f"""
from grpo_jax.rewards.math_answer import math_answer
strange = {strange!r}
print(math_answer([""] * 8, ["#### " + t for t in strange], ["x^2+1"] * 8))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == (f"{[0.0] * 8}\n", "")


# --- Made to hang, crash or fool ------------------------------------------------------------------


def test_texts_are_not_evaluated(tmp_path):
    """Neither a completion's nor the data's, in whatever notation the parser is given them."""
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    forms = [
        code,
        f"${code}$",
        f"\\text{{{code}}}",
        f"x={code}",
        f"\\sqrt{{{code}}}",
        f"({code})+1",
    ]
    forms += ["(" * 10**5 + code, "9**9**9**9", "E.__class__", "S('1')", "f(x).__globals__"]
    for text in forms:
        for completion, gold in ((text, "x^2+1"), ("x^2+1", text)):
            assert math_answer([""], [f"\\boxed{{{completion}}}"], [gold]) == [0.0]
    assert not mark.exists()
    eval(code)  # it would have left its mark
    assert mark.exists()


def test_adversarial_cases_are_the_same_every_time():
    cases = adversarial.make(200)
    assert cases == adversarial.make(200) != adversarial.make(200, seed=1)
    assert len(cases) == 200 and {c.expected for c in cases} >= {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("reward", [math_answer, exact_answer])
def test_adversarial_completions(reward):
    """Up to six of each kind; test_pool.py has them all."""
    made, cases = collections.Counter(), []
    for case in adversarial.make():
        made[case.kind] += 1
        cases += [case] * (made[case.kind] <= 6)
    assert len(made) > 60
    for case in cases:
        what, values = f"{case.kind}: {case.completion[:100]!r}", []
        run = lambda: values.extend(reward([""], [case.completion], answer=["72"]))  # noqa: B023, E731
        assert processor_s(run) < 10, what
        if reward is math_answer or case.expected == 0.0:
            assert values == [case.expected], what


# --- Real data ------------------------------------------------------------------------------------


def read(file, *columns):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [tuple(row[c] for c in columns) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("reward", [math_answer, exact_answer])
def test_gsm8k(shared, reward):
    solutions = [a for _, a in read(shared / "data/gsm8k/train.jsonl", "question", "answer")]
    assert len(solutions) == 7473
    prompts = [""] * len(solutions)
    assert reward(prompts, solutions, answer=solutions) == [1.0] * 7473
    following = solutions[1:] + solutions[:1]
    values = [Fraction(s.rpartition("####")[2].strip().replace(",", "")) for s in solutions]
    equal = [float(a == b) for a, b in zip(values, values[1:] + values[:1])]
    assert reward(prompts, solutions, answer=following) == equal
    assert 0 < sum(equal) < 200


@functools.cache
def math_solutions(shared):
    """Worked solutions of MATH, without the two whose box is empty."""
    rows = read(shared / "data/math/math_train.jsonl", "unique_id", "solution")
    faults = {name: answer_fault(solution) for name, solution in rows}
    assert [n for n, fault in faults.items() if fault] == EMPTY_BOXES
    return [solution for name, solution in rows if not faults[name]]


@functools.cache
def math_answers(shared):
    return tuple(map(extract_answer, math_solutions(shared)))


EMPTY_BOXES = ["train/number_theory/7115.json", "train/number_theory/7117.json"]


@pytest.mark.slow
def test_math(shared):
    solutions = math_solutions(shared)
    prompts = [""] * len(solutions)
    assert math_answer(prompts, solutions, answer=solutions) == [1.0] * 7498
    following = solutions[1:] + solutions[:1]
    equal = math_answer(prompts, solutions, answer=following)
    pairs = {
        (extract_answer(a), extract_answer(b))
        for a, b, is_equal in zip(solutions, following, equal)
        if is_equal and extract_answer(a) != extract_answer(b)
    }
    # Read by a person: each is equal but for a unit, a degree sign or a name.
    assert pairs == {
        ("8", "K=8"),
        ("120", r"120^\circ"),
        (r"21\text{ dogs}", "21"),
        (r"18 \text{ degrees}", "18"),
    }


@pytest.mark.slow
def test_perturbed_answers_of_math_are_not_paid(shared):
    """A share of the 6,000 that `python tests/helpers/perturbed.py 6000` makes."""
    cases = perturbed.make(list(math_answers(shared)), 900)
    assert {case.kind for case in cases} == set(perturbed.KINDS)
    completions = [f"So it is $\\boxed{{{case.changed}}}$." for case in cases]
    paid = math_answer([""] * len(cases), completions, answer=[case.answer for case in cases])
    assert [case for case, reward in zip(cases, paid) if reward] == []


FRAC = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def with_slash(text):
    if re.search(r"[0-9]\\[dt]?frac", text):  # 1\frac{2}{3} is no product
        return text
    return FRAC.sub(lambda m: f"(({m[1]})/({m[2]}))", text)


def with_decimals(text):
    match = re.fullmatch(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}", text)
    if match and not 10**6 % int(match[3]):
        return f"{match[1]}{int(match[2]) / int(match[3])!r}"
    return f"{text}.0" if re.fullmatch(r"-?[0-9]+", text) else text


RESPELLINGS = {
    "dfrac": lambda a: a.replace("\\frac", "\\dfrac"),
    "slash": with_slash,
    "decimals": with_decimals,
    "spaces": lambda a: re.sub(
        r"(?<!\\)(?<!left)(?<!right)([=+,()-])(?!!)", r" \1 ", a.replace("{,}", "")
    ),
    "no spaces": lambda a: re.sub(r"(?<![a-zA-Z\\])\s+|\s+(?![a-zA-Z])", "", a),
    "left and right": lambda a: (
        a if "\\left" in a else re.sub(r"(?<!\\)\(", r"\\left(", a).replace(")", "\\right)")
    ),
    "no left and right": lambda a: a.replace("\\left", "").replace("\\right", ""),
    "dollars": lambda a: f"$ {a} $",
    "period": lambda a: f"{a}.",
    "thousands": lambda a: f"{int(a):,}" if re.fullmatch(r"[0-9]{4,}", a) else a,
    "no degrees": lambda a: re.sub(r"\^\{?\\circ\}?$", "", a),
    "name": lambda a: a if re.search(r"[=<>a-zA-Z]", a.replace("\\frac", "")) else f"x = {a}",
    "bare root": lambda a: re.sub(r"\\sqrt\{([0-9])\}", r"\\sqrt\1", a),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESPELLINGS)
def test_respelled_answers_of_math(shared, name):
    answers = sorted(set(math_answers(shared)))
    pairs = [(a, RESPELLINGS[name](a)) for a in answers]
    pairs = [(a, b) for a, b in pairs if a != b]
    assert len(pairs) > 50
    completions = [f"So it is $\\boxed{{{b}}}$." for _, b in pairs]
    equal = math_answer([""] * len(pairs), completions, answer=[a for a, _ in pairs])
    failed = [pair for pair, is_equal in zip(pairs, equal) if not is_equal]
    assert len(failed) <= 0.005 * len(pairs), failed
