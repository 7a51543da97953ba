"""Finds and hides keys and passwords in texts: they belong in the environment alone.

Options that hold a secret are refused, since a run records its options. In messages to the terminal
secrets are hidden, in every form in which Python may write them.
"""

from __future__ import annotations

import base64
import functools
import os
import re

# Names of environment variables that hold a secret: HF_TOKEN, WANDB_API_KEY, PGPASSWORD,
# OPENAI_APIKEY_2. Not PWD and OLDPWD, which are folders, nor words that end in KEY by chance.
_NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CONNECTION_?STRING"
    r"|(^|_|API|ACCESS|SECRET|PRIVATE|ACCOUNT)KEY|(^|_)(PASS|PAT|AUTH|DSN|SAS|COOKIE)|_PWD"
    r"|WEBHOOK(_URL)?)S?(_?[0-9]+)?$"
)
_LEAST_CHARS = 12  # a shorter value may be in a text by chance
_LEAST_HIDDEN = 8  # of a value that is known to be a secret

# Keys of services, known by their prefixes.
_KEYS = re.compile(
    r"\b(?:(?:hf|api_org|gsk|esecret|ntn|npm|r8|fw|gh[pousr])_[A-Za-z0-9]{20,}"
    r"|(?:github_pat|wandb_v1|lsv2_[a-z]{2})_\w{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|(?:sk|xai|nvapi|pplx|tvly|glpat|GOCSPX|pypi)-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}"
    r"|dop_v1_[0-9a-f]{40,}|dapi[0-9a-f]{32}|(?:AKIA|ASIA)[A-Z0-9]{16}\b|AIza[\w-]{35}"
    r"|ya29\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*)"
)
# User and password before the host of an address, and values after a name such as "password=".
_IN_ADDRESSES = re.compile(r"(://)[^/\s:@]*:[^/\s@]+(?=@)|(hooks\.slack\.com/services/)[\w/]{20,}")
_NAMED = re.compile(
    r"((?:[?&](?:sig|key|token|api_key|access_token|x-amz-signature|x-goog-signature)|password|pwd"
    r"|accountkey|sharedaccesskey)=|authorization['\"]?: ?['\"]?(?:basic|bearer) )"
    r"[^;&\s'\",)]{8,}",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(  # all of the key; line ends plain or escaped
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:(?:\s|\\+[nr]){0,9}[A-Za-z0-9+/=]{16,})*"
    r"(?:(?:\s|\\+[nr]){0,9}[A-Za-z0-9+/=]*(?:\s|\\+[nr]){0,9}-----END [A-Z ]*PRIVATE KEY-----)?"
)
_SHAPES = (_KEYS, _IN_ADDRESSES, _NAMED, _PRIVATE_KEY)


def find_secret(text: str) -> str | None:
    """The kind of secret that a text holds, without the secret itself; None if it holds none.

    Secrets are the values of environment variables with such a name, and texts that look like a
    service's key or an address with a password.
    """
    for name, value in _of_environment():
        if _written(value).search(text):
            return f"the value of the environment variable {name}"
    if any(shape.search(text) for shape in _SHAPES):
        return "what looks like a key, or an address with a password"
    return None


def redact(text: str) -> str:
    """The text with *** for every secret that `find_secret` would find."""
    for _, value in _of_environment():
        text = _written(value).sub("***", text)
    for shape in _SHAPES:  # the groups hold the text before the secret
        text = shape.sub(lambda found: "".join(filter(None, found.groups())) + "***", text)
    return text


def hide(text: str, secret: str) -> str:
    """The text with *** for a secret, however it is written; a short one is none."""
    return _written(secret).sub("***", text) if len(secret) >= _LEAST_HIDDEN else text


def _of_environment() -> list[tuple[str, str]]:
    """Secrets in the environment as (name, value), the longest first: one may contain another."""
    found = [(n, v.strip()) for n, v in os.environ.items() if _NAMES.search(n.upper())]
    return sorted((f for f in found if len(f[1]) >= _LEAST_CHARS), key=lambda f: -len(f[1]))


# --- How a secret may be written ------------------------------------------------------------------


@functools.lru_cache(64)
def _written(value: str) -> re.Pattern[str]:
    """A pattern of a secret: plain, in Python's and JSON's escapes, percent-encoded, or in base64.

    Escapes may be escaped again: an error's text may hold the repr of another error.
    """
    parts = re.findall(r"\\+|[^\\]", value, re.DOTALL)
    return re.compile("|".join(["".join(map(_part, parts)), *map(re.escape, _base64(value))]))


def _part(part: str) -> str:
    """A pattern of all ways to write one character, or one run of backslashes.

    Backslashes match possessively, without backtracking, so the cost is linear in the text's
    length.
    """
    if part.isascii() and part.isalnum():
        return part
    num = len(part)
    if part[0] == "\\":
        return rf"(?:\\{{{num},{8 * num}}}+|(?i:%5c){{{num}}})"
    pairs = part.encode("utf-16-be", "surrogatepass")
    octets = part.encode("utf-8", "surrogatepass")
    escapes = [
        r"\\{1,8}+".join(f"u{pairs[i : i + 2].hex()}" for i in range(0, len(pairs), 2)),
        r"\\{1,8}+".join(f"x{octet:02x}" for octet in octets),
        f"x{ord(part):02x}",
        f"u{ord(part):08x}",  # also \U, since case is ignored
    ]
    ways = [re.escape(part), *([_SHORT[part]] if part in _SHORT else []), *escapes]
    percent = "".join(f"%{octet:02x}" for octet in octets) + (r"|\+" if part == " " else "")
    return rf"(?i:\\{{0,8}}+(?:{'|'.join(ways)})|{percent})"


_SHORT = {"\n": "n", "\r": "r", "\t": "t"}  # escapes of one letter


def _base64(value: str) -> list[str]:
    """The base64 characters that a text always yields, for each of its three possible offsets."""
    raw, found = value.encode("utf-8", "surrogatepass"), []
    for before in range(3):
        text = base64.b64encode(bytes(before) + raw).decode()
        sure = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        found += [sure, sure.translate(str.maketrans("+/", "-_"))]
    return list(dict.fromkeys(found))
