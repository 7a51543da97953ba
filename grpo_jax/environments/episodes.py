"""Conversations: turns of the policy and answers of its environment, each a completion.

An episode's token ids are the truth, its text is a view of them. A completion holds the tokens that
the policy drew and those of the environment between them; `Rollouts.chosen_PGC` tells them apart.
The policy's turns are drawn by the engine, each until its stop token or a limit. Then the
environments answer, all at once, each in a process of its own (`live.Live`). The episodes that go
on do so in the lanes of the engine's slots that hold them. If there are too few slots, or eagerly,
they are read again with all their tokens. Random keys follow from an episode and the position in
it, so that neither the cut into turns nor the batch changes a draw.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from grpo_jax.environments.episode import LATE, Episode, Limits, Start, Told, World
from grpo_jax.environments.live import INVALID, Answer
from grpo_jax.environments.rewriting import Spoken
from grpo_jax.hosts import processes
from grpo_jax.sampling import layouts
from grpo_jax.sampling.board import NO_MORE, Drawn, Turn
from grpo_jax.sampling.engine import Engine
from grpo_jax.sampling.kept import Kept
from grpo_jax.structs import Array, Params, Rollouts, pad_rows

_WAIT_S = 1.0  # between two looks at whether the run was asked to stop

# Takes a prompt's number and its finished episodes.
OnGroup = Callable[[int, list[Episode]], None]


def sample(
    engine: Engine,
    params: Params,
    world: World,
    starts: Sequence[Start],
    prompt_ids: Sequence[list[int]],
    limits: Limits,
    *,
    group: int,
    key: Array,
    temperature: float,
    rollout_seeds: Sequence[int],
    eager: bool = False,
    forks: bool = False,
    on_group: OnGroup,
    meanwhile: Callable[[], None] | None = None,
    on_harvest: Callable[[], None] = lambda: None,
) -> tuple[Rollouts, Told]:
    """`group` episodes of each prompt.

    As `Engine.generate`, whose arguments these are otherwise. `rollout_seeds`: one for each row.
    `eager`: episodes go on once they are answered, and not when all are; of several processes, all
    are waited for in any case. `forks`: where the template rewrites earlier turns, an episode goes
    on in what it writes, as a further part of its completion. `on_group` is called once for each
    prompt when all its episodes have their rewards, on the process that owns it. Raises ValueError
    if environments of one group begin with different texts.
    """
    eager = eager and processes.count() == 1
    one = _Sampling(engine, params, world, starts, limits, group, key, temperature, on_harvest)
    one.kept, one.forks = None if eager else Kept(), forks
    one.on_group = on_group
    one.begin(prompt_ids, rollout_seeds)
    one.hand_over(one.first_turns(meanwhile))
    while one.goes_on(eager):
        one.hand_over(one.later_turns(eager))
    one.finish()
    told = one.told()
    return one.rollouts(told.outcomes), told


class _Sampling:
    """One call of `sample`. As a `board.Source` it gives turns that are answered meanwhile."""

    on_group: OnGroup
    kept: Kept | None
    forks: bool

    def __init__(self, engine, params, world, starts, limits, group, key, temperature, on_harvest):
        self.engine, self.params, self.world = engine, params, world
        self.starts, self.limits, self.group = starts, limits, group
        self.temperature, self.on_harvest = temperature, on_harvest
        self.held_P, self.own_P = engine.places(len(starts))
        self.key_B2 = engine.keys(key, len(starts) * group)
        self.episodes: list[Episode] = []
        self.acting: set[int] = set()  # own rows whose environment has not answered yet
        self.ending: set[int] = set()  # own rows without their rewards yet
        self.ready: list[int] = []  # rows that go on, on this process's count
        # Own rows answered since the exchange: what was said, the outcome, and a part's context
        self.news: list[tuple[int, list[int], str, list[int] | None]] = []
        self.width = 0  # of the turns that are drawn now
        self.idle_s, self.read_again, self.drawn = 0.0, 0, 0
        self.open_P = np.full(len(starts), group)  # episodes of a prompt that are not closed

    # --- The beginning and the end ---

    def begin(self, prompt_ids: Sequence[list[int]], rollout_seeds: Sequence[int]) -> None:
        """Resets the environments, and makes the prompts."""
        for row in range(len(self.starts) * self.group):
            start = self.starts[row // self.group]
            given = start.prompt
            told = [{"role": "user", "content": given}] if isinstance(given, str) else [*given]
            prompt = list(prompt_ids[row // self.group])
            rewriting = start.dialogue.rewriting if self.forks else None
            tail = rewriting.tail if rewriting else 0
            self.episodes.append(Episode(row, prompt, start.columns, told, len(told), tail))
            if self.own_P[row // self.group]:
                columns = start.columns | {"prompt": start.prompt}
                self.world.reset(row, columns, start.seed, rollout_seeds[row])
                self.acting.add(row)
        texts: dict[int, set[str]] = collections.defaultdict(set)
        while self.acting:
            for answer in self._answers():
                episode = self.episodes[answer.row]
                episode.seconds += answer.seconds
                if answer.outcome:
                    episode.outcome, episode.fault = answer.outcome, answer.message
                else:
                    said = "".join(m["content"] for m in answer.messages or ())
                    texts[answer.row // self.group].add(said)
        begun = {p: said for p, said in texts.items() if said != {""}}
        for said in begun.values():
            if len(said) > 1:
                one, two, *_ = sorted(said)
                raise ValueError(
                    f"The environments of one group began with different texts, {one[:80]!r} and "
                    f"{two[:80]!r}. A group has one prompt. What `reset` returns must follow from "
                    "its arguments and from the modules random and numpy.random, which are seeded "
                    "alike for a group."
                )
        self._set_prompts({p: said.pop() for p, said in begun.items()})

    def _set_prompts(self, texts: dict[int, str]) -> None:
        """Appends the texts of `reset` to the prompts, on all processes."""
        everyones = processes.gather(sorted(texts.items()), "what environments begin with")
        for p, text in (pair for pairs in everyones for pair in pairs):
            ids = self.starts[p].with_text(text)
            for episode in self.episodes[p * self.group : (p + 1) * self.group]:
                episode.prompt, episode.begun = ids, text
                last = dict(episode.messages[-1])
                episode.messages[-1] = last | {"content": f"{last.get('content') or ''}{text}"}

    def finish(self) -> None:
        """Waits for the rewards."""
        while self.ending:
            self._hear()

    # --- The device ---

    def first_turns(self, meanwhile: Callable[[], None] | None) -> Iterable[Drawn]:
        prompts = [episode.prompt for episode in self.episodes[:: self.group]]
        return self.engine.first_turns(
            self.params,
            prompts,
            self.group,
            self.key_B2,
            self.temperature,
            limit=min(map(self._limit, self.episodes)),
            kept=self.kept,
            meanwhile=meanwhile,
        )

    def later_turns(self, eager: bool) -> Iterable[Drawn]:
        """The next turns of the episodes that are answered, and with `eager` of those that will."""
        rows = [*self.ready, *self.acting] if eager else self.ready
        longest = max(self.episodes[row].num_context for row in rows)
        if any(self.episodes[row].forked for row in rows) and self.kept is not None:
            # Lanes hold what was rewritten. Those that read the new contexts are kept again.
            self.kept = Kept(again=True) if self.kept.holds(rows) else None
        # Eagerly with room for another turn: an episode that comes back must fit.
        self.width = layouts.turn_width(longest * (5 if eager else 4) // 4)
        turns, self.ready = self._turns(self.ready), []
        return self.engine.later_turns(
            self.params,
            turns,
            len(self.starts),
            self.group,
            self.width,
            self.key_B2,
            self.temperature,
            expected=len(self.acting) * eager,
            source=self if eager else NO_MORE,
            kept=self.kept,
        )

    def _limit(self, episode: Episode) -> int:
        return min(self.limits.turn_tokens, self._room(episode) - episode.length)

    def _room(self, episode: Episode) -> int:
        """The limit of an episode's own tokens."""
        return self.limits.tokens - episode.tail

    def _turns(self, rows: Sequence[int]) -> list[Turn]:
        """The next turns of some episodes; of those held elsewhere, the shape alone."""
        turns = []
        for row in rows:
            e = self.episodes[row]
            ids = e.context if self.held_P[row // self.group] else [0] * e.num_context
            turns.append(Turn([row], ids, e.length, self._limit(e)))
        if self.kept is None or not self.kept.holds(rows):
            self.read_again += sum(len(turn.ids) for turn in turns)
        return turns

    def hand_over(self, drawn: Iterable[Drawn]) -> None:
        """Takes finished turns to their environments."""
        for some in drawn:
            self.on_harvest()
            for i, row in enumerate(some.row_B):
                episode, n = self.episodes[int(row)], int(some.length_B[i])
                episode.spans.append((episode.length, episode.length + n))
                episode.length += n
                episode.stopped = bool(some.stopped_B[i])
                self.drawn += n
                if self.held_P[int(row) // self.group]:
                    episode.turn = some.token_BC[i, :n].tolist()
                    episode.add(episode.turn, some.logp_BC[i, :n])
                if self.own_P[int(row) // self.group]:
                    self._to_environment(episode)

    # --- `board.Source`, where episodes go on eagerly ---

    @property
    def pending(self) -> bool:
        """False once an episode has become too long: it is not to wait for answers to others."""
        return all(map(self._fits, self.ready)) and bool(self.acting or self.ready)

    def take(self, wait: bool) -> list[tuple[int, Turn]]:
        began = time.monotonic()
        self._hear(0.0)
        while wait and self.acting and not self.ready:
            self._hear()
        self.idle_s += (time.monotonic() - began) * wait
        fitting = [row for row in self.ready if self._fits(row)]
        self.ready = [row for row in self.ready if row not in set(fitting)]
        turns = self._turns(fitting)
        shards = self.engine.shards_of(turns, len(self.starts), self.group)
        return list(zip(shards.tolist(), turns))

    def _fits(self, row: int) -> bool:
        return self.episodes[row].num_context <= self.width

    # --- The environments ---

    def goes_on(self, eager: bool) -> bool:
        """Waits for the environments' answers; whether any episode goes on, on all processes.

        `eager`: only until one goes on.
        """
        began = time.monotonic()
        while self.acting and not (eager and self.ready):
            self._hear()
        self.idle_s += time.monotonic() - began
        if processes.count() == 1:
            self.news = []
            self.ready.sort()
            return bool(self.ready)
        everyones = processes.gather(self.news, "the environments' answers")
        own, self.news, self.ready = {row for row, *_ in self.news}, [], []
        everyones = [news for told in everyones for news in told]
        for row, ids, outcome, context in sorted(everyones, key=lambda news: news[0]):
            episode = self.episodes[row]
            if row not in own:
                episode.outcome = outcome
                episode.go_on(ids, context, is_held=self.held_P[row // self.group])
            if not episode.outcome:
                self.ready.append(row)
        return bool(self.ready)

    def _to_environment(self, episode: Episode) -> None:
        """Gives the policy's last turn to its environment, or ends the episode."""
        if episode.outcome:  # its environment did not start
            self._end(episode, episode.outcome)
            return
        turn = self.starts[episode.row // self.group].dialogue.parse(episode.turn)
        episode.messages.append(turn.message)
        episode.steps.append((turn.message, []))
        if not episode.stopped and episode.length >= self._room(episode):
            self._end(episode, "tokens")
            return
        self.acting.add(episode.row)
        self.world.act(episode.row, turn, episode.messages)

    def _answers(self, timeout_s: float = _WAIT_S) -> list[Answer]:
        answers = self.world.answers(timeout_s)
        self.acting -= {answer.row for answer in answers if answer.kind != "finish"}
        return answers

    def _hear(self, timeout_s: float = _WAIT_S) -> None:
        """Takes the answers that have come, after waiting for at least one up to the time."""
        going: list[tuple[Episode, list[int]]] = []
        for answer in self._answers(timeout_s):
            episode = self.episodes[answer.row]
            episode.seconds += answer.seconds
            if answer.kind == "finish":
                self._rewarded(episode, answer)
                continue
            episode.calls += answer.num_calls
            episode.failures += answer.failures
            episode.turn_rewards.append(answer.turn_reward or 0.0)
            if answer.outcome:
                episode.fault = answer.message
                self._end(episode, answer.outcome)
            elif answer.messages is None:
                self._end(episode, "done" if episode.stopped else "tokens")
            else:
                going += self._answered(episode, answer.messages)
        for (episode, ids), context in zip(going, self._contexts(going)):
            self._go_on(episode, ids, context)

    def _answered(
        self, episode: Episode, messages: list[dict[str, Any]]
    ) -> list[tuple[Episode, list[int]]]:
        """Takes an answer: the episode and the tokens that follow; [] if it has had its turns."""
        episode.messages += messages
        episode.steps[-1][1].extend(messages)
        if len(episode.spans) >= self.limits.turns:
            self._end(episode, "turns")
            return []
        dialogue = self.starts[episode.row // self.group].dialogue
        return [(episode, dialogue.follow(episode.turn, episode.stopped, messages))]

    def _contexts(self, going: list[tuple[Episode, list[int]]]) -> list[list[int] | None]:
        """What episodes go on from, after the prompt, if it is not what stands."""
        found: list[list[int] | None] = [None] * len(going)
        if not self.forks:
            return found
        of_rewriting = collections.defaultdict(list)
        for n, (episode, _) in enumerate(going):
            of_rewriting[self.starts[episode.row // self.group].dialogue.rewriting].append(n)
        of_rewriting.pop(None, None)
        for rewriting, numbers in of_rewriting.items():
            spoken = [self._spoken(*going[n]) for n in numbers]
            for n, context in zip(numbers, rewriting.contexts(spoken)):
                found[n] = context
        return found

    def _spoken(self, episode: Episode, ids: list[int]) -> Spoken:
        start, own = self.starts[episode.row // self.group], episode.context + ids
        said = start.prompt, episode.begun, start.arguments, episode.prompt
        return Spoken(*said, episode.steps, own)

    def _go_on(self, episode: Episode, ids: list[int], context: list[int] | None) -> None:
        if episode.length + len(ids if context is None else context) >= self._room(episode):
            self._end(episode, "tokens")  # what would not fit is not said
            return
        episode.go_on(ids, context, is_held=True)
        episode.observed += len(ids)
        self.ready.append(episode.row)
        self.news.append((episode.row, ids, "", context))

    def _end(self, episode: Episode, outcome: str) -> None:
        """Ends an episode; asks for its rewards, unless its environment is at fault."""
        episode.outcome = outcome
        self.news.append((episode.row, [], outcome, None))
        if outcome in INVALID:
            self._close(episode)
            return
        self.ending.add(episode.row)
        prompt = self.starts[episode.row // self.group].prompt
        if not isinstance(prompt, str):
            prompt = episode.messages[: episode.first]
        self.world.finish(episode.row, episode.replies, episode.columns, episode.said_ids, prompt)

    def _rewarded(self, episode: Episode, answer: Answer) -> None:
        """Takes an episode's rewards. One that the policy made end is worth 0 if it has none."""
        reward = answer.reward
        if answer.outcome in INVALID and episode.outcome in LATE:
            reward = 0.0
        elif answer.outcome:
            episode.outcome, episode.fault = answer.outcome, answer.message
        if reward is not None and math.isnan(reward):
            reward = 0.0 if episode.outcome in LATE else None
        episode.reward, episode.scored = reward, answer.scored
        self._close(episode)

    def _close(self, episode: Episode) -> None:
        self.ending.discard(episode.row)
        p = episode.row // self.group
        self.open_P[p] -= 1
        if not self.open_P[p]:
            self.on_group(p, self.episodes[p * self.group : (p + 1) * self.group])

    # --- The result ---

    def rollouts(self, outcomes: Sequence[str]) -> Rollouts:
        limit, rows = self.limits.tokens, len(self.episodes)
        completion_BC, logp_BC = np.zeros((rows, limit), np.int32), np.zeros((rows, limit))
        chosen_BC, begin_BC = np.zeros((rows, limit), bool), np.zeros((rows, limit), np.int32)
        for e in self.episodes:
            own = slice(e.tail, e.tail + len(e.ids))
            completion_BC[e.row, : e.tail] = e.prompt[len(e.prompt) - e.tail :]
            completion_BC[e.row, own], logp_BC[e.row, own] = e.ids, e.logp
            for first, past in e.spans:  # known to all processes, as the parts are
                chosen_BC[e.row, e.tail + first : e.tail + past] = True
            for begin in e.begins:
                begin_BC[e.row, e.tail + begin :] = e.tail + begin
        prompts = [e.prompt[: len(e.prompt) - e.tail] for e in self.episodes[:: self.group]]
        width = self.engine.padded(max(map(len, prompts)))
        prompt_PQ, prompt_length_P = pad_rows(prompts, width)
        by_group = lambda x_B: np.asarray(x_B).reshape(len(prompts), self.group, *x_B.shape[1:])  # noqa: E731
        return Rollouts(
            prompt_PQ=prompt_PQ,
            prompt_length_P=prompt_length_P,
            completion_PGC=by_group(completion_BC),
            logp_PGC=by_group(logp_BC.astype(np.float32)),
            length_PG=by_group(np.array([e.tail + e.length for e in self.episodes], np.int32)),
            stopped_PG=by_group(np.array([outcome == "done" for outcome in outcomes])),
            chosen_PGC=by_group(chosen_BC),
            begin_PGC=by_group(begin_BC) if self.forks else None,
        )

    def told(self) -> Told:
        own = [
            (
                *(e.row, e.outcome, len(e.spans), e.calls, e.observed, e.seconds, e.failures),
                *([e.tail + past for _, past in e.spans], e.turn_rewards),
                *(len(e.begins), e.rewritten),
            )
            for e in self.episodes
            if self.own_P[e.row // self.group]
        ]
        of_world = self.idle_s, self.world.num_live, self.world.num_lost
        everyones = processes.gather((own, of_world), "the episodes")
        rows = sorted(row for rows, _ in everyones for row in rows)
        idle_s, live, restarts = zip(*(told for _, told in everyones))
        _, outcomes, turns, calls, observed, seconds, failures, ends, rewards, *parts = zip(*rows)
        return Told(
            list(outcomes),
            np.array(turns),
            np.array(calls),
            np.array(observed),
            np.array(seconds, np.float64),
            dict(collections.Counter(kind for kinds in failures for kind in kinds)),
            max(idle_s),
            self.read_again,
            self.drawn,
            list(ends),
            list(rewards),
            sum(live),
            sum(restarts),
            *(map(np.array, parts) if self.forks else ()),
        )
