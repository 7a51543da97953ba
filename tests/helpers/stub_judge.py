"""A judge's server for tests: HTTP over asyncio, in a thread, that answers as it is told.

`python stub_judge.py --delay 0.2` serves until it is ended, and prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import ssl
import threading
from collections.abc import Callable

_NUMBER = re.compile(r"number of this call is ([0-9a-f]{16})")
_ANSWER = re.compile(r"\[\[BEGIN ANSWER(?: \d+)? ([0-9a-f]+)\]\]\n(.*?)\n\[\[END ANSWER", re.DOTALL)


def answers(body: dict) -> list[str]:
    """The answers that a request is about, as the judge sees them."""
    return [text for _, text in _ANSWER.findall(body["messages"][1]["content"])]


def number(body: dict) -> str:
    return _NUMBER.search(body["messages"][1]["content"])[1]


def criteria(body: dict) -> list[tuple[str, int, int]]:
    """Each criterion's name, lowest and highest number."""
    line = body["messages"][1]["content"].rsplit("\n", 1)[-1]
    found = re.findall(r"(\w+)=<(\d+) to (\d+)>", line)
    return [(name, int(low), int(high)) for name, low, high in found]


def by_length(body: dict) -> str:
    """Each criterion by the length of the answer; of several answers, the longest is best."""
    texts = answers(body)
    if asked := criteria(body):
        values = ((n, low + len(texts[0]) % (high - low + 1)) for n, low, high in asked)
        told = " ".join(f"{name}={value}" for name, value in values)
    elif len(texts) == 2 and "one of the lines" in body["messages"][1]["content"]:
        told = {1: "1", -1: "2", 0: "tie"}[
            (len(texts[0]) > len(texts[1])) - (len(texts[0]) < len(texts[1]))
        ]
    else:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        told = " > ".join(str(i + 1) for i in order)
    return f"It is long enough.\nVERDICT-{number(body)}: {told}"


def completion(text: str | None, prompt_tokens: int = 100, completion_tokens: int = 10) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return response(200, json.dumps({"choices": [choice], "usage": usage}).encode())


def response(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Told", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class StubJudge:
    """A context manager. `reply(body, i)` gives the bytes of response i, or None: never.

    An empty one, or one in a tuple, closes the connection. What is sent stays in `requests`.
    """

    def __init__(
        self,
        reply: Callable[[dict, int], bytes | tuple | None] | None = None,
        delay_s: float = 0.0,
        tls: ssl.SSLContext | None = None,
    ):
        self._reply = reply or (lambda body, i: completion(by_length(body)))
        self._delay_s, self._tls = delay_s, tls
        self.requests: list[dict] = []
        self.heads: list[str] = []
        self.at_once = self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"http{'s' * bool(self._tls)}://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> StubJudge:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        start = asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls)
        server = self._loop.run_until_complete(start)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connected(self, reader, writer) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head.decode())
                length = int(re.search(rb"Content-Length: (\d+)", head)[1])
                body = json.loads(await reader.readexactly(length))
                i = len(self.requests)
                self.requests.append(body)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                sent = self._reply(body, i)
                if sent is None:
                    await asyncio.sleep(3600)
                self.at_once -= 1
                writer.write(sent[0] if isinstance(sent, tuple) else sent)
                await writer.drain()
                if not sent or isinstance(sent, tuple):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    with StubJudge(delay_s=parser.parse_args().delay) as stub:
        print(stub.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
