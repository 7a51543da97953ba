"""The terminal: lines as they stand, without keys and what it would obey."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from grpo_jax.messages.credentials import redact


class _Output:
    """Standard output as it is now; what it does not take is lost, and ends no run.

    As where a disk that a log goes to is full, or whoever read a pipe has gone.
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


def say(text: str) -> None:
    """Prints one line as it stands: no markup, no wrapping, no keys or passwords."""
    console.print(Text(printable(redact(text))), soft_wrap=True)


def one_line(text: str, limit: int = 2000) -> str:
    """A message as a program ends with it: like what `say` prints, in one line, long ones cut.

    Names in files and data stand in messages; they may hold what a terminal would obey.
    """
    return cut_middle(" ".join(printable(redact(text)).split()), limit)


def print_title(text: str) -> None:
    """Prints a heading across the terminal."""
    console.print(Rule(Text(printable(text), style="bold"), align="left"))


def cut_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


# What a terminal or a page obeys: controls, the order of writing, and invisible marks; not tabs,
# nor the joiners of Persian, of Indic scripts and of emoji.
_OBEYED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with the characters spelled out that a terminal would obey; ends of lines remain."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """`visible`, and what the terminal's encoding lacks spelled out as well."""
    encoding = console.encoding
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)
