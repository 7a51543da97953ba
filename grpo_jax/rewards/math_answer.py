"""Reward for the right final answer, where right means equal as mathematics.

Answers that are equal as numbers or as tidied text never reach sympy. The rest are read by
math_verify's LaTeX parser, one whole answer at a time: it is never left to search a completion, nor
to find an expression inside an answer that it cannot read. What sympy could work on without end is
refused by length, depth and size before it sees it. What slips through must be stopped from
outside: math_verify's own timeouts are off, because they need the signal SIGALRM, which only the
main thread of a process gets and which the surrounding worker may want for itself.
"""

from __future__ import annotations

import functools
import logging
import math
import random
import re
import warnings
from collections.abc import Iterator
from typing import Any

from grpo_jax.rewards.answers import answer_fault, extract_answer, stated_answer, strip
from grpo_jax.rewards.completions import text_of
from grpo_jax.rewards.exact import normalise, number, same_answer

_MAX_LENGTH = 300  # characters; the longest answer in MATH has 159
_MAX_DEPTH = 8  # nested brackets; the parser's time grows with each
_MAX_DIGITS = 2000  # of a number that sympy may write out
_MAX_ARGUMENT = 500  # of a factorial or a binomial

_UNICODE = {
    "−": "-",
    "–": "-",
    "×": "\\times ",
    "·": "\\cdot ",
    "÷": "/",
    "π": "\\pi ",
    "√": "\\sqrt",
    "∞": "\\infty ",
    "°": "^\\circ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "∪": "\\cup ",
    "∈": "\\in ",
}
_SPACING = re.compile(r"\\\\|\\(?:left|right)(?![a-zA-Z])|\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~")
_SPACES = {"\\\\": "\\\\", "\\left": "", "\\right": "", "\\!": "", "\\,": ""}  # \\\\ ends a row
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TEXT_COMMAND = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf)|[mh]box)\s{0,3}"
_TEXT = re.compile(_TEXT_COMMAND + r"\{([^{}]*)\}")
_GROUPED = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:[, ][0-9]{3})+)(?![0-9])(?!,[0-9])")
_SURE_GROUP = re.compile(r"(?<=[0-9])\{ ?, ?\}(?=[0-9]{3})")
_REPEATING = re.compile(r"(?<![0-9.])([0-9]{0,9})\.([0-9]{0,9})\\overline\{([0-9]{1,9})\}")
_MIXED = re.compile(r"(?<![0-9./])([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})(?![0-9./])")
_PLAIN_FUNCTION = re.compile(r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|log|ln|pi|infty)(?![a-zA-Z])")
_AND = re.compile(r"\s{0,9},?\s{0,9}(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])\s{0,9}")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+|\\.")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]{1,9}\*?\}")

# What may follow a number without changing it: degrees, the base it is written in, a unit.
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?$|\s*\\degree$")
_BASE = re.compile(r"(?<=[0-9])_(?:\{([0-9]{1,2})\}|([0-9]{1,2}))$")
_UNIT_TEXT = re.compile(
    rf"(?<=[0-9a-z}})])\s*{_TEXT_COMMAND}\{{([^{{}}0-9,]+)\}}(\s*\^\s*\{{?[23]\}}?)?$"
)
_UNIT_WORDS = re.compile(
    r"(?<=[0-9})])\s+((?:[a-zA-Z]{3,}|[ckm]m|k?g|mg|m?[lL]|ft|in|lb|oz|mi|hr|sq)\.?"
    r"(?:[ /][a-zA-Z ./]{1,40})?)(\s*\^\s*\{?[23]\}?)?$"
)
_MULTIPLIERS = re.compile(r"hundred|thousand|[mb]illion|dozen|percent|half|and|or", re.IGNORECASE)

_ASSIGNED = re.compile(
    r"\s*([a-zA-Z]|\\[a-z]+)(_\{?\w{1,5}\}?)?'?(\([a-zA-Z, ]{1,9}\))?\s*(?:=|\\in(?![a-zA-Z]))"
)
# Work without end, or notation whose value nobody states as an answer.
_REFUSED = re.compile(
    r"\\(?:sum|prod|i{0,2}int|oint|lim|def|newcommand|renewcommand|let|input|include|loop|csname"
    r"|det|gcd|lcm|mod|pmod|bmod|operatorname|write|read|frac\{d\}|frac\{\\partial)(?![a-zA-Z])"
    r"|[0-9]{60}|![\s)}\]]*!|[0-9]\s+[0-9]|[:'\"]|\\underline"
    r"|binom.*[0-9]{4}|[0-9]{4}.*choose"  # the parser works them out
)
_RELATION = re.compile(r"[<>=]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-zA-Z])")
_OPENING, _CLOSING = "([{", ")]}"


def math_answer(
    prompts: list[Any], completions: list[Any], answer: list[Any], **columns: Any
) -> list[float]:
    """1.0 for each completion whose extracted answer equals that of its row, else 0.0.

    `answer` holds a number, a short text or LaTeX, or a worked solution that ends in "#### 72" or
    `\\boxed{72}`. Raises ValueError, saying what is wrong, where it holds no answer. Nothing in a
    completion raises.
    """
    rewards = []
    for completion, value in zip(completions, answer):
        expected, found = stated_answer(value), extract_answer(text_of(completion))
        rewards.append(float(found is not None and same_mathematics(expected, found)))
    return rewards


math_answer.column_faults = {"answer": answer_fault}
math_answer.right_or_wrong = True


def same_mathematics(expected: str, found: str) -> bool:
    """Whether two answers are equal: as `same_answer` has it, else as mathematics.

    A unit, a degree sign, the base that a number is written in, or "x =" may stand on one side
    only; on both they must agree. Brackets must be alike, so (1,2), [1,2] and {1,2} all differ;
    "1,2" is the set {1,2}. Decimals are not rounded: 0.333 is not 1/3. Words are compared as text.
    """
    if same_answer(expected, found):
        return True
    if max(len(expected), len(found)) > _MAX_LENGTH:
        return False
    are_plain = (number(normalise(t)) is not None and "%" not in t for t in (expected, found))
    if all(are_plain):
        return False  # the usual case, a hundred times faster than asking sympy
    one, other = _tidy(expected), _tidy(found)
    (one, unit), (other, other_unit) = _split_unit(one), _split_unit(other)
    if unit and other_unit and unit != other_unit:
        return False
    one, other = (_AND.sub(", ", _TEXT.sub(r"\1", text)).strip() for text in (one, other))
    if _is_bare(one) != _is_bare(other):
        one, other = _assigned(one), _assigned(other)
    if same_answer(_letter(one), _letter(other)):
        return True
    if not (_is_readable(one) and _is_readable(other)) or not _alike(one, other):
        return False
    try:
        return _same_expression(_parse(one), _parse(other))
    except Exception:  # sympy raises anything, a RecursionError included; the answer is not right
        return False


# --- As text --------------------------------------------------------------------------------------


def _tidy(text: str) -> str:
    """One spelling for spaces, fractions, thousands and repeating decimals; LaTeX for Unicode."""
    for sign, command in _UNICODE.items():
        text = text.replace(sign, command)
    text = strip(text).replace("\\$", "").replace("$", "").replace("\\\\%", "\\%")
    text = text.replace(",\\!", "{,}")
    text = _SPACING.sub(lambda m: _SPACES.get(m[0], " "), text)
    text = _FRACTION.sub(r"\\frac", text).replace("\\displaystyle", "")
    text = text.replace("**", "^").replace("*", "\\cdot ")
    text = _REPEATING.sub(_repeating, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _SURE_GROUP.sub("", text)
    if not re.search(r"[(\[{]", text):  # (1,234) is a pair
        text = _GROUPED.sub(lambda m: re.sub(r"[^0-9]", "", m[1]), text)
    return _call_roots(_PLAIN_FUNCTION.sub(r"\\\1 ", text)).strip()


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction: (16 - 1) / 90."""
    whole, fixed, repeated = match.groups()
    top = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return f"\\frac{{{top}}}{{{(10 ** len(repeated) - 1) * 10 ** len(fixed)}}}"


def _call_roots(text: str) -> str:
    """sqrt(2) and x^(2) with braces in place of parentheses."""
    for match in reversed(list(re.finditer(r"(?:\\sqrt|\^)\s*\(", text))):
        end = _partner(text, match.end() - 1)
        if end is not None and text[end] == ")":
            head = match[0].rstrip("( ")
            text = f"{text[: match.start()]}{head}{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text


def _split_unit(text: str) -> tuple[str, str]:
    """A text without its unit, and the unit as it is compared, "" where there is none."""
    if match := _DEGREES.search(text):
        if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
            return text[: match.start()], "degree"
    elif match := _BASE.search(text):
        return text[: match.start()], match[1] or match[2]
    elif match := _UNIT_TEXT.search(text) or _UNIT_WORDS.search(text):
        if match.start() and not _MULTIPLIERS.search(match[1]):
            power = re.sub(r"[^23]", "", match[2] or "")
            words = match[1].casefold().replace(".", "").split()
            words = [word.removesuffix("s").removesuffix("e") for word in words]  # inch, inches
            return text[: match.start()], " ".join(words) + power
    return text, ""


def _letter(text: str) -> str:
    """A choice of one letter without its parentheses."""
    return text[1] if re.fullmatch(r"\([a-zA-Z]\)", text) else text


def _is_bare(text: str) -> bool:
    return "=" not in text and "\\in" not in text.replace("\\infty", "")


def _assigned(text: str) -> str:
    """5 for "x = 5" and for "x = 2 + 3 = 5"; "3, -3" for "x = 3, x = -3"; else the text."""
    match = _ASSIGNED.match(text)
    if not match:
        return text
    head = match[0].replace(" ", "")
    parts = [part.replace(" ", "") for part in text.split(",")]
    if len(parts) > 1 and all(part.startswith(head) for part in parts):
        return ",".join(part.removeprefix(head) for part in parts)
    rest = text[match.end() :]
    return rest if "," in rest or not head.endswith("=") else rest.rpartition("=")[2]


def _is_readable(text: str) -> bool:
    """Whether the parser may see a text: printable ASCII, no words, bounded in depth and size.

    A word would be read as a product of letters, in which "east" equals "seat".
    """
    if not text or len(text) > _MAX_LENGTH or not (text.isascii() and text.isprintable()):
        return False
    bare = _ENVIRONMENT.sub(" ", text)
    return (
        not _WORD.search(bare)
        and not _REFUSED.search(bare)
        and _is_shallow(bare)
        and _powers_are_small(text)
    )


def _is_shallow(text: str) -> bool:
    """Whether brackets nest no deeper than _MAX_DEPTH."""
    depth = 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth > _MAX_DEPTH:
            return False
    return True


def _powers_are_small(text: str) -> bool:
    """Whether no exponent is a tower of numbers, or a number of more than three digits.

    Parsing an interval compares its ends, so 9^{9^9} is refused here and not after.
    """
    for match in re.finditer(r"\^\s*", text):
        if match.end() == len(text):
            return False
        end = _partner(text, match.end()) if text[match.end()] in _OPENING else match.end()
        if end is None:
            return False
        exponent = text[match.end() : end + 1]
        if re.match(r"\s*\^", text[end + 1 :]) or re.search(r"[0-9]{4}", exponent):
            return False
        if "^" in exponent and not re.search(r"[a-zA-Z]", _COMMAND.sub("", exponent)):
            return False
    return True


def _partner(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` closes, whatever its kind."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in _OPENING) - (text[i] in _CLOSING)
        if depth == 0:
            return i
    return None


def _alike(one: str, other: str) -> bool:
    """Whether two texts can be equal by their brackets and equals signs.

    math_verify reads (1,2) as an interval, and takes it for {1,2}; it also takes "2x = 5" for 5.
    """
    if ("=" in one) != ("=" in other):
        return False
    if any(_RELATION.search(text) for text in (one, other)):
        return True  # 0 < x < 1 is (0,1)
    return _brackets(one) == _brackets(other)


def _brackets(text: str) -> str:
    """The pair of brackets around a list, "" around one thing; none is that of a set."""
    text = text.replace("\\{", "{").replace("\\}", "}").strip()
    if text[:1] in _OPENING and text and _partner(text, 0) == len(text) - 1:
        around, inside = text[0] + text[-1], text[1:-1]
    else:
        around, inside = "{}", text
    depth = 0
    for char in inside:
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth == 0 and char in ",;":
            return around
    return "{}" if "\\pm" in inside else ""


# --- As mathematics -------------------------------------------------------------------------------


class _TooLargeError(ValueError):
    """An expression that sympy could work on without end."""


@functools.cache
def _math_verify() -> tuple[Any, Any, list]:
    """parse and verify, and how to parse; imported once needed, which takes half a second."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    for name in ("math_verify", "latex2sympy2_extended"):  # one line for each odd completion
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Units are dealt with above: the library's rule also takes the letter off 5m, 5d and 5c.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return parse, verify, [LatexExtractionConfig(normalization_config=normalization)]


@functools.lru_cache(maxsize=4096)  # the answer of a row is asked for once per completion
def _parse(text: str) -> Any:
    """The sympy object that a whole text spells. Raises ValueError where there is none."""
    import sympy

    parse, _, config = _math_verify()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = parse(
            f"${text}$",
            config,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )
    if not found:
        raise ValueError(f"cannot read {text!r}")
    tree = found[0]
    if isinstance(tree, sympy.Basic):
        _digits(tree)
        imaginary = {s: sympy.I for s in tree.free_symbols if getattr(s, "name", "") == "i"}
        tree = tree.xreplace(imaginary) if imaginary else tree
    return tree


def _digits(tree: Any) -> float:
    """A bound on the decimal digits of any number inside a tree. Raises beyond _MAX_DIGITS."""
    import sympy

    sizes = [_digits(arg) for arg in tree.args]
    if isinstance(tree, sympy.Rational):
        size = math.log10(max(abs(tree.p), tree.q, 10))
    elif isinstance(tree, sympy.Pow) and tree.exp.is_number:
        exponent = tree.exp if tree.exp.is_Rational else 10 ** min(sizes[1], 9)
        size = sizes[0] * max(1.0, abs(float(exponent)))
    elif isinstance(tree, sympy.functions.combinatorial.factorials.CombinatorialFunction):
        if any(arg.is_number and not abs(arg) <= _MAX_ARGUMENT for arg in tree.args):
            raise _TooLargeError(type(tree).__name__)
        size = 3.0 * _MAX_ARGUMENT  # 500! has 1,135 digits
    else:
        size = sum(sizes, start=1.0)
    if size > _MAX_DIGITS:
        raise _TooLargeError(f"{size} digits")
    return size


def _same_expression(one: Any, other: Any) -> bool:
    """Whether two sympy objects are equal.

    Expressions are compared by their values at three points, negative ones included: two that
    differ do not agree there in 30 digits by chance, and nothing has to be simplified, which is
    where sympy hangs. Relations and sets are left to math_verify.
    """
    import sympy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
            return one.shape == other.shape and all(map(_same_expression, one.flat(), other.flat()))
        both = (one, other)
        if all(isinstance(e, sympy.Expr) and not e.has(_undefined()) for e in both):
            return all(_same_number(*values) for values in _values(*both))
        _, verify, _ = _math_verify()
        return verify(
            one, other, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None
        )


def _undefined() -> Any:
    from sympy.core.function import AppliedUndef

    return AppliedUndef


def _values(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """Two expressions with numbers for their letters, at three points; once without letters."""
    import sympy

    rng = random.Random(0)
    letters = sorted(one.free_symbols | other.free_symbols, key=str)
    for sign in (1, 1, -1) if letters else (1,):
        at = {s: sign * sympy.Rational(rng.randint(200, 900), 311) for s in letters}
        yield one.xreplace(at), other.xreplace(at)


def _same_number(one: Any, other: Any) -> bool:
    """Whether two numbers agree in 30 digits, or in 12 where one is a decimal.

    math_verify's own comparison is absolute, which makes 10^{-30} equal 10^{-31}.
    """
    import sympy

    if one == other:
        return one.is_finite is not False or one in (sympy.oo, -sympy.oo)
    has_decimal = one.has(sympy.Float) or other.has(sympy.Float)
    a, b = (n.doit().evalf(50).as_real_imag() for n in (one, other))
    largest = max(abs(part) for part in (*a, *b))
    if not largest.is_finite:
        return False
    tolerance = largest * sympy.Float(10, 50) ** (-12 if has_decimal else -30)
    return all(abs(x - y) <= tolerance for x, y in zip(a, b))
