"""Paths as people write them."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path


def near(path: Path) -> str:
    """ " Did you mean ...?" with what lies in the path's folder under a name like it; or ""."""
    try:
        there = {entry.stem: entry.name for entry in itertools.islice(path.parent.iterdir(), 1000)}
    except OSError:
        return ""
    # Without suffixes, by which any two names would be alike.
    found = difflib.get_close_matches(path.stem, there, n=1)
    return "".join(f" Did you mean {path.with_name(there[name])}?" for name in found)


def expanded(path: str, option: str) -> Path:
    """The path with `~` and `~name` written out.

    Raises ValueError, naming the option, if there is no such user or the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{option} = {path!r}: {path.partition('/')[0]} stands for nobody's home folder here. "
            "Write the whole path."
        ) from error
