"""Each attack on the sandbox is contained: by namespaces, and by Landlock and a filter alone."""

import dataclasses

import pytest

from grpo_jax.rewards.sandbox import attacks, client, isolation, linux
from grpo_jax.rewards.sandbox.client import Limits, Sandbox
from grpo_jax.rewards.sandbox.judging import Judge

pytestmark = pytest.mark.skipif(not linux.is_here(), reason="needs Linux on x86-64 or ARM64")


@pytest.fixture(scope="module", params=["usual", "plain"])
def judge(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(client, "ROUTES", ("plain",))
        isolation.found.cache_clear()
        kept, measures = isolation.found()
        missing = [name for name, is_kept in kept.items() if not is_kept]
        if not (measures["filter"] and (measures["namespaces"] or measures["landlock"])):
            pytest.skip(f"this system does not keep programs from {missing}: {measures}")
        assert not missing, measures
        with Judge(attacks.LIMITS) as judge:
            yield judge
    isolation.found.cache_clear()


@pytest.fixture(scope="module")
def host():
    with attacks.Host() as host:
        yield host


@pytest.mark.parametrize("attack", attacks.ATTACKS, ids=lambda a: a.name.replace(" ", "-"))
def test_it_is_contained(attack, judge, host):
    contained, what = attack.run(judge, host)
    assert contained, what


def test_an_attack_that_succeeds_is_seen(judge, host):
    """Programs that do what is allowed, written as if it were an attack."""
    prints = attacks._script("allowed", "attempt(lambda: open('x', 'w'))")
    assert not prints.run(judge, host)[0]
    solves = attacks.Attack("right", f"def f(x): return {attacks._WANTED!r}", attacks._CALL)
    assert not solves.run(judge, host)[0]
    host.file.write_text("changed")
    assert not attacks.ATTACKS[5].run(judge, host)[0]
    host.file.write_text("precious")


def test_a_start_is_refused_or_told(monkeypatch):
    kept = dict.fromkeys(isolation._MEANINGS, True) | {"connects": False, "forks": False}
    said = []
    measures = {"filter": True, "faults": {"user": "no"}}
    monkeypatch.setattr(isolation, "found", lambda: (kept, measures))
    monkeypatch.setattr(isolation, "say", said.append)
    with pytest.raises(ValueError) as error:
        isolation.check("full")
    assert "kept from the network; more processes than its limit" in str(error.value)
    assert 'rewards.code_isolation = "limits"' in str(error.value)
    isolation.check("limits")
    assert "the network" in said[0] and "filter (user: no)" in said[0]
    monkeypatch.setattr(isolation, "found", lambda: (dict.fromkeys(kept, True), {}))
    isolation.check("full")
    assert len(said) == 1


def test_the_probes_answers():
    """What says nothing has escaped, unless a limit stopped it."""
    with Sandbox(Limits()) as sandbox:
        done = sandbox.script("print('reads escaped'); print('forks kept')")
    assert isolation._read(done, ["reads", "forks", "writes"]) == {
        "reads": False, "forks": True, "writes": False
    }  # fmt: skip
    stopped = dataclasses.replace(done, stopped="disk")
    assert isolation._read(stopped, ["reads", "fills"]) == {"reads": False, "fills": True}


def test_nothing_is_left_after_the_end(tmp_path, monkeypatch):
    """Neither the process that starts programs, nor its folder."""
    monkeypatch.setattr(client, "ROUTES", ("plain",))
    monkeypatch.setattr(client.tempfile, "tempdir", str(tmp_path))
    with Sandbox(Limits()) as sandbox:
        sandbox.script("open('x', 'w')")
        pid = sandbox.pid
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        client.os.kill(pid, 0)


def test_a_lost_process_is_replaced():
    """A fault of the sandbox is no fault of the program: it raises, and the next one runs."""
    with Sandbox(Limits()) as sandbox:
        assert sandbox.script("print(1)").output == b"1\n"
        client.os.kill(sandbox.pid, 9)
        with pytest.raises(client.SandboxError, match="has failed"):
            sandbox.script("print(2)")
        assert sandbox.script("print(3)").output == b"3\n"
