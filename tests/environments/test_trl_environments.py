"""Environments written for TRL run unchanged: tools, messages and rewards are those of its loop."""

from __future__ import annotations

import asyncio
import inspect
import random

import trl_environments
from test_live import act, begin, finish, turn

from grpo_jax.environments import contract
from grpo_jax.environments.live import Limits, Live
from grpo_jax.rewards import registry

HERE = "trl_environments"


class Trl:
    """What TRL 1.16 does with one environment in `_generate_and_score_completions` and
    `_tool_call_loop`, transcribed; of results of asynchronous tools it does not keep the order,
    which is left out here."""

    def __init__(self, factory=None, tools=()):
        self.environment = factory() if factory else None
        members = inspect.getmembers(type(self.environment), predicate=inspect.isfunction)
        methods = [
            getattr(self.environment, name)
            for name, _ in members
            if name not in ("reset", "get_reward") and not name.startswith("_")
        ]
        methods = methods if factory else []
        self.tools = {tool.__name__: tool for tool in [*tools, *methods]}

    def messages(self, calls):
        found = []
        for name, arguments in calls:
            try:
                if name not in self.tools:
                    raise ValueError(f"Tool {name} not found.")
                result = self.tools[name](**arguments)
                result = asyncio.run(result) if inspect.isawaitable(result) else result
            except Exception as error:
                result = {"error": str(error)}
            found.append({"role": "tool", "name": name, "content": str(result)})
        return found


def both(live, trl, calls):
    got = act(live, turn(*calls))
    assert got.messages == trl.messages(calls)
    return got


def start(classes=(), tools=(), rewards=()):
    rewards = registry.load([f"{HERE}:{r}" for r in rewards], [1.0] * len(rewards))
    found = contract.read(
        [f"{HERE}:{c}" for c in classes], [f"{HERE}:{t}" for t in tools], rewards=rewards
    )
    return Live(found, Limits(5.0, 100.0))


def test_a_counter():
    trl = Trl(trl_environments.CounterEnv)
    with start(["CounterEnv"], rewards=["counter_reward"]) as live:
        assert [s["function"]["name"] for s in live.contract.schemas({})] == list(trl.tools)
        for target in (3, 4):
            row = {"prompt": "p", "target": target}
            assert begin(live, **row).messages[0]["content"] == trl.environment.reset(**row)
            both(live, trl, [("increment", {"step": 1}), ("increment", {"step": 2})])
            both(live, trl, [("increment", {}), ("decrement", {"step": 1})])
            want = trl_environments.counter_reward([None], [trl.environment])
            assert finish(live, **row).scored["counter_reward"].values == want
        assert live.num_started == 1  # made once, reset often


def test_tools_alone():
    tools = [trl_environments.multiply, trl_environments.async_add]
    trl = Trl(tools=tools)
    with start(tools=["multiply", "async_add"]) as live:
        assert begin(live).messages == []
        both(live, trl, [("multiply", {"a": 3, "b": -4}), ("async_add", {"a": 1, "b": 2})])
        both(live, trl, [("async_add", {"a": "x", "b": "y"}), ("multiply", {"c": 1})])
        assert act(live, turn(content="-12")).messages is None
        assert finish(live).reward is None


def test_a_word_game():
    trl = Trl(trl_environments.WordGameEnv)
    with start(["WordGameEnv"]) as live:
        for seed in range(3):
            random.seed(seed)
            assert begin(live, seed=seed).messages[0]["content"] == trl.environment.reset()
            both(live, trl, [("guess", {"word": "[slate]"}), ("guess", {"word": "no"})])
            both(live, trl, [("guess", {"word": word}) for word in trl_environments.WORDS])
            both(live, trl, [("guess", {"word": "after"}), ("guess", {"word": "end"})])
            assert finish(live).reward == trl.environment.get_reward() == 1.0
