"""Output on the terminal: lines without markup, secrets or control characters."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from grpo_jax.messages.credentials import redact


class _Output:
    """The current `sys.stdout`. Text that it cannot take is lost; a failed write ends no run.

    A write fails if a log's disk is full, or if the reader of a pipe has gone.
    """

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


console = Console(file=_Output(), highlight=False)


# The values of `logging.console`, with their meanings.
WAYS = {
    "auto": "all of it: a bar on a terminal, lines elsewhere",
    "quiet": "warnings, evaluations and the end",
    "json": "a JSON object in each line: steps, evaluations, and whatever else is said",
}
_way = "auto"


def show_as(way: str) -> None:
    """Sets the way of output, one of `WAYS`, for this process."""
    global _way
    assert way in WAYS
    _way = way


def is_full() -> bool:
    """Whether everything is shown, tables and bars too."""
    return _way == "auto"


def is_json() -> bool:
    return _way == "json"


def say(text: str, *, always: bool = False, whole: bool = False) -> None:
    """Prints one line: no markup, and no keys or passwords.

    On a terminal the line wraps between words, unless `whole`: a command that a person copies must
    not wrap. In a file it never wraps. With "quiet" only warnings are printed, lines that begin
    with "warning: ", and lines with `always`.
    """
    is_warning = text.startswith("warning: ")
    if _way == "json":
        line({"event": "warning" if is_warning else "message", "text": text})
    elif _way == "auto" or always or is_warning:
        text = printable(redact(text))
        if console.is_terminal and not whole:
            text = in_words(text, console.width)
        console.print(Text(text), soft_wrap=True)


def in_words(text: str, width: int) -> str:
    """The text in lines of at most so many characters, but for longer words, as paths may be."""
    wrapper = textwrap.TextWrapper(
        width,
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapper.fill(one) for one in text.split("\n"))


def line(values: Mapping[str, Any]) -> None:
    """Prints values as a line of JSON if `logging.console` is "json", else nothing.

    It adds "time", seconds since the epoch.
    """
    if _way == "json":
        values = plain({**values, "time": round(time.time(), 3)})
        console.print(Text(json.dumps(values)), soft_wrap=True)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: without keys and passwords, None for NaN and inf."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "item"):  # NumPy's numbers
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return redact(str(value))


def one_line(text: str, limit: int = 2000) -> str:
    """The message that a program ends with: printable, without secrets, in one line, cut if long.

    Messages quote names from files and data, which may hold control characters.
    """
    return cut_middle(" ".join(printable(redact(text)).split()), limit)


def print_title(text: str) -> None:
    """Prints a heading across the terminal."""
    if is_full():
        console.print(Rule(Text(printable(text), style="bold"), align="left"))
    else:
        say(text)


def cut_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


# Characters that change how a terminal or a page shows text: controls, writing order, invisible
# marks. Not tabs, nor the joiners of Persian, of Indic scripts and of emoji.
_OBEYED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with control characters spelled out as escapes, except line feeds and tabs."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """As `visible`; characters that the terminal's encoding lacks are spelled out too."""
    encoding = console.encoding
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)
