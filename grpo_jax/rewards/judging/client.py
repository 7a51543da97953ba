"""Asks an OpenAI-compatible server for chat completions: bounded, with retries and a budget."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import os
import random
import re
import ssl
import time
from collections.abc import Callable
from typing import Any

from grpo_jax.rewards.judging.http import BadResponseError, Poster, Response

KINDS = ("timeout", "connection", "status", "redirect", "size", "garbage", "verdict", "budget")
"""Why judgements fail; `metrics.names` explains each."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_SHOWN = 200  # characters of a server's own words in a message
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # OpenSSL's words for plain HTTP


class FailedError(Exception):
    """A judgement that failed; `kind` is one of KINDS."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of all judgements of a process."""

    concurrency: int = 32  # calls at once
    attempt_s: float = 60.0  # for one call
    deadline_s: float = 300.0  # for a judgement with its waiting and retries
    retries: int = 4  # after the first attempt
    max_calls: int = 0  # of a run; 0: no limit
    max_tokens: int = 0  # of a run, prompts and answers together; 0: no limit
    response_bytes: int = 1 << 20


class Budget:
    """Counts the calls and tokens of a run, and refuses more than its limits."""

    def __init__(self, limits: Limits, calls: int = 0, tokens: int = 0):
        """`calls`, `tokens`: what was spent before."""
        self._limits, self.calls, self.tokens = limits, calls, tokens

    def take_call(self) -> None:
        """Counts a call; FailedError if the budget is spent."""
        limits = self._limits
        if limits.max_calls and self.calls >= limits.max_calls:
            raise FailedError("budget", f"judge.max_calls = {limits.max_calls:,} calls were made")
        if limits.max_tokens and self.tokens >= limits.max_tokens:
            raise FailedError(
                "budget", f"judge.max_tokens = {limits.max_tokens:,} tokens were used"
            )
        self.calls += 1


@dataclasses.dataclass
class Spent:
    """What a judgement took."""

    calls: int = 0
    retries: int = 0
    seconds: float = 0.0  # of its calls, without waiting
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Spent) -> None:
        for field in dataclasses.fields(Spent):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)


class Server:
    """A chat-completion server. All is called in one event loop.

    `hide` removes the key from a text: a server's error may quote it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str,
        limits: Limits,
        budget: Budget,
        slots: asyncio.Semaphore,
        hide: Callable[[str], str],
    ):
        """`url`: up to /v1. `slots`: for the calls of all servers at once."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        where = f"{url.rstrip('/')}/chat/completions"
        self._post = Poster(where, headers, limit_bytes=limits.response_bytes)
        self.model, self._has_key = model, bool(key)
        self._limits, self._budget, self._slots, self._hide = limits, budget, slots, hide
        self._not_before = 0.0  # time.monotonic() until which a 429 told all to wait
        self._jitter = random.Random()  # changes when a call is repeated, and no verdict

    def close(self) -> None:
        self._post.close()

    async def ask(self, messages: Any, sampling: dict[str, Any], spent: Spent) -> str:
        """The text that the server writes; adds to `spent`, also if it fails.

        Raises FailedError. The caller limits the time of the whole.
        """
        body = {"model": self.model, "messages": list(messages), **sampling}
        for attempt in range(self._limits.retries + 1):
            spent.retries += attempt > 0
            try:
                return await self._attempt(body, spent)
            except _AgainError as again:
                if attempt == self._limits.retries:
                    raise FailedError(again.kind, str(again)) from None
                await asyncio.sleep(self._wait_s(attempt, again.after_s))
        raise AssertionError

    def _wait_s(self, attempt: int, after_s: float | None) -> float:
        """Twice as long each time, and at random, so that not all come back at once."""
        longest = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)
        wait_s = self._jitter.uniform(longest / 2, longest)
        if after_s is None:
            return wait_s
        self._not_before = max(self._not_before, time.monotonic() + after_s)
        return after_s + self._jitter.uniform(0, _FIRST_WAIT_S)

    async def _attempt(self, body: dict[str, Any], spent: Spent) -> str:
        async with self._slots:
            if (pause := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            self._budget.take_call()
            spent.calls += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._limits.attempt_s):
                    response = await self._post.post(body)
            except TimeoutError:
                limit = f"judge.timeout_s = {self._limits.attempt_s:g} s"
                raise _AgainError("timeout", f"the judge did not answer in {limit}") from None
            except BadResponseError as error:
                raise FailedError(error.kind, str(error)) from None
            except ssl.SSLError as error:
                raise self._of_tls(error) from None
            except OSError as error:  # refused, reset, closed, no such host
                raise self._unreachable(error) from None
            finally:
                spent.seconds += time.monotonic() - began
        return self._read(response, spent)

    def _unreachable(self, error: OSError) -> _AgainError:
        why = self._hide(error.strerror or str(error) or type(error).__name__)[:_SHOWN]
        return _AgainError("connection", f"the judge cannot be reached: {why}")

    def _of_tls(self, error: ssl.SSLError) -> FailedError | _AgainError:
        """What came of no secure connection: a wrong certificate is as wrong the next time."""
        if isinstance(error, ssl.SSLCertVerificationError):
            file = os.environ.get("SSL_CERT_FILE")
            named = "is not set" if file is None else f"is {file!r}"
            named += "" if file is None or os.path.isfile(file) else ", and there is no such file"
            return FailedError(
                "connection",
                f"the judge's certificate is refused: {error.verify_message.rstrip('.')}. Give "
                "judge.base_url a name that the certificate is for, and the environment variable "
                "SSL_CERT_FILE the file (PEM) of the authority that has signed it, or of itself; "
                f"that variable {named}",
            )
        if error.reason in _NO_TLS:
            return FailedError(
                "connection",
                "the judge's server answers without TLS. Begin judge.base_url with http://, or "
                "give the port at which it speaks TLS",
            )
        return self._unreachable(error)

    def _read(self, response: Response, spent: Spent) -> str:
        status = response.status
        if 300 <= status < 400:
            raise FailedError(
                "redirect",
                f"the judge's server answered {status}, a redirect to "
                f"{self._hide(response.headers.get('location', '?'))[:_SHOWN]!r}, which is not "
                "followed: the key is for this server. Set judge.base_url to the right address",
            )
        if status != 200:
            told = self._hide(response.body[:2000].decode("utf-8", "replace"))
            message = f"the judge's server answered {status}: {told[:_SHOWN]!r}"
            if status in (401, 403) and not self._has_key:
                message += ". No key was sent: the variable that judge.key_env names is not set"
            if status == 429 or status == 408 or status >= 500:
                raise _AgainError("status", message, _retry_after(response))
            raise FailedError("status", message)
        try:
            found = json.loads(response.body)
            choice = found["choices"][0]
            text = choice["message"]["content"]
            usage = found.get("usage") or {}
            tokens = [int(usage.get(f"{n}_tokens") or 0) for n in ("prompt", "completion")]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise FailedError("garbage", "the judge's response is no chat completion") from None
        spent.prompt_tokens += max(tokens[0], 0)
        spent.completion_tokens += max(tokens[1], 0)
        self._budget.tokens += max(tokens[0], 0) + max(tokens[1], 0)
        if not isinstance(text, str):
            why = str(choice.get("finish_reason"))[:40]
            raise FailedError("garbage", f"the judge wrote nothing (finish_reason {why!r})")
        return self._hide(text)


class _AgainError(Exception):
    """An attempt that failed and is worth another, after `after_s` seconds if that is known."""

    def __init__(self, kind: str, message: str, after_s: float | None = None):
        super().__init__(message)
        self.kind, self.after_s = kind, after_s


def _retry_after(response: Response) -> float | None:
    """Seconds that the server asks to wait, from a number or a date; None if it asks nothing."""
    value = response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return min(float(value), 86_400.0)
    try:
        then = email.utils.parsedate_to_datetime(value).timestamp()
        return min(max(then - time.time(), 0.0), 86_400.0)
    except (ValueError, TypeError, OverflowError):
        return None
