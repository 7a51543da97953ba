"""Compares two values as mathematics: math_verify's parser reads them, their numbers decide.

The parser gets one whole value at a time. It never searches a completion, nor looks for an
expression inside an answer that it cannot read. Values on which sympy could work without end are
refused beforehand by length, depth and size. The rest must be stopped from outside: math_verify's
own timeouts are off, because they need the signal SIGALRM, which only a process's main thread gets
and which a reward function may use itself.
"""

from __future__ import annotations

import functools
import logging
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.rewards.spelling import partner

_MAX_LENGTH = 300  # characters; the longest answer in MATH has 159
_MAX_DEPTH = 8  # nested brackets; the parser's time grows with each
_MAX_DIGITS = 2000  # of a number that sympy may compute
_MAX_ARGUMENT = 500  # of a factorial or a binomial

_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+|\\.")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]{1,9}\*?\}")
# Operations that may not end, or notation that no final answer has.
_REFUSED = re.compile(
    r"\\(?:sum|prod|i{0,2}int|oint|lim|def|newcommand|renewcommand|let|input|include|loop|csname"
    r"|Gamma|det|gcd|lcm|mod|pmod|bmod|operatorname|write|read|frac\{d\}|frac\{\\partial)(?![a-zA-Z])"
    r"|[0-9]{60}|![\s)}\]]*!|[0-9]\s+[0-9]|[0-9]\s*_|[:'\"]|\\underline|\\not|\\(?:long)?[a-zA-Z]*arrow|\\to"
    r"|binom.*[0-9]{4}|[0-9]{4}.*choose"  # the parser evaluates them
)
_OPENING, _CLOSING = "([{", ")]}"


def same_expression(one: str, other: str) -> bool:
    """Whether two tidy texts are equal as mathematics; False if one cannot be read."""
    if not (is_readable(one) and is_readable(other)):
        return False
    try:
        return _same(_parse(one), _parse(other))
    except Exception:  # sympy raises anything, a RecursionError included; the answer is not right
        return False


def is_readable(text: str) -> bool:
    """Whether the parser may read a text: printable ASCII, no words, bounded in depth and size.

    A word would be read as a product of letters, in which "east" equals "seat".
    """
    if not text or len(text) > _MAX_LENGTH or not (text.isascii() and text.isprintable()):
        return False
    bare = _ENVIRONMENT.sub(" ", text)
    return (
        not _WORD.search(bare)
        and not _REFUSED.search(bare)
        and is_shallow(bare)
        and _powers_are_small(text)
    )


def is_shallow(text: str) -> bool:
    """Whether brackets nest no deeper than _MAX_DEPTH."""
    depth = 0
    for char in text:
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth > _MAX_DEPTH:
            return False
    return True


def _powers_are_small(text: str) -> bool:
    """Whether no exponent is a tower of numbers, or a number of more than three digits.

    Parsing an interval compares its ends, so 9^{9^9} must be refused before parsing.
    """
    for match in re.finditer(r"\^\s*", text):
        if match.end() == len(text):
            return False
        end = partner(text, match.end()) if text[match.end()] in _OPENING else match.end()
        if end is None:
            return False
        exponent = text[match.end() : end + 1]
        if re.match(r"\s*\^", text[end + 1 :]) or re.search(r"[0-9]{4}", exponent):
            return False
        if "^" in exponent and not re.search(r"[a-zA-Z]", _COMMAND.sub("", exponent)):
            return False
    return True


class _TooLargeError(ValueError):
    """An expression that sympy could work on without end."""


@functools.cache
def _library() -> tuple[Callable, Callable]:
    """math_verify's parser and comparison; imported at first use, which takes half a second."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex

    for name in ("math_verify", "latex2sympy2_extended"):  # they log each odd completion
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Units are removed before this: the library's rule also removes the letter of 5m, 5d and 5c.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    # By default R is r and \\Sigma is \\sigma.
    conversion = ConversionConfig(lowercase_symbols=False)

    def parse(text: str) -> Any:
        text = normalize_latex(text, normalization)
        return latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            normalization_config=None,
            conversion_config=conversion,
        )

    return parse, verify


@functools.lru_cache(maxsize=4096)  # a row's answer is parsed for each of its completions
def _parse(text: str) -> Any:
    """The sympy object of a whole text. Raises an error if there is none."""
    import sympy

    parse, _ = _library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = parse(text)
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


def _same(one: Any, other: Any) -> bool:
    """Whether two sympy objects are equal; math_verify compares sets, and a set with a relation.

    Nothing is simplified or solved, because sympy may hang there. And math_verify would call two
    equations without solutions equal.
    """
    import sympy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = (one, other)
        if all(isinstance(e, sympy.MatrixBase) for e in both):
            return one.shape == other.shape and all(map(_same, one.flat(), other.flat()))
        if all(isinstance(e, sympy.Expr) for e in both):
            return all(_same_number(*values) for values in _values(*both))
        relations = [_relations(e) for e in both]
        if all(relations):
            return _same_relations(*relations)
        _, verify = _library()
        return verify(
            one, other, float_rounding=12, allow_set_relation_comp=True, timeout_seconds=None
        )


def _values(*trees: Any) -> Iterator[list[Any]]:
    """Evaluates expressions at several points of their letters; once if there are no letters.

    Different expressions do not agree in 30 digits by chance. All letters are positive at the first
    point and negative at the second. At the others, any two letters have different signs at least
    once, so that |xy| is not xy. An unknown function, such as f(3), is a letter.
    """
    import sympy
    from sympy.core.function import AppliedUndef

    rng = random.Random(0)
    letters = {str(s): s for t in trees for s in (*t.free_symbols, *t.atoms(AppliedUndef))}
    names = sorted(letters)
    points = [0, *range(len(names).bit_length() + 1)] if names else [0]
    for number, bit in enumerate(points):
        size = {name: sympy.Rational(rng.randint(200, 900), 311) for name in names}
        for i, name in enumerate(names):
            negative = number == 1 or (number > 1 and (i >> (bit - 1)) % 2)
            size[name] *= -1 if negative else 1
        yield [
            tree.xreplace({f: size[str(f)] for f in tree.atoms(AppliedUndef)}).xreplace(
                {s: size[str(s)] for s in tree.free_symbols}
            )
            for tree in trees
        ]


def _relations(tree: Any) -> list[tuple[str, Any]]:
    """For each relation of a tree, its sign and its left side minus its right; [] if it has none.

    "a > b" comes as "b < a".
    """
    import sympy

    if isinstance(tree, sympy.And):
        parts = [_relations(arg) for arg in getattr(tree, "_unsorted_args", tree.args)]
        return [part[0] for part in parts] if all(len(part) == 1 for part in parts) else []
    if not isinstance(tree, sympy.core.relational.Relational):
        return []
    turned = tree.rel_op in (">", ">=")
    difference = sympy.Add(tree.lhs, sympy.Mul(-1, tree.rhs, evaluate=False), evaluate=False)
    sign = tree.rel_op.replace(">", "<")
    return [(sign, sympy.Mul(-1, difference, evaluate=False) if turned else difference)]


def _same_relations(one: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> bool:
    """Whether relations are equivalent in this order or the reverse: 0 < x < 1 is 1 > x > 0."""
    if len(one) != len(other):
        return False
    return any(
        all(a[0] == b[0] and _is_multiple(a[1], b[1], a[0] in ("<", "<=")) for a, b in zip(one, ps))
        for ps in (other, other[::-1])
    )


def _is_multiple(one: Any, other: Any, only_positive: bool) -> bool:
    """Whether one expression is the other times a number: then "= 0" means the same for both."""
    points = list(_values(one, other))
    if len(points) == 1:  # no letters: 1 = 2 and 3 = 4 are not equal
        return False
    first, second = points[0]
    ratio = (first / second).doit().evalf(50)
    if not ratio.is_finite or ratio == 0 or (only_positive and not ratio > 0):
        return False
    return all(_same_number(a, ratio * b) for a, b in points)


def _same_number(one: Any, other: Any) -> bool:
    """Whether two numbers agree in 30 digits, or in 12 if one is a decimal.

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
