"""Times conversations with environments: `python benchmarks/environments.py`.

64 episodes of three turns, of a model of random weights. Prints

- the time that one round of answers adds when each takes a second (a serial loop adds 64 s),
- the share of the time in which the device waits for answers, where decoding takes a second or more
  and half of the episodes have slots (`environment.order = "eager"`),
- the time of a rollout in three turns over that of one turn of as many drawn tokens, where answers
  take no time: what the environment's tokens, which are computed too, and the processes cost. The
  same with environments in this process, which answer at once: what the tokens alone cost.

Measure while nothing else runs. `--json FILE` writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import timing
import workload

from grpo_jax import keys
from grpo_jax.devices import sharding
from grpo_jax.environments import contract, episodes
from grpo_jax.environments.episode import Limits, Start
from grpo_jax.environments.live import Answer, Live
from grpo_jax.environments.live import Limits as LiveLimits
from grpo_jax.environments.turns import Turn
from grpo_jax.models import parameters
from grpo_jax.sampling.decode import decoder_for
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Sampling

TURNS, PROMPTS, GROUP, SAID = 3, 8, 8, 8


class Dialogue:
    """Any answer is the same few tokens."""

    @staticmethod
    def parse(turn_ids: list[int]) -> Turn:
        return Turn("")

    @staticmethod
    def follow(turn_ids: list[int], stopped: bool, messages: list) -> list[int]:
        return list(range(2, 2 + SAID))


class AtOnce:
    """Environments in this process that say the same to every turn."""

    num_live = num_lost = 0

    def __init__(self) -> None:
        self._ready: list[Answer] = []

    def reset(self, row: int, columns: dict, seed: int, rollout_seed: int) -> None:
        self._ready.append(Answer(row, "reset", messages=[]))

    def act(self, row: int, turn: Turn, messages: list[dict]) -> None:
        self._ready.append(Answer(row, "act", messages=[{"role": "user", "content": "..."}]))

    def finish(self, row: int, *of_episode: Any) -> None:
        self._ready.append(Answer(row, "finish", reward=0.0))

    def answers(self, timeout_s: float) -> list[Answer]:
        found, self._ready = self._ready, []
        return found


class Bench:
    """A model, and a rollout of it in turns."""

    def __init__(self, turn_tokens: int, num_slots: int = 0):
        model, mesh = workload.SHAPES["tiny"], sharding.make_mesh()
        self.turn_tokens, self.limit = turn_tokens, TURNS * (turn_tokens + SAID) + 1
        decoder = decoder_for(model, mesh, Sampling(), (), self.limit, "float32")
        self.engine = Engine(decoder, num_slots=num_slots)
        params = parameters.init(model, keys.key_for(0, "init"))
        self.params = self.engine.publish(params)
        found = contract.read(("sleeper:Sleeper",), ())
        self.world = Live(found, LiveLimits(10.0, 300.0), num=PROMPTS * GROUP)

    def rollout(
        self, seconds: float, *, eager: bool = False, at_once: bool = False
    ) -> tuple[float, Any]:
        """Seconds of a rollout whose answers take so long each, and what is told of it.

        `at_once`: the environments are those of `AtOnce`.
        """
        start = Start("?", {"seconds": seconds}, 0, Dialogue, lambda text: [])
        prompts = [[3 + p] * 16 for p in range(PROMPTS)]
        began = time.monotonic()
        _, told = episodes.sample(
            self.engine,
            self.params,
            AtOnce() if at_once else self.world,
            [start] * PROMPTS,
            prompts,
            Limits(TURNS, self.limit, self.turn_tokens),
            group=GROUP,
            key=keys.key_for(0, "rollout"),
            temperature=1.0,
            rollout_seeds=range(PROMPTS * GROUP),
            eager=eager,
            on_group=lambda p, ended: None,
        )
        return time.monotonic() - began, told

    def one_turn(self) -> float:
        """Seconds of a rollout of one turn that draws as many tokens."""
        prompts = [[3 + p] * 16 for p in range(PROMPTS)]
        began = time.monotonic()
        drawn = self.engine.first_turns(
            self.params,
            prompts,
            GROUP,
            self.engine.keys(keys.key_for(0, "rollout"), PROMPTS * GROUP),
            1.0,
            limit=TURNS * self.turn_tokens,
        )
        for _ in drawn:
            pass
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turn_tokens", type=int, default=32)
    parser.add_argument("--long_turn_tokens", type=int, default=256, help="for the idle share")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    short = Bench(args.turn_tokens)

    def times() -> tuple[float, float, float]:
        turns = [short.rollout(0.0, at_once=at_once)[0] for at_once in (False, True)]
        return *turns, short.one_turn()

    times()  # compiles
    told = [times() for _ in range(args.repeats)]
    ratio, alone = (statistics.median(t[i] / t[2] for t in told) for i in (0, 1))
    slept = [short.rollout(1.0)[0] for _ in range(args.repeats)]
    base = statistics.median(turns for turns, *_ in told)
    a_round = (statistics.median(slept) - base) / TURNS
    short.world.close()
    long = Bench(args.long_turn_tokens, num_slots=PROMPTS * GROUP // 2)
    long.rollout(0.0, eager=True)
    seconds, told = long.rollout(1.0, eager=True)
    long.world.close()
    values = {
        "environment": timing.environment(),
        "round_s": a_round,
        "turns_over_one_turn": ratio,
        "turns_at_once_over_one_turn": alone,
        "idle_share": told.idle_s / seconds,
        "rollout_s": seconds,
        "read_again": told.read_again / told.drawn,
    }
    print(f"a round whose answers take 1 s adds {a_round:.2f} s (bar 1.5)")
    print(f"{TURNS} turns / one turn of as many tokens: {ratio:.2f} (bar 1.25)")
    print(f"the same without the environments' processes: {alone:.2f}")
    print(f"idle {values['idle_share']:.1%} of {seconds:.1f} s (bar 10 %)")
    if args.json:
        Path(args.json).write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
