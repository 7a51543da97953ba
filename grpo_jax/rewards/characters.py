"""Characters beyond ASCII as LaTeX spells them: ½ is \\frac{1}{2}, x² is x^{2}, π is \\pi."""

from __future__ import annotations

import re
import unicodedata

_GREEK = (
    "αalpha βbeta γgamma δdelta εepsilon ζzeta ηeta θtheta ιiota κkappa λlambda μmu νnu ξxi πpi "
    "ρrho σsigma τtau υupsilon φphi χchi ψpsi ωomega ΓGamma ΔDelta ΘTheta ΛLambda ΞXi ΠPi ΣSigma "
    "ΥUpsilon ΦPhi ΨPsi ΩOmega"
)
_COMMANDS = (
    "×times ·cdot ⋅cdot ∙cdot ±pm ∓mp ∞infty ≤le ⩽le ≥ge ⩾ge ≠neq ≈approx ∪cup ∩cap ∈in ∅emptyset "
    "∖setminus ∠angle △triangle →rightarrow ←leftarrow"
)
_TEXTS = {
    "÷": "/", "⁄": "/", "∕": "/", "√": "\\sqrt", "°": "^\\circ ", "º": "^\\circ ",
    "ℝ": "\\mathbb{R}", "‘": "'", "’": "'", "“": '"', "”": '"', "′": "'",
    "₋": "-", "﹣": "-", "−": "-",
}  # fmt: skip
_HYPHENS = "‐‑‒–—"
# No-break, thin and zero-width spaces. They all separate words: 7 2 is not 72.
_SPACES = "\u00a0\u2007\u2008\u2009\u200a\u202f\u3000\u200b\u2060\ufeff"
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "₀₁₂₃₄₅₆₇₈₉"
_WIDE = (range(0xFF01, 0xFF5F), range(0x1D400, 0x1D800))  # full width, letters of mathematics
_EXPONENT, _INDEX = (re.compile(f"[{signs}]+") for signs in (_RAISED, _LOWERED))
_GREEK_WORD = re.compile(r"[Α-Ωα-ωά-ώ]{3,}")  # a Greek word, not a product


def _table() -> dict[int, str]:
    table = {ord(word[0]): f"\\{word[1:]} " for word in f"{_GREEK} {_COMMANDS}".split()}
    table |= {ord(sign): text for sign, text in _TEXTS.items()}
    table |= {ord(sign): "-" for sign in _HYPHENS} | {ord(sign): " " for sign in _SPACES}
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F)):  # ¼ to ⅞
        top, _, bottom = unicodedata.normalize("NFKC", chr(code)).partition("⁄")
        table[code] = f"\\frac{{{top}}}{{{bottom}}}"
    for code in (code for codes in _WIDE for code in codes):
        plain = unicodedata.normalize("NFKC", chr(code))
        table[code] = table.get(ord(plain[0]), plain)
    return table


_TABLE = _table()


def as_latex(text: str) -> str:
    """A text with ASCII or LaTeX for characters that have such a spelling; others stay."""
    if text.isascii():
        return text
    if not _GREEK_WORD.search(text):
        text = _EXPONENT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
        text = _INDEX.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
        return text.translate(_TABLE)
    return text
