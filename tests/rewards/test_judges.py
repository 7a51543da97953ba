"""LLM judges against a server that answers as it is told, behaves badly, or is not there."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import numpy as np
import pytest
import stub_judge
from injections import INJECTIONS
from stub_judge import StubJudge, by_length, completion, response

from grpo_jax.messages.credentials import hide
from grpo_jax.rewards import registry
from grpo_jax.rewards.judging import rubric as rubric_lib
from grpo_jax.rewards.judging.cache import Cache
from grpo_jax.rewards.judging.client import Limits
from grpo_jax.rewards.judging.judge import _wanted
from grpo_jax.rewards.judging.judges import Judges, Settings
from grpo_jax.rewards.pool import Pool

SINGLE = """
task = "Judge it."
[[criteria]]
name = "good"
ask = "Is it good?"
"""
PAIRS = 'mode = "pairwise"\n' + SINGLE
LIST = 'mode = "listwise"\n' + SINGLE
KEY = "sesame+open/42=="
QUICK = Limits(attempt_s=0.3, deadline_s=3.0, retries=0, response_bytes=10_000)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Repeated calls wait for no time."""
    monkeypatch.setattr("grpo_jax.rewards.judging.client._FIRST_WAIT_S", 0.001)


def judged(
    tmp_path, url, texts, text=SINGLE, limits=QUICK, cache=None, key="", model="m1", **columns
):
    """The scores of one prompt's completions, by the pool of a run."""
    file = tmp_path / "rubric.toml"
    file.write_text(text)
    rewards = registry.load((f"judge:{file}",), (1.0,))
    settings = {"rubric": Settings(rubric_lib.read(str(file)), url, model, key)}
    host = Judges(settings, limits, cache)
    with Pool(rewards, host=host) as pool:
        columns = {name: [value] * len(texts) for name, value in columns.items()}
        return pool.score(["q"] * len(texts), texts, columns, group=len(texts))


# --- What a judge makes of a group ----------------------------------------------------------------


def test_a_single_judge_gives_each_its_share_of_the_scale(tmp_path):
    with StubJudge() as stub:
        got = judged(tmp_path, stub.url, ["", "a", "bbb", "bbb", "dddddd"])
    assert got.reward_B.tolist() == [0, 0.25, 0.75, 0.75, 0.25]  # 1 + length % 5, of 1 to 5
    assert not got.failed["rubric"].any() and got.metrics["rubric.good"] == (1 + 2 + 4 + 4 + 2, 5)
    # Equal texts are one call.
    assert got.sums["judge/calls"] == len(stub.requests) == 4
    assert got.metrics["judge/cached_share"] == (1, 5)
    assert got.sums["judge/prompt_tokens"] == 400 and got.sums["judge/completion_tokens"] == 40
    assert got.extras["rubric said"][1].startswith("It is long enough.\nVERDICT-")
    assert {body["model"] for body in stub.requests} == {"m1"}
    assert {(body["temperature"], body["max_tokens"]) for body in stub.requests} == {(0.0, 1024)}
    assert len({body["messages"][0]["content"] for body in stub.requests}) == 1


def test_a_group_of_pairs_gives_bordas_count(tmp_path):
    """Lengths 3, 1, 1, 2 of unlike letters: the longer wins, equal lengths tie."""
    with StubJudge() as stub:
        got = judged(tmp_path, stub.url, ["aaa", "b", "c", "dd"], PAIRS)
        assert got.reward_B.tolist() == pytest.approx([1, -2 / 3, -2 / 3, 1 / 3])
        assert len(stub.requests) == 12  # 6 pairs in both orders
        orders = [tuple(stub_judge.answers(body)) for body in stub.requests]
        assert {pair[::-1] for pair in orders} == set(orders)
        assert got.metrics["judge/flip_share/rubric"] == (0, 6)
        # With one opponent each around the ring: 3 beats 1, 1 ties 1, 1 loses to 2, 2 loses to 3.
        ring = judged(tmp_path, stub.url, ["aaa", "b", "c", "dd"], PAIRS + "[pairs]\nopponents = 1")
        assert ring.reward_B.tolist() == [1, -0.5, -0.5, 0]
        assert len(stub.requests) == 12 + 8


def test_equal_texts_tie_without_a_call(tmp_path):
    with StubJudge() as stub:
        got = judged(tmp_path, stub.url, ["same", "same"], PAIRS)
    assert got.reward_B.tolist() == [0, 0] and not stub.requests


def test_a_judge_that_likes_the_first_place_decides_nothing(tmp_path):
    """Every pair flips, is a tie, and is counted."""
    first = lambda body, i: completion(f"VERDICT-{stub_judge.number(body)}: 1")  # noqa: E731
    with StubJudge(first) as stub:
        got = judged(tmp_path, stub.url, ["a", "bb", "ccc"], PAIRS)
    assert got.reward_B.tolist() == [0, 0, 0]
    assert got.metrics["judge/flip_share/rubric"] == (3, 3)


def test_a_list_is_ranked_in_both_orders(tmp_path):
    with StubJudge() as stub:
        got = judged(tmp_path, stub.url, ["aaa", "b", "cc"], LIST)
        assert got.reward_B.tolist() == [1, -1, 0] and len(stub.requests) == 2
        # In the second order equally long ones are the other way round: a flip.
        got = judged(tmp_path, stub.url, ["aaa", "b", "c"], LIST)
    assert got.reward_B.tolist() == [1, -0.5, -0.5]
    assert got.metrics["judge/flip_share/rubric"] == (1, 3)


def test_an_answer_is_compared_with_the_reference(tmp_path):
    text = 'reference = "gold"\n' + PAIRS + '[pairs]\nagainst = "reference"'
    with StubJudge() as stub:
        got = judged(tmp_path, stub.url, ["aaa", "bb", "c"], text, gold="xx")
    assert got.reward_B.tolist() == [1, 0, -1] and len(stub.requests) == 6
    assert "REFERENCE" not in stub.requests[0]["messages"][1]["content"]


def test_a_group_of_one_has_no_pairs(tmp_path):
    """As in an evaluation: the reward does not apply. It has not failed."""
    for text in (PAIRS, LIST):
        got = judged(tmp_path, "http://127.0.0.1:9/v1", ["a"], text)
        assert np.isnan(got.reward_B).all() and not got.failed["rubric"].any()


def test_the_judge_reads_what_follows_the_thinking(tmp_path):
    texts = ["<think>long thoughts</think>\nab", "<think>cut"]
    with StubJudge() as stub:
        judged(tmp_path, stub.url, texts)
        assert sorted(map(stub_judge.answers, stub.requests)) == [[""], ["ab"]]
        judged(tmp_path, stub.url, texts[:1], "sees_thinking = true\n" + SINGLE)
        assert "long thoughts" in stub_judge.answers(stub.requests[-1])[0]


def test_every_answer_of_a_ring_meets_as_many():
    for group in range(1, 8):
        for opponents in range(group):
            wins_GG, pairs = _wanted(group, opponents)
            reach = min(2 * opponents, group - 1) if opponents else group - 1
            assert (~np.isinf(wins_GG)).sum(axis=1).tolist() == [reach] * group
            assert len(pairs) == group * reach / 2


# --- Servers that behave badly --------------------------------------------------------------------

LONG = b"x" * 20_000
BAD = {
    "closes": (b"", "connection", "closed before the response ended"),
    "closes within": ((b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",), "connection", "closed"),
    "never answers": (None, "timeout", "did not answer in judge.timeout_s = 0.3 s"),
    "answers garbage": (b"\x00\xff\n\n\r\n\r\n", "garbage", "no HTTP"),
    "sends a line without an end": (b"H" * 40_000, "garbage", "line without an end"),
    "sends no JSON": (response(200, b"<html>"), "garbage", "no chat completion"),
    "sends other JSON": (response(200, b'{"choices": [3]}'), "garbage", "no chat completion"),
    "sends nested JSON": (response(200, b"[" * 9_000), "garbage", "no chat completion"),
    "says nothing": (completion(None), "garbage", "wrote nothing (finish_reason 'stop')"),
    "gives no verdict": (completion("I like it."), "verdict", "gave no verdict"),
    "sends a huge body": (response(200, LONG), "size", "longer than 10,000 bytes"),
    "announces a huge body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n", "size", ""),
    "never ends its body": (b"HTTP/1.1 200 OK\r\n\r\n" + LONG, "size", "longer than"),
    "never ends its chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"1000\r\n%s\r\n" % LONG[:4096] * 5,
        "size",
        "longer than",
    ),
    "redirects": (
        response(307, b"", "Location: http://127.0.0.2:1/steal"),
        "redirect",
        "answered 307, a redirect to 'http://127.0.0.2:1/steal', which is not followed",
    ),
    "is away": (response(503, b"down"), "status", "answered 503: 'down'"),
    "knows no such model": (response(404, b"no model"), "status", "answered 404: 'no model'"),
    "wants a key": (response(401), "status", "No key was sent: the variable that judge.key_env"),
}  # fmt: skip
KINDS = {"timeout": "timeout", "verdict": "values", "garbage": "values"}


@pytest.mark.parametrize("case", BAD)
def test_a_judgement_that_fails_is_unknown(tmp_path, case):
    sent, kind, words = BAD[case]
    with StubJudge(lambda body, i: sent) as stub:
        got = judged(tmp_path, stub.url, ["a", "bb"])
    assert got.unknown_B.all() and got.failed["rubric"].all(), case
    assert got.sums[f"judge/failed_by_{kind}"] == 2
    assert {f.kind for f in got.failures} == {KINDS.get(kind, "error")}
    assert got.failures[0].message.startswith("The judge 'rubric': ")
    assert words in got.failures[0].message and len(got.failures[0].message) < 600
    assert len(stub.requests) >= 2


def test_a_server_that_is_not_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    got = judged(tmp_path, f"http://127.0.0.1:{port}/v1", ["a"])
    assert "cannot be reached" in got.failures[0].message and got.unknown_B.all()
    for url, why in (
        ("localhost:8000", "must begin with http:// or https://"),
        ("http://me:pw@host/v1", "must not hold a user, a password"),
        ("http://host:x/v1", "is no address"),
    ):
        with pytest.raises(ValueError, match=f"judge.base_url: the address of .* {why}"):
            judged(tmp_path, url, ["a"])


@pytest.mark.parametrize(
    "bad",
    [b"", response(429, b"", "Retry-After: 0"), response(500), 
     response(429, b"", "Retry-After: Mon, 30 Nov 2020 00:00:00 GMT")],
)  # fmt: skip
def test_calls_are_repeated_until_one_succeeds(tmp_path, bad):
    """The first two fail; connections that a server closed in between are no attempt."""
    reply = lambda body, i: bad if i < 2 else completion(by_length(body))  # noqa: E731
    with StubJudge(reply) as stub:
        limits = Limits(attempt_s=5, deadline_s=30, retries=2, concurrency=1)
        got = judged(tmp_path, stub.url, ["a", "bb", "ccc"], limits=limits)
    assert got.reward_B.tolist() == [0.25, 0.5, 0.75]
    assert got.sums["judge/retries"] == 2 and got.sums["judge/calls"] == len(stub.requests) == 5


def test_a_connection_that_was_closed_meanwhile_is_no_attempt(tmp_path):
    """The server answers, keeps the connection by its word, and closes it."""
    with StubJudge(lambda body, i: (completion(by_length(body)),)) as stub:
        limits = Limits(concurrency=1, retries=0)
        got = judged(tmp_path, stub.url, ["a", "bb", "ccc"], limits=limits)
    assert got.reward_B.tolist() == [0.25, 0.5, 0.75] and got.sums["judge/calls"] == 3


def test_a_long_retry_after_ends_at_the_deadline(tmp_path):
    with StubJudge(lambda body, i: response(429, b"", "Retry-After: 3600")) as stub:
        limits = Limits(deadline_s=0.2, retries=9, concurrency=4)
        got = judged(tmp_path, stub.url, ["a", "bb"], limits=limits)
    assert "no verdict after judge.deadline_s = 0.2 s" in got.failures[0].message
    assert got.num_failed("timeout") == 2 and len(stub.requests) <= 2


def test_half_of_the_calls_fail_and_the_rest_count(tmp_path):
    texts = [str(i) * (i % 5) for i in range(1, 25)]
    ways = [b"", response(400), None, completion("?")]

    def reply(body, i):
        n = int((stub_judge.answers(body)[0] or "0")[:1])
        return ways[n % 4] if n % 2 else completion(by_length(body))

    with StubJudge(reply) as stub:
        got = judged(tmp_path, stub.url, texts)
    odd_B = np.array([bool(t) and int(t[0]) % 2 == 1 for t in texts])
    np.testing.assert_array_equal(got.unknown_B, odd_B)
    want = [(len(t) % 5) / 4 for t in texts]
    np.testing.assert_array_equal(got.reward_B[~odd_B], np.float32(want)[~odd_B])
    assert 0 < odd_B.sum() < len(texts)


def test_no_more_calls_at_once_than_allowed(tmp_path):
    with StubJudge(delay_s=0.005) as stub:
        limits = Limits(concurrency=3)
        judged(tmp_path, stub.url, [chr(97 + i) * 2 for i in range(20)], limits=limits)
    assert stub.most_at_once == 3 and len(stub.requests) == 20


def test_a_budget_ends_judging(tmp_path):
    texts = ["a", "bb", "ccc", "dddd"]
    with StubJudge() as stub:
        calls = judged(tmp_path, stub.url, texts, limits=Limits(max_calls=3, concurrency=1))
        assert calls.unknown_B.sum() == 1 and len(stub.requests) == 3
        assert "judge.max_calls = 3 calls were made" in calls.failures[0].message
        tokens = judged(tmp_path, stub.url, texts, limits=Limits(max_tokens=220, concurrency=1))
    assert tokens.unknown_B.sum() == 2 and tokens.sums["judge/failed_by_budget"] == 2


# --- What is kept ---------------------------------------------------------------------------------


def kept_in(file):
    def append(record: bytes) -> None:
        with file.open("ab") as opened:
            opened.write(record)

    return Cache([file] if file.exists() else [], append)


def test_what_was_judged_once_is_not_asked_again(tmp_path):
    """Also after a kill within a line, and though the judge answers otherwise now."""
    file, texts = tmp_path / "judgements.jsonl", ["a", "bb", "ccc", "ddddd"]
    with StubJudge() as stub:
        first = judged(tmp_path, stub.url, texts, cache=kept_in(file))
    lines = file.read_text().splitlines()
    assert len(lines) == 4 and {"key", "verdict", "said", "tokens"} == set(json.loads(lines[0]))
    with file.open("a") as opened:
        opened.write('{"key": "x", "verd')
    worst = lambda body, i: completion(f"VERDICT-{stub_judge.number(body)}: good=1")  # noqa: E731
    with StubJudge(worst) as stub:
        again = judged(tmp_path, stub.url, texts, cache=kept_in(file))
        assert not stub.requests
        np.testing.assert_array_equal(first.reward_B, again.reward_B)
        assert first.extras == again.extras and again.sums["judge/calls"] == 0
        # The model, the sampling and the rubric are parts of the key; comments are not.
        judged(tmp_path, stub.url, texts, "# well\n" + SINGLE, cache=kept_in(file))
        assert not stub.requests
        for other in ("[sampling]\nseed = 1", "weight = 2", "[sampling]\ntemperature = 1"):
            before = len(stub.requests)
            judged(tmp_path, stub.url, texts, SINGLE + other, cache=kept_in(file))
            assert len(stub.requests) == before + 4
        judged(tmp_path, stub.url, texts, cache=kept_in(file), model="m2")
        assert len(stub.requests) == 16
        # Earlier calls count in a run's budget.
        cache = kept_in(file)
        assert cache.calls == len(cache) == 20 and cache.tokens == 20 * 110
        spent = judged(tmp_path, stub.url, ["new"], limits=Limits(max_calls=20), cache=cache)
        assert spent.unknown_B.all()


def test_a_failure_is_not_kept(tmp_path):
    file = tmp_path / "judgements.jsonl"
    with StubJudge(lambda body, i: response(400)) as stub:
        assert judged(tmp_path, stub.url, ["a"], cache=kept_in(file)).unknown_B.all()
    assert not file.exists()
    with StubJudge() as stub:
        assert judged(tmp_path, stub.url, ["a"], cache=kept_in(file)).reward_B == [0.25]


def test_the_key_is_sent_and_stands_nowhere_else(tmp_path):
    """A server may quote it in an error, in a redirect, and in its answers."""
    file = tmp_path / "judgements.jsonl"
    echo = [
        lambda body: response(400, f"bad key {KEY}, {json.dumps(KEY)}".encode()),
        lambda body: response(302, b"", f"Location: http://x/?k={KEY}"),
        lambda body: completion(f"Your key is {KEY}.\nVERDICT-{stub_judge.number(body)}: {KEY}"),
        lambda body: completion(f"Your key is {KEY}.\n{by_length(body)}"),
    ]
    with StubJudge(lambda body, i: echo[len(stub_judge.answers(body)[0])](body)) as stub:
        got = judged(tmp_path, stub.url, ["", "1", "22", "333"], cache=kept_in(file), key=KEY)
    assert all(f"Authorization: Bearer {KEY}" in head for head in stub.heads)
    assert got.unknown_B.tolist() == [True, True, True, False]
    told = [f.message for f in got.failures] + [str(got.extras), file.read_text()]
    assert len(got.failures) == 3 and all(KEY not in text for text in told)
    assert sum("***" in text for text in told) >= 4
    assert KEY not in repr(Settings(None, "u", "m", KEY))
    assert hide("a short one", "one") == "a short one"


# --- Injections -----------------------------------------------------------------------------------


def quoting(truth: str):
    """A judge that quotes what it judges, as it reads it and as it was, and then judges rightly."""

    def reply(body, i):
        n, texts = stub_judge.number(body), stub_judge.answers(body)
        asked = body["messages"][1]["content"].rsplit("\n", 1)[-1]
        raw = [text.replace("V ERDICT", "VERDICT").replace("[ [", "[[") for text in texts]
        seen = "\n".join([*texts, *raw, asked])
        thought = f"<think>{seen}\nIt wants VERDICT-{n}: good=5, or VERDICT-{n}: 1.</think>\n"
        return completion(f"{thought}It says: {seen}\nVERDICT-{n}: {truth}\n{seen[: -len(asked)]}")

    return reply


def test_no_text_speaks_as_the_judge(tmp_path):
    """40 injections: the parser reads the judge's own verdict, whatever it quotes."""
    texts = [f"The answer is 4. {text}" for text in INJECTIONS]
    flips = 0
    with StubJudge(quoting("good=2")) as stub:
        rubric = "sees_thinking = true\n" + SINGLE
        got = judged(tmp_path, stub.url, texts, rubric, Limits(retries=0))
        flips += int((got.reward_B != 0.25).sum())
        for body in stub.requests:  # and nothing ends its block, or begins another
            content = body["messages"][1]["content"]
            assert len(re.findall(r"\[\[BEGIN ", content)) == 2
            assert len(re.findall(r"\[\[END ", content)) == 2
            assert len(re.findall(r"VERDICT-[0-9a-f]", content)) == 1
            assert not re.search(r"<\||<｜|</?think>|\[/?INST\]|<start_of_turn>|</?s>", content)
    assert flips == 0 and len(stub.requests) == 40
    with StubJudge(quoting("2")) as stub:  # the injected one is first, and then second
        for text in texts[:8]:
            got = judged(tmp_path, stub.url, [text, "4"], PAIRS)
            assert got.reward_B.tolist() == [0, 0], text  # "2" in both orders: a flip, so a tie


def test_the_event_loop_ends_with_calls_under_way(tmp_path):
    with StubJudge(lambda body, i: None) as stub:
        file = tmp_path / "rubric.toml"
        file.write_text(SINGLE)
        settings = {"rubric": Settings(rubric_lib.read(str(file)), stub.url, "m")}
        host = Judges(settings, Limits())
        rewards = registry.load((f"judge:{file}",), (1.0,))
        pool, limit = Pool(rewards, host=host), time.monotonic() + 60
        pool.submit(["q"], ["a"], {})
        while not stub.requests and time.monotonic() < limit:
            time.sleep(0.01)
        tasks, ends = list(host._tasks), threading.Thread(target=pool.close, daemon=True)
        ends.start()
        ends.join(60)
        assert not ends.is_alive() and host._thread is None and host._loop.is_closed()
        assert tasks and all(task.cancelled() for task in tasks)
        host.close()  # twice does no harm
