"""Environments of verifiers up to 0.3.1, unchanged: their own loop runs, and asks our policy.

    environment.classes = (
        "grpo_jax.environments.adapters.verifiers:Verifiers(name='my-environment')",
    )

Their client is ours: where it would ask a server for a reply, it waits for the policy's turn. So
setup, tools, stops and rubric are theirs. `write_rows` writes their dataset as the run's problems.
Not covered: rewards of whole groups, and environments that rewrite a conversation. verifiers 0.4
has no such environments any more. Needs the extra `verifiers`.
"""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

_COLUMNS = ("prompt", "answer", "info", "example_id", "task")


@functools.cache
def _loaded(name: str, arguments: str) -> Any:
    """An environment, loaded once in the process from which others are forked."""
    try:
        import verifiers as vf

        vf.MultiTurnEnv  # noqa: B018 - verifiers 0.4 has none
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"verifiers up to 0.3.1 is needed ({error}): pip install 'grpo_jax[verifiers]'."
        ) from error
    return vf.load_environment(name, **json.loads(arguments))


def write_rows(file: str | Path, name: str, *, held_out: bool = False, **arguments: Any) -> int:
    """Writes an environment's dataset as JSON lines, for `data.path`; returns their number."""
    environment = _loaded(name, json.dumps(arguments, sort_keys=True))
    rows = environment.get_eval_dataset() if held_out else environment.get_dataset()
    with open(file, "w", encoding="utf-8") as out:
        for row in rows:
            kept = {n: row[n] for n in _COLUMNS if row.get(n) is not None}
            out.write(json.dumps(kept, ensure_ascii=False) + "\n")
    return len(rows)


class Verifiers:
    """One rollout of an environment at a time."""

    def __init__(self, name: str, **arguments: Any):
        """`name` and `arguments` are those of `verifiers.load_environment`."""
        self._environment = _loaded(name, json.dumps(arguments, sort_keys=True))
        self._rollout: asyncio.Future | None = None

    @classmethod
    def __prepare__(cls, name: str, **arguments: Any) -> None:
        _loaded(name, json.dumps(arguments, sort_keys=True))

    def __tools__(self) -> list[tuple[dict[str, Any], None]]:
        """The environment's tools, with their schemas; it calls them itself."""
        of = lambda t: {n: dict(t)[n] for n in ("name", "description", "parameters")}  # noqa: E731
        tools = self._environment.tool_defs or ()
        return [({"type": "function", "function": of(tool)}, None) for tool in tools]

    async def reset(self, prompt: Any, **row: Any) -> None:
        """Begins a rollout of the row, up to the first question to the policy."""
        if self._rollout is not None:
            self._rollout.cancel()
        self._asked: asyncio.Queue = asyncio.Queue()
        given = {"answer": "", "info": {}, "example_id": 0} | row | {"prompt": prompt}
        given = {n: given[n] for n in _COLUMNS if n in given}
        rollout = self._environment.rollout(given, _client(self._asked), "policy", {})
        self._rollout = asyncio.ensure_future(rollout)
        await self._next(0)

    async def _next(self, known: int) -> list[dict] | None:
        """What it says after the `known` messages, until it asks the policy; None: it is over."""
        asked = asyncio.ensure_future(self._asked.get())
        await asyncio.wait([asked, self._rollout], return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            asked.cancel()
            self._rollout.result()  # raises what went wrong
            return None
        self._known, self._reply = asked.result()
        if known > len(self._known):
            raise RuntimeError("the environment rewrites the conversation, which is not supported")
        made = [c for m in self._known for c in getattr(m, "tool_calls", None) or ()]
        names = {call.id: call.name for call in made}
        return [_ours(message, names) for message in self._known[known:]]

    async def __turn__(self, calls: list[dict], messages: list[dict]) -> list[dict] | None:
        """Gives the policy's turn to the environment, and waits for what it says."""
        from verifiers.types import Response, ResponseMessage, ToolCall

        said = messages[-1]
        made = [
            ToolCall(
                id=f"call_{len(self._known)}_{i}",
                name=call["name"],
                # A malformed call is not JSON, and the environment says so.
                arguments=json.dumps(call["arguments"]) if "arguments" in call else call["reason"],
            )
            for i, call in enumerate(calls)
        ]
        message = ResponseMessage(
            content=said.get("content") or "",
            reasoning_content=said.get("reasoning_content"),
            tool_calls=made or None,
            finish_reason="tool_calls" if made else "stop",
            is_truncated=False,
        )
        self._reply.set_result(Response(id="", created=0, model="policy", message=message))
        return await self._next(len(self._known) + 1)

    async def get_reward(self) -> float:
        """What the environment's rubric gives; a rollout that goes on is ended before."""
        from verifiers.errors import OverlongPromptError

        if not self._rollout.done():
            self._reply.set_exception(OverlongPromptError("the episode was ended"))
        state = await self._rollout
        if state.get("error") is not None:
            raise state["error"]
        await self._environment.rubric.score_rollout(state)
        return float(state["reward"])


def _ours(message: Any, names: dict[str, str]) -> dict[str, Any]:
    """A message of theirs in TRL's form."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "\n".join(dict(part).get("text", "") for part in content)
    found = {"role": message.role, "content": content}
    return found | ({"name": names[message.tool_call_id]} if message.role == "tool" else {})


def _client(asked: asyncio.Queue) -> Any:
    """A client of theirs that puts each question in a queue, with a future for the reply."""
    from verifiers.clients import Client

    class Policy(Client):
        async def get_response(self, prompt, model, sampling_args, tools=None, **more):
            reply = asyncio.get_running_loop().create_future()
            asked.put_nowait((list(prompt), reply))
            return await reply

    Policy.__abstractmethods__ = frozenset()  # they are parts of the method above
    return Policy(None)
