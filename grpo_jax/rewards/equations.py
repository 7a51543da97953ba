"""Finds the equations between numbers in a text, and checks each with exact fractions.

No model is needed: "12 * 6 = 72", "<<48/2=24>>", "5 + 3 = 8 apples", `\\frac{1}{2} \\times 4 = 2`
and each part of "x = 2 + 3 = 5" can be computed. Equations with letters are left alone. Every
search is bounded, so that the cost is that of one pass, whatever a text holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

_SIDE = 120  # characters of a side that are read
_MAX_SIGNS = 2000  # equal signs of a text that are looked at
_MAX_EXPONENT, _MAX_BITS = 64, 4096
_DROPPED = 8  # words at the outer end of a side that are no part of it, as in "Step 1. 2 + 3 = 5"
_OPERATIONS = frozenset("+-*/^(")
_ALLOWED = frozenset("0123456789.,+-*/^()% \t")
_SIGN = re.compile(r"[=≈]")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}\\]{1,40})\}\{([^{}\\]{1,40})\}")
_COMMANDS = {
    r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": "", r"\,": "", r"\!": "",
    r"\$": "", r"\%": "%", r"\boxed{": "", r"\approx": "≈",
}  # fmt: skip
_SPELLED = re.compile("|".join(map(re.escape, sorted(_COMMANDS, key=len, reverse=True))))
_SIGNS = str.maketrans("×÷·⋅−–$€£*", "*/**-- " + "  *")
_POWER = re.compile(r"(?<=[0-9)])\*\*(?=[0-9(])")
_TIMES = re.compile(r"(?<=[0-9)])( ?)x( ?)(?=[0-9(])")
_BULLET = re.compile(r"^([ \t]{0,20})[-*+](?=[ \t])", re.MULTILINE)
_TOKEN = re.compile(r"\s*(?:([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+\.?[0-9]*|\.[0-9]+)|(\S))")
_PLAIN = re.compile(r"[+-]?\s*(?:[0-9][0-9,]*\.?[0-9]*|\.[0-9]+)%?")


class Equation(NamedTuple):
    """Two sides of a text that are said to be equal."""

    start: int  # of the left side, in characters of the text
    end: int  # after the right side
    left: Fraction
    right: Fraction
    is_right: bool


def find(text: str, *, rounded: bool = True) -> list[Equation]:
    """The equations of a text, in order; of "a = b = c" those of neighbours.

    A side that is one number may be `rounded`: 10 / 3 = 3.33 is right, and 10 / 3 = 3 is not. After
    ≈ it may be rounded to a whole number. An equation of two plain numbers is no step of reasoning,
    and left out.
    """
    plain = _plain(text)
    found = []
    for number, sign in enumerate(_SIGN.finditer(plain)):
        if number == _MAX_SIGNS:
            break
        if plain[sign.start() - 1 : sign.start()] in ("<", ">", "!", ":", "="):
            continue
        left, right = _left(plain, sign.start()), _right(plain, sign.end())
        if left is None or right is None or (left.is_plain and right.is_plain):
            continue
        equal = left.value == right.value
        equal |= left.value == right.as_written or right.value == left.as_written
        if rounded or sign[0] == "≈":
            equal |= _is_rounded(left, right, whole=sign[0] == "≈")
            equal |= _is_rounded(right, left, whole=sign[0] == "≈")
        found.append(Equation(left.start, right.end, left.value, right.value, equal))
    return found


class _Side(NamedTuple):
    start: int
    end: int
    value: Fraction
    is_plain: bool  # one number, without an operation
    step: Fraction | None  # the value of its last digit, if it is plain
    as_written: Fraction  # 25 for 25%, since people write 0.25 * 100 = 25%


def _plain(text: str) -> str:
    """A text of the same length in which operations have one spelling."""
    text = _BULLET.sub(r"\1 ", text.translate(_SIGNS))
    text = _POWER.sub("^ ", text).replace("**", "  ")  # else they make a text bold
    if "\\" in text:
        text = _FRACTION.sub(lambda m: f"(({m[1]})/({m[2]}))".ljust(len(m[0])), text)
        text = _SPELLED.sub(lambda m: _COMMANDS[m[0]].ljust(len(m[0])), text)
    return _TIMES.sub(r"\1*\2", text)


def _left(text: str, end: int) -> _Side | None:
    """The side before an equal sign at `end`: the longest that is an expression."""
    start = end
    while start > 0 and end - start < _SIDE and text[start - 1] in _ALLOWED:
        start -= 1
    if end - start == _SIDE or (_sticks(text[start - 1 : start]) and not text[start].isspace()):
        start = _after_space(text, start, end)
    elif text[start - 1 : start] == ":" and text[start - 2 : start - 1].isdigit():  # 6:00
        return None
    for _ in range(_DROPPED):
        if not text[start:end].strip():
            return None
        if side := _side(text, start, end):
            return None if _continues(text, side) else side
        start = _after_space(text, start + _indent(text[start:end]), end)
    return None


def _continues(text: str, side: _Side) -> bool:
    """Whether what stands before a side is a part of it: an operation, a factor, a number.

    As in "2 apples + 12 - 18", "60 questions x 60/100", "10% of 150", "3 1/2 - 2" and "350, 000".
    """
    start = side.start
    before = text[max(0, start - 40) : start].rpartition("\n")[2].rstrip()
    if not before:
        return False
    if side.is_plain and before.endswith(" of"):  # "a total of 3 * 4 = 12" is whole
        return True
    if text[start] in "+-" and (before[-1].isalnum() or before[-1] in ")}]%"):
        return True
    if before[-1] in _OPERATIONS or before[-1].isdigit() or before.endswith((" x", "√")):
        return True
    return before[-1] == "," and before[-2:-1].isdigit() and _is_group(text[start : start + 4])


def _is_group(text: str) -> bool:
    """Whether a text begins with the three digits of a thousands group."""
    return text[:3].isdigit() and len(text[:3]) == 3 and not text[3:4].isdigit()


def _right(text: str, start: int) -> _Side | None:
    """The side after an equal sign, from `start`."""
    end = start
    while end < len(text) and end - start < _SIDE and text[end] in _ALLOWED:
        end += 1
    if end - start == _SIDE or (_is_part(text[end : end + 2]) and not text[end - 1].isspace()):
        end = _before_space(text, start, end)
    elif text[end : end + 1] == ":" and text[end + 1 : end + 2].isdigit():
        return None
    for _ in range(_DROPPED):
        if not text[start:end].strip():
            return None
        stripped = start + len(text[start:end].rstrip().rstrip(".,"))
        if side := _side(text, start, stripped):
            return None if _goes_on(text, side.end) else side
        end = _before_space(text, start, stripped)
    return None


def _goes_on(text: str, end: int) -> bool:
    """Whether a side goes on after its end, as in "8 + 1x", "3 1/2" and "18, 000"."""
    after = text[end : end + 40].partition("\n")[0]
    bare = after.lstrip(" \t")
    if bare[:1] in _OPERATIONS - {"-"} and bare:  # - may be a dash, and ( begin a remark
        return bare[0] != "("
    if len(bare) < len(after) and bare[:1].isdigit():
        return True
    return after[:1] == "," and _is_group(after[1:].lstrip(" "))


def _is_part(after: str) -> bool:
    """Whether a number goes on as something else, as in 2x; two letters are a unit, as in 2kg."""
    return _sticks(after[:1]) and not (len(after) == 2 and after.isalpha())


def _sticks(character: str) -> bool:
    """Whether a character beside a number makes it a part of something else, as in 2x."""
    return character.isalnum() or character in ("_", "\\", "{", "^")


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _after_space(text: str, start: int, end: int) -> int:
    """The place after the first space from `start` on, or `end`."""
    at = next((i for i in range(start, end) if text[i].isspace()), end)
    return min(at + 1, end)


def _before_space(text: str, start: int, end: int) -> int:
    """The place of the last space before `end`, or `start`."""
    return next((i for i in range(end - 1, start - 1, -1) if text[i].isspace()), start)


def _side(text: str, start: int, end: int) -> _Side | None:
    written = text[start:end]
    try:
        value = _Reader(written).read()
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    start += _indent(written)
    written = written.strip()
    is_plain = _PLAIN.fullmatch(written) is not None
    decimals = len(written.rstrip("%").partition(".")[2])
    step = Fraction(1, 10**decimals) / (100 if written.endswith("%") else 1) if is_plain else None
    bare = value * 100 if is_plain and written.endswith("%") else value
    return _Side(start, start + len(written), value, is_plain, step, bare)


def _is_rounded(side: _Side, other: _Side, *, whole: bool) -> bool:
    """Whether one side is the other, rounded to the digits that it has."""
    if side.step is None or (side.step >= 1 and not whole):
        return False
    return abs(side.value - other.value) <= side.step / 2


class _Reader:
    """Reads one expression of numbers, + - * / ^, % and brackets, by recursive descent."""

    def __init__(self, text: str):
        self._tokens: list[str] = [m[1] or m[2] for m in _tokens(text)]
        self._at = 0

    def read(self) -> Fraction:
        """The value. Raises ValueError, or ZeroDivisionError, if the text is no expression."""
        value = self._sum()
        if self._at < len(self._tokens):
            raise ValueError("more follows")
        return value

    def _next(self, *wanted: str) -> str:
        """Takes the next token if it is one of these; "" if not."""
        token = self._tokens[self._at] if self._at < len(self._tokens) else ""
        if token and token in wanted:
            self._at += 1
            return token
        return ""

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._next("+", "-"):
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while True:
            if sign := self._next("*", "/"):
                factor = self._signed()
                value = value * factor if sign == "*" else value / factor
            elif self._tokens[self._at : self._at + 1] == ["("]:  # 2(3 + 4)
                value *= self._power()
            else:
                return value

    def _signed(self) -> Fraction:
        if self._next("-"):
            return -self._signed()
        if self._next("+"):
            return self._signed()
        return self._power()

    def _power(self) -> Fraction:
        value = self._atom()
        if not self._next("^"):
            return value
        exponent = self._signed()
        bits = max(abs(value.numerator), value.denominator).bit_length()
        if exponent.denominator != 1 or abs(exponent) > _MAX_EXPONENT:
            raise ValueError("no small whole exponent")
        if bits * abs(exponent) > _MAX_BITS:
            raise ValueError("too large")
        return value**exponent.numerator

    def _atom(self) -> Fraction:
        if self._next("("):
            value = self._sum()
            if not self._next(")"):
                raise ValueError("a bracket is open")
        else:
            token = self._tokens[self._at] if self._at < len(self._tokens) else ""
            if not token or token[0] not in "0123456789.":
                raise ValueError("no number")
            self._at += 1
            value = Fraction(token.replace(",", "").rstrip("."))
        return value / 100 if self._next("%") else value


def _tokens(text: str) -> Iterator[re.Match]:
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return
        yield match
        at = match.end()
