"""The structure of an answer: a value, a list, a set, a tuple, and the names of quantities.

"x = 5" is the value 5 under the name x; "x = 1, y = 2" are two named values; (1,2) is a tuple or an
interval; both are compared by the same rule. The caller gives a function that compares two values;
this file handles only texts, which are tidy and short.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

Same = Callable[[str, str], bool]  # whether two values, given as texts, are equal

_MAX_PARTS = 32  # in a list, since all pairs may be compared
_BRACKETS = r"\\begin(?![a-z])|\\end(?![a-z])|\\[{}]|[()\[\]{}]"
_BRACKET = re.compile(_BRACKETS)
_OPENING, _CLOSING = {"(", "[", "{", "\\{", "\\begin"}, {")", "]", "}", "\\}", "\\end"}
_ORDER = re.compile(r"[<>]|\\(?:le|ge|neq|equiv|subset|mid|notin|not|perp|parallel|sim)(?![a-z])")
_COMMA = re.compile(rf"{_BRACKETS}|(?P<cut>[,;])")
_EQUALS = re.compile(rf"{_BRACKETS}|(?P<cut>:?=|\\in(?![a-z]))")
_SIGN = re.compile(r"\\(pm|mp)(?![a-z])\s*")
# A name is letters, with indices, arguments, bars, or the ratio of two names.
_INDEX = re.compile(
    r"_\s*(?:\{[^{}]{0,20}\}|\w)|(?<=[a-zA-Z}])\s*\(\s*-?[0-9a-zA-Z][0-9a-zA-Z, ]{0,20}\)"
)
_NO_NAME = re.compile(
    r"\\(?:sqrt|pi|infty|cdot|times|div|pm|mp|sum|int|lim|prod|begin|end|circ|emptyset|mathbb|not"
    r"|neg|bar|cup|cap|log|ln|d?binom|exp)(?![a-zA-Z])"
)
_NAME = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z(){}|:/,' ])+")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An answer, or a part of one."""

    text: str  # the whole text, with the name
    kind: str = ""  # "": one value; "list" or "set": any order; else brackets, such as "(]"
    value: str = ""  # without the name
    name: str = ""
    parts: tuple[Shape, ...] = ()

    @property
    def is_named_list(self) -> bool:
        """Whether each part has its own name: x = 1, y = 2."""
        return bool(self.parts) and all(part.name for part in self.parts)

    def alone(self) -> Shape:
        """The only element of a set that is the whole answer; else the shape itself."""
        return self.parts[0] if self.kind == "set" and len(self.parts) == 1 else self


def read(text: str, same: Same) -> Shape:
    """The shape of a tidy text."""
    text = text.strip()
    texts = _split(text)
    if len(texts) == 1:
        texts = _signs(text)
    else:
        texts = list(itertools.chain.from_iterable(map(_signs, texts)))
    if len(texts) == 1:
        return _read_one(text, same)
    parts = [_read_one(part, same) for part in texts]
    names = {part.name for part in parts}
    if parts[0].name and names <= {parts[0].name, ""}:  # n = 2, 3, 4 and x = 3, x = -3
        parts = [dataclasses.replace(part, name="") for part in parts]
        return Shape(text, "list", text, names.pop() or names.pop(), tuple(parts))
    return Shape(text, "list", text, parts=tuple(parts))


def equal(one: Shape, other: Shape, same: Same, same_relation: Same) -> bool:
    """Whether two answers are equal: part by part, in any order if they are lists or sets.

    A name may be on one side only. `same` compares values. `same_relation` compares whole texts if
    one is an equation, an inequality, or a set written in another way.
    """

    def equal_parts(a: Shape, b: Shape) -> bool:
        return equal(a, b, same, same_relation)

    if one.is_named_list or other.is_named_list:
        return _equal_named(one, other, equal_parts)
    if one.name and other.name and one.name != other.name:
        both_values = not one.kind and not other.kind
        return both_values and "=" in one.text and same_relation(one.text, other.text)
    if one.kind != other.kind and "list" not in (one.kind, other.kind):
        return _in_other_words(one, other) and same_relation(one.value, other.value)
    if not one.kind and not other.kind:
        return _equal_values(one, other, same, same_relation)
    if {one.kind, other.kind} <= {"list", "set"}:
        return _equal_sets(one, other, equal_parts)
    if one.kind != other.kind or len(one.parts) != len(other.parts):
        return False
    return all(map(equal_parts, one.parts, other.parts))


def is_relation(text: str) -> bool:
    """Whether a text is an equation, an inequality or the like, not a value."""
    return bool(_ORDER.search(text) or "=" in text)


# --- Reading --------------------------------------------------------------------------------------


def _read_one(text: str, same: Same) -> Shape:
    """The shape of a text without commas outside of brackets."""
    text = text.strip()
    if _ORDER.search(text):
        return Shape(text, value=text)
    sides = _sides(text)
    if len(sides) == 1:
        return _read_value(text, same)
    name = _name_of(text)
    values = sides[1:] if name else sides
    if "" not in sides and all(same(value, values[-1]) for value in values[:-1]):
        if name or not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text)):
            value = _read_value(values[-1], same)
            return dataclasses.replace(value, name=name, text=text)
    return Shape(text, value=text)  # an equation, or a chain of different values


def _sides(text: str) -> list[str]:
    """The texts between the equality signs; of a value and its rounding, only the value."""
    value, _, rounded = text.partition("\\approx")
    if rounded:
        text = f"{value}={rounded}" if _is_name(value) else value
    return _cut(text, _EQUALS)


def _name_of(text: str) -> str:
    """The name before the first equality sign, without spaces; else ""."""
    head = _sides(text)[0]
    if len(_sides(text)) == 1 or not _is_name(head):
        return ""
    return re.sub(r"\\text|\\mathrm|[\s{}]", "", head)


def _is_name(text: str) -> bool:
    bare = _INDEX.sub("", text).strip()
    return bool(_NAME.fullmatch(bare)) and not _NO_NAME.search(text)


def _read_value(text: str, same: Same) -> Shape:
    """The shape of a text without a name: the content of its brackets, or one value."""
    opening, inside, closing = _brackets(text)
    if not opening:
        return Shape(text, value=text)
    texts = _split(inside)
    is_set = opening in ("{", "\\{")
    if len(texts) == 1 and not is_set:
        return dataclasses.replace(_read_one(inside, same), text=text)
    shape = read(inside, same)
    if not is_set:
        parts = tuple(_read_one(part, same) for part in texts)
        return Shape(text, opening + closing, text, parts=parts)
    if opening == "\\{" and not (shape.kind or shape.name):
        return Shape(text, "set", text, parts=(shape,))
    if shape.kind != "list" or shape.is_named_list:
        return dataclasses.replace(shape, text=text)
    return dataclasses.replace(shape, text=text, kind="set")


def _brackets(text: str) -> tuple[str, str, str]:
    """The brackets around a whole text and their content; none if they do not enclose all of it."""
    depth, first = 0, None
    for match in _BRACKET.finditer(text):
        bracket = match[0]
        depth += (bracket in _OPENING) - (bracket in _CLOSING)
        if first is None:
            if match.start() != 0 or bracket not in _OPENING - {"\\begin"}:
                break
            first = match
        elif depth == 0:
            if match.end() != len(text):
                break
            return first[0], text[first.end() : match.start()].strip(), bracket
    return "", text, ""


def _split(text: str) -> list[str]:
    """The parts of a text between commas and semicolons outside of brackets."""
    return [part for part in _cut(text, _COMMA) if part] or [text]


def _cut(text: str, pattern: re.Pattern) -> list[str]:
    """A text, cut at matches of the pattern's group "cut" outside of brackets."""
    parts, start, depth = [], 0, 0
    for match in pattern.finditer(text):
        if match["cut"] is None:
            depth += (match[0] in _OPENING) - (match[0] in _CLOSING)
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def _signs(text: str) -> list[str]:
    """Both values of a text with one \\pm, or with a \\pm and a \\mp; else the text alone.

    Two signs of one kind are ambiguous (dependent or independent), so they stay.
    """
    found = _SIGN.findall(text)
    if not found or len(found) != len(set(found)) or _brackets(text)[0] in ("{", "\\{"):
        return [text]
    return [
        _SIGN.sub(lambda m: signs[m[1]], text).strip()  # noqa: B023
        for signs in ({"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"})
    ]


# --- Comparing ------------------------------------------------------------------------------------


def _equal_values(one: Shape, other: Shape, same: Same, same_relation: Same) -> bool:
    if is_relation(one.value) or is_relation(other.value):
        if "=" in one.text and "=" in other.text:
            return same_relation(one.text, other.text)
        return _in_other_words(one, other) and same_relation(one.value, other.value)
    return same(one.value, other.value)


def _in_other_words(one: Shape, other: Shape) -> bool:
    """Whether two shapes may be the same relation, or a set and the relation that defines it."""
    kinds = {_kind(one), _kind(other)}
    if one.name not in other.text or other.name not in one.text:
        return False  # x > 1 is not y in (1, oo)
    if kinds == {"union", "set"}:
        return True
    return kinds <= {"relation", "interval", "union"} and kinds != {"interval"}


def _kind(shape: Shape) -> str:
    if shape.kind:
        return "set" if shape.kind in ("list", "set") else "interval"
    if is_relation(shape.value):
        return "relation"
    return "union" if re.search(r"\\(?:cup|cap|setminus|mathbb)", shape.value) else "value"


def _equal_named(one: Shape, other: Shape, equal_parts: Callable) -> bool:
    """Compares x = 1, y = 2 with the names in any order, with (x,y) = (1,2), or with "1, 2"."""
    named, values = (one, other) if one.is_named_list else (other, one)
    if len(named.parts) != len(values.parts):
        return False
    names = [part.name for part in named.parts]
    order = list(range(len(names)))
    if values.is_named_list or values.name:
        given = [part.name for part in values.parts] if values.is_named_list else _names(values)
        if len(set(names)) < len(names) or sorted(names) != sorted(given):
            return _equal_sets(one, other, equal_parts) if values.is_named_list else False
        order = [given.index(name) for name in names]
    elif values.kind != "list":
        return False
    parts = [dataclasses.replace(part, name="") for part in named.parts]
    found = [dataclasses.replace(values.parts[i], name="") for i in order]
    return all(equal_parts(*pair) for pair in zip(parts, found))


def _names(shape: Shape) -> list[str]:
    return re.sub(r"[()]", "", shape.name).split(",")


def _equal_sets(one: Shape, other: Shape, equal_parts: Callable) -> bool:
    """Whether two lists have equal parts in any order; with equal counts if neither is a set."""
    if not one.parts or not other.parts or max(len(one.parts), len(other.parts)) > _MAX_PARTS:
        return False
    if "set" in (one.kind, other.kind):
        return all(
            any(equal_parts(part, candidate) for candidate in b.parts)
            for a, b in ((one, other), (other, one))
            for part in a.parts
        )
    left = list(other.parts)
    for part in one.parts:
        found = next((i for i, candidate in enumerate(left) if equal_parts(part, candidate)), None)
        if found is None:
            return False
        del left[found]
    return not left
