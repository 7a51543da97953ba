"""Runs on given completions: against transformers, and killed while they read a stream."""

from __future__ import annotations

import json
import shutil
import signal
from datetime import datetime

import numpy as np
import pytest
from driving import drive
from kill_and_resume import final_state, log_differences, logged, state_differences
from mistakes import TINY, make_model, refusal

import grpo_jax
from grpo_jax import sft
from grpo_jax.config import loading
from grpo_jax.models import policy as policy_lib
from grpo_jax.trainers import given

STEPS, EVERY = 6, 4
OPTIONS = [
    f"--config.sft.num_steps={STEPS}",
    f"--config.sft.evaluate_every_steps={EVERY}",
    "--config.sft.checkpoint_every_steps=2",
    "--config.sft.batch=5",
    "--config.sft.learning_rate=0.01",
    "--config.data.task=",
    "--config.data.columns=('prompt=question',)",
    "--config.data.streaming=True",
    "--config.data.shuffle_buffer=7",
    "--config.logging.tensorboard=False",
    "--config.logging.token_metrics=True",
]


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """The arguments of a run in a folder, and its model and data."""
    folder = tmp_path_factory.mktemp("given")
    model = make_model(folder / "model")
    rng = np.random.default_rng(0)
    for name, count in (("train", 23), ("held_out", 7)):
        sums = [rng.integers(1, 99, 2 + i % 3).tolist() for i in range(count)]
        rows = [{"question": "+".join(map(str, s)) + "=", "completion": str(sum(s))} for s in sums]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [
        *OPTIONS,
        f"--config.model.path={model}",
        f"--config.data.path={folder / 'train.jsonl'}",
        f"--config.data.eval_path={folder / 'held_out.jsonl'}",
    ]
    return lambda name, *more: ["--config", str(TINY), "--workdir", str(folder / name), *options,
                                *more]  # fmt: skip


@pytest.fixture(scope="module")
def runs(argv, alone):
    """The workdirs of a run that was left alone and of one that was killed and went on."""
    whole, killed = argv("whole"), argv("killed")
    jobs = [
        {"program": "sft", "argv": whole},
        {"program": "sft", "argv": killed, "in": "update", "of": "sft", "after": 5, "killed": True},
    ]
    assert drive(jobs, alone, -signal.SIGKILL) == ["finished"]
    whole, killed = (_folder(a) for a in (whole, killed))
    shutil.copytree(killed, killed.with_name("then"))
    again = [
        {"program": "sft", "argv": argv("killed")},
        {
            "program": "sft",
            "argv": argv("dft", "--config.sft.loss=dft", "--config.sft.num_steps=1"),
        },
    ]
    assert drive(again, alone) == ["finished", "finished"]
    return whole, killed


def _folder(arguments):
    from pathlib import Path

    return Path(arguments[arguments.index("--workdir") + 1])


def test_a_killed_stream_goes_on_as_if_it_had_not_been(runs):
    whole, killed = runs
    then = killed.with_name("then")
    made = int(final_state(then)["/num_updates"])
    assert made in (2, 4)  # of 5; that of the fourth step may not have been whole yet
    facts = json.loads((then / "checkpoints" / str(made) / "facts" / "metadata").read_text())
    place = facts["state"]["place"]
    assert place["draw"] == made and place["cursor"]["at"] > 0
    assert not state_differences(whole, killed)
    assert not log_differences(whole, killed)
    weights = "export/model.safetensors"
    assert (whole / weights).read_bytes() == (killed / weights).read_bytes()


def _by_transformers(model, rows) -> list[float]:
    """Cross-entropy, entropy and accuracy at the completions' tokens, one row at a time."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for row in rows:
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.completion_ids])[None].astype(int))
        first, target = len(row.prompt_ids) - 1, ids[0, 1:]
        with torch.no_grad():
            logp = network(ids).logits.log_softmax(-1)[0, first:-1]
        target = target[first:]
        entropy, right = -(logp.exp() * logp).sum(-1), logp.argmax(-1) == target
        picked = logp.gather(1, target[:, None])[:, 0]
        found.append(torch.stack([-picked, entropy, right.float()]))
    return torch.cat(found, dim=1).mean(1).tolist()


def test_the_losses_are_those_of_transformers(runs, argv):
    """Of packed rows, one at a time; before the first update, and held out after the last."""
    whole, _ = runs
    config = loading.load(str(TINY), [a for a in argv("x") if a.startswith("--config.")])
    policy = policy_lib.read(config.model.path)
    now = datetime(2026, 1, 1)
    data = given.rows(config, policy, "sft", "example", now)
    rows, _ = data.draw(0, {})
    data.close()
    held_out = given.held_out(config, policy, "sft", "example", now)
    assert len(rows) == 5 and len(held_out) == 7
    log = logged(whole)
    by_step = {row["step"]: row for row in log if "sft/loss" in row}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    told = [by_step[1][f"sft/{name}"] for name in ("loss", "entropy", "token_accuracy")]
    assert told == pytest.approx(_by_transformers(config.model.path, rows), rel=1e-5)
    assert any(0 < row["sft/token_accuracy"] < 1 for row in by_step.values())
    measured = {row["step"]: row["sft/eval_loss"] for row in log if "sft/eval_loss" in row}
    assert sorted(measured) == [0, EVERY, STEPS]
    expected, *_ = _by_transformers(config.model.path, held_out)
    assert measured[0] == pytest.approx(expected, rel=1e-5)
    expected, *_ = _by_transformers(whole / "export", held_out)
    assert measured[STEPS] == pytest.approx(expected, rel=1e-5) and expected < measured[0]


def test_a_mesh_of_eight_does_the_same(runs, argv, tmp_path):
    """Five rows on eight devices: the loss, the gradient, and the loss of seven held-out rows."""
    arguments = argv("mesh", "--config.mesh.data=4", "--config.mesh.fsdp=2",
                     "--config.sft.num_steps=1")  # fmt: skip
    sft.main(arguments)
    first, *_ = (row for row in logged(_folder(arguments)) if row["step"] == 1)
    alone, *_ = (row for row in logged(runs[0]) if row["step"] == 1)
    for name in ("sft/loss", "policy/grad_norm", "sft/entropy", "sft/token_accuracy"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5), name
    before = [logged(f)[0]["sft/eval_loss"] for f in (_folder(arguments), runs[0])]
    assert before[0] == pytest.approx(before[1], rel=1e-5)


def test_a_run_of_dft_logs_both_losses(runs):
    whole, killed = runs
    (nll,) = [row["sft/loss"] for row in logged(whole) if row["step"] == 1]
    (dft,) = [row for row in logged(killed.with_name("dft")) if row["step"] == 1]
    assert dft["sft/nll"] == pytest.approx(nll, rel=1e-6) and 0 < dft["sft/loss"] < nll


def test_a_new_model_from_python(argv, tmp_path, one_device):
    """Of a tokenizer's folder, on texts in a list; the config's task is not used."""
    config = loading.load(str(TINY), [a for a in argv("x") if a.startswith("--config.")])
    rows = [{"text": f"{i}+1={i + 1}"} for i in range(9)]
    seen = []
    options = {"model.path": "", "model.tokenizer": config.model.path, "batch": 5,
               "num_epochs": 1.0, "num_steps": 0, "mesh.data": 1,
               "logging.tensorboard": False}  # fmt: skip
    run = grpo_jax.sft(None, rows, rows[:4], workdir=tmp_path / "run", config=str(TINY),
                       callbacks=[lambda step: seen.append(step.number)], **options)  # fmt: skip
    assert run.is_finished and run.summary == {} and seen == [0, 1, 2]
    assert run.metrics[-1]["sft/eval_loss"] < run.metrics[0]["sft/eval_loss"]
    assert run.config.sft.batch == 5 and run.config.data.task == ""
    (answer,) = run.model().generate(["1+1="], max_tokens=4)
    assert len(answer.token_ids) <= 4
    with pytest.raises(ValueError, match="Give num_steps or num_epochs: how long"):
        grpo_jax.sft(config.model.path, rows)


BAD = {
    "a row": (["{", '{"question": "1=", "completion": "1"}'], [], ("train.jsonl, line 1",)),
    "a column": (['{"question": "1+1=", "solution": "2"}'], [], ("line 1", "`completion`")),
    "a long row": (['{"question": "1+1=", "completion": "22222"}'], ["--config.sft.max_tokens=3"],
                   ("sft.max_tokens = 3", "line 1", "6 tokens", "sft.too_long")),
    "epochs of a stream": ([], ["--config.sft.num_epochs=2.0"], ("sft.num_epochs = 2", "stream")),
    "a subset of one": ([], ["--config.data.subset=(0,)"], ("data.subset", "data.streaming")),
    "turns of texts": ([], ["--config.sft.loss_on=assistant"], ("line 1", "has no turns")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_nothing_is_trained_on_bad_data(case, argv, tmp_path):
    lines, options, words = BAD[case]
    arguments = [*argv("bad"), *options]
    arguments[arguments.index("--workdir") + 1] = str(tmp_path / "run")
    if lines:
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        arguments.append(f"--config.data.path={tmp_path / 'train.jsonl'}")
    status, message = refusal(sft.main, arguments)
    assert status == 1 and message.count("error:") == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
