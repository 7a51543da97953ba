"""Messages between the trainer and its environments' processes: a length, then as many bytes.

The trainer never waits for one process: it reads and writes what a socket takes at once. A process
of an environment waits for the trainer.
"""

from __future__ import annotations

import socket
import struct

_HEADER = struct.Struct(">Q")
_READ_BYTES = 1 << 16  # of one read
_MAX_BYTES = 1 << 30  # of a message; more cannot be meant


def framed(data: bytes) -> bytes:
    """A message with its length before it."""
    return _HEADER.pack(len(data)) + data


def read(sock: socket.socket) -> bytes:
    """The next message, waited for; EOFError when the other side is gone."""
    (length,) = _HEADER.unpack(_exactly(sock, _HEADER.size))
    return _exactly(sock, length)


def write(sock: socket.socket, data: bytes) -> None:
    """Sends a message whole; OSError when the other side is gone."""
    sock.sendall(framed(data))


def read_with_socket(sock: socket.socket) -> tuple[bytes, int | None]:
    """The next message, and the descriptor that came with it; None if none did."""
    header, descriptors, _, _ = socket.recv_fds(sock, _HEADER.size, 1)
    if not header:
        raise EOFError
    header += _exactly(sock, _HEADER.size - len(header))
    data = _exactly(sock, _HEADER.unpack(header)[0])
    return data, descriptors[0] if descriptors else None


def _exactly(sock: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = sock.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


class Line:
    """The trainer's end of a socket: it never waits."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.sock = sock
        self._in, self._out = bytearray(), bytearray()

    @property
    def is_waiting(self) -> bool:
        """Whether something is still to be sent, once the other side reads."""
        return bool(self._out)

    def send(self, data: bytes) -> None:
        """Sends a message, or keeps what the socket does not take now; OSError if it is gone."""
        self._out += framed(data)
        self.flush()

    def flush(self) -> None:
        """Sends what is kept, as far as the socket takes it; OSError if the other side is gone."""
        while self._out:
            try:
                del self._out[: self.sock.send(self._out[: 1 << 20])]
            except BlockingIOError:
                return

    def receive(self) -> list[bytes]:
        """The messages that have arrived whole; EOFError once no more can come and none is here."""
        is_over = False
        while True:
            try:
                part = self.sock.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                part = b""
            if not part:
                is_over = True
                break
            self._in += part
            if len(part) < _READ_BYTES:
                break
        found = []
        while len(self._in) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._in)
            if length > _MAX_BYTES:
                raise EOFError
            end = _HEADER.size + length
            if len(self._in) < end:
                break
            found.append(bytes(self._in[_HEADER.size : end]))
            del self._in[:end]
        if is_over and not found:
            raise EOFError
        return found

    def close(self) -> None:
        """Closes the socket."""
        self.sock.close()
