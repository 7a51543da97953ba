"""A small HTTP/1.1 client for asyncio: it posts JSON, and trusts nothing that comes back.

It follows no redirect, asks for no compression, and stops reading at a limit. Connections are kept
for the next call. The standard library has no such client that can be cancelled; the ones that
have it would be one more dependency of every run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

_LINE = 16_384  # bytes of a header's line
_HEADERS = 100
_PORTS = {"http": 80, "https": 443}


class BadResponseError(Exception):
    """What the server sent is no response that can be used; `kind` is one of `client.KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class ClosedError(ConnectionError):
    """The connection ended before the response did."""


@dataclasses.dataclass(frozen=True)
class Response:
    """A response that was read to its end."""

    status: int
    headers: dict[str, str]  # names in small letters
    body: bytes


@dataclasses.dataclass(eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def close(self) -> None:
        self.writer.close()


class Poster:
    """Posts to one address, over connections of its own."""

    def __init__(self, url: str, headers: dict[str, str], *, limit_bytes: int):
        """`headers`: of every request. `limit_bytes`: of a response's body.

        Raises ValueError for an address that is not http:// or https:// with a host.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError as error:
            raise ValueError(f"is no address ({error})") from None
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must not hold a user, a password, a query or a fragment")
        self._host, self._port, self._limit = parts.hostname, port, limit_bytes
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        named = parts.hostname if ":" not in parts.hostname else f"[{parts.hostname}]"
        host = named if port == _PORTS[parts.scheme] else f"{named}:{port}"
        fixed = {
            "Host": host,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "grpo_jax",
            **headers,
        }
        if any(c in value for value in (parts.path, *fixed.values()) for c in "\r\n\0"):
            raise ValueError("has a line end in its address, or in its key")
        lines = [f"POST {parts.path or '/'} HTTP/1.1", *(f"{n}: {v}" for n, v in fixed.items())]
        self._head = "\r\n".join(lines).encode("latin-1", "replace")
        self._idle: list[_Connection] = []

    async def post(self, body: Any) -> Response:
        """The response to a JSON body.

        Raises OSError (ClosedError among them) if the connection fails, and BadResponseError for
        what is no HTTP, or too long. If it is cancelled, its connection is closed.
        """
        data = json.dumps(body).encode()
        request = b"%s\r\nContent-Length: %d\r\n\r\n%s" % (self._head, len(data), data)
        while True:
            is_old = bool(self._idle)
            connection = self._idle.pop() if is_old else await self._connect()
            try:
                connection.writer.write(request)
                await connection.writer.drain()
                response, stays_open = await self._response(connection.reader)
            except (ClosedError, ConnectionError) as error:
                connection.close()
                if is_old and not getattr(error, "answered", False):
                    continue  # the server had closed it meanwhile
                raise
            except BaseException:
                connection.close()
                raise
            if stays_open:
                self._idle.append(connection)
            else:
                connection.close()
            return response

    def close(self) -> None:
        """Closes the connections that wait for a next call."""
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> _Connection:
        how = {"ssl": self._tls, "limit": _LINE} if self._tls else {"limit": _LINE}
        return _Connection(*await asyncio.open_connection(self._host, self._port, **how))

    # --- Reading ---

    async def _response(self, reader: asyncio.StreamReader) -> tuple[Response, bool]:
        status, version, headers = await self._head_of(reader)
        while 100 <= status < 200:
            status, version, headers = await self._head_of(reader)
        has_length = "content-length" in headers
        if status in (204, 304):
            body = b""
        elif "chunked" in headers.get("transfer-encoding", "").lower():
            body, has_length = await self._chunks(reader), True
        elif has_length:
            if not headers["content-length"].isdecimal():
                raise BadResponseError("garbage", "the response has a broken Content-Length")
            body = await self._exactly(reader, int(headers["content-length"][:18]))
        else:
            body = await self._rest(reader)
        stays_open = version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
        return Response(status, headers, body), stays_open and (has_length or status in (204, 304))

    async def _line(self, reader: asyncio.StreamReader) -> str:
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            closed = ClosedError("the connection was closed before the response ended")
            closed.answered = bool(error.partial)
            raise closed from None
        except asyncio.LimitOverrunError:
            raise BadResponseError("garbage", "the response has a line without an end") from None
        return line.decode("latin-1").strip("\r\n")

    async def _head_of(self, reader: asyncio.StreamReader) -> tuple[int, str, dict[str, str]]:
        version, _, rest = (await self._line(reader)).partition(" ")
        status = rest[:3]
        if version not in ("HTTP/1.1", "HTTP/1.0") or not (status.isdecimal() and len(status) == 3):
            raise BadResponseError("garbage", "the response is no HTTP")
        headers: dict[str, str] = {}
        for _ in range(_HEADERS):
            line = await self._line(reader)
            if not line:
                return int(status), version, headers
            name, colon, value = line.partition(":")
            if not colon:
                raise BadResponseError("garbage", "the response has a broken header")
            headers[name.strip().lower()] = value.strip()
        raise BadResponseError("garbage", f"the response has more than {_HEADERS} headers")

    def _too_long(self) -> BadResponseError:
        return BadResponseError("size", f"the response is longer than {self._limit:,} bytes")

    async def _exactly(self, reader: asyncio.StreamReader, length: int) -> bytes:
        if length > self._limit:
            raise self._too_long()
        try:
            return await reader.readexactly(length)
        except asyncio.IncompleteReadError:
            closed = ClosedError("the connection was closed before the response ended")
            closed.answered = True
            raise closed from None

    async def _rest(self, reader: asyncio.StreamReader) -> bytes:
        body = bytearray()
        while part := await reader.read(65_536):
            body += part
            if len(body) > self._limit:
                raise self._too_long()
        return bytes(body)

    async def _chunks(self, reader: asyncio.StreamReader) -> bytes:
        body = bytearray()
        while True:
            size = (await self._line(reader)).partition(";")[0].strip()
            try:
                length = int(size[:16], 16)
            except ValueError:
                raise BadResponseError("garbage", "the response has a broken chunk") from None
            if length < 0 or len(body) + length > self._limit:
                raise self._too_long()
            if not length:
                break
            body += await self._exactly(reader, length)
            await self._line(reader)
        for _ in range(_HEADERS):
            if not await self._line(reader):
                return bytes(body)
        raise BadResponseError("garbage", "the response has too many trailers")
