"""One spelling of an answer: spaces, fractions, relations, thousands, powers of ten, styles.

Nothing here changes a value. The caller bounds the length of every text.
"""

from __future__ import annotations

import re

from grpo_jax.rewards.answers import strip
from grpo_jax.rewards.characters import as_latex

_SPACING = re.compile(r"\\\\|\\(?:left|right)(?![a-zA-Z])|\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~")
_SPACES = {"\\\\": "\\\\", "\\left": "", "\\right": "", "\\!": ""}  # \\\\ ends a row
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|[mh]box)\s{0,3}(?=\{)")
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|bf|rm|it|boldsymbol|bm|[lL]arge)(?![a-zA-Z])"
    r"|\\(?:text)?color\s*\{[a-zA-Z]{1,20}\}"
)
_SURE_GROUP = re.compile(r"(?<=[0-9])(?:\{ ?, ?\}|\s?,\s?\\!\s?|\\,)(?=[0-9]{3}(?![0-9]))")
_GROUPED = re.compile(
    r"(?<![0-9.,])([0-9]{1,3}(?:([, '])[0-9]{3})(?:\2[0-9]{3})*)(?![0-9'])(?!,[0-9])"
)
_REPEATING = re.compile(r"(?<![0-9.])([0-9]{0,9})\.([0-9]{0,9})\\overline\{([0-9]{1,9})\}")
_MIXED = re.compile(r"(?<![0-9./])([0-9]{1,9}) +([0-9]{1,9})/([0-9]{1,9})(?![0-9./])")
_SCIENTIFIC = re.compile(r"(?<![a-zA-Z\\])([0-9]+\.?[0-9]*)[eE]([+-]?[0-9]{1,3})(?![0-9a-zA-Z.])")
_PERCENT = re.compile(r"\s*(?:\\text\{\s*)?\b(?:per ?cent|percentage|pct)\b\s*(\})?")
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MULTIPLIED = re.compile(
    rf"(?<=[0-9}}])\s*(?:\\cdot)?\s*(\\text\{{\s*)?({'|'.join(_POWERS)})(?![a-zA-Z])"
)
_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infty)(?![a-zA-Z])"
)
_LOG_BASE = re.compile(r"\\log_\s*([0-9a-z])")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_ANGLE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)")
_HALF_OF_DAY = re.compile(r"(?<![a-zA-Z])([ap])\.?\s?m(?:\.|(?![a-zA-Z]))", re.IGNORECASE)
_AND = re.compile(r"\s{0,9},?\s{0,9}(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])\s{0,9}")
_AND_TEXT = re.compile(r"\\text\{[\s,]*(?:or|and)\s*\}")
_SYNONYMS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\not\s*=|!=|\\ne(?![a-zA-Z])", r"\\neq "),
        (r"<=|\\leq(?:slant)?(?![a-zA-Z])", r"\\le "),
        (r">=|\\geq(?:slant)?(?![a-zA-Z])", r"\\ge "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"^\s*\\(?:mathbb\s*\{R\}|R)\s*$", r"(-\\infty,\\infty)"),
    )
)


def tidy(text: str) -> str:
    """A text in one spelling; "and", "or" become commas, "5 million" 5 times a power of ten."""
    text = strip(as_latex(text)).replace("\\$", "").replace("$", "").replace("\\\\%", "\\%")
    text = _TEXT.sub(r"\\text", _STYLE.sub("", text))
    text = _SURE_GROUP.sub("", text)
    text = _SPACING.sub(lambda m: _SPACES.get(m[0], " "), text)
    for pattern, plain in _SYNONYMS:
        text = pattern.sub(plain, text)
    text = _REPEATING.sub(_repeating, text)
    text = _SCIENTIFIC.sub(lambda m: f"{m[1]}\\cdot 10^{{{int(m[2])}}}", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    if not re.search(r"[(\[{]", text):  # (1,234) is a pair
        text = _GROUPED.sub(lambda m: re.sub(r"[^0-9]", "", m[1]), text)
    text = _MULTIPLIED.sub(lambda m: f"\\cdot 10^{{{_POWERS[m[2]]}}}{m[1] or ' '}", text)
    text = _PERCENT.sub(r"\\%", text)
    if re.search(r"[0-9]:|[ap]\.\s?m", text, re.IGNORECASE):
        text = _HALF_OF_DAY.sub(lambda m: f"{m[1].lower()}m", text)
    text = _AND.sub(", ", _AND_TEXT.sub(", ", text))
    text = _call_roots(_FUNCTION.sub(r"\\\1 ", text))
    return _LOG_BASE.sub(r"\\log_{\1}", text).replace("\\text{}", "").strip()


def in_radians(text: str) -> str:
    """A tidy text with the degrees in trigonometric functions converted to radians."""
    return _ANGLE.sub(r"(\\frac{\1\\pi}{180})", text) if _TRIGONOMETRY.search(text) else text


def without_degrees(text: str) -> str:
    """A tidy text without degree signs."""
    return _ANGLE.sub(r"\1", text)


def partner(text: str, start: int) -> int | None:
    """The position at which the bracket that opens at `start` closes; kinds are not compared."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return None


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction: (16 - 1) / 90."""
    whole, fixed, repeated = match.groups()
    top = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return f"\\frac{{{top}}}{{{(10 ** len(repeated) - 1) * 10 ** len(fixed)}}}"


def _call_roots(text: str) -> str:
    """A text with braces in place of the parentheses of sqrt(2), x^(2) and exp(2)."""
    for match in reversed(list(re.finditer(r"(\\sqrt|\\exp|\^)\s*\(", text))):
        end = partner(text, match.end() - 1)
        if end is not None and text[end] == ")":
            head = "e^" if match[1] == "\\exp" else match[1]
            text = f"{text[: match.start()]}{head}{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text
