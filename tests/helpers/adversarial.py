"""Completions that try to hang, crash or fool a reward. A count and a seed give the same ones."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    """One completion."""

    kind: str
    completion: str
    expected: float | None  # math_answer's value for the answer 72; None: not certain
    can_hang: bool  # sympy could work on it without end


def make(count: int = 1000, seed: int = 0) -> list[Case]:
    """`count` cases of all kinds in turn, each time with other sizes."""
    rng = random.Random(seed)
    kinds: list[tuple[str, Callable[[random.Random], str], float | None, bool]] = [
        *((kind, f, 0.0, False) for kind, f in _WRONG.items()),
        *((kind, f, 1.0, False) for kind, f in _RIGHT.items()),
        *((kind, f, 0.0, True) for kind, f in _ENDLESS.items()),
    ]
    cases, num_long = [], 0
    for i in range(count):
        kind, function, expected, can_hang = kinds[i % len(kinds)]
        if i % 23 == 0:
            kind, expected, can_hang = list(_LONG)[num_long % len(_LONG)], 0.0, False
            function = _LONG[kind]
            num_long += 1
        cases.append(Case(kind, function(rng), expected, can_hang))
    return cases


def of_each_kind(short: int = 20, long: int = 4) -> list[Case]:
    """Different cases, some of every kind: each text of 1 MB once, of another kind `short` texts.

    Of these, `long` have over 1,000 characters, since they take nearly all of the time.
    """
    cases: dict[str, Case] = {}
    made: collections.Counter[tuple[str, bool]] = collections.Counter()
    for case in make(4000):
        is_long = len(case.completion) > 1000
        most = 1 if case.kind in _LONG else long if is_long else short
        if case.completion not in cases and made[case.kind, is_long] < most:
            made[case.kind, is_long] += 1
            cases[case.completion] = case
    return list(cases.values())


def _box(inside: str) -> str:
    return f"So the answer is $\\boxed{{{inside}}}$."


def _nested(opening: str, inside: str, closing: str, depths: tuple[int, int]) -> Callable:
    def build(rng: random.Random) -> str:
        depth = rng.randint(*depths)
        return _box(opening * depth + inside + closing * depth)

    return build


def _one_of(*texts: str) -> Callable:
    return lambda rng: rng.choice(texts)


def _boxed_one_of(*texts: str) -> Callable:
    return lambda rng: _box(rng.choice(texts))


def _long(piece: str, *, boxed: bool = False) -> Callable:
    def build(rng: random.Random) -> str:
        text = piece * ((10**6 - rng.randrange(1000)) // len(piece))
        return _box(text) if boxed else text

    return build


def _random_text(alphabet: str) -> Callable:
    def build(rng: random.Random) -> str:
        return _box("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 250))) + "x")

    return build


_LATEX = r"\{}[]()^_&$,;=<>+-*/!|.0123456789xyi"
_STRANGE = "\x00\x01\x07\x1b\x7f\u0301\u200b\u200f\u202e\u2066\ufeff\ud800\udfff\U0001f600٧７²"

# fmt: off
_WRONG: dict[str, Callable] = {
    "empty": _one_of("", " ", "\n", "\x00", "\\", "{", "}", "####", "\\boxed", "\\boxed{", "$"),
    "nested braces": _nested("{", "7", "}", (20, 60000)),
    "nested parentheses": _nested("(", "7", ")", (10, 60000)),
    "nested fractions": _nested("\\frac{1}{", "2", "}", (5, 20000)),
    "nested roots": _nested("\\sqrt{", "2", "}", (5, 20000)),
    "nested boxes": _nested("\\boxed{", " ", "}", (5, 60000)),
    "left without right": _nested("\\left(", "71", "", (1, 40000)),
    "unbalanced boxes": _one_of("\\boxed{72", "\\boxed{\\frac{72}{1}", "\\fbox{{72}", "boxed{72}"),
    "definitions": _boxed_one_of(
        r"\def\x{\x\x}\x",
        r"\newcommand{\a}{\a\a}\a",
        r"\let\x=\y\let\y=\x\x",
        r"\loop\iftrue\repeat",
        r"\input{/etc/passwd}",
        r"\csname a\endcsname",
        r"\expandafter\expandafter\x",
    ),
    "code": _boxed_one_of(
        "__import__('os').system('true')", "exec('1')", "lambda: 72", "(72).__class__", "eval(72)"
    ),
    "matrices": lambda rng: _box(
        r"\begin{pmatrix}" + r"1&" * rng.randint(1, 3000) + r"1\\2\end{pmatrix}"
    ),
    "random latex": _random_text(_LATEX),
    "random bytes": lambda rng: _box(
        bytes(rng.randrange(256) for _ in range(rng.randint(1, 500))).decode("latin-1") + "x"
    ),
    "strange characters": _random_text(_STRANGE),
    "lone surrogates": _boxed_one_of("\ud80072", "7\udfff2", "\ud800" * 300),
    "controls": _boxed_one_of("7\x002", "\x1b[31m7\x072", "7\u200b2", "7\u202e2\u202c"),
    "combining": lambda rng: _box("7" + "\u0301" * rng.randint(1, 400) + "2"),
    "not numbers": _boxed_one_of(
        "inf", "nan", "-inf", "Infinity", "NaN", "1e999", "1e-999", "0/0", "1/0", "\\frac{0}{0}",
        "\\frac{72}{0}", "0^{-1}", "\\infty", "-\\infty", "\\infty-\\infty", "\\log 0",
        "\\tan\\frac{\\pi}{2}", "None", "True", "()", "\\{\\}", "[]", "\\emptyset", "E", "I",
    ),
    "other bases": _boxed_one_of("0x48", "0b1001000", "0o110", "72_{8}x", "LXXII", "seventy-two"),
    "separators": _boxed_one_of("7,2", "7 2", "7.2", "7'2", "7_2", "7{,}2", "7\\,2x", "7\\\\2"),
    "hedges": _boxed_one_of(
        "71, 72", "72, 73", "72 or 73", "\\{71,72\\}", "x=71,72", "\\pm 72", "72x", "72+x",
        "[72,73]",
    ),
    "several answers": _one_of(
        "#### 72\n#### 71", "\\boxed{72} or rather \\boxed{71}", "#### 72\nno: \\boxed{5}",
        "<answer>72</answer> <answer>7</answer>", "The answer is 72. No, the answer is 5.",
    ),
    "answer in the thinking": _one_of(
        "<think>It is \\boxed{72}.</think>", "<think>#### 72", "<think>a</think><think>#### 72",
        "<think>\\boxed{72}</think> I do not know.", "#### 72\n</think>\n#### 7",
    ),
    "the prompt again": lambda rng: "How many clips did Natalia sell? " * rng.randint(1, 2000),
    "no answer": _one_of("72", "It is 72.", "= 72", "7" * 5000, "answer 72", "#72", "### 72"),
    "wrong numbers": _one_of("#### -72", "#### 720", "#### 7.2", "#### 72.01", "#### 1/72"),
    "units": _boxed_one_of("72 million", "72 thousand dollars", "72 dozen", "72m", "72^2", "72!"),
    # For rewards of other things than an answer.
    "JSON": _one_of(
        '{"a": 1}', '{"a": NaN}', "[" * 100_000, '{"a":' * 50_000, '"' * 5000, "9" * 10_000,
        '```json\n{"a": 1e999}\n```', "```json\n" * 5000, '{"a": "\\ud800"}', "\ufeff{}",
    ),
    "equations": _one_of(
        "1/0 = 5", "9^9^9^9 = 1", "9**64**64 = 2", "0^-1 = 1", "(" * 5000 + "1" + ")" * 5000 + "=1",
        "-" * 5000 + "1 = 1 + 0", "1 = " * 3000, "1%%% + 1 = 2", "1,000,00 + 1 = 2", "٣ + ٤ = ٧",
        "1" * 5000 + " + 1 = 2", ".+. = .", "= = =", "2^(-64)^64 = 1 + 1", "1e9 + 1 = 2",
    ),
    "tags": _one_of(
        "<think>\n" * 3000, "\n</think>\n<answer>\n" * 3000,
        "<think>\n\n</think>\n<answer>\n\n</answer>",
        "</answer></think>", "<think>\n<think>\n</think>\n</think>", "<think" * 3000,
    ),
    "words": _one_of(
        "A B. C D " * 2000, "but " * 4000, "not no never " * 2000, "!" * 5000, "Step 1:" * 3000,
        "'" * 5000, "a@4 " * 4000, "\U0001f600" * 2000, "你好。" * 3000, "İ" * 3000, "ß" * 3000,
        "\u202eabc", "a\u0301" * 3000, "\x00 \x00", "2024-01-01 " * 2000, "1,2,3," * 3000,
    ),
    "unsolved": _boxed_one_of("2x=72", "72=72x", "x<72", "x \\ne 72", "y = 72x", "f(72)", "1=2"),
}

_RIGHT: dict[str, Callable] = {
    "right": _one_of(
        "#### 72", "#### 72.0", "\\boxed{72}", "\\boxed 72$.", "\\fbox{72}", "<answer>72</answer>",
        "The answer is 72.", "**Final Answer**: 72", "Final answer is $72$.", "answer: 72",
        "#### $72", "\\boxed{\\$72}", "\\boxed{072}", "\\boxed{7.2e1}",
    ),
    "right as mathematics": _boxed_one_of(
        "\\frac{144}{2}", "144/2", "8 \\cdot 9", "2^3 \\cdot 3^2", "\\sqrt{5184}", "70+2", "x=72",
        "72\\text{ clips}", "72 clips", "72^\\circ", "\\left(72\\right)", "36\\times2", "(72)",
        "\\dfrac{72}{1}", "72^1", "\\sqrt{72}^2", "6 \\cdot 12", "\\log_2 2^{72}",
    ),
    "right at last": _one_of(
        "#### 71\n#### 72", "\\boxed{71} or rather \\boxed{72}",
        "<think>\\boxed{71}</think>#### 72", "\\boxed{72} and a cut \\boxed{7",
        "{" * 1000 + "\\boxed{72}", "\\boxed{}\n#### 72",
    ),
    "right after much": lambda rng: "}{" * rng.randint(1, 50000) + " #### 72",
}

_ENDLESS: dict[str, Callable] = {
    "towers": _boxed_one_of(
        "9**9**9**9", "10^{10^{10}}", "9^{9^{9^9}}", "((9^9)^9^9)^9", "2^{2^{2^{2^{2^2}}}}"
    ),
    "powers": lambda rng: _box(f"{rng.randint(2, 99)}^{{{rng.randint(10**4, 10**12)}}}"),
    "stacked powers": lambda rng: _box("(" * 4 + "9" + ")^{999}" * 4 + f"+{rng.randint(1, 9)}"),
    "factorials": lambda rng: _box(f"{rng.randint(10**4, 10**12)}!"),
    "factorials of factorials": _boxed_one_of("9!!!!", "((99!)!)!", "(99!)!", "{{20!}!}!"),
    "binomials": lambda rng: _box(f"\\binom{{{10 ** rng.randint(6, 9)}}}{{{10**5 * 3}}}"),
    "intervals of towers": _boxed_one_of("(0,9^{9^{9^9}})", "[9^{9^9},10^{10^{10}}]"),
    "sums": _boxed_one_of(
        r"\sum_{n=1}^{10^9} \frac{1}{n}",
        r"\prod_{n=1}^{99999} n",
        r"\int_0^1 e^{x^{x^x}} dx",
        r"\lim_{x\to 0} \frac{\sin^{99} x}{x^{99}}",
    ),
    "expansions": lambda rng: _box(f"(x+y+z+w)^{{{rng.randint(100, 999)}}}"),
    "equations": lambda rng: _box(
        f"x^{{{rng.randint(7, 99)}}} - x + \\sin x = e^x \\cdot {rng.randint(2, 9)}"
    ),
    "trigonometry": lambda rng: _box("+".join(f"\\sin({k}x)^{k}" for k in range(2, 14))),
}
# fmt: on

_LONG: dict[str, Callable] = {
    "1 MB of letters": _long("a"),
    "1 MB of equal signs": _long("="),
    "1 MB of sums": _long("1+"),
    "1 MB of equations": _long("1+1=3 "),
    "1 MB of brackets": _long("["),
    "1 MB of quotes": _long('"'),
    "1 MB of lists": _long("\n- "),
    "1 MB of names": _long("Aa Bb. "),
    "1 MB of fences": _long("```json\n"),
    "1 MB of sentences": _long("it is not so, but good! "),
    "1 MB of Chinese": _long("你好。"),
    "1 MB of digits": _long("7"),
    "1 MB of spaces": _long(" "),
    "1 MB of opening braces": _long("{"),
    "1 MB of closing braces": _long("}"),
    "1 MB of braces": _long("{}"),
    "1 MB of backslashes": _long("\\"),
    "1 MB of open boxes": _long("\\boxed{"),
    "1 MB of empty boxes": _long("\\boxed{}"),
    "1 MB of bare boxes": _long("\\boxed 7 "),
    "1 MB of markers": _long("####"),
    "1 MB of marked lines": _long("#### 7\n"),
    "1 MB of open tags": _long("<answer>"),
    "1 MB of closed tags": _long("</answer>"),
    "1 MB of thoughts": _long("<think></think>"),
    "1 MB of open thoughts": _long("<think>"),
    "1 MB of phrases": _long("the answer is "),
    "1 MB of half phrases": _long("answer to "),
    "1 MB of dollars": _long("$"),
    "1 MB of surrogates": _long("\ud800"),
    "1 MB of NULs": _long("\x00"),
    "1 MB of accents": _long("\u0301"),
    "1 MB of digits in a box": _long("7", boxed=True),
    "1 MB of spaces in a box": _long("7   ", boxed=True),
    "1 MB of fractions in a box": _long("\\frac", boxed=True),
    "1 MB of roots in a box": _long("\\sqrt ", boxed=True),
    "1 MB of commas in a box": _long("777,", boxed=True),
    "1 MB of zeros after a point": lambda rng: _box("72." + "0" * 10**6 + "1"),
}
