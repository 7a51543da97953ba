"""Checkpoints: bit for bit, which ones are kept, and which are not taken for whole."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from states import MODEL, OPTIMIZER, same_bits, train_state

from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import accumulate, optim
from grpo_jax.learner import train_state as train_state_lib
from grpo_jax.models import parameters
from grpo_jax.run import checksums, integrity
from grpo_jax.run.checkpoints import Checkpoints, NotSaved
from grpo_jax.run.saved import Saved, newest_params
from grpo_jax.structs import Experience, Layer, Rollouts, TrainState


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 4, 1)


def _like(mesh, model=MODEL):
    return train_state_lib.state_like(model, mesh, OPTIMIZER)


def _said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def _experience(mesh, *, old: bool, ref: bool, prompt: int = 5) -> Experience:
    rng = np.random.default_rng(0)
    shape = (4, 2, 3)
    floats = lambda: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    rollouts = Rollouts(
        prompt_PQ=rng.integers(0, 8, (4, prompt), np.int32),
        prompt_length_P=np.minimum([5, 1, 2, 3], prompt).astype(np.int32),
        completion_PGC=rng.integers(0, 8, shape, np.int32),
        logp_PGC=floats(),
        length_PG=rng.integers(1, 4, (4, 2), np.int32),
        stopped_PG=rng.random((4, 2)) < 0.5,
    )
    experience = Experience(
        rollouts=rollouts,
        advantage=floats()[..., 0],
        action_PGC=rng.random(shape) < 0.5,
        old_logp_PGC=floats() if old else None,
        ref_logp_PGC=floats() if ref else None,
    )
    return transfer.shard_rows(mesh, experience)


def test_a_state_comes_back_bit_for_bit(tmp_path, mesh):
    state = train_state(mesh, 2)
    with_facts = Checkpoints(tmp_path / "c", keep=1)
    assert with_facts.latest() is None
    with_facts.save(state, {"position": {"step": 3, "share": 0.1}})
    with_facts.close()
    again = Checkpoints(tmp_path / "c", keep=1)  # as a new process would
    assert again.latest() == 2
    assert again.facts(2) == {"position": {"step": 3, "share": 0.1}}
    restored = again.restore(2, _like(mesh))
    same_bits(state, restored)
    placed = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]  # noqa: E731
    assert placed(restored) == placed(_like(mesh))
    other = sharding.make_mesh(1, 8, 1)  # and on another mesh
    same_bits(state, again.restore(2, _like(other)))
    again.close()


@pytest.mark.parametrize(
    ("kept", "master_weights"), [("int8", False), ("bfloat16", True)], ids=["rounded", "copy"]
)
def test_low_precision_continues_bit_for_bit(tmp_path, mesh, kept, master_weights):
    """Parameters, moments and chance are the same after a restore; on another mesh but for the
    rounding of its programs, which XLA does not promise to be alike."""
    optimizer = optim.for_params(
        optim.adamw(
            lambda step: 0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=0.0,
            kept=kept, seed=5,
        ),
        "bfloat16",
        master_weights=master_weights,
        seed=5,
    )  # fmt: skip
    shapes = parameters.param_shapes(MODEL)
    step = jax.jit(lambda state, grads: accumulate.apply_gradient(state, optimizer, grads, 0.0)[0])

    def moved(state, number):
        key = jax.random.key(number)
        grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), shapes)
        return step(state, grads)

    def like(mesh):
        return train_state_lib.state_like(MODEL, mesh, optimizer, jnp.bfloat16)

    def cast(params):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    placed = jax.tree.map(lambda x: x.sharding, like(mesh).params)
    params = jax.device_put(cast(train_state(mesh, 0).params), placed)
    state = moved(train_state_lib.start(params, MODEL, mesh, optimizer), 1)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(jnp.bfloat16)}
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(state, {})
    other = sharding.make_mesh(1, 8, 1)
    restored = checkpoints.restore(1, like(mesh)), checkpoints.restore(1, like(other))
    weights = newest_params(tmp_path / "c", state.params)
    checkpoints.close()

    same_bits(state.params, weights)
    for again in restored:
        same_bits(state, again)
    want = moved(state, 2)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (want.params, state.params))))
    same_bits(want, moved(restored[0], 2))
    for a, b in zip(*map(jax.tree.leaves, (want, moved(restored[1], 2)))):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isclose(a, b, rtol=1e-6, atol=1e-7).mean() > 0.99  # a code may go the other way
    if (
        kept == "int8"
    ):  # [V = 8, D = 16]: codes as a moment lies, peaks whole where they do not split
        moment = optax.tree.get(like(other).opt_state, "mu")["embed"]["embedding"]
        assert moment.codes.sharding.shard_shape(moment.codes.shape) == (8, 2)
        assert moment.peak.sharding.shard_shape(moment.peak.shape) == (8, 1)


@pytest.mark.parametrize(("old", "ref"), [(True, True), (False, True), (False, False)])
def test_a_rollout_comes_back_with_what_it_lacks(tmp_path, mesh, old, ref):
    """In a manager that never saved one: as after a restart."""
    experience = _experience(mesh, old=old, ref=ref)
    if ref:  # an advantage for each token
        experience = experience.replace(advantage=experience.ref_logp_PGC * 2)
    first = Checkpoints(tmp_path / "c", keep=2)
    first.save(train_state(mesh, 1), {}, experience=experience)
    first.save(train_state(mesh, 2), {})
    first.close()
    again = Checkpoints(tmp_path / "c", keep=2)
    found = again.experience(1, mesh)
    assert found is not None
    same_bits(experience, found)
    assert (found.old_logp_PGC is None, found.ref_logp_PGC is None) == (not old, not ref)
    assert found.advantage.sharding == experience.advantage.sharding
    assert again.experience(2, mesh) is None
    again.close()


def test_rollouts_of_texts_without_a_prompt_come_back(tmp_path, mesh):
    """Their array of prompts has no element, which Orbax does not save."""
    experience = _experience(mesh, old=False, ref=False, prompt=0)
    first = Checkpoints(tmp_path / "c", keep=2)
    first.save(train_state(mesh, 1), {}, experience=experience, ahead=experience.rollouts)
    first.close()
    again = Checkpoints(tmp_path / "c", keep=2)
    found, ahead = again.experience(1, mesh), again.ahead(1, mesh)
    again.close()
    assert found.rollouts.prompt_PQ.shape == (4, 0)
    assert found.rollouts.prompt_PQ.sharding == experience.rollouts.prompt_PQ.sharding
    same_bits(experience, found)
    same_bits(experience.rollouts, ahead)


def test_the_newest_and_the_best_are_kept(tmp_path, mesh):
    state = train_state(mesh, 0)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    accuracies = [None, 0.5, 0.9, 0.7, None, 0.2, None]
    for number, accuracy in enumerate(accuracies):
        numbered = dataclasses.replace(state, num_updates=jnp.int32(number))
        checkpoints.save(numbered, {}, quality=accuracy)
    checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit())
    assert kept == [2, 5, 6]


@pytest.fixture(scope="module")
def states(mesh):
    return {number: train_state(mesh, number) for number in (1, 2)}


@pytest.fixture(scope="module")
def two(tmp_path_factory, states):
    """A folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "c"
    checkpoints = Checkpoints(folder, keep=2)
    for number, state in states.items():
        checkpoints.save(state, {"number": number})
    checkpoints.close()
    return folder


def _damage(file, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "is missing":
        file.unlink()
    elif how == "is truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("state/d/*", "is missing"),
        ("state/d/*", "is truncated"),
        ("state/d/*", "has changed"),
        ("state/manifest.ocdbt", "has changed"),
        ("facts/metadata", "is truncated"),
        ("_CHECKPOINT_METADATA", "is truncated"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    tmp_path, mesh, two, states, capsys, pattern, how
):
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    file = next((folder / "2").glob(pattern))
    _damage(file, how)
    name = str(file.relative_to(folder / "2"))
    newest = newest_params(folder, _like(mesh).params)  # renames nothing
    assert f"checkpoint 2 in {folder} is damaged and passed over: {name} {how}" in _said(capsys)
    assert (folder / "2").exists()

    again = Checkpoints(folder, keep=2)
    assert again.latest() == 1
    told = _said(capsys)
    assert f"warning: checkpoint 2 in {folder} is damaged: {name} {how}" in told
    assert "The one before is 1: 1 update must be computed again." in told
    same_bits(states[1], again.restore(1, _like(mesh)))
    same_bits(states[1].params, newest)
    again.save(states[2], {"number": 3})  # its number is free
    assert again.latest() == 2 and again.facts(2) == {"number": 3}
    again.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "damaged_2"]


@pytest.mark.parametrize("how", ["is missing", "is damaged", "does not belong there"])
def test_a_checkpoint_whose_record_is_not_its_own_is_set_aside(tmp_path, two, capsys, how):
    shutil.copytree(two, tmp_path / "c")
    record = tmp_path / "c" / "2" / "sha256.json"
    if how == "is missing":
        record.unlink()
    elif how == "is damaged":
        record.write_text(record.read_text()[:-3])
    else:
        (tmp_path / "c" / "2" / "state" / "d" / "other").write_text("")
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.latest() == 1
    assert f" {how}. It is not used" in _said(capsys)
    again.close()


def test_when_all_are_damaged_the_run_asks(tmp_path, two, capsys):
    """None is renamed, unless it may begin again."""
    folder = tmp_path / "c"
    shutil.copytree(two, folder)
    for number in ("1", "2"):
        _damage(folder / number / "facts" / "metadata", "has changed")
    again = Checkpoints(folder, keep=2)
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged \(2: facts/metadata"):
        again.latest()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    assert again.latest(begin_again=True) is None
    assert "There is none before it: 1 update must be computed again." in _said(capsys)
    again.close()
    assert sorted(p.name for p in folder.iterdir()) == ["damaged_1", "damaged_2"]
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        newest_params(folder, {})


@pytest.mark.parametrize("fault", [errno.ESTALE, errno.EACCES, errno.EIO])
def test_what_cannot_be_read_is_not_damaged(tmp_path, mesh, two, monkeypatch, fault):
    """It is tried again; at last the run ends, and nothing was renamed."""
    folder, times = tmp_path / "c", []
    shutil.copytree(two, folder)
    read = checksums._size_and_sum

    def unreadable(file):
        if len(times) < faults:
            times.append(file)
            raise OSError(fault, os.strerror(fault), str(file))
        return read(file)

    monkeypatch.setattr(checksums, "_size_and_sum", unreadable)
    monkeypatch.setattr(integrity, "_TRY_AGAIN_S", (0.0, 0.0))
    again = Checkpoints(folder, keep=2)
    faults = 1
    assert again.latest() == 2
    times.clear()
    faults = 10**6
    with pytest.raises(ValueError, match=rf"The checkpoint {folder}/2 cannot be read .*{fault}"):
        again.latest()
    with pytest.raises(ValueError, match=r"Nothing was changed"):
        newest_params(folder, _like(mesh).params)
    again.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("name", ["lr[1e-5]", "[", "]", "*", "a?", "back\\slash"])
def test_a_path_that_is_a_pattern_is_refused(tmp_path, name):
    """Orbax looks for what its processes wrote by such patterns."""
    with pytest.raises(ValueError, match=r"cannot be kept in .*is a pattern.*checkpoint\.folder"):
        Checkpoints(tmp_path / name / "c", keep=1)


@pytest.mark.parametrize("name", ["a b", "%41", "é", "{a}", "#", "run=1,2", "'q\"", "$HOME"])
def test_any_other_path_keeps_checkpoints(tmp_path, name):
    folder = tmp_path / name / "c"
    first = Checkpoints(folder, keep=1)
    first.save(_tiny(1), {})
    first.close()
    again = Checkpoints(folder, keep=1)
    same_bits(again.restore(again.latest(), _tiny(0)), _tiny(1))
    again.close()


def test_a_checkpoint_that_could_not_be_restored_gets_no_name(tmp_path, monkeypatch):
    """As where Orbax finds nothing to merge, and does not mind."""
    monkeypatch.setattr(integrity, "_PATTERNS", re.compile("(?!)"))  # refuses nothing
    folder = tmp_path / "lr[1e-5]"
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(_tiny(1), {})
    with pytest.raises(NotSaved, match=r"not written whole: state/manifest.ocdbt is missing"):
        checkpoints.wait()
    assert checkpoints.latest() is None and not list(folder.iterdir())


def test_a_checkpoint_whose_sums_are_right_may_lack_its_arrays(tmp_path, two, capsys):
    """One of before that was looked at."""
    shutil.copytree(two, tmp_path / "c")
    newest = epath.Path(tmp_path / "c" / "2")
    (newest / "state" / "manifest.ocdbt").unlink()
    checksums.write(newest, leave_out=integrity.WRITTEN_LAST)
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.latest() == 1 and "state/manifest.ocdbt is missing" in _said(capsys)
    again.close()


def test_folders_that_are_no_checkpoints_are_not_touched(tmp_path, mesh, two):
    """Orbax would take their names for steps, and delete the oldest of them."""
    folder = tmp_path / "by_year"
    shutil.copytree(two, folder)
    for year in ("2023", "2024"):
        (folder / year).mkdir()
        (folder / year / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"by_year holds 2023, 2024, which are named like"):
        Checkpoints(folder, keep=2)
    assert {p.name for p in folder.iterdir()} == {"1", "2", "2023", "2024"}
    with Saved(folder) as newest:
        assert newest.number == 2


def _tiny(number: int) -> TrainState:
    """A state of 400 kB that does not compress."""
    values = np.random.default_rng(number).normal(size=100_000).astype(np.float32)
    return TrainState(
        params={"a": jnp.asarray(values)},
        opt_state=(),
        num_updates=jnp.int32(number),
        num_skipped=jnp.int32(0),
    )


def test_a_full_disk_is_told_and_costs_no_checkpoint(small_disk, capsys):
    ballast, folder = small_disk / "ballast", small_disk / "c"
    checkpoints = Checkpoints(folder, keep=1, max_failed=2)
    checkpoints.save(_tiny(1), {})
    checkpoints.wait()
    ballast.write_bytes(bytes(400_000))

    checkpoints.save(_tiny(2), {})
    while "warning" not in (told := _said(capsys)):  # without waiting for it
        checkpoints.poll()
        time.sleep(0.01)
    for words in (
        f"checkpoint 2 could not be written to {folder}: no space is left on the disk",
        "It has 400 kB before compression, and",
        "are free. The newest is 1. The run goes on",
        "it ends when checkpoint.max_failed = 2 fail in a row",
    ):
        assert words in told
    assert [p.name for p in folder.iterdir()] == ["1"]  # what was written of it is gone

    ballast.unlink()
    checkpoints.save(_tiny(3), {})
    checkpoints.wait()
    assert checkpoints.latest() == 3
    same_bits(checkpoints.restore(3, _tiny(0)), _tiny(3))

    ballast.write_bytes(bytes(400_000))
    checkpoints.save(_tiny(4), {})
    checkpoints.save(_tiny(5), {})  # the first of a new row is told here
    with pytest.raises(NotSaved, match=r"checkpoint 5 could not be .* The newest is 3"):
        checkpoints.wait()
    with pytest.raises(NotSaved):  # nothing was saved since
        checkpoints.close()
    assert [p.name for p in folder.iterdir()] == ["3"]


def test_saving_the_same_state_again_does_nothing(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(train_state(mesh, 1), {"a": 1})
    checkpoints.save(train_state(mesh, 1), {"a": 2})
    checkpoints.wait()
    assert checkpoints.facts(1) == {"a": 1}
    checkpoints.close()


def test_a_state_that_was_saved_before_it_was_evaluated_is_saved_again(tmp_path):
    """As by a stop in the evaluation: with its accuracy it may be the best."""
    told = []
    checkpoints = Checkpoints(tmp_path / "c", keep=1, on_saved=told.append)
    for number, accuracy in [(1, 0.1), (2, None), (2, 0.9), (3, 0.2), (4, 0.3)]:
        checkpoints.save(_tiny(number), {"accuracy": accuracy}, quality=accuracy)
    checkpoints.wait()
    assert checkpoints.numbers() == [2, 4] and checkpoints.facts(2) == {"accuracy": 0.9}
    assert told == [1, 2, 2, 3, 4]
    checkpoints.close()


def test_the_best_is_kept_by_a_run_that_goes_on(tmp_path):
    """What a manager has not saved itself it knows by what was written."""
    for numbers in ({1: 0.9, 2: 0.2}, {3: 0.3, 4: 0.1}):
        checkpoints = Checkpoints(tmp_path / "c", keep=1)
        for number, quality in numbers.items():
            checkpoints.save(_tiny(number), {}, quality=quality)
        checkpoints.wait()
        assert checkpoints.numbers() == [1, max(numbers)]
        checkpoints.close()


def test_closing_waits_for_the_newest_and_notes_it(tmp_path):
    told = []
    checkpoints = Checkpoints(tmp_path / "c", keep=1, on_saved=told.append)
    checkpoints.save(_tiny(3), {})
    checkpoints.close()
    assert told == [3]


def test_a_save_leaves_nothing_behind(tmp_path, mesh):
    """TensorStore keeps each list of metrics that Orbax asks it for; see `_ask_for_no_metrics`."""
    state = train_state(mesh, 0)
    checkpoints = Checkpoints(tmp_path, keep=1)

    def lists_after(*numbers: int) -> int:
        for number in numbers:
            checkpoints.save(state.replace(num_updates=jnp.int32(number)), {})
        checkpoints.wait()
        gc.collect()
        return sum(type(x) is list for x in gc.get_objects())

    before = lists_after(1, 2)
    after = lists_after(3, 4, 5)
    checkpoints.close()
    assert after - before < 30  # 24 a save, where they are kept


def test_a_half_written_checkpoint_is_passed_over(tmp_path, mesh):
    """What a kill in the middle of writing leaves: a folder under a temporary name."""
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    checkpoints.save(train_state(mesh, 1), {})
    checkpoints.close()
    half = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c" / "1", half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    again = Checkpoints(tmp_path / "c", keep=3)
    assert again.latest() == 1
    again.save(train_state(mesh, 2), {})  # and its number is free
    again.wait()
    assert again.latest() == 2
    same_bits(train_state(mesh, 2), again.restore(2, _like(mesh)))
    again.close()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"width": 32, "head_size": 16}, r"embed/embedding is \[8, 16\], needed \[8, 32\]"),
        ({"layers": (Layer(),) * 2}, r"k/kernel is \[1, 16, 8\], needed \[2, 16, 8\]"),
        ({"tied_head": False}, r"params/head/\S* is missing"),
        ({"qkv_bias": True}, r"q/bias is missing"),
    ],
)
def test_another_model_is_refused(tmp_path, mesh, change, told):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(train_state(mesh, 1), {})
    other = dataclasses.replace(MODEL, **change)
    with pytest.raises(ValueError, match=rf"Checkpoint 1 in .* does not fit this .*{told}") as info:
        checkpoints.restore(1, _like(mesh, other))
    assert len(str(info.value)) < 700 and "\n" not in str(info.value)
    checkpoints.close()
    with pytest.raises(ValueError, match=r"Checkpoint 1 in .* does not fit this model"):
        newest_params(tmp_path / "c", _like(mesh, other).params)


def test_a_checkpoint_with_more_than_the_model_is_refused(tmp_path, mesh):
    untied = dataclasses.replace(MODEL, tied_head=False)
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(train_state(mesh, 1, untied), {})
    with pytest.raises(ValueError, match=r"params/head/\S* has no place"):
        checkpoints.restore(1, _like(mesh))
    checkpoints.close()


def test_only_the_newest_parameters(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(train_state(mesh, 1), {})
    checkpoints.save(train_state(mesh, 3), {})
    checkpoints.close()
    like = _like(mesh).params
    same_bits(train_state(mesh, 3).params, newest_params(tmp_path / "c", like))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        newest_params(tmp_path / "empty", like)


def test_a_bucket_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails
    with pytest.raises(ValueError, match=r"folder gs://grpo/run cannot be used .*install gcsfs,"):
        Checkpoints("gs://grpo/run", keep=1)
