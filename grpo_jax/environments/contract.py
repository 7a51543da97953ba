"""The contract with a user's environments and tools: TRL 1.16's, and one method more.

A tool is a function with type hints and a docstring. An environment is a class:

    reset(**row) -> str | None     begins an episode; a text is added to the prompt
    every other public method      a tool; it may raise, and may be asynchronous
    get_reward() -> float | None   optional: the episode's reward
    respond(messages)              optional, not in TRL: called after a turn without a valid call.
                                   None ends the episode, a text or messages continue it

It is made without arguments, once for each episode that is live at a time, and reused. A number
`turn_reward`, if it has one, is set to 0 before each turn and read after it. `reset` is given the
row's columns, all or those that it names; the column `environment` chooses among several classes
and is not passed on. If `reset` names them, `seed` is one number for all episodes of a problem in
this step, and `rollout_seed` another for each. Python's and NumPy's global generators have `seed`.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import select
import time
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_jax.environments.described import CLASSES, TOOLS, Kind
from grpo_jax.environments.forking import Setup
from grpo_jax.environments.home import Home, why
from grpo_jax.rewards import given, registry, sources
from grpo_jax.rewards.registry import Reward

COLUMN = "environment"  # that chooses among several classes
START_S = 120.0  # for the user's modules to be imported, and for an instance to be made
_NAMED = re.compile(r"(?:([\w.\-]+)=)?(\S.*)")


def read(
    classes: Sequence[str],
    tools: Sequence[str],
    *,
    rewards: Sequence[Reward] = (),
    memory_bytes: int = 0,
) -> Contract:
    """The environments and tools of the options, imported and looked at in a process of theirs.

    `classes`: "module:Class", or several "name=module:Class"; `tools`: "module:function". `rewards`
    may hold any; those that take `environments` run in the environments' processes. `memory_bytes`:
    limit of what an environment adds to the imported modules, 0: none.

    Raises ValueError with one message if a name is not found, a module cannot be imported, a class
    needs arguments, or a tool lacks hints or a docstring.
    """
    named = [_entry(entry, len(classes) > 1) for entry in classes]
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{CLASSES}: the name {name!r} stands for two classes.")
    taking = {r.name: r.spec for r in rewards if takes_environments(r)}
    try:
        objects = given.pickled([*(spec for _, spec in named), *tools, *taking.values()])
    except ValueError as error:
        raise ValueError(str(error).replace("rewards:", f"{CLASSES} or {TOOLS}:", 1)) from error
    setup = Setup(
        tuple(tools), tuple(named), tuple(taking.items()), memory_bytes, sources.held(), objects
    )
    home = Home(setup)
    home.wait_ready(START_S)
    try:
        kinds = _asked(home, {"kind": "describe", "limit_s": START_S}, START_S + 2)["kinds"]
    except BaseException:
        home.close()
        raise
    return Contract({name: _kind(kind) for name, kind in kinds}, home, tuple(taking), home.threads)


def _entry(entry: str, is_named: bool) -> tuple[str | None, str]:
    found = _NAMED.fullmatch(entry.strip())
    if not found or bool(found[1]) < is_named:
        raise ValueError(
            f'{CLASSES}: {entry!r} must be written "module:Class"'
            + (
                ', or "name=module:Class" where there are several: the column `environment` of a '
                "row has the name."
                if is_named
                else "."
            )
        )
    return found[1], found[2]


def _kind(fields: dict[str, Any]) -> Kind:
    as_tuples = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    return Kind(**as_tuples)


def takes_environments(reward: Reward) -> bool:
    """Whether a reward function takes `environments`, so that it runs beside them."""
    return not reward.model and registry.reads([reward], "environments")


@dataclasses.dataclass
class Contract:
    """The user's environments and tools; `Live` runs them."""

    kinds: dict[str | None, Kind]  # by the column `environment`; None: there is one for all rows
    home: Home  # has imported them; `Live` takes it over
    rewards: tuple[str, ...]  # names of reward functions that take `environments`
    threads: int  # in the process that forks; more than 1: a module has started some

    def name(self, columns: dict[str, Any]) -> str | None:
        """Which environment a row has. Raises ValueError if it is none of those that there are."""
        if None in self.kinds:
            return None
        name = columns.get(COLUMN)
        if name not in self.kinds:
            raise ValueError(
                f"{CLASSES} has {', '.join(map(str, self.kinds))}, and a row's column "
                f"`{COLUMN}` is {name!r}. It must be one of these names."
            )
        return name

    def kind(self, columns: dict[str, Any]) -> Kind:
        """The kind of environment of a row."""
        return self.kinds[self.name(columns)]

    def schemas(self, columns: dict[str, Any]) -> tuple[dict, ...]:
        """The tools that the policy is shown for a row, in the form of chat templates."""
        return self.kind(columns).schemas

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Classes that give the reward themselves: rewards of weight 1 by these names, as TRL."""
        return tuple(dict.fromkeys(k.class_name for k in self.kinds.values() if k.gives_reward))

    def given_to_reset(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns of a row that its environment's `reset` is called with, `prompt` included."""
        kind = self.kind(columns)
        hidden = () if None in self.kinds else (COLUMN,)
        return {
            name: value
            for name, value in columns.items()
            if name not in hidden and (kind.takes_all or name in kind.takes)
        }

    def check(self, rows: Iterable[tuple[dict[str, Any], str]], limit_s: float) -> None:
        """Refuses rows that the environments cannot begin with; rows are columns and their place.

        The first row of each environment is tried: its `reset` is called, for at most `limit_s`.
        Raises ValueError with the row's place.
        """
        tried = set()
        for columns, where in rows:
            try:
                name = self.name(columns)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            kind = self.kinds[name]
            missing = [n for n in kind.needs if n not in (*columns, "seed", "rollout_seed")]
            if missing:
                raise ValueError(
                    f"{where} has no column `{missing[0]}`, which {kind.class_name}.reset needs; "
                    f"it has {', '.join(columns)}. Name it with data.columns, or give the argument "
                    "a default."
                )
            if name in tried or not kind.spec:
                continue
            tried.add(name)
            request = reset_request(self, columns, 0, 0, limit_s)
            try:
                _asked(self.home, request, limit_s + request["construct_s"] + 2)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None

    def close(self) -> None:
        """Ends the process that has imported the user's modules."""
        self.home.close()


def reset_request(
    contract: Contract, columns: dict[str, Any], seed: int, rollout_seed: int, limit_s: float
) -> dict[str, Any]:
    """What the process of an environment is asked at the beginning of an episode."""
    name = contract.name(columns)
    return {
        "kind": "reset",
        "id": -1,
        "name": name,
        "columns": contract.given_to_reset(columns),
        "seed": seed,
        "rollout_seed": rollout_seed,
        "limit_s": limit_s,
        # The first one may have loaded what the others find in the cache of the disk.
        "construct_s": limit_s + 4 * contract.kinds[name].seconds,
    }


def _asked(home: Home, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """One answer of a process that is forked for it. Raises ValueError with the fault."""
    number = home.next_trial()
    line = home.spawn(number)
    limit = time.monotonic() + limit_s
    try:
        line.send(pickle.dumps(request | {"id": number}))
        while (left_s := limit - time.monotonic()) > 0:
            writing = [line.sock] if line.is_waiting else []
            ready, _, _ = select.select([line.sock, home.line.sock], writing, [], left_s)
            line.flush()
            if home.line.sock in ready:
                home.hear()
            if line.sock in ready:
                for answer in map(json.loads, line.receive()):
                    if "fault" in answer:
                        raise ValueError(answer["fault"])
                    if "done" in answer:
                        return answer["done"]
    except (EOFError, OSError):
        limit = time.monotonic() + 1.0
        while number not in home.ended and time.monotonic() < limit and not home.is_dead:
            if select.select([home.line.sock], [], [], 0.1)[0]:
                home.hear()
        status = home.ended.get(number)
        raise ValueError(
            f"{CLASSES}: the environment cannot be tried, since {why(status)}."
        ) from None
    finally:
        home.end(number)
        line.close()
    raise ValueError(f"{CLASSES}: the environment did not answer within {limit_s:.3g} s.")
