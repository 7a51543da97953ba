"""The engine: what it returns does not depend on how the work was laid out."""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import made_once
import numpy as np
import pytest
import tiny

from grpo_jax import keys
from grpo_jax.devices import compiling, sharding
from grpo_jax.kernels import quantize
from grpo_jax.kernels.kv_cache import RingCache
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import logits, parameters
from grpo_jax.sampling import decode, layouts
from grpo_jax.sampling.board import Turn
from grpo_jax.sampling.decode import Decoder
from grpo_jax.sampling.engine import Engine
from grpo_jax.sampling.kept import Kept
from grpo_jax.structs import Layer, Sampling

GROUP, LIMIT = 4, 16
PROMPTS = [[7], [5, 6, 7, 8, 9], [30, 2], [11, 12, 13], [3, 3, 3, 3], [39]]
STOPS = (1, 4, 17)  # a completion of about 13 tokens in the mean: some stop at once, some never
KEY = keys.key_for(0, "rollout", 0)


@pytest.fixture(scope="module")
def params():
    return tiny.params()


def engine(num_slots=0, compact=True, stop_ids=STOPS, limit=LIMIT, **sampling) -> Engine:
    decoder = Decoder(tiny.MODEL, tiny.one_device(), Sampling(**sampling), stop_ids, limit)
    return made_once.engine(decoder, num_slots=num_slots, compact=compact)


def generate(engine, params, prompts=PROMPTS, group=GROUP, key=KEY, temperature=1.0):
    return engine.generate(
        engine.publish(params), prompts, group=group, key=key, temperature=temperature
    )


@jax.jit
def scores_of(params, prompt_PQ, prompt_length_P, completion_PGC):
    """Scores over the vocabulary at each completion token, by one full pass, [P, G, C, V]."""
    hidden = tiny.completion_states(params, tiny.MODEL, prompt_PQ, prompt_length_P, completion_PGC)
    return logits.logits(hidden, parameters.head_kernel(params))


def scores(params, rollouts):
    return np.asarray(
        scores_of(params, rollouts.prompt_PQ, rollouts.prompt_length_P, rollouts.completion_PGC)
    )


def uniforms(row: int, tokens: int) -> np.ndarray:
    """The uniform numbers that the completion of this row draws with, as the design states them."""
    key = jax.random.fold_in(KEY, row)
    return np.array([jax.random.uniform(jax.random.fold_in(key, t)) for t in range(tokens)])


@pytest.fixture(scope="module")
def whole(params):
    """All completions at once, nothing moved: what every other layout is held against."""
    plain = engine(compact=False)
    rollouts = generate(plain, params)
    assert plain.shapes == {(len(PROMPTS), GROUP, 16)}
    return rollouts


def assert_same(got, want, params):
    """The same completions; another token only where two were within 1e-4 of being drawn."""
    score_PGCV = None
    for p, g in np.ndindex(want.length_PG.shape):
        n = min(got.length_PG[p, g], want.length_PG[p, g])
        ours, theirs = got.completion_PGC[p, g, :n], want.completion_PGC[p, g, :n]
        differs = np.flatnonzero(ours != theirs)
        if len(differs):  # from here on the two go separate ways
            n = differs[0]
            score_PGCV = scores(params, want) if score_PGCV is None else score_PGCV
            prob_V = np.exp(score_PGCV[p, g, n] - score_PGCV[p, g, n].max())
            edge_V = np.cumsum(prob_V / prob_V.sum())
            uniform = uniforms(p * want.length_PG.shape[1] + g, n + 1)[n]
            low, high = sorted((ours[n], theirs[n]))
            assert np.abs(edge_V[low:high] - uniform).max() < 1e-4, (p, g, n)
        else:
            assert got.length_PG[p, g] == want.length_PG[p, g]
            assert got.stopped_PG[p, g] == want.stopped_PG[p, g]
        logps = got.logp_PGC[p, g, :n], want.logp_PGC[p, g, :n]
        np.testing.assert_allclose(*logps, atol=1e-4, rtol=0)


def test_the_batch_holds_every_kind_of_completion(whole):
    """Else the comparisons here would not see the edges."""
    assert whole.length_PG.min() == 1
    assert not whole.stopped_PG.all()
    assert whole.length_PG[~whole.stopped_PG].tolist() == [LIMIT] * (~whole.stopped_PG).sum()
    assert len(set(whole.length_PG.ravel())) > 5


@pytest.mark.parametrize(
    ("num_slots", "compact", "shapes"),
    [
        (1, True, {(1, 1)}),  # groups split over single lanes, one after another
        (3, False, {(1, 3)}),  # a group of four as three and one
        (8, True, {(2, 4)}),  # refilled twice and more; too few rows to compact
        (16, False, {(4, 4)}),  # refilled, never compacted
        (16, True, {(4, 4), (8, 1)}),  # refilled and compacted
        (0, True, {(6, 4), (12, 1)}),  # compacted, never refilled
    ],
)
def test_slots_do_not_change_the_completions(whole, params, num_slots, compact, shapes):
    ours = engine(num_slots, compact)

    got = generate(ours, params)

    assert {shape[:2] for shape in ours.shapes} == shapes
    np.testing.assert_array_equal(got.prompt_PQ, whole.prompt_PQ)
    np.testing.assert_array_equal(got.prompt_length_P, [len(p) for p in PROMPTS])
    assert_same(got, whole, params)


@pytest.mark.parametrize("num_slots", [0, 8, 3])
def test_each_group_is_handed_over_once_when_it_is_whole(whole, params, num_slots):
    handed = {}

    def take(p, completions):
        assert p not in handed
        handed[p] = completions

    own = engine(num_slots)
    rollouts = own.generate(
        own.publish(params), PROMPTS, group=GROUP, key=KEY, temperature=1.0, on_group=take
    )
    want = {
        p: [rollouts.completion_PGC[p, g, : rollouts.length_PG[p, g]].tolist()
            for g in range(GROUP)]
        for p in range(len(PROMPTS))
    }  # fmt: skip
    assert handed == want
    assert_same(rollouts, whole, params)


def test_a_group_is_handed_over_while_others_are_decoded(params):
    """The hand-over comes before the device is asked for the rest of the rows."""
    own, events = engine(4), []
    harvest = own._harvest

    def noted(slots, board):
        events.append("harvest")
        return harvest(slots, board)

    own._harvest = noted
    own.generate(
        own.publish(params), PROMPTS, group=GROUP, key=KEY, temperature=1.0,
        on_group=lambda p, completions: events.append("group"),
    )  # fmt: skip
    assert events.count("group") == len(PROMPTS)
    assert "harvest" in events[events.index("group") :]


def test_prompts_are_read_a_few_at_a_time(whole, params, monkeypatch):
    """Four of six, then the rest; the compiled program has one size."""
    few, read = made_once.engine(engine().decoder, compact=False, num_read=4), []
    admit = few.admit

    def counting(*args):
        read.append(args[3].shape[0])
        return admit(*args)

    monkeypatch.setattr(few, "admit", counting)

    rollouts = generate(few, params)

    assert read == [4, 4]
    assert_same(rollouts, whole, params)


def test_completions_end_with_their_stop_token(whole):
    for p, g in np.ndindex(whole.length_PG.shape):
        n = whole.length_PG[p, g]
        is_stop = np.isin(whole.completion_PGC[p, g, :n], STOPS)
        assert not is_stop[:-1].any()
        assert is_stop[-1] == whole.stopped_PG[p, g]
        assert not whole.completion_PGC[p, g, n:].any()
        assert not whole.logp_PGC[p, g, n:].any()
        assert (whole.logp_PGC[p, g, :n] < 0).all()
    ends = np.take_along_axis(whole.completion_PGC, whole.length_PG[..., None] - 1, axis=-1)
    assert set(STOPS) <= set(ends[whole.stopped_PG].ravel())  # each of the stop tokens stops


def test_tokens_are_drawn_by_the_inverse_of_the_distribution(whole, params):
    """Every token from one full pass and the uniform number of its row and position."""
    prob_PGCV = np.asarray(jax.nn.softmax(scores(params, whole).astype(np.float64), axis=-1))
    edge_PGCV = np.cumsum(prob_PGCV, axis=-1)
    for p, g in ((0, 0), (2, 3), (5, 1)):
        n = whole.length_PG[p, g]
        for t, uniform in enumerate(uniforms(p * GROUP + g, n)):
            token = whole.completion_PGC[p, g, t]
            below = edge_PGCV[p, g, t, token - 1] if token else 0.0
            assert below - 1e-4 <= uniform <= edge_PGCV[p, g, t, token] + 1e-4


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.6, 0, 1.0), (1.4, 7, 1.0), (0.8, 10, 0.9)],
)
def test_sampler_and_scorer_agree(params, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    ours = engine(temperature=temperature, top_k=top_k, top_p=top_p)
    rollouts = generate(ours, params, temperature=temperature)

    scorer = Scorer(tiny.MODEL, tiny.one_device(), sampling)
    logp_PGC = tiny.logp(scorer, params, rollouts)

    action_PGC = np.arange(LIMIT) < rollouts.length_PG[..., None]
    gap_PGC = np.where(action_PGC, np.abs(logp_PGC - rollouts.logp_PGC), 0)
    assert gap_PGC.max() < 1e-4
    if top_k:  # nothing outside the support was drawn
        score_PGCV = scores(params, rollouts)
        chosen = np.take_along_axis(score_PGCV, rollouts.completion_PGC[..., None], axis=-1)
        rank_PGC = (score_PGCV > chosen + 1e-4).sum(axis=-1)
        assert rank_PGC[action_PGC].max() < top_k


@pytest.fixture(scope="module")
def unstoppable():
    return engine(stop_ids=())


def test_greedy_takes_the_highest_score(params, unstoppable):
    rollouts = generate(unstoppable, params, temperature=0.0)

    score_PGCV = scores(params, rollouts)
    chosen = np.take_along_axis(score_PGCV, rollouts.completion_PGC[..., None], axis=-1)[..., 0]
    np.testing.assert_array_less(score_PGCV.max(axis=-1) - 1e-4, chosen)
    want_PGC = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(score_PGCV)), rollouts.completion_PGC[..., None], axis=-1
    )[..., 0]
    np.testing.assert_allclose(rollouts.logp_PGC, want_PGC, atol=1e-4, rtol=0)
    assert (rollouts.completion_PGC == rollouts.completion_PGC[:, :1]).all()


def test_without_stop_tokens_all_are_cut_at_the_limit(params, unstoppable):
    rollouts = generate(unstoppable, params)

    assert (rollouts.length_PG == LIMIT).all()
    assert not rollouts.stopped_PG.any()


def test_when_every_token_stops_all_are_one_token_long(params):
    rollouts = generate(engine(num_slots=8, stop_ids=tuple(range(40))), params)

    assert (rollouts.length_PG == 1).all()
    assert rollouts.stopped_PG.all()
    assert not rollouts.completion_PGC[..., 1:].any()


def test_one_token_completions(params, whole):
    ours = engine(limit=1)

    got = generate(ours, params)

    assert (got.length_PG == 1).all()
    np.testing.assert_array_equal(got.completion_PGC, whole.completion_PGC[..., :1])
    np.testing.assert_array_equal(got.stopped_PG, np.isin(got.completion_PGC[..., 0], STOPS))
    assert set(got.stopped_PG.ravel()) == {False, True}
    assert ours.shapes == set()  # the prompt's pass draws the first token; nothing was decoded


def test_steps_differ_and_a_step_is_repeated(params, unstoppable):
    first, again, second = (
        generate(unstoppable, params, key=keys.key_for(0, "rollout", step)).completion_PGC
        for step in (0, 0, 1)
    )

    np.testing.assert_array_equal(again, first)
    assert (second != first).any(axis=-1).all()  # every completion


def test_completions_of_a_group_differ(params, unstoppable):
    completion_PGC = generate(unstoppable, params).completion_PGC

    for rows in completion_PGC:
        assert len(np.unique(rows, axis=0)) == GROUP


def test_a_completion_depends_on_its_prompt_and_row_alone(params, unstoppable):
    want = generate(unstoppable, params)
    others = [[20, 21]] * 3 + [PROMPTS[3]] + [[22]] * 2  # prompt 3 stays where it was

    got = generate(unstoppable, params, others)

    np.testing.assert_array_equal(got.completion_PGC[3], want.completion_PGC[3])
    assert (got.completion_PGC[4] != want.completion_PGC[4]).any()
    # The first rows are the same when the others are not asked for.
    few = generate(unstoppable, params, PROMPTS[:2])
    np.testing.assert_array_equal(few.completion_PGC, want.completion_PGC[:2])
    # Groups of two: rows 2 and 3 belong to prompt 1 now, so prompt 0 in its place draws with them.
    pairs = generate(unstoppable, params, [PROMPTS[0]] * 2, group=2)
    np.testing.assert_array_equal(pairs.completion_PGC.reshape(4, -1), want.completion_PGC[0])


def test_a_longer_padding_changes_nothing(params, unstoppable, whole):
    """One prompt of 17 tokens pads all prompts to 32."""
    want = generate(unstoppable, params)

    got = generate(unstoppable, params, [*PROMPTS[:5], list(range(3, 20))])

    assert want.prompt_PQ.shape[1] == 16
    assert got.prompt_PQ.shape[1] == 32
    np.testing.assert_array_equal(got.completion_PGC[:5], want.completion_PGC[:5])


@pytest.mark.parametrize(
    ("num_slots", "changes"), [(0, {"steps": 4}), (8, {"steps": 3, "fuse": True})]
)
def test_how_a_device_decodes_does_not_change_the_completions(whole, params, num_slots, changes):
    """Several tokens between two looks at whether the host is needed, and products joined.

    A GPU has the first alone where it holds a part of a layer, and else both.
    """
    decoder = dataclasses.replace(engine(num_slots).decoder, **changes)
    ours = made_once.engine(decoder, num_slots=num_slots)
    assert_same(generate(ours, params), whole, params)


def test_a_gpu_joins_products_and_looks_at_the_host_more_rarely(monkeypatch):
    plain, shape = engine().decoder, (tiny.MODEL, tiny.one_device(), Sampling(), STOPS, LIMIT)
    assert decode.decoder_for(*shape, jnp.float32) == plain

    monkeypatch.setattr(sharding, "is_gpu", lambda mesh: True)

    faster = dataclasses.replace(plain, fuse=True, steps=8)
    assert decode.decoder_for(*shape, jnp.float32) == faster


def in_int8(num_slots=0, compact=True, weights="int8", cache="int8", mesh=None) -> Engine:
    decoder = Decoder(
        tiny.MODEL,
        mesh or tiny.one_device(),
        Sampling(),
        STOPS,
        LIMIT,
        weights=weights,
        kv_cache=RingCache(int8=cache == "int8"),
    )
    return made_once.engine(decoder, num_slots=num_slots, compact=compact)


@pytest.fixture(scope="module")
def whole_in_int8(params):
    return generate(in_int8(compact=False), params)


@pytest.mark.parametrize(("num_slots", "shapes"), [(0, {(6, 4), (12, 1)}), (3, {(1, 3)})])
def test_slots_do_not_change_completions_in_int8(whole_in_int8, params, num_slots, shapes):
    ours = in_int8(num_slots)

    got = generate(ours, params)

    assert {shape[:2] for shape in ours.shapes} == shapes
    np.testing.assert_array_equal(got.completion_PGC, whole_in_int8.completion_PGC)
    np.testing.assert_allclose(got.logp_PGC, whole_in_int8.logp_PGC, atol=1e-4, rtol=0)


def test_joined_products_do_not_change_completions_in_int8(whole_in_int8, params):
    plain = in_int8(compact=False)
    ours = made_once.engine(dataclasses.replace(plain.decoder, fuse=True), compact=False)
    got = generate(ours, params)
    np.testing.assert_array_equal(got.completion_PGC, whole_in_int8.completion_PGC)
    np.testing.assert_allclose(got.logp_PGC, whole_in_int8.logp_PGC, atol=1e-4, rtol=0)


def test_int8_weights_are_those_that_the_codes_stand_for(params):
    own = in_int8(weights="int8", cache="auto", compact=False)
    published = own.publish(params)

    def value(path, kept):
        if not isinstance(kept, quantize.Int8):
            return kept
        axis = -1 if path[-1].key == "embedding" else -2
        return kept.codes * jnp.expand_dims(kept.scale, axis)

    plain = jax.tree_util.tree_map_with_path(
        value, published, is_leaf=lambda x: isinstance(x, quantize.Int8)
    )
    plain["layers"] = jax.tree.map(lambda *layers: jnp.stack(layers), *plain["layers"])
    kernel = published["layers"][1]["mlp"]["up"]["kernel"]
    assert kernel.codes.dtype == jnp.int8 and kernel.scale.shape == (48,)
    assert published["embed"]["embedding"].scale.shape == (40,)
    assert published["norm"]["scale"].dtype == jnp.float32

    got = generate(own, params)

    assert_same(got, generate(engine(compact=False), plain), plain)
    first = scores(params, got)[:, :, 0]
    assert 1e-4 < np.abs(first - scores(plain, got)[:, :, 0]).max() < 0.2  # what int8 changes


def test_an_int8_cache_is_near_the_exact_one(whole, params):
    got = generate(in_int8(weights="auto", cache="int8", compact=False), params)

    # The first token comes from the prefill, which reads no cache.
    np.testing.assert_array_equal(got.completion_PGC[..., 0], whole.completion_PGC[..., 0])
    np.testing.assert_allclose(got.logp_PGC[..., 0], whole.logp_PGC[..., 0], atol=1e-5)
    log_prob = jax.nn.log_softmax(scores(params, got))
    exact_PGC = np.take_along_axis(np.asarray(log_prob), got.completion_PGC[..., None], -1)[..., 0]
    drawn = np.arange(LIMIT) < got.length_PG[..., None]
    gap = np.abs(exact_PGC - got.logp_PGC)[drawn]
    assert 1e-4 < gap.max() < 0.2 and gap.mean() < 0.02


def test_publish_casts_to_the_compute_dtype(params):
    decoder = Decoder(tiny.MODEL, tiny.one_device(), Sampling(), STOPS, LIMIT, dtype=jnp.bfloat16)

    published = Engine(decoder).publish(params)

    assert {x.dtype for x in jax.tree.leaves(published)} == {jnp.dtype(jnp.bfloat16)}


def test_publishing_again_traces_nothing(params, monkeypatch):
    """What it once found of parameters of these kinds holds: a run asks at every step."""
    ours = engine()
    first = ours.publish(params)
    monkeypatch.setattr(jax, "eval_shape", None)
    again = ours.publish(jax.tree.map(lambda x: x + 1, params))
    assert jax.tree.structure(again) == jax.tree.structure(first)
    np.testing.assert_array_equal(again["norm"]["scale"], params["norm"]["scale"] + 1)


def test_publish_takes_the_layers_apart():
    """Of more layers than may be in flight."""
    model = dataclasses.replace(tiny.MODEL, layers=(Layer(),) * (compiling.MAX_IN_FLIGHT + 3))
    params = jax.jit(functools.partial(parameters.init, model))(jax.random.key(0))

    published = Engine(Decoder(model, tiny.one_device(), Sampling(), STOPS, LIMIT)).publish(params)

    jax.tree.map(
        np.testing.assert_array_equal,
        published["layers"],
        tiny.unstacked(params["layers"], model),
    )


def in_turns(engine, params, cuts, kept=None):
    """The completions of PROMPTS, drawn in turns of about `cuts` tokens, as lists of tokens."""
    num_prompts, published = len(PROMPTS), engine.publish(params)
    rows = num_prompts * GROUP
    key_B2 = engine.keys(KEY, rows)
    ids: list[list[int]] = [[] for _ in range(rows)]
    logp: list[list[float]] = [[] for _ in range(rows)]
    open_rows: set[int] = set()

    def take(turns):
        for drawn in turns:
            for row, token_C, logp_C, n, stopped in zip(
                drawn.row_B, drawn.token_BC, drawn.logp_BC, drawn.length_B, drawn.stopped_B
            ):
                ids[row] += token_C[:n].tolist()
                logp[row] += logp_C[:n].tolist()
                open_rows.discard(row)
                if not stopped and len(ids[row]) < LIMIT:
                    open_rows.add(row)

    take(engine.first_turns(published, PROMPTS, GROUP, key_B2, 1.0, limit=cuts[0], kept=kept))
    for cut in cuts[1:]:
        turns = [
            Turn(
                [row],
                PROMPTS[row // GROUP] + ids[row],
                len(ids[row]),
                min(cut + row % 3, LIMIT - len(ids[row])),
            )
            for row in sorted(open_rows)
        ]
        if turns:
            width = layouts.turn_width(max(len(turn.ids) for turn in turns))
            where = num_prompts, GROUP, width
            take(engine.later_turns(published, turns, *where, key_B2, 1.0, kept=kept))
    assert not open_rows
    return ids, logp


@pytest.mark.parametrize("num_slots, compact", [(0, True), (5, False)])
def test_the_cut_into_turns_changes_no_draw(params, whole, num_slots, compact):
    for cuts in ((5, 1, LIMIT), (1, 3, 4, LIMIT)):
        ids, logp = in_turns(engine(num_slots, compact), params, cuts)
        for row, (p, g) in enumerate(np.ndindex(whole.length_PG.shape)):
            n = whole.length_PG[p, g]
            assert ids[row] == whole.completion_PGC[p, g, :n].tolist()
            np.testing.assert_allclose(logp[row], whole.logp_PGC[p, g, :n], atol=1e-5)


def test_turns_go_on_in_their_lanes(params, whole, monkeypatch):
    """Turns of unlike lengths, lanes that move to a smaller batch; no prefix is read again."""
    names, calls = ("append", "align", "compact_slots", "put_back"), collections.Counter()
    for cuts in ((3, 1, LIMIT), (1, 3, 4, LIMIT)):
        used = engine()
        for name in (*names, "admit"):
            program = getattr(used, name)

            def counting(*args, name=name, program=program):
                calls[name] += 1
                return program(*args)

            monkeypatch.setattr(used, name, counting)
        ids, logp = in_turns(used, params, cuts, Kept())
        for row, (p, g) in enumerate(np.ndindex(whole.length_PG.shape)):
            n = whole.length_PG[p, g]
            assert ids[row] == whole.completion_PGC[p, g, :n].tolist()
            np.testing.assert_allclose(logp[row], whole.logp_PGC[p, g, :n], atol=1e-5)
    assert calls["admit"] == 2 and calls["append"] == 5
    assert calls["align"] and calls["compact_slots"] > calls["put_back"] > 0


def test_slots_that_were_needed_for_others_are_not_kept(params, whole):
    kept = Kept()
    ids, _ = in_turns(engine(8), params, (5, LIMIT), kept)
    assert not kept.holds([0])
    for row, (p, g) in enumerate(np.ndindex(whole.length_PG.shape)):
        assert ids[row] == whole.completion_PGC[p, g, : whole.length_PG[p, g]].tolist()


def test_turns_that_come_while_others_are_decoded(params, whole):
    """A source gives the second turns one after the other; only its first is there at once."""
    used, rows = engine(6), len(PROMPTS) * GROUP
    published, key_B2 = used.publish(params), used.keys(KEY, rows)
    ids = {}
    for drawn in used.first_turns(published, PROMPTS, GROUP, key_B2, 1.0, limit=4):
        for row, token_C, n, stopped in zip(
            drawn.row_B, drawn.token_BC, drawn.length_B, drawn.stopped_B
        ):
            ids[int(row)] = token_C[:n].tolist(), bool(stopped)
    later = [
        Turn([row], PROMPTS[row // GROUP] + own, 4, LIMIT - 4)
        for row, (own, stopped) in sorted(ids.items())
        if not stopped
    ]

    class OneByOne:
        asked = 0

        @property
        def pending(self):
            return bool(later)

        def take(self, wait):
            self.asked += 1
            return [(0, later.pop(0))] if wait or self.asked % 2 else []

    source = OneByOne()
    first = [later.pop(0)]
    for drawn in used.later_turns(
        published, first, len(PROMPTS), GROUP, 64, key_B2, 1.0, expected=len(later), source=source
    ):
        for row, token_C, n in zip(drawn.row_B, drawn.token_BC, drawn.length_B):
            ids[int(row)][0].extend(token_C[:n].tolist())
    assert source.asked > 1 and not later
    for row, (own, _) in ids.items():
        p, g = divmod(row, GROUP)
        assert own == whole.completion_PGC[p, g, : whole.length_PG[p, g]].tolist()
