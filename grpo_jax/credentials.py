"""Keys and passwords in texts: they belong in the environment alone.

Where a run's options are read they are refused, since a run records its options; in messages to the
terminal they are hidden.
"""

from __future__ import annotations

import os
import re

# Names of environment variables that hold one, such as HF_TOKEN and WANDB_API_KEY.
_NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_LEAST_CHARS = 12  # a shorter value stands in texts by chance

# What the services call theirs begins in a way of its own; of an address, the user and password
# before the host, and the signature among its arguments.
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bglpat-[\w-]{20,}"
    r"|\bsk-[\w-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}"
    r"|\bxox[abprs]-[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|(?i:(?<=[?&](?:sig|key)=)|(?<=[?&]token=)|(?<=[?&]api_key=)|(?<=[?&]access_token=)"
    r"|(?<=[?&]x-amz-signature=)|(?<=[?&]x-goog-signature=))[^&\s'\"]{8,}"
)


def stands_in(text: str) -> str | None:
    """What kind of secret a text holds, without the secret; None where it holds none.

    The value of an environment variable that is named as one, by that name; and what looks like a
    key of a service or an address with a password.
    """
    for name, value in _of_environment():
        if value in text:
            return f"the value of the environment variable {name}"
    if _SHAPES.search(text):
        return "what looks like a key, or an address with a password"
    return None


def hidden(text: str) -> str:
    """A text with *** in the place of every secret that `stands_in` knows."""
    for _, value in _of_environment():
        text = text.replace(value, "***")
    return _SHAPES.sub("***", text)


def _of_environment() -> list[tuple[str, str]]:
    """Environment variables that hold secrets, the longest first: one may stand in another."""
    found = [(n, v.strip()) for n, v in os.environ.items() if _NAMES.search(n.upper())]
    return sorted((f for f in found if len(f[1]) >= _LEAST_CHARS), key=lambda f: -len(f[1]))
