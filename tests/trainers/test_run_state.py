"""Where a run goes on: at its newest checkpoint, or at the one that it is rolled back to."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from states import MODEL, OPTIMIZER, same_bits, train_state

from grpo_jax.config import options
from grpo_jax.data.pass_rates import PassRates
from grpo_jax.devices import sharding, transfer
from grpo_jax.environments.single_turn import Draws, GivenUp, Rollout
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.structs import Experience
from grpo_jax.trainers import run_state
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Course

EVERY, UPDATES = 2, 3  # steps between checkpoints; updates a step


@pytest.fixture(scope="module")
def state():
    return train_state(sharding.make_mesh(2, 4, 1), updates=0)


@pytest.fixture
def parts(tmp_path, state):
    """Of a run that keeps one checkpoint, and those that a roll-back needs."""
    config = options.default()
    config.checkpoint.every_steps, config.batch.minibatches = EVERY, UPDATES
    checkpoints = Checkpoints(tmp_path, keep=1, due_every=EVERY * UPDATES)
    yield types.SimpleNamespace(
        config=config,
        course=Course(100, 8, updates=UPDATES, save_every=EVERY),
        folder=tmp_path,
        mesh=sharding.make_mesh(2, 4, 1),
        policy=types.SimpleNamespace(model=MODEL),
        optimizer=OPTIMIZER,
        sizes={"update": CompiledSizes()},
        read={"training problems": {"number": 3}},
        checkpoints=checkpoints,
        first_reference=lambda: None,
        critic=None,
    )
    checkpoints.close()


def _save(parts, state, *steps: int, update: int = 0, experience=None, **known) -> None:
    for step in steps:
        number = jax.device_put(jnp.int32(step * UPDATES + update), state.num_updates.sharding)
        train = state.replace(num_updates=number)
        known |= {"train": train, "experience": experience}
        at = RunState(step=step, update=update, prompts=100 * step, **known)
        run_state.save(parts, at)


def test_a_run_that_reads_something_else_does_not_go_on(parts, state):
    """Where checkpoint.folder is elsewhere, the workdir may be new and know of nothing."""
    _save(parts, state, 2)
    assert run_state.newest(parts).step == 2
    parts.read = {"training problems": {"number": 4}}
    with pytest.raises(ValueError, match="3 training problems there, 4 now"):
        run_state.newest(parts)
    parts.config.checkpoint.accept_changes = ("data.path",)
    assert run_state.newest(parts).step == 2
    parts.config.checkpoint.accept_changes = ()
    (parts.folder / "config.json").write_text(  # accepted before, when nothing was saved after it
        '{"binding": {}, "options": {}, "changes": [{"option": "data.path"}]}'
    )
    assert run_state.newest(parts).step == 2


def test_a_checkpoint_of_an_earlier_version_is_refused(parts, state):
    parts.checkpoints.save(state, {"position": {"step": 2}, "config": {}})
    with pytest.raises(ValueError, match=r"earlier version of grpo_jax.*--workdir"):
        run_state.newest(parts)


def test_a_roll_back_goes_to_the_newest_checkpoint_that_was_due(parts, state):
    """The one in the middle of step 9 is from a stop; a run that was left alone has none there."""
    _save(parts, state, 2, 4, 6, 8)
    _save(parts, state, 8, update=1)
    assert parts.checkpoints.numbers() == [18, 24, 25]  # though keep = 1
    at = RunState(step=8, update=1, passed_over=5, tokens=1234)

    back = run_state.roll_back(parts, at, undone=9)
    assert (back.step, back.update, back.prompts, back.checkpoint) == (8, 0, 800, 24)
    assert parts.checkpoints.numbers() == [18, 24]
    # Step 9 had draw 8 + 5, as steps are counted from 0 there; now it has the next one.
    assert at.draw_of(8) == 13 and back.draw_of(8) == 14
    assert (back.tokens, back.history.roll_backs) == (1234, 1)
    assert run_state.load(parts, back) is None and back.experience is None
    same_bits(back.train.params, state.params)

    # Led astray from there again, at step 10: now the one before. Then nothing older is kept.
    back.step = 9
    again = run_state.roll_back(parts, back, undone=10)
    assert (again.step, again.checkpoint) == (6, 18) and parts.checkpoints.numbers() == [18]
    assert again.draw_of(6) == back.draw_of(9) + 1 == 16
    assert again.history.roll_backs == 2
    assert run_state.roll_back(parts, again, undone=7).checkpoint == 18


def test_a_checkpoint_was_due_by_the_config_that_wrote_it(parts, state):
    """Of a run that goes on with other `checkpoint.every_steps`, which 18 and 12 are no part of."""
    _save(parts, state, 2, 4, 6)
    parts.course = dataclasses.replace(parts.course, save_every=5)
    _save(parts, state, 7, last_due=18)  # of a stop
    at = run_state.newest(parts)
    assert (at.step, at.last_due) == (7, 18)
    back = run_state.roll_back(parts, at, undone=8)
    assert (back.step, back.checkpoint) == (6, 18)
    assert parts.checkpoints.numbers() == [12, 18]  # nothing older is deleted
    _save(parts, state, 8, last_due=18)
    _save(parts, state, 10, last_due=18)
    assert run_state.newest(parts).last_due == 30  # of the new config
    assert run_state.roll_back(parts, RunState(step=11), undone=12).checkpoint == 30


def test_where_those_that_were_due_are_gone_it_goes_back_to_one_of_a_stop(parts, state):
    """As where no guard needed them when they were written; in the middle of step 10."""
    mesh, rollouts = parts.mesh, tiny.rollouts(prompts=8)
    experience = Experience(
        rollouts=transfer.shard_rows(mesh, rollouts),
        advantage=transfer.shard_rows(mesh, rollouts.length_PG.astype(np.float32)),
        action_PGC=transfer.shard_rows(mesh, rollouts.logp_PGC < 0),
        old_logp_PGC=None,
        ref_logp_PGC=None,
    )
    _save(parts, state, 9, update=2, experience=experience, last_due=24, passed_over=5)
    at = run_state.newest(parts)
    back = run_state.roll_back(parts, dataclasses.replace(at, step=10, update=1), undone=11)
    assert (back.step, back.update, back.checkpoint) == (9, 2, 29)
    assert parts.checkpoints.numbers() == [29]
    # Its own completions are learned from first; step 11 has the draw after the one undone.
    assert back.draw_of(10) == at.draw_of(10) + 1
    run_state.load(parts, back)
    np.testing.assert_array_equal(back.experience.advantage, experience.advantage)


def test_without_a_checkpoint_that_was_due_it_begins_again(parts, state):
    _save(parts, state, 1)
    before = {"eval/accuracy": 0.25}
    at = RunState(step=1, first_evaluation=before, accuracy_before=0.25, accuracy=0.5)
    back = run_state.roll_back(parts, at, undone=2)
    assert (back.step, back.checkpoint, back.draw_of(0)) == (0, -1, 2)
    assert (back.first_evaluation, back.accuracy) == (before, 0.25)
    assert parts.checkpoints.numbers() == []


def test_a_damaged_checkpoint_is_passed_over(parts, state, capsys):
    _save(parts, state, 6, 8)
    assert parts.checkpoints.numbers() == [18, 24]
    facts = parts.folder / "24" / "facts" / "metadata"
    facts.write_bytes(facts.read_bytes() + b" ")
    assert run_state.roll_back(parts, RunState(step=8), undone=9).checkpoint == 18
    assert "checkpoint 24" in capsys.readouterr().out


def test_the_newest_checkpoint_is_where_the_run_stands(parts, state):
    assert run_state.newest(parts) == RunState()
    _save(parts, state, 4, rollout_metrics={"reward": 0.5})
    at = run_state.newest(parts)
    own = {"checkpoint": 12, "last_due": 12, "sizes": {"update": CompiledSizes().as_json()}}
    assert at == RunState(step=4, prompts=400, rollout_metrics={"reward": 0.5}, **own)


def test_what_decides_the_next_prompts_goes_along(parts, state):
    """Pass rates to the last bit; and completions sampled ahead with their problems' numbers.

    What over-sampling gave up beside them is still to be counted.
    """
    rates = PassRates.unseen(5).after([3, 1, 3], [0.1, 0.7, 1 / 3], newest=0.3)
    ahead = transfer.shard_rows(parts.mesh, tiny.rollouts(prompts=8))
    given_up = GivenUp(np.array([3, 4], np.int32), np.array([[1, 2], [0, 0]], np.int32))
    waiting = Rollout(None, None, ahead, 1.5, problem_P=np.arange(8) + 2, given_up=given_up)
    _save(parts, state, 4, pass_rates=rates, next_rollout=waiting, passed_over=3)
    at = run_state.newest(parts)
    assert at.pass_rates.times_N.tolist() == [0, 1, 0, 2, 0]
    assert at.pass_rates.rate_N.tobytes() == rates.rate_N.tobytes()
    assert (at.next_problems, at.next_rollout_s) == ([*range(2, 10)], 1.5)
    assert at.next_given_up == [[3, 4], [[1, 2], [0, 0]]]
    assert run_state.load(parts, at).length_PG.tolist() == np.array(ahead.length_PG).tolist()


def test_a_step_of_several_draws_is_sampled_again(parts, state):
    """The rewards of the groups that were left out are not kept, nor are its draws counted."""
    draws = Draws(3, np.arange(12), *[None] * 4, num_equal=2)
    ahead = transfer.shard_rows(parts.mesh, tiny.rollouts(prompts=8))
    waiting = Rollout(None, None, ahead, 1.5, problem_P=np.arange(8), draws=draws)
    _save(parts, state, 4, next_rollout=waiting, passed_over=3)
    at = run_state.newest(parts)
    assert run_state.load(parts, at) is None and at.next_problems == []
    assert at.draw_of(4) == 7
    at.count_draws(waiting)  # once it is learned from
    assert at.draw_of(5) == 4 + 3 + 3


def test_sizes_of_rows_go_along(parts, state):
    kept = {"used": [[8, 2, 14, 1, 4]], "wasted": 0.5}
    parts.sizes["update"].restore(kept)
    number = jax.device_put(jnp.int32(4 * UPDATES), state.num_updates.sharding)
    run_state.save(parts, RunState(step=4, train=state.replace(num_updates=number)))
    parts.sizes["update"].restore(None)
    at = run_state.newest(parts)
    assert run_state.load(parts, at) is None and at.experience is None
    assert parts.sizes["update"].as_json() == kept


@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_checkpoint_that_is_not_finite_is_refused(parts, state, where):
    tree = getattr(state, where)
    leaves, structure = jax.tree.flatten(tree)
    index = max(range(len(leaves)), key=lambda i: leaves[i].size)
    path = jax.tree_util.tree_leaves_with_path(tree)[index][0]
    name = f"{where}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
    bad = np.array(leaves[index])
    bad.flat[[3, 5]] = np.nan, -np.inf
    leaves[index] = jax.device_put(bad, leaves[index].sharding)
    _save(parts, state.replace(**{where: structure.unflatten(leaves)}), 4)
    with pytest.raises(ValueError) as info:
        run_state.load(parts, run_state.newest(parts))
    message = str(info.value)
    assert f"Checkpoint 12 in {parts.folder}: 2 of the {bad.size} values of {name}" in message
    assert "Delete that" in message


def _moved(tree, by: float):
    return jax.tree.map(lambda x: x + jnp.float32(by).astype(x.dtype), tree)


def test_a_refreshed_reference_goes_back_with_the_run(parts, state):
    """And the coefficients; the reference as it was given is read again where it is needed."""
    reads = []
    parts.first_reference = lambda: reads.append(1) or state.params
    second, third = (_moved(state.params, by) for by in (0.25, 0.5))
    _save(parts, state, 2, reference=state.params, coefficients={"kl_coef": 0.1})
    _save(parts, state, 4, reference=second, refreshed=1, coefficients={"kl_coef": 1 / 3})
    assert not (parts.folder / "6" / "reference").exists()  # it was not refreshed yet
    at = RunState(step=5, reference=third, refreshed=2, coefficients={"kl_coef": 9.0})

    back = run_state.roll_back(parts, at, undone=5)
    run_state.load(parts, back)
    same_bits(back.reference, second)
    assert (back.step, back.refreshed, back.coefficients) == (4, 1, {"kl_coef": 1 / 3})
    assert not reads

    first = run_state.roll_back(parts, back, undone=5)
    run_state.load(parts, first)
    same_bits(first.reference, state.params)
    assert (first.step, first.refreshed, first.coefficients) == (2, 0, {"kl_coef": 0.1})
    assert len(reads) == 1

    again = run_state.roll_back(parts, first, undone=3)  # it has it already
    run_state.load(parts, again)
    assert again.reference is first.reference and len(reads) == 1
