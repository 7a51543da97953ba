"""Servers of the Model Context Protocol: their tools are those of an environment.

    environment.classes = (
        "grpo_jax.environments.adapters.mcp:MCP(command=['python', 'server.py'])",
    )

Each environment starts a server of its own, or opens a session of its own with the one at `url`.
Needs the extra `mcp`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards import worker


class MCP:
    """The tools of one server. What a server knows of an episode ends with it if `fresh`."""

    def __init__(
        self,
        command: Sequence[str] = (),
        url: str = "",
        only: Sequence[str] = (),
        fresh: bool = False,
    ):
        """`command` starts a server that speaks on its standard output, `url` is one that runs.

        `only`: names of the tools that the policy sees; (): all. `fresh`: a server, or a session,
        for each episode.
        """
        if bool(command) == bool(url):
            raise ValueError("give the command of a server, or the url of one")
        self._command, self._url, self._only = list(command), url, set(only)
        self._fresh, self._is_used = fresh, False
        self._end: asyncio.Event | None = None
        self._begin()

    def _begin(self) -> None:
        """Opens the session, in the event loop of this process; raises what went wrong."""

        async def begin() -> list[Any]:
            ready = asyncio.get_running_loop().create_future()
            self._held = asyncio.ensure_future(self._hold(ready))
            return await ready

        self._tools = worker.waited_for(begin())
        missing = self._only - {tool.name for tool in self._tools}
        if missing:
            raise ValueError(
                f"only = {sorted(self._only)}, and the server's tools are "
                f"{sorted(tool.name for tool in self._tools)}"
            )

    async def _hold(self, ready: asyncio.Future) -> None:
        """The session from its beginning to its end, which must be in one task."""
        self._end = asyncio.Event()
        try:
            async with contextlib.AsyncExitStack() as stack:
                self._session = await self._opened(stack)
                await self._session.initialize()
                ready.set_result(await self._all_tools())
                await self._end.wait()
        except BaseException as error:  # also groups of errors
            if ready.done():
                raise
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            ready.set_exception(error)

    async def _opened(self, stack: contextlib.AsyncExitStack) -> Any:
        try:
            from mcp import ClientSession, StdioServerParameters
            from mcp.client.stdio import stdio_client
            from mcp.client.streamable_http import streamable_http_client
        except ImportError as error:
            raise ImportError("MCP is not installed: pip install 'grpo_jax[mcp]'.") from error
        if self._url:
            streams = await stack.enter_async_context(streamable_http_client(self._url))
        else:
            program, *arguments = self._command
            how = StdioServerParameters(command=program, args=arguments, env=dict(os.environ))
            # What the server prints for its operator is lost, as of any program of an environment.
            nowhere = stack.enter_context(open(os.devnull, "w"))
            streams = await stack.enter_async_context(stdio_client(how, errlog=nowhere))
        return await stack.enter_async_context(ClientSession(*streams[:2]))

    async def _all_tools(self) -> list[Any]:
        found, cursor = [], None
        while True:
            page = await self._session.list_tools(**({"cursor": cursor} if cursor else {}))
            found += page.tools
            cursor = getattr(page, "next_cursor", None) or getattr(page, "nextCursor", None)
            if not cursor:
                return found

    def __tools__(self) -> list[tuple[dict[str, Any], Callable]]:
        """The server's tools, with their schemas."""
        return [
            (_schema(tool), self._call(tool.name))
            for tool in self._tools
            if not self._only or tool.name in self._only
        ]

    def _call(self, name: str) -> Callable:
        async def call(**arguments: Any) -> str:
            result = await self._session.call_tool(name, arguments)
            text = "\n".join(getattr(part, "text", f"[{part.type}]") for part in result.content)
            if getattr(result, "is_error", None) or getattr(result, "isError", None):
                raise RuntimeError(text)
            return text

        return call

    def reset(self, **row: Any) -> None:
        """Begins an episode."""
        if self._fresh and self._is_used:
            worker.waited_for(self._close())
            self._begin()
        self._is_used = True

    async def _close(self) -> None:
        self._end.set()
        await asyncio.wait([self._held], timeout=2.0)


def _schema(tool: Any) -> dict[str, Any]:
    parameters = getattr(tool, "input_schema", None) or tool.inputSchema
    function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": function}
