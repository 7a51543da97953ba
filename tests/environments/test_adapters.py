"""Environments of other libraries, unchanged, beside those libraries themselves."""

from __future__ import annotations

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
