"""Units: words that may follow a number without changing it, and their equality.

A word is a unit if it is a known unit, or a noun that is counted, as in "5 oranges". Nouns are too
many to list. The other words are few: numerals, operations, and words that connect or negate
clauses. If one of these follows a number, the answer stays as it is, equal to no number.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

# Each line: the name that units are compared by, and its other spellings.
_SPELLINGS = """
meter: m meters metre metres
kilometer: km kilometers kilometre kilometres
centimeter: cm centimeters centimetre centimetres
millimeter: mm millimeters millimetre millimetres
inch: in inches
foot: ft feet
yard: yd yds yards
mile: mi miles
gram: g gm gms grams
kilogram: kg kgs kilograms kilo kilos
milligram: mg milligrams
pound: lb lbs pounds
ounce: oz ounces
ton: tons
liter: l L liters litre litres
milliliter: ml mL milliliters millilitre millilitres
gallon: gal gallons
second: s sec secs seconds
minute: min mins minutes
hour: h hr hrs hours
day: days
week: wk wks weeks
month: months
year: yr yrs years
dollar: dollars usd USD
euro: euros EUR €
sterling: GBP £
yen: JPY ¥
rupee: rupees Rs INR ₹
cent: cents
degree: degrees deg
radian: rad radians
celsius: C
fahrenheit: F
newton: N newtons
joule: J joules
watt: W watts
volt: V volts
hertz: Hz
pascal: Pa
ampere: amps amperes
ohm: ohms
mole: mol moles
am: AM
pm: PM
unit: units
mph:
kph: kmh kmph
"""
_KNOWN = {
    spelling: line.partition(":")[0]
    for line in _SPELLINGS.strip().splitlines()
    for spelling in (line.partition(":")[0], *line.partition(":")[2].split())
}
_ATTACHED = {"km", "cm", "mm", "kg", "mg", "ml", "mL", "ft", "lb", "lbs", "oz", "mph", "€", "°"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_SIGNS = "£€¥₹"
_LETTERS = {"g", "l", "L", "m ^2", "m ^3", "m / s", "m / s ^2"}  # units also outside of \\text

_NUMERAL = re.compile(
    r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen(?:th)?"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)(?:ty|tieth)"
    r"|hundred(?:th)?|thousand(?:th)?|(?:m|b|tr|quadr|quint|sext|z)illion(?:th)?|lakh|crore|dozen"
    r"|half|halve|quarter|first|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh"
    r"|twelfth|single|double|triple|quadruple|twice|thrice|once|score|gross|myriad|\w{2,12}fold"
)
_NO_UNIT = frozenset(
    # operations and their results, short names of numbers
    "plus minus times multiplied divided over remainder modulo mod modulus base point dot choose "
    "factorial power root exponent raised reciprocal inverse increased decreased reduced doubled "
    "tripled quadrupled halved squared cubed square cubic added subtracted percent percentage pct "
    "infinity infinite pi alpha beta gamma theta sqrt log ln sin cos tan exp grand mil mill bil "
    # words that join, compare, deny or doubt
    "and or but nor not no never none nothing neither either except unless without than versus vs "
    "if when while where whether because since so then hence thus therefore else otherwise instead "
    "rather though although however unknown undefined impossible "
    # prepositions of place and range
    "to from into onto through until till between above below beneath beyond under underneath off "
    "up down out before after past within against among by as like about around near nearly almost "
    # verbs
    "is are was were be been being isn has have had do does did can could will would shall should "
    "may might must equals equal means gives makes becomes "
    # pronouns
    "it its he she they them that this these those which who whom whose what there here we you "
    .split()
)  # fmt: skip
_NOT_LAST = {"wrong", "incorrect", "false", "negative", "positive", "prime"}
_INSIDE = {"a", "an", "the", "of", "per", "each", "every", "in", "on", "at", "for", "with", "any"}

_TOKEN = re.compile(
    r"\\text\{(?P<text>[^{}]*)\}|(?P<word>(?<![\\a-zA-Z])[a-zA-Z]+)\.?"
    r"|\^\s*(?:\{\s*(?P<braced>-?[1-4])\s*\}|(?P<power>[1-4]))|(?P<degree>\^\s*\{?\s*\\circ\s*\}?"
    rf"|\\degree)|(?P<sign>[{_SIGNS}])|(?P<over>/)|\\cdot(?![a-zA-Z])|[\s.]+"
)
_BASE = re.compile(r"(?<=[0-9])_(?:\{([0-9]{1,2})\}|([0-9]{1,2}))$")
_NUMBER_END = re.compile(r"[0-9})][\s.]*$")
_COUNT_END = re.compile(r"(?:[0-9})]|\\pi)[\s.]*$")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")


@functools.lru_cache(maxsize=4096)
def split_unit(text: str) -> tuple[str, str]:
    """A tidy text without its unit, and the unit's canonical name; "" if there is none.

    Units are those of quantities, angles and currencies, and the base of a number.
    """
    if match := _BASE.search(text):
        return text[: match.start()], f"base {match[1] or match[2]}"
    if text[:1] in _SIGNS and len(text) > 1:
        return text[1:].strip(), _KNOWN[text[0]]
    tokens = _tail(text)
    for i, token in enumerate(tokens):  # the longest unit first
        before = text[: token.start()]
        if not before.strip() or token[0].isspace():
            continue
        unit = _unit(tokens[i:], before)
        if unit and not (unit == "degree" and _TRIGONOMETRY.search(before)):
            return before.strip(), unit
    return text, ""


def _tail(text: str) -> list[re.Match]:
    """The tokens at the end of a text that may be part of a unit."""
    tokens: list[re.Match] = []
    place = 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            tokens, place = [], place + 1
        else:
            tokens.append(token)
            place = token.end()
    return tokens


def _unit(tokens: list[re.Match], before: str) -> str:
    """The canonical name of the unit that the tokens spell; "" if they spell none."""
    words: list[str] = []
    for token in tokens:
        if token["text"] is not None:
            words += re.findall(r"[a-zA-Z.]+|/|[^\sa-zA-Z./]+", token["text"])
        elif token["word"]:
            words.append(token["word"])
        elif token["degree"] or token["sign"] or token["over"]:
            words.append("degree" if token["degree"] else token[0])
        elif power := token["braced"] or token["power"]:
            words.append(f"^{power}")
    words = [word.replace(".", "") or "." for word in words]
    first = tokens[0]
    is_quantity = bool(words) and _is_quantity(words)
    if not is_quantity and not (words and _COUNT_END.search(before) and _is_noun(words)):
        return ""
    if first["word"]:
        # Letters next to a number are a product, unless they are one of these units.
        if not _NUMBER_END.search(before) or before[-1:] not in " \t~":
            attached = bool(_NUMBER_END.search(before)) and words[0] in _ATTACHED
            return _name(words) if attached else ""
        letters = [word for word in words if word.isalpha()]
        if max(map(len, letters)) == 1 and " ".join(words) not in _LETTERS:
            return ""  # 5 s may be 5 times s
    elif first["text"] is None and not (first["degree"] or first["sign"]):
        return ""  # a unit does not begin with a power or a slash
    return _name(words)


def _is_quantity(words: list[str]) -> bool:
    """Whether words are known units, with powers, multiplied or divided."""
    letters = [w for w in words if w not in ("/", "per") and w not in _POWERS and w[0] != "^"]
    return bool(letters) and words[0] not in ("squared", "cubed") and all(map(_known, letters))


def _known(word: str) -> str | None:
    """The canonical name of a known unit. Case matters in short ones: 5 M is not a length."""
    return _KNOWN.get(word) or (_KNOWN.get(word.lower()) if len(word) > 2 else None)


def _is_noun(words: list[str]) -> bool:
    """Whether words are a counted noun: letters, and no numeral, operation or clause."""
    if words[-1].startswith("^"):
        words = words[:-1]
    for i, word in enumerate(words):
        lower = word.strip("()").lower()
        if lower in ("/", "per"):
            if i in (0, len(words) - 1):
                return False
            continue
        if word in _KNOWN or (lower in _POWERS and i + 1 < len(words)):
            continue
        if lower in _INSIDE:
            if i == 0 or (lower != "each" and i == len(words) - 1):
                return False
            continue
        if lower == "times" and words == [word]:
            continue
        if lower in _NOT_LAST and i == len(words) - 1:
            return False
        if not lower.isalpha() or not lower.isascii() or len(lower) < 3 or _is_none(lower):
            return False
    return True


def _is_none(word: str) -> bool:
    stems = {word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ves") + "ve"}
    stems.add(re.sub(r"ies$", "y", word))
    return word in _NO_UNIT or any(_NUMERAL.fullmatch(stem) for stem in stems)


def _name(words: list[str]) -> str:
    """The canonical name of a unit: powers of known units, sorted; other words in the singular."""
    if not _is_quantity(words):
        stems = [w.strip("()").lower().removesuffix("s").removesuffix("e") for w in words]
        return " ".join(stems)
    powers: Counter[str] = Counter()
    sign, ahead, last = 1, 1, ""
    for word in words:
        if word in ("/", "per"):
            sign = -1
        elif word in ("squared", "cubed") or word[0] == "^":
            power = _POWERS.get(word) or int(word[1:])
            if last:
                powers[last] = powers[last] * power
        elif word in _POWERS:
            ahead = _POWERS[word]
        else:
            last = _known(word) or word
            powers[last] += sign * ahead
            ahead = 1
    return " ".join(
        f"{unit}^{power}" if power != 1 else unit for unit, power in sorted(powers.items())
    )
