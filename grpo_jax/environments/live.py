"""Live environments: a process for each episode that goes on, none of which the trainer waits for.

`Live` sends requests and collects answers. A process that dies, hangs or takes too much is killed
with all that it started, and replaced at once; other episodes never notice. An episode that lost
its process is repeated once in a new one, with the same seeds and the same calls, up to the place
where it was: if all answers are the same again, it goes on.
"""

from __future__ import annotations

import json
import math
import pickle
import selectors
import time
from typing import Any

from grpo_jax.environments.answers import (
    INVALID,
    NEW,
    Answer,
    Episode,
    Limits,
    Seat,
    failures,
    scored,
    what,
)
from grpo_jax.environments.contract import START_S, Contract, reset_request
from grpo_jax.environments.home import EnvironmentsError, Home, why
from grpo_jax.messages.values import cut

_GRACE_S = 0.7  # after a time limit, for the process to end the call itself
_STATUS_S = 2.0  # for a process that has ended to be told of, with the status
_MAX_FALSE_STARTS = 3
_MAX_TIMEOUTS = 2  # calls of an episode that take too long; with the last it ends


class Live:
    """The environments' processes of this host. A context manager; its end kills them.

    An episode is known by its `row`. `reset`, `act` and `finish` return at once, and `answers`
    gives what came of them, one answer for each. A row has one request at a time.
    """

    def __init__(self, contract: Contract, limits: Limits, *, num: int = 0, max_tokens: int = 0):
        """Takes over the contract's process, and forks `num` others in advance.

        `max_tokens`: a completion's limit, an argument of reward functions.
        """
        self.contract, self.limits = contract, limits
        self.trainer_state: dict[str, Any] = {"global_step": 0, "max_steps": 0, "epoch": 0.0}
        self.num_started = self.num_lost = 0  # processes
        self._max_tokens = max_tokens
        self._home = contract.home
        self._false_starts = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._home.line.sock, selectors.EVENT_READ)
        self._idle: list[Seat] = []
        self._seats: dict[int, Seat] = {}  # by number
        self._episodes: dict[int, Episode] = {}  # by row
        self._ready: list[Answer] = []
        for _ in range(num):
            self._idle.append(self._spawn())

    @property
    def num_live(self) -> int:
        """Processes that are there."""
        return len(self._seats)

    # --- Requests ---

    def reset(self, row: int, columns: dict[str, Any], seed: int, rollout_seed: int) -> None:
        """Begins an episode; the row's columns hold `prompt`, too, if `reset` may read it.

        `seed`: the same for all episodes of a problem; `rollout_seed`: of this one.
        """
        self.drop(row)
        begin = reset_request(self.contract, columns, seed, rollout_seed, self.limits.tool_seconds)
        episode = self._episodes[row] = Episode(row, begin)
        self._ask(episode, begin)

    def act(self, row: int, turn: Any, messages: list[dict[str, Any]]) -> None:
        """Carries out a turn of the policy: its calls in order, or `respond` if none is valid.

        `messages`: the whole conversation, with this turn last.
        """
        calls = [
            {"name": call.name, "arguments": call.arguments}
            if hasattr(call, "arguments")
            else {"name": "unknown", "malformed": call.kind, "reason": call.reason}
            for call in turn.calls
        ]
        episode = self._episodes[row]
        episode.said, episode.failures, episode.turn_seconds = [], [], 0.0
        request = {"kind": "act", "calls": calls, "num_calls": len(calls), "messages": messages}
        if self._left_s(episode) <= 0:
            episode.request = request
            self._answer(episode, outcome="time")
            return
        self._ask(episode, request)

    def finish(
        self,
        row: int,
        messages: list[dict[str, Any]],
        columns: dict[str, Any],
        completion_ids: list[int],
        prompt: Any = None,
    ) -> None:
        """Ends an episode and asks for its rewards; `messages`: what followed the prompt."""
        request = {
            "kind": "finish",
            "messages": messages,
            "columns": columns,
            "completion_ids": completion_ids,
            "prompt": prompt,
            "trainer_state": self.trainer_state,
            "max_tokens": self._max_tokens,
            "limit_s": self.limits.tool_seconds,
        }
        episode = self._episodes[row]
        episode.said, episode.failures, episode.turn_seconds = [], [], 0.0
        self._ask(episode, request)

    def drop(self, row: int) -> None:
        """Ends an episode without rewards, if there is one; what it was asked is not answered."""
        episode = self._episodes.pop(row, None)
        if episode is None or episode.seat is None:
            return
        if episode.todo or episode.deadline < math.inf:  # it is at work
            self._lose(episode.seat)
        else:
            self._release(episode.seat)

    def answers(self, timeout_s: float) -> list[Answer]:
        """The answers that have arrived; waits for one, at most `timeout_s`.

        Raises EnvironmentsError if no process can be started any more.
        """
        limit = time.monotonic() + timeout_s
        while True:
            self._hear(0.0 if self._ready else max(limit - time.monotonic(), 0.0))
            if self._ready or time.monotonic() >= limit:
                found, self._ready = self._ready, []
                return found

    def close(self) -> None:
        """Kills all processes."""
        for seat in self._seats.values():
            seat.line.close()
        self._seats.clear()
        self._episodes.clear()
        self._home.close()
        self._selector.close()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- Processes ---

    def _spawn(self) -> Seat:
        if self._home.is_dead:
            self._renew_home()
        self.num_started += 1
        seat = Seat(self.num_started, self._home.spawn(self.num_started))
        self._seats[seat.number] = seat
        self._selector.register(seat.line.sock, selectors.EVENT_READ, seat)
        return seat

    def _renew_home(self) -> None:
        self._false_starts += 1
        if self._false_starts > _MAX_FALSE_STARTS:
            raise EnvironmentsError(
                f"The process that forks environments ended {_MAX_FALSE_STARTS} times. Its last "
                "words may stand above; environment.memory_limit_gib limits only what it forks."
            )
        self._selector.unregister(self._home.line.sock)
        self._home.close()
        self._home = Home(self._home.setup)
        try:
            self._home.wait_ready(START_S)
        except ValueError as error:
            raise EnvironmentsError(str(error)) from error
        self._selector.register(self._home.line.sock, selectors.EVENT_READ)

    def _seat_for(self, name: str | None) -> Seat:
        """An idle process, of those that have made this environment if there is one."""
        best = next((s for s in self._idle if name in s.made), None)
        if best is None and self._idle:
            best = self._idle[0]
        if best is None:
            return self._spawn()
        self._idle.remove(best)
        return best

    def _release(self, seat: Seat) -> None:
        seat.row = None
        if not seat.is_lost:
            self._idle.append(seat)

    def _lose(self, seat: Seat) -> None:
        """Kills a process, and starts another in its place."""
        if seat.is_lost:
            return
        seat.is_lost = True
        self.num_lost += 1
        self._selector.unregister(seat.line.sock)
        seat.line.close()
        del self._seats[seat.number]
        self._home.end(seat.number)
        if seat in self._idle:
            self._idle.remove(seat)
        self._idle.append(self._spawn())

    # --- What a process is asked ---

    def _left_s(self, episode: Episode) -> float:
        return self.limits.episode_seconds - episode.seconds

    def _ask(self, episode: Episode, request: dict[str, Any]) -> None:
        """Sends the trainer's request, after what a new process must repeat first."""
        episode.request = request
        self._go_on(episode, request)

    def _go_on(self, episode: Episode, request: dict[str, Any]) -> None:
        if episode.seat is None or episode.seat.is_lost:
            if episode.past and not episode.can_repeat:
                self._give_up(episode, "a call was interrupted, so that it cannot be repeated")
                return
            episode.seat = self._seat_for(episode.begin["name"])
            episode.seat.row = episode.row
            episode.todo.extend(episode.past)
        episode.todo.append((request, NEW))
        self._send_next(episode)

    def _send_next(self, episode: Episode) -> None:
        request, _ = episode.todo[0]
        episode.parts = []
        limit_s = self.limits.tool_seconds
        if request["kind"] == "act":
            left_s = max(self._left_s(episode), 0.01)
            more = {"limit_s": limit_s, "left_s": left_s, "timeouts": episode.timeouts}
            request = request | more
            limit_s = min(limit_s, left_s)
        seat = episode.seat
        if request["kind"] == "reset" and episode.begin["name"] not in seat.made:
            limit_s = request["construct_s"]
        episode.sent, episode.limit_s = time.monotonic(), limit_s
        episode.deadline = episode.sent + limit_s + _GRACE_S
        try:
            seat.line.send(pickle.dumps(request | {"id": episode.row}))
        except OSError:
            self._died(seat)
            return
        self._watch(seat)

    def _watch(self, seat: Seat) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if seat.line.is_waiting else 0)
        self._selector.modify(seat.line.sock, events, seat)

    # --- What processes tell ---

    def _hear(self, timeout_s: float) -> None:
        """Waits until something is told or late, and takes it."""
        began = time.monotonic()
        late = min((e.deadline for e in self._episodes.values()), default=math.inf)
        until_s = min(timeout_s, max(late - began, 0.0))
        for key, events in self._selector.select(until_s):
            seat = key.data
            if seat is None:
                self._hear_home()
            elif not seat.is_lost:
                self._hear_seat(seat, events)
        # What came before this began was taken. Later answers wait, however long that has taken.
        for episode in [e for e in self._episodes.values() if e.deadline <= began]:
            self._late(episode)

    def _hear_home(self) -> None:
        self._home.hear()
        if self._home.is_dead:  # all its forks are ended, and tell so
            self._renew_home()

    def _hear_seat(self, seat: Seat, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                seat.line.flush()
                self._watch(seat)
            messages = seat.line.receive() if events & selectors.EVENT_READ else []
        except (EOFError, OSError):
            self._died(seat)
            return
        episode = self._episodes.get(seat.row) if seat.row is not None else None
        if episode is not None and episode.deadline < math.inf:  # a long answer is on its way,
            left_s = episode.limit_s if events & selectors.EVENT_WRITE else 0.0  # or its request
            episode.deadline = max(episode.deadline, time.monotonic() + left_s + _GRACE_S)
        for message in map(json.loads, messages):
            episode = self._episodes.get(seat.row) if seat.row is not None else None
            if episode is None or episode.seat is not seat or message["id"] != episode.row:
                self._died(seat)  # it says what it was not asked
                return
            self._told(episode, message)
            if seat.is_lost:
                return

    def _told(self, episode: Episode, message: dict[str, Any]) -> None:
        limit = time.monotonic() + self.limits.tool_seconds + _GRACE_S
        if "note" in message:
            if message["note"] == "made":
                episode.seat.made.add(episode.begin["name"])
            episode.deadline = limit
        elif "part" in message:
            episode.parts.append(message["part"])
            episode.deadline = limit
        elif "fault" in message:
            episode.seconds += message["seconds"]
            self._failed(episode, message["fault"])
        else:
            self._done(episode, message["done"])

    def _done(self, episode: Episode, done: dict[str, Any]) -> None:
        """Takes the end of a request: of one that is repeated, or of the trainer's."""
        episode.deadline = math.inf
        request, expected = episode.todo.popleft()
        said = what(request, done, episode.parts)
        failed = [part["failure"] for part in episode.parts]
        if expected is not NEW:
            if said != expected:
                self._failed(episode, "repeated with the same seeds, it said something else")
                return
            self._send_next(episode)
            return
        episode.past.append((request, said))
        episode.seconds += done["seconds"]
        episode.turn_seconds += done["seconds"]
        episode.timeouts += failed.count("timeout")
        episode.can_repeat &= "timeout" not in failed
        episode.failures += failures(request, failed)
        if request["kind"] == "act":
            self._acted(episode, said, done["turn_reward"])
        elif request["kind"] == "reset":
            text = done["text"]
            messages = [{"role": "user", "content": text}] if text else []
            self._answer(episode, messages=messages)
        else:
            by_name = {name: scored(fields) for name, fields in done["scored"].items()}
            self._answer(episode, reward=done["reward"], scored=by_name)

    def _acted(self, episode: Episode, messages: list | None, turn_reward: float | None) -> None:
        if messages is not None or episode.said:
            messages = [*episode.said, *(messages or [])]
        outcome = None
        if episode.timeouts >= _MAX_TIMEOUTS:
            outcome = "tool_timeout"
        elif self._left_s(episode) <= 0:
            outcome = "time"
        self._answer(episode, messages=messages, outcome=outcome, turn_reward=turn_reward)

    # --- What goes wrong ---

    def _died(self, seat: Seat) -> None:
        """A process has ended, or can no longer be trusted."""
        episode = self._episodes.get(seat.row) if seat.row is not None else None
        if episode is None or episode.seat is not seat or not episode.todo:
            self._lose(seat)  # between two requests: it is noticed at the next
            return
        self._failed(episode, "")

    def _why(self, seat: Seat) -> str:
        """Why a process ended: waits for its status while the rest of it is being killed."""
        limit = time.monotonic() + _STATUS_S
        ended, home = self._home.ended, self._home
        while seat.number not in ended and not home.is_dead and time.monotonic() < limit:
            home.hear()
            time.sleep(0.002)
        return why(ended.pop(seat.number, None))

    def _late(self, episode: Episode) -> None:
        """A process did not end a call by itself: kills it."""
        request, expected = episode.todo[0]
        seconds = time.monotonic() - episode.sent
        if request["kind"] != "act" or expected is not NEW or not request["calls"]:
            self._failed(episode, f"it took longer than {self.limits.tool_seconds:g} s")
            return
        done = len(episode.parts)  # the calls before the one that hangs
        self._lose(episode.seat)
        call = request["calls"][min(done, len(request["calls"]) - 1)]
        error = {"error": f"The call took longer than {self.limits.tool_seconds:g} s."}
        late = {"role": "tool", "name": call["name"], "content": str(error)}
        messages = [part["message"] for part in episode.parts]
        failed = [part["failure"] for part in episode.parts]
        before = request | {"calls": request["calls"][:done]}
        if done:
            episode.past.append((before, messages))
        episode.said += [*messages, late]
        episode.failures += [*failures(before, failed), "timeout"]
        episode.timeouts += 1 + failed.count("timeout")
        episode.can_repeat &= "timeout" not in failed
        episode.seconds += seconds
        episode.turn_seconds += seconds
        episode.deadline = math.inf
        episode.todo.clear()
        rest = request["calls"][done + 1 :]
        if not rest or episode.timeouts >= _MAX_TIMEOUTS or self._left_s(episode) <= 0:
            self._acted(episode, None, None)
        else:
            self._go_on(episode, request | {"calls": rest})

    def _failed(self, episode: Episode, fault: str) -> None:
        """Repeats an episode once in a new process, or gives it up; "": its process has ended."""
        episode.deadline = math.inf
        request = episode.todo[-1][0] if episode.todo else episode.request
        episode.todo.clear()
        seat = episode.seat
        if seat is not None:
            self._lose(seat)
        if episode.is_again or not episode.can_repeat:
            self._give_up(episode, fault or self._why(seat))
            return
        episode.is_again = True
        self._go_on(episode, request)

    def _give_up(self, episode: Episode, fault: str) -> None:
        kind = episode.request["kind"]
        outcome = {"reset": "env_start", "act": "env_died", "finish": "reward_failed"}[kind]
        is_its_doing = episode.timeouts and not episode.can_repeat
        if is_its_doing or episode.timeouts >= _MAX_TIMEOUTS:
            outcome = "tool_timeout"  # by the policy's doing
        reward = math.nan if kind == "finish" else None
        self._answer(episode, outcome=outcome, reward=reward, message=cut(fault, 1000))

    def _answer(self, episode: Episode, **fields: Any) -> None:
        request = episode.request
        self._ready.append(
            Answer(
                episode.row,
                request["kind"],
                seconds=episode.turn_seconds,
                num_calls=request.get("num_calls", 0),
                failures=tuple(episode.failures),
                **fields,
            )
        )
        if request["kind"] == "finish" or fields.get("outcome") in INVALID:
            self._episodes.pop(episode.row, None)
            if episode.seat is not None:
                self._release(episode.seat)
