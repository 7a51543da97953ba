"""Tiny runs from end to end in this process: what they leave, and what they do with bad numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import types
from pathlib import Path

import audit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from kill_and_resume import final_state, logged
from mistakes import TINY, make_model, refusal

from grpo_jax import train
from grpo_jax.config import options
from grpo_jax.devices import chips, memory
from grpo_jax.devices.chips import Chip
from grpo_jax.environments.single_turn import Draws, GivenUp, Rollout
from grpo_jax.learner.experience import Prepare
from grpo_jax.messages import console
from grpo_jax.metrics import trace as trace_lib
from grpo_jax.metrics.names import METRICS, is_known
from grpo_jax.metrics.summary import SHOWN
from grpo_jax.models.hf.weights import stored_dtype
from grpo_jax.rewards import registry
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.scores import Failure, Scores
from grpo_jax.run.append_log import read_jsonl
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Rollouts
from grpo_jax.trainers import grpo_run, prompt_choice, results, step_metrics
from grpo_jax.trainers.run_state import RunState

CHIP = Chip("slow", 1e9, 1e30, 2**30, 1e9, "made up: its memory takes no time")
MESH = ["--config.mesh.data=2", "--config.mesh.tensor=-1"]
TWO_STEPS = ["--config.loop.num_steps=2", "--config.evaluation.num_problems=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("loop") / "model")


def _argv(folder, *more: str) -> list[str]:
    return ["--config", str(TINY), "--workdir", str(folder), *more]


def _refused(folder, *more: str) -> str:
    status, message = refusal(train.main, _argv(folder, *more))
    assert status == 1, message
    return message


def _runs(folder, *more: str) -> list[dict]:
    status, message = refusal(train.main, _argv(folder, *more))
    assert status is None, message
    return logged(folder)


def test_what_a_run_leaves(tmp_path, compile_cache, cache_folder, monkeypatch):
    said = []
    monkeypatch.setattr(grpo_run, "say", said.append)
    monkeypatch.setattr(console, "say", lambda text, **options: said.append(text))
    monkeypatch.setattr(chips, "chip", lambda kind: CHIP)
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    secret = "q7Z" * 12
    monkeypatch.setenv("HF_TOKEN", secret)
    options = ["--config.evaluation.num_samples=2", "--config.profile.steps=(3,3)"]
    options += ["--config.optim.warmup_steps=16"]  # as many as there are updates, 4 to a step
    with audit.writes() as written:
        rows = _runs(folder, *MESH, *options)
    assert not audit.outside(written, folder, Path(cache_folder))
    assert str(folder / "config.json.new") in written and not list(elsewhere.iterdir())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [f for f in files if secret.encode() in f.read_bytes()]
    summary = json.loads((folder / "summary.json").read_text())
    needed = "accuracy_before accuracy_after train_wall_s generated_tokens_per_s seed steps".split()
    assert set(needed) <= summary.keys()
    assert summary["steps"] == 4 and summary["seed"] == 0 and summary["train_wall_s"] > 0
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert summary["generated_tokens_per_s"] > 0
    assert summary.keys() - {"ask"} == SHOWN.keys()  # each has its name in the box

    _check_names(folder)
    every_step = {"reward", "accuracy", "policy/loss", "policy/kl", "policy/grad_norm"}
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(every_step <= row.keys() and None not in row.values() for row in steps)
    # The policy before the updates has drawn, and the reference is the model as it was given.
    assert all(row["policy/sampler_gap_max"] < 1e-4 for row in steps)
    assert steps[0]["policy/kl"] < steps[3]["policy/kl"]
    parts = [f"time/{name}_s" for name in ("rollout", "reward", "update")]
    timed = [r for r in read_jsonl(folder / "metrics.jsonl") if "time/update_s" in r]
    assert len(timed) == 4
    for row in timed:
        assert sum(row[part] for part in parts) <= 1.01 * row["time/step_s"]
    # Of the step's last update, the 4th, 8th, 12th and 16th.
    rates = [row["policy/learning_rate"] for row in steps]
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001])
    assert summary["generated_tokens"] == steps[-1]["tokens/generated"]
    assert 16 * 4 < summary["generated_tokens"] <= 16 * 4 * 8

    told = "\n".join(said)
    accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert f"Evaluation at the start: accuracy {accuracy[0]:.1%}, pass@2 " in told
    change = 100 * (accuracy[2] - accuracy[0])
    assert f"after step 2: accuracy {accuracy[2]:.1%} ({change:+.1f}), 8 problems, " in told
    assert f"Model: qwen2, {summary['parameters']:,} parameters, float32, from the super" in told
    prompts = r"Problems: 40 to train on, 8 held out; prompts of (8|10) tokens, the longest of 10\n"
    assert re.search(prompts, told)  # of four or five terms
    assert "A step: 4 prompts x 4 completions of at most 8 tokens, 4 updates\n" in told
    assert f"Seed 0, workdir {folder}\n" in told

    samples = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2, 3, 4} and len(samples) == 16
    assert samples[0].keys() == {
        "step",
        "prompt",
        "columns",
        "completion",
        "rewards",
        "extras",
        "advantage",
        "length",
    }
    evaluated = {f.name: f for f in (folder / "evaluations").iterdir()}
    assert evaluated.keys() == {
        "step_000000_greedy.jsonl", "step_000000_sampled_2.jsonl", "step_000002_greedy.jsonl",
        "step_000004_greedy.jsonl", "step_000004_sampled_2.jsonl",
    }  # fmt: skip
    assert len(evaluated["step_000004_sampled_2.jsonl"].read_text().splitlines()) == 16
    right = [json.loads(x)["rewards"]["exact_answer"] == 1
             for x in evaluated["step_000004_greedy.jsonl"].read_text().splitlines()]  # fmt: skip
    assert len(right) == 8 and np.mean(right) == summary["accuracy_after"]
    assert list(folder.glob("events.out.tfevents.*"))  # TensorBoard calls the run by its folder
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    _check_export(folder)
    _check_trace(folder)
    _check_rates(_rows_with_times(folder)[1:])


def _rows_with_times(folder) -> list[dict]:
    return list(read_jsonl(folder / "metrics.jsonl"))


# What a run emits only where something went wrong, or where its devices or rewards have it:
# test_metrics_of_what_this_run_has_not makes each of them.
HOW = ("timeout", "error", "values", "memory", "died", "invalid")
NOT_HERE = {f"rewards/failed_by_{how}" for how in HOW}
NOT_HERE |= {"reward_log/NAME", "eval/failed_rewards"}
NOT_HERE |= {"groups/draws", "groups/drawn", "groups/dropped", "groups/given_up"}
NOT_HERE |= {"tokens/given_up_share"}
NOT_HERE |= {f"prompts/{which}_share" for which in ("unseen", "easy", "hard", "replayed")}
OF_OTHER_OBJECTIVES = {"policy/kl_coef", "policy/entropy_coef", "policy/off_policy_share"}
# Of ensembles, hybrids, distillation and critics, and of programs on given completions: their own
# runs' tests.
OTHERS = ("ensemble/", "hybrid/", "distill/", "value/", "preference/", "reward_model/", "judge/")
OTHERS += ("environment/",)
OF_OTHER_OBJECTIVES |= {name for name in METRICS if name.startswith(OTHERS)}
OF_OTHER_OBJECTIVES |= {"rewards/failed_by_member"}  # test_ensembles.py
OF_OTHER_OBJECTIVES |= {"sft/nll", "sft/eval_loss"}  # of grpo_jax.sft: test_given_runs.py
OF_OTHER_OBJECTIVES |= {"sft/entropy", "sft/token_accuracy"}  # the same
NOT_HERE |= OF_OTHER_OBJECTIVES
NOT_HERE |= {"memory/device_gib", "memory/device_peak_gib"}


def _check_names(folder):
    """What is emitted is documented, and what is documented is emitted."""
    rows = [*_rows_with_times(folder), *_rows_with_times(folder / "bootstrap")]
    emitted = {n for row in rows for n in row if n != "step"}
    assert not {n for n in emitted if not is_known(n)}
    assert {n for n in METRICS if not _among(n, emitted)} == NOT_HERE


def _among(documented: str, names) -> bool:
    pattern = re.escape(documented).replace("NAME", r"\w+").replace("@K", r"@\d+")
    pattern = pattern.replace(r"\^K", r"\^\d+")
    return any(re.fullmatch(pattern, name) for name in names)


def _check_trace(folder):
    """Step 3 alone, its phases on the host, and those that its programs name."""
    trace = trace_lib.newest_trace(folder)
    data = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    assert [dict(e.stats)["step_num"] for e in events if e.name == "step"] == [3]
    assert {"rollout", "scoring", "rewards", "update"} <= {e.name for e in events}
    found = trace_lib.operations(trace)
    parts = {(o.phase, word) for o in found for word in o.part.split(" ")[0].split("/")}
    scopes = {
        "rollout": ["admit", "decode", "choose", "attention", "mlp"],
        "scoring": ["attention", "mlp", "vocabulary"],
        "update": ["attention", "mlp", "vocabulary", "optimizer"],
    }
    assert {(phase, part) for phase, names in scopes.items() for part in names} <= parts
    programs = {o.program.split("(")[0] for o in found}
    assert programs >= {
        "jit_admit",
        "jit_decode",
        "jit_score",
        "jit_gradient",
        "jit_optimizer_step",
    }


def _check_rates(steps):
    """Of a chip that is no faster than it must be: shares of the step's floor by their times."""
    for row in steps:
        rollout, learning, step = (
            row[f"roofline/{n}_share"] for n in ("rollout", "learning", "step")
        )
        tokens = row["completion/length"] * 16
        step_s, rollout_s = tokens / row["throughput/step_tokens_per_s"], row["time/rollout_s"]
        assert rollout_s < step_s <= row["time/step_s"]
        assert step * step_s == pytest.approx(rollout * rollout_s + learning * (step_s - rollout_s))
        # Nothing but arithmetic counts on this chip: the passes of a step are 1 to sample, 2 * 3
        # to learn, 1 of the reference and 1 of the policy before.
        assert row["throughput/mfu"] == pytest.approx(step)
        assert learning * (step_s - rollout_s) == pytest.approx(8 * rollout * rollout_s)
        # Two iterations over all tokens: what is not generated are 4 prompts of 2 to 16 tokens.
        learned = row["throughput/learned_tokens_per_s"] * (step_s - rollout_s) / 2
        assert 8 <= round(learned - tokens, 3) <= 64


def _check_export(folder):
    """transformers reads the export, and computes with it what we compute with the checkpoint."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from grpo_jax.devices import sharding
    from grpo_jax.models import parameters, policy
    from grpo_jax.run.saved import newest_params

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export")
    ids = tokenizer("8+7-4+9=#### 20")["input_ids"]
    with torch.no_grad():
        expected = torch.log_softmax(theirs(torch.tensor([ids])).logits[0].float(), -1).numpy()
    mesh = sharding.make_mesh()
    ours = policy.read(str(folder / "export"))
    params = newest_params(folder / "checkpoints", policy.param_like(ours.model, mesh))
    rows = np.array([ids[:1]]), np.array([1]), np.array([[ids[1:]]])
    hidden = tiny.completion_states(params, ours.model, *rows, dtype=jnp.float32)[0, 0]
    found = jax.nn.log_softmax(hidden @ parameters.head_kernel(params), -1)
    np.testing.assert_allclose(found, expected[: len(ids) - 1], atol=1e-4)


class _Device:
    def memory_stats(self):
        return {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**31}


def test_metrics_of_what_this_run_has_not(monkeypatch):
    """Rewards that fail in each way, what they log, and devices that tell of their memory."""
    kinds = ("timeout", "error", "values", "memory", "died", "invalid")
    failures = tuple(Failure("r", i, kind, "as asked") for i, kind in enumerate(kinds))
    value_B, failed_B = np.full(6, np.nan, np.float32), np.arange(6) < 6
    scores = Scores(
        np.zeros(6, np.float32), {"r": value_B}, {"r": failed_B}, {"r": value_B}, failures,
        metrics={"depth": (3.0, 2)},
    )  # fmt: skip
    ones = np.ones((3, 2), np.int32)
    rollouts = Rollouts(ones, ones[:, 0], ones[..., None], ones[..., None], ones, ones > 0)
    with Pool(registry.load(("exact_answer",), (1.0,))) as pool:
        pool.rewards[0] = dataclasses.replace(pool.rewards[0], name="r")
        parts = types.SimpleNamespace(rewards=pool)
        draws = Draws(2, ones[:, 0], ones[:, 0], ones, ones > 0, scores, num_equal=1)
        given_up = GivenUp(ones[:, 0], ones)
        sampled = Rollout(None, None, rollouts, 1.0, draws=draws, given_up=given_up)
        values = step_metrics.rollout_metrics(parts, sampled, scores)
        values |= step_metrics.of_given_up(sampled, ones)
        parts.config = options.default()
        parts.config.prompts.outside_weight = 0.5
        parts.train = types.SimpleNamespace(problems=[None] * 2)
        values |= prompt_choice.measure(parts, RunState(), sampled, scores)
    assert values["accuracy"] == 0.0 and values["reward_log/depth"] == 1.5
    assert all(values[f"rewards/failed_by_{kind}"] == 1 for kind in kinds)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [_Device()])
    values |= memory.usage()
    assert (values["memory/device_gib"], values["memory/device_peak_gib"]) == (1.0, 2.0)
    assert all(is_known(name) for name in values)
    missing = {name for name in NOT_HERE - OF_OTHER_OBJECTIVES if not _among(name, values)}
    assert missing == {"eval/failed_rewards"}


def test_the_device_has_work_while_metrics_are_read(tmp_path, model, monkeypatch, one_device):
    """Those of an update once the next is under way, those of a step's last while it samples on."""
    events = []

    def noted(name, function):
        def call(*args, **kwargs):
            if name != "fetch" or args[0]._unread:
                events.append(name)
            return function(*args, **kwargs)

        return call

    build = grpo_run.build

    def watched(*args):
        parts = build(*args)
        return dataclasses.replace(parts, update=noted("update", parts.update))

    monkeypatch.setattr(grpo_run, "build", watched)
    monkeypatch.setattr(step_metrics.StepLog, "fetch", noted("fetch", step_metrics.StepLog.fetch))
    monkeypatch.setattr(Engine, "_placed", noted("admit", Engine._placed))
    every = ["--config.checkpoint.every_steps=0", "--config.rollout.num_slots=0"]
    _runs(tmp_path / "run", f"--config.model.path={model}", *TWO_STEPS, *every)
    updates = ["update", "update", "fetch", "update", "fetch", "update", "fetch"]
    assert events == ["admit", *updates, "admit", "fetch", *updates, "fetch"]
    rows = _rows_with_times(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["time/update_s"] < row["time/step_s"] for row in rows)
    unknown = {"throughput/mfu", "roofline/rollout_share", "memory/device_gib"}  # of a CPU
    assert all(row["throughput/step_tokens_per_s"] > 0 and not unknown & row.keys() for row in rows)


@pytest.mark.slow
def test_a_debugging_run(tmp_path, model, one_device):
    """configs/debug_gpu.py, shorter: it checks for NaN, and shows what each step did."""
    debug = TINY.parents[2] / "configs" / "debug_gpu.py"
    options = ["sft.num_steps=0", "loop.num_steps=2", "evaluation.num_problems=0"]
    options += [f"model.path={model}", "compile_cache=True"]
    options += ["algorithm.kl_coef=0", "rollout.max_tokens=8", "batch.group=2"]  # fewer programs
    argv = ["--config", str(debug), "--workdir", str(tmp_path / "run")]
    try:
        status, message = refusal(train.main, argv + [f"--config.{o}" for o in options])
        assert status is None, message
        assert jax.config.jax_debug_nans
        with pytest.raises(FloatingPointError):
            jax.jit(lambda x: x / x)(jnp.zeros(()))
    finally:
        jax.config.update("jax_debug_nans", False)
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1, 1, 2, 2]
    assert trace_lib.operations(trace_lib.newest_trace(tmp_path / "run"))


# --- Numbers that are not finite ------------------------------------------------------------------


def _poisoned(bad_steps: set[int]):
    """`Prepare` with the advantages of those rollouts made NaN."""
    prepare, count = Prepare.__call__, iter(range(10**6))

    def call(*args, **more):
        experience = prepare(*args, **more)
        if next(count) not in bad_steps:
            return experience
        return experience.replace(advantage=experience.advantage * jnp.nan)

    return call


def test_a_bad_update_is_skipped_and_counted(tmp_path, model, monkeypatch, one_device):
    """Rollout 0 is poisoned: its 4 updates are refused, and those of rollout 1 are not."""
    monkeypatch.setattr(Prepare, "__call__", _poisoned({0}))
    path = f"--config.model.path={model}"
    rows = _runs(tmp_path / "run", path, *TWO_STEPS)
    assert [row["policy/skipped_updates"] for row in rows] == [4, 4]
    assert rows[0]["policy/loss"] is None and rows[1]["policy/loss"] is not None
    state = final_state(tmp_path / "run")
    assert int(state["/num_updates"]) == 8 and int(state["/num_skipped"]) == 4
    assert all(np.isfinite(array).all() for array in state.values())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_updates"] == 4


def test_a_run_of_bad_updates_ends(tmp_path, model, monkeypatch, one_device):
    monkeypatch.setattr(Prepare, "__call__", _poisoned(set(range(1, 100))))
    path = f"--config.model.path={model}"
    more = [*TWO_STEPS, "--config.loop.num_steps=9", "--config.checkpoint.every_steps=1"]
    message = _refused(tmp_path / "run", path, *more)
    assert "20 updates in a row" in message and "loss nan" in message and "Step 6" in message
    for option in ("optim.learning_rate", "optim.max_grad_norm", "model.dtype = float32"):
        assert option in message
    state = final_state(tmp_path / "run")  # of step 5: its checkpoint holds the weights of step 1
    assert int(state["/num_updates"]) == 20 and int(state["/num_skipped"]) == 16
    assert all(np.isfinite(array).all() for array in state.values())


# --- Other sources and types ----------------------------------------------------------------------

REWARD = """
def shortness(prompts, completions, wish, **columns):
    assert all(w == "short" for w in wish) and len(prompts) == len(completions)
    return [None if not c else -float(len(c)) for c in completions]
"""


def test_a_problem_file_and_a_reward_of_ones_own(tmp_path, model, monkeypatch, one_device):
    (tmp_path / "own_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("train", "eval"):
        lines = [json.dumps({"prompt": f"{i}+{len(name)}=", "wish": "short"}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = _runs(
        tmp_path / "run", f"--config.model.path={model}", "--config.data.task=",
        f"--config.data.path={tmp_path}/train.jsonl",
        f"--config.data.eval_path={tmp_path}/eval.jsonl",
        "--config.rewards.names=own_reward:shortness", "--config.rewards.weights=2.0",
        "--config.loop.num_steps=1", "--config.evaluation.num_samples=0",
    )  # fmt: skip
    sys.modules.pop("own_reward")
    assert rows[-1]["reward/shortness"] < 0 and -16 <= rows[-1]["reward"] < 0
    evaluated = [row for row in rows if "eval/reward" in row]
    assert [row["step"] for row in evaluated] == [0, 1]
    assert all(row["eval/reward"] == 2 * row["eval/reward/shortness"] < 0 for row in evaluated)
    assert not [name for row in rows for name in row if "accuracy" in name]  # lengths are no shares
    items = (tmp_path / "run" / "evaluations" / "step_000001_greedy.jsonl").read_text()
    assert json.loads(items.splitlines()[5])["prompt"] == "5+4="


def test_bfloat16(tmp_path, model, one_device):
    """Weights stay float32; sampler and scorer agree as far as bfloat16 does."""
    more = [f"--config.model.path={model}", "--config.model.dtype=bfloat16", *TWO_STEPS]
    more += ["--config.checkpoint.export_dtype=bfloat16"]
    rows = _runs(tmp_path / "run", *more)
    assert len(rows) == 2 and all(row["policy/loss"] is not None for row in rows)
    state = final_state(tmp_path / "run")
    assert {a.dtype.name for n, a in state.items() if "params" in n} == {"float32"}
    assert rows[0]["policy/sampler_gap_max"] > 0
    assert stored_dtype(tmp_path / "run" / "export") == "bfloat16"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] is None  # no evaluation at all


def test_checkpoints_may_lie_elsewhere(tmp_path, model, one_device):
    """A run without its workdir, as a new machine is, goes on from them; another run does not."""
    kept = tmp_path / "kept"
    more = [
        *TWO_STEPS,
        f"--config.model.path={model}",
        f"--config.checkpoint.folder={kept}",
        "--config.checkpoint.export=False",
    ]
    assert len(_runs(tmp_path / "a", *more, "--config.loop.num_steps=1")) == 1
    assert kept.is_dir() and not (tmp_path / "a" / "checkpoints").exists()
    assert [row["step"] for row in _runs(tmp_path / "b", *more)] == [2]
    message = _refused(tmp_path / "c", *more, "--config.optim.learning_rate=0.5")
    assert f"checkpoint.folder = '{kept}' holds a run of a different config" in message


@pytest.mark.parametrize("prompt", ["It's 1 + 1?", [{"role": "user", "content": "$HOME `ls`"}]])
def test_the_command_that_asks_the_model_can_be_pasted(prompt):
    questions = types.SimpleNamespace(problems=[types.SimpleNamespace(prompt=prompt)])
    run = types.SimpleNamespace(held_out=None, train=questions)
    command = shlex.split(results._command_to_ask(run, Path("/runs/my run/export")))
    chat = [] if isinstance(prompt, str) else ["--chat"]
    text = prompt if isinstance(prompt, str) else "$HOME `ls`"
    model = ["--model", "/runs/my run/export"]
    assert command == ["python", "-m", "grpo_jax.generate", *model, *chat, "--prompt", text]
