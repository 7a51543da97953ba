"""Environments of other libraries, unchanged, beside those libraries themselves."""

from __future__ import annotations

import json
import sys

import pytest
from test_live import act, begin, finish, said, turn

from grpo_jax.environments import contract
from grpo_jax.environments.live import Limits, Live

ADAPTERS = "grpo_jax.environments.adapters"


def start(entry, seconds=20.0):
    return Live(contract.read([f"{ADAPTERS}.{entry}"], []), Limits(seconds, 100.0))


def talk(live, text):
    return act(live, turn(content=text), messages=[{"role": "assistant", "content": text}])


# --- Gymnasium ------------------------------------------------------------------------------------


def test_a_game_of_gymnasium_is_its_own():
    """Step by step: observations and rewards are those of the library, for the same seed."""
    gymnasium = pytest.importorskip("gymnasium")
    words, how = ("left", "down", "right", "up"), {"render_mode": "ansi", "map_name": "4x4"}
    game = gymnasium.make("FrozenLake-v1", **how)
    entry = f"gymnasium:Gymnasium(name='FrozenLake-v1', actions={words}, "
    entry += "render_mode='ansi', map_name='4x4')"
    with start(entry) as live:
        total, ends = 0.0, 0
        for seed in range(12):
            game.reset(seed=seed)
            assert said(begin(live, seed=seed))[0] == game.render()
            for action in [1, 1, 2, 2, 1, 2, 2, 1, 2]:
                _, reward, terminated, truncated, _ = game.step(action)
                got = talk(live, f"I go {words[action]}.")
                assert got.turn_reward == reward
                if terminated or truncated:
                    assert got.messages is None
                    ends += 1
                    break
                assert said(got) == [game.render()]
            assert finish(live).reward == reward
            total += reward
        assert ends > 6
        begin(live)
        assert said(talk(live, "jump")) == ["Say one of: left, down, right, up."]


def test_numbers_are_actions_and_observations():
    gymnasium = pytest.importorskip("gymnasium")
    game = gymnasium.make("Blackjack-v1")
    with start("gymnasium:Gymnasium(name='Blackjack-v1')") as live:
        observation, _ = game.reset(seed=5)
        assert said(begin(live, seed=5)) == [str(observation)]
        assert said(talk(live, "7")) == ["Say a number from 0 to 1."]
        assert talk(live, "0").messages is None
        assert finish(live).reward == game.step(0)[1]
    with pytest.raises(ValueError, match="actions has 1 words, and Blackjack-v1 has 2"):
        start("gymnasium:Gymnasium(name='Blackjack-v1', actions=('a',))")
    with pytest.raises(ValueError, match=r"cannot be made: .*Nope"):
        start("gymnasium:Gymnasium(name='Nope-v1')")


# --- MCP ------------------------------------------------------------------------------------------

SERVER = '''
import json
import sys
try:
    from mcp.server import MCPServer as Server
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server

server = Server("notes")
notes = []


@server.tool()
def remember(text: str) -> str:
    """Remembers a text."""
    notes.append(text)
    return f"{len(notes)} notes"


@server.tool()
def recall(number: int) -> str:
    """Says a note."""
    if number >= len(notes):
        raise ValueError("there is no such note")
    return notes[number]


server.run()
'''


@pytest.mark.parametrize("fresh", [False, True])
def test_tools_of_a_server(tmp_path, fresh):
    pytest.importorskip("mcp")
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py")]
    with start(f"mcp:MCP(command={command}, fresh={fresh})") as live:
        remember, recall = live.contract.schemas({})
        assert remember["function"]["name"] == "remember"
        assert remember["function"]["description"] == "Remembers a text."
        assert recall["function"]["parameters"]["properties"]["number"]["type"] == "integer"
        for episode in range(2):
            begin(live)
            before = 0 if fresh else episode
            got = act(live, turn(("remember", {"text": "a"}), ("recall", {"number": before})))
            assert said(got) == [f"{before + 1} notes", "a"]
            got = act(live, turn(("recall", {"number": 7}), ("recall", {"x": 1})))
            assert all("Error executing tool recall" in text for text in said(got))
            assert got.failures == ("error", "error")
            finish(live)


def test_servers_that_do_not_start(tmp_path):
    pytest.importorskip("mcp")
    with pytest.raises(ValueError, match=r"cannot be made: .*no_such_program"):
        start("mcp:MCP(command=['no_such_program'])")
    with pytest.raises(ValueError, match="give the command of a server, or the url"):
        start("mcp:MCP()")


def test_without_their_libraries(monkeypatch, tmp_path):
    for name in ("gymnasium", "mcp", "verifiers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(tmp_path)
    for entry, extra in (
        ("gymnasium:Gymnasium(name='x')", "gymnasium"),
        ("mcp:MCP(command=['x'])", "mcp"),
    ):
        with pytest.raises(ValueError, match=rf"pip install 'grpo_jax\[{extra}\]'"):
            start(entry)


# --- verifiers ------------------------------------------------------------------------------------

ENVIRONMENT = '''
import verifiers as vf
from datasets import Dataset


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: One.
        b: Another.
    """
    return a + b


def is_right(completion, answer, state) -> float:
    return float(completion[-1].content == answer) + 0.1 * len(state["trajectory"])


class Guess(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["tries"] = 0

    @vf.stop
    async def found(self, state):
        steps = state["trajectory"]
        return bool(steps) and steps[-1]["completion"][-1].content == state["answer"]

    async def env_response(self, messages, state, **more):
        state["tries"] += 1
        return [{"role": "user", "content": f"no, {state['tries']}"}]


def load_environment(kind="tools", max_turns=5):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    given = dict(dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[is_right]),
                 max_turns=max_turns, system_prompt="Be short.")
    return vf.ToolEnv(tools=[add], **given) if kind == "tools" else Guess(**given)
'''


@pytest.fixture(scope="module")
def made_verifiers(tmp_path_factory):
    """The folder of an environment written for verifiers, and its rows."""
    pytest.importorskip("verifiers")
    from grpo_jax.environments.adapters import verifiers

    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "made_for_verifiers.py").write_text(ENVIRONMENT)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    assert verifiers.write_rows(folder / "rows.jsonl", "made_for_verifiers") == 4
    yield [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    patch.undo()


def test_tools_of_verifiers(made_verifiers):
    """Its tools, messages and rubric, with our turns."""
    row = made_verifiers[2]
    assert [m["role"] for m in row["prompt"]] == ["system", "user"] and row["answer"] == "3"
    with start("verifiers:Verifiers(name='made_for_verifiers')") as live:
        (schema,) = live.contract.schemas({})
        assert schema["function"]["name"] == "add"
        assert schema["function"]["parameters"]["required"] == ["a", "b"]
        for _ in range(2):
            assert begin(live, **row).messages == []
            calls = turn(("add", {"a": 2, "b": 1}), ("add", {"a": 1}), ("syntax", "no end"))
            got = act(live, calls, messages=[{"role": "assistant", "content": ""}])
            assert [m["name"] for m in got.messages] == ["add", "add", "unknown"]
            assert said(got)[0] == "3" and "missing 1 required" in said(got)[1]
            assert talk(live, "3").messages is None
            assert finish(live).reward == pytest.approx(1.2)


def test_turns_of_verifiers(made_verifiers):
    """Its own stop and its limit of turns; an episode that we end is judged as it is."""
    entry = "verifiers:Verifiers(name='made_for_verifiers', kind='guess', max_turns=3)"
    with start(entry) as live:
        begin(live, **made_verifiers[0])
        assert said(talk(live, "5")) == ["no, 1"] and said(talk(live, "6")) == ["no, 2"]
        assert talk(live, "1").messages is None
        assert finish(live).reward == pytest.approx(1.3)
        begin(live, **made_verifiers[0])
        assert [said(talk(live, t)) for t in "78"] == [["no, 1"], ["no, 2"]]
        assert talk(live, "9").messages is None
        assert finish(live).reward == pytest.approx(0.3)
        begin(live, **made_verifiers[0])
        assert said(talk(live, "7")) == ["no, 1"]
        assert finish(live).reward == pytest.approx(0.1)
