"""Episodes: their tokens are what was drawn and said, whatever the cut, the slots and the order."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import jax
import made_once
import numpy as np
import pytest
import tiny
from together import Together

from grpo_jax import keys
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.devices import sharding
from grpo_jax.environments import episodes
from grpo_jax.environments.episode import Limits, Start
from grpo_jax.environments.live import Answer
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.sampling.decode import Decoder
from grpo_jax.structs import Sampling

GROUP, LIMIT = 4, 24
PROMPTS = [[7], [5, 6, 7, 8, 9], [30, 2], [11, 12, 13]]
STOPS = (1, 4, 17, 21, 33)  # a turn of about 8 tokens in the mean
KEY = keys.key_for(0, "rollout", 0)
LIMITS = Limits(turns=3, tokens=LIMIT, turn_tokens=7)


class Dialogue:
    """What the environment says follows from the turn: its first tokens backwards, or nothing."""

    @staticmethod
    def parse(turn_ids):
        return SimpleNamespace(message={"role": "assistant", "content": str(turn_ids)}, calls=())

    @staticmethod
    def follow(turn_ids, stopped, messages):
        return [2] * (not stopped) + messages[-1]["ids"]


class World:
    """Environments in this process. Each answers at once, or after `late` other answers."""

    num_live, num_lost = 7, 3

    def __init__(self, late=lambda row: 0):
        self.late, self.waiting, self.log, self.turns = late, [], [], []
        self.said: dict[int, list[list[int]]] = {}

    def _answer(self, row, kind, **fields):
        self.waiting.append([self.late(row), Answer(row, kind, **fields)])

    def reset(self, row, columns, seed, rollout_seed):
        self.log.append((row, columns["n"], seed, rollout_seed))
        if columns.get("fails") == row % GROUP:
            self._answer(row, "reset", outcome="env_start", message="no")
        else:
            self._answer(row, "reset", messages=[])

    def act(self, row, turn, messages):
        assert messages[-1] is turn.message
        self.turns.append(("drawn", row))
        ids = [int(i) for i in turn.message["content"][1:-1].split(", ")]
        turns = self.said.setdefault(row, [])
        if ids[0] % 5 == 0:
            self._answer(row, "act")
        elif ids[0] % 11 == 1:
            self._answer(row, "act", outcome="env_died", message="killed")
        else:
            turns.append([3, *reversed(ids[:3])])
            said = [{"role": "user", "content": "...", "ids": turns[-1]}]
            self._answer(row, "act", messages=said, seconds=0.5, num_calls=2, failures=("error",))

    def finish(self, row, messages, columns, completion_ids, prompt=None):
        assert prompt == [{"role": "user", "content": "?"}]
        self._answer(row, "finish", reward=float(len(completion_ids)))

    def answers(self, timeout_s):
        for one in self.waiting:
            one[0] -= 1
        due = [answer for wait, answer in self.waiting if wait < 0]
        self.turns += [("answered", a.row) for a in due if a.kind == "act"]
        self.waiting = [one for one in self.waiting if one[0] >= 0]
        return due

    def close(self):
        pass


@pytest.fixture(scope="module")
def params():
    return tiny.params()


def sample(
    params, world, *, num_slots=0, mesh=None, limits=LIMITS, fails=None, dialogue=Dialogue,
    prompts=PROMPTS, half=None, **options,
):  # fmt: skip
    """`half`: of two processes that hold all episodes, the one that owns every second prompt's."""
    decoder = Decoder(tiny.MODEL, mesh or tiny.one_device(), Sampling(), STOPS, LIMIT)
    engine = made_once.engine(decoder, num_slots=num_slots)
    if half is not None:
        own_P = np.arange(len(prompts)) % 2 == half
        engine.places = lambda num: (np.ones(num, bool), own_P)
    prompt = [{"role": "user", "content": "?"}]
    starts = [
        Start(
            prompt,
            {"n": p} | ({"fails": fails} if fails is not None else {}),
            100 + p,
            dialogue,
            None,
        )
        for p in range(len(prompts))
    ]
    ended = {}
    rollouts, told = episodes.sample(
        engine,
        engine.publish(params),
        world,
        starts,
        prompts,
        limits,
        group=GROUP,
        key=KEY,
        temperature=1.0,
        rollout_seeds=range(len(prompts) * GROUP),
        on_group=lambda p, found: ended.update({p: found}),
        **options,
    )
    return rollouts, told, ended


@pytest.fixture(scope="module")
def whole(params):
    world = World()
    return *sample(params, world), world


def test_the_batch_holds_every_kind_of_episode(whole):
    _, told, _, _ = whole
    assert {"done", "turns", "tokens", "env_died"} <= set(told.outcomes)
    assert set(told.turns_B) == {1, 2, 3}


def test_tokens_are_what_was_drawn_and_said(whole):
    """Between an episode's turns stand its environment's tokens, which no loss may read."""
    rollouts, told, ended, _ = whole
    for row, (p, g) in enumerate(np.ndindex(len(PROMPTS), GROUP)):
        n = rollouts.length_PG[p, g]
        ids, chosen = rollouts.completion_PGC[p, g, :n], rollouts.chosen_PGC[p, g, :n]
        parts = [
            (is_chosen, [int(i) for i, _ in part])
            for is_chosen, part in itertools.groupby(zip(ids, chosen), key=lambda pair: pair[1])
        ]
        drawn = [part for is_chosen, part in parts if is_chosen]
        said = [part for is_chosen, part in parts if not is_chosen]
        assert len(drawn) == told.turns_B[row]
        for turn, after in zip(drawn, said):
            close = [] if turn[-1] in STOPS else [2]
            assert len(turn) <= LIMITS.turn_tokens and (turn[-1] in STOPS or len(turn) == 7)
            assert after == close + [3, *reversed(turn[:3])]
        assert not rollouts.logp_PGC[p, g, :n][~chosen].any()
        assert not rollouts.chosen_PGC[p, g, n:].any()
        assert n <= LIMIT and rollouts.stopped_PG[p, g] == (told.outcomes[row] == "done")
        assert ended[p][g].ids == ids.tolist()
        assert ended[p][g].reward == (None if told.outcomes[row] == "env_died" else n)


def test_the_scorer_finds_the_sampler_s_log_probabilities(whole, params):
    """The ratio of the first update is 1, and the environment's tokens are no actions."""
    rollouts = whole[0]
    scorer = Scorer(tiny.MODEL, tiny.one_device(), Sampling())
    prepare = make_prepare(scorer, AdvantageOptions(), mask_truncated=False, with_old=True)
    scored = prepare.log_probs(params, None, rollouts)
    experience = prepare(scored, np.float32(rollouts.length_PG))
    np.testing.assert_array_equal(experience.action_PGC, rollouts.chosen_PGC)
    gap = np.abs(np.asarray(experience.old_logp_PGC) - rollouts.logp_PGC)[rollouts.chosen_PGC]
    assert gap.max() < 1e-4


@pytest.mark.parametrize("case", ["slots", "one slot", "mesh", "eager", "eager slots"])
def test_neither_slots_nor_mesh_nor_order_change_a_draw(whole, params, case):
    want, told = whole[:2]
    mesh = sharding.make_mesh(2, 1, 1, 2, devices=jax.devices()[:4]) if case == "mesh" else None
    slots = {"slots": 6, "one slot": 1, "eager slots": 8}.get(case, 0)
    world = World(late=lambda row: row % 3) if "eager" in case else World()
    own = params
    got, got_told, ended = sample(own, world, num_slots=slots, mesh=mesh, eager="eager" in case)
    for name in ("completion_PGC", "chosen_PGC", "length_PG", "stopped_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    np.testing.assert_allclose(got.logp_PGC, want.logp_PGC, atol=1e-5)
    assert got_told.outcomes == told.outcomes and len(ended) == len(PROMPTS)
    # Of the others every later turn went on in its lane.
    assert (got_told.read_again == 0) == (case == "mesh")


def test_eagerly_no_episode_waits_for_another_answer(whole, params):
    """The last row's first answer comes when all others have had all of their turns."""
    world = World(late=lambda row: 500 * (row == 15))
    got, told, _ = sample(params, world, eager=True)
    np.testing.assert_array_equal(got.completion_PGC, whole[0].completion_PGC)
    assert told.turns_B[15] > 1
    assert {row for _, row in world.turns[world.turns.index(("answered", 15)) :]} == {15}


def test_seeds_and_columns_of_the_environments(whole):
    log = whole[3].log
    assert log == [(row, row // GROUP, 100 + row // GROUP, row) for row in range(len(log))]


def test_an_environment_that_does_not_start_costs_its_own_episode(whole, params):
    rollouts, told, ended = sample(params, World(), fails=1)
    assert [row for row, end in enumerate(told.outcomes) if end == "env_start"] == [1, 5, 9, 13]
    assert told.invalid_B.sum() == 4 + whole[1].invalid_B.reshape(4, 4)[:, [0, 2, 3]].sum()
    others = np.arange(16).reshape(4, 4)[:, [0, 2, 3]]
    want = whole[0].completion_PGC.reshape(16, LIMIT)
    np.testing.assert_array_equal(rollouts.completion_PGC.reshape(16, LIMIT)[others], want[others])
    assert ended[0][1].fault == "no" and ended[0][1].reward is None


def test_what_is_told(whole):
    told = whole[1]
    values = told.metrics()
    answers = sum(len(turns) for turns in whole[3].said.values())
    assert values["environment/calls"] == 2 * answers / 16
    assert values["environment/valid_calls"] == 0.5
    assert values["environment/failed_calls/error"] == answers
    assert values["environment/seconds_max"] == 0.5 * told.turns_B[told.seconds_B.argmax()]
    assert sum(v for n, v in values.items() if "/ended/" in n) == 1
    assert values["environment/restarts"] == 3 and values["environment/read_again"] == 0


# --- Histories that are rewritten ---

FORKED = [[13, *prompt] for prompt in PROMPTS]  # whose last token is of the first part alone


class Forking(Dialogue):
    """What stands is rewritten where its last token is even: a third of it is left."""

    def __init__(self, tail=0, changes=True, once=False):
        self.rewriting, self.tail, self.changes, self.once = self, tail, changes, once

    def contexts(self, spoken):
        once = [self.once and len(one.steps) > 1 for one in spoken]
        return [
            None if no else self.context(one.prompt_ids, one.ids) for one, no in zip(spoken, once)
        ]

    def context(self, prompt, ids):
        return [9, *ids[len(prompt) :: 3]] if self.changes and ids[-1] % 2 == 0 else None


@pytest.fixture(scope="module")
def forked(params):
    return sample(params, World(), dialogue=Forking(tail=1), prompts=FORKED, forks=True)


def test_each_drawn_token_of_an_episode_with_parts_is_an_action_once(forked):
    rollouts, told, ended = forked
    made, parts = Forking(tail=1), []
    for row, (p, g) in enumerate(np.ndindex(len(FORKED), GROUP)):
        episode, ids, context = ended[p][g], FORKED[p][-1:], list(FORKED[p])
        chosen, begin, said = [False], [0], []
        for number, (message, group) in enumerate(episode.steps):
            turn = [int(i) for i in message["content"][1:-1].split(", ")]
            ids, context, said = ids + turn, context + turn, said + turn
            if number + 1 < len(episode.steps):  # what follows was said, and another turn
                more = made.follow(turn, turn[-1] in STOPS, group)
                again, said = made.context(FORKED[p], context + more), said + more
                context = context + more if again is None else FORKED[p][:-1] + again
                begin += begin[-1:] * len(turn)
                begin += [len(ids) if again else begin[-1]] * len(again or more)
                chosen += [True] * len(turn) + [False] * len(again or more)
                ids += again or more
        chosen += [True] * (len(ids) - len(chosen))
        n = len(ids)
        assert rollouts.completion_PGC[p, g, :n].tolist() == ids and rollouts.length_PG[p, g] == n
        assert rollouts.chosen_PGC[p, g, :n].tolist() == chosen
        assert not rollouts.chosen_PGC[p, g, n:].any()
        assert rollouts.begin_PGC[p, g, : len(begin)].tolist() == begin
        assert episode.said_ids == said  # what rewards and samples see: all once
        drawn = rollouts.logp_PGC[p, g][rollouts.chosen_PGC[p, g]].tolist()
        assert [float(x) for x in episode.said[1] if x] == drawn
        parts.append(len(set(begin)) - 1)
        assert told.ends[row][-1] == n
    assert told.parts_B.tolist() == parts and set(parts) == {0, 1, 2}
    assert told.metrics()["environment/forks"] == np.mean(parts)
    assert rollouts.prompt_length_P.tolist() == [len(prompt) - 1 for prompt in FORKED]


def test_the_scorer_reads_each_part_as_a_text_of_its_own(forked, params):
    scorer = Scorer(tiny.MODEL, tiny.one_device(), Sampling())
    prepare = make_prepare(scorer, AdvantageOptions(), mask_truncated=False, with_old=True)

    def gap(rollouts):
        logp = np.asarray(prepare.log_probs(params, None, rollouts).old_logp_PGC)
        return np.abs(logp - rollouts.logp_PGC)[rollouts.chosen_PGC].max()

    assert gap(forked[0]) < 1e-4
    assert gap(forked[0].replace(begin_PGC=np.zeros_like(forked[0].begin_PGC))) > 0.1


@pytest.mark.parametrize("case", ["mesh", "eager slots"])
def test_neither_slots_nor_mesh_nor_order_change_a_draw_of_a_part(forked, params, case):
    mesh = sharding.make_mesh(2, 1, 1, 2, devices=jax.devices()[:4]) if case == "mesh" else None
    eager = case != "mesh"
    world = World(late=lambda row: row % 3) if eager else World()
    how = {"mesh": mesh, "num_slots": 8 * eager, "eager": eager}
    got, _, _ = sample(params, world, dialogue=Forking(tail=1), prompts=FORKED, forks=True, **how)
    for name in ("completion_PGC", "chosen_PGC", "begin_PGC", "length_PG", "stopped_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(forked[0], name), name)
    np.testing.assert_allclose(got.logp_PGC, forked[0].logp_PGC, atol=1e-5)


def test_turns_go_on_in_the_lanes_that_read_a_new_context(params):
    """Only at the second turns episodes are read again; eagerly they are at each."""
    how = {"dialogue": Forking(tail=1, once=True), "prompts": FORKED, "forks": True}
    got, told, ended = sample(params, World(), **how)
    want, told_eager, _ = sample(params, World(), **how, eager=True)
    np.testing.assert_array_equal(got.completion_PGC, want.completion_PGC)
    np.testing.assert_allclose(got.logp_PGC, want.logp_PGC, atol=1e-5)
    second = [e for group in ended.values() for e in group if len(e.spans) > 1]
    read = [
        e.spans[1][0] + (len(e.prompt) - 1 - e.begins[0] if e.begins else len(e.prompt))
        for e in second
    ]
    assert told.parts_B.any() and any(len(e.spans) > 2 and e.begins for e in second)
    assert told.read_again == sum(read)
    assert told_eager.read_again > told.read_again


def test_where_nothing_is_rewritten_all_is_as_without_parts(whole, params):
    got, told, _ = sample(params, World(), dialogue=Forking(changes=False), forks=True)
    for name in ("completion_PGC", "logp_PGC", "chosen_PGC", "length_PG", "stopped_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(whole[0], name), name)
    assert not got.begin_PGC.any() and not told.parts_B.any() and told.read_again == 0
    assert whole[0].begin_PGC is None and "environment/forks" not in whole[1].metrics()


@pytest.mark.parametrize("forks", [False, True])
def test_two_processes_that_hold_all_episodes_do_what_one_does(
    whole, forked, params, forks, monkeypatch
):
    """Each has the environments of every second prompt, and learns of the others from the other."""
    want, told, ended = forked if forks else whole[:3]
    how = {"dialogue": Forking(tail=1), "prompts": FORKED, "forks": True} if forks else {}
    worlds = World(), World()
    both = Together(monkeypatch, 2).run(lambda n: sample(params, worlds[n], half=n, **how))
    for number, (got, got_told, got_ended) in enumerate(both):
        for name in ("completion_PGC", "chosen_PGC", "begin_PGC", "length_PG", "stopped_PG"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
        np.testing.assert_allclose(got.logp_PGC, want.logp_PGC, atol=1e-5)
        assert (got_told.outcomes, got_told.ends) == (told.outcomes, told.ends)
        assert got_told.read_again == told.read_again
        assert not forks or got_told.rewritten_B.tolist() == told.rewritten_B.tolist()
        assert {row // GROUP for row, *_ in worlds[number].log} == {number, number + 2}
        assert {p: [e.said_ids for e in own] for p, own in got_ended.items()} == {
            p: [e.said_ids for e in ended[p]] for p in (number, number + 2)
        }
