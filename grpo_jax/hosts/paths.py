"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


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
