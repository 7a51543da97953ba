"""The program: models side by side, what it writes and shows, what it refuses."""

from __future__ import annotations

import json
import shutil
from datetime import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import evaluate, keys
from grpo_jax.config import loading
from grpo_jax.config import options as options_lib
from grpo_jax.data import tasks
from grpo_jax.devices import sharding
from grpo_jax.evaluation import compare, estimates, held_out
from grpo_jax.models import policy
from grpo_jax.models.hf.export import save
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.scores import RewardError
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import model as model_lib
from grpo_jax.setup.data import load_problems, questions
from grpo_jax.setup.model import open_model
from grpo_jax.setup.rewards import load_rewards
from grpo_jax.structs import Sampling

CONFIG = """
from grpo_jax.config import options as config_lib

def get_config():
    c = config_lib.default()
    c.model.path = "unused"
    c.data.path = {train!r}
    c.data.eval_path = {test!r}
    c.data.max_prompt_tokens = {prompt_tokens}
    c.rollout.max_tokens = 6
    c.rewards.names = ("{reward}",)
    c.rewards.accuracy = "{reward}"
    c.compile_cache = False
    return c
"""
SHORT = """
def short(prompts, completions, **columns):
    return [float(len(c) < 6) for c in completions]

def mostly_fails(prompts, completions, answer, **columns):
    return [1.0 / (int(a) > 9) for a in answer]
"""


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


@pytest.fixture(scope="module")
def models(tmp_path_factory, mesh):
    """Two random models that answer sums."""
    folder = tmp_path_factory.mktemp("models")
    options = options_lib.default().model
    options.update(num_layers=1, width=32, mlp_width=48)
    tokenizer = tasks.load("arithmetic").make_tokenizer()
    new = model_lib.new(options, tokenizer)
    for seed, name in enumerate(("one", "two")):
        params = policy.load_params(new, mesh, seed)
        params = jax.tree.map(lambda x: 8.0 * x if x.ndim > 1 else x, params)
        save(folder / name, params, new.model, source=None, dtype="float32", tokenizer=tokenizer)
    return [str(folder / "one"), str(folder / "two")]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config's file, with 4 training and 12 held-out problems and a reward for brevity."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "brevity.py").write_text(SHORT)
    for name, numbers in (("train", range(4)), ("test", range(12))):
        rows = [{"prompt": f"{i}+3-1=", "answer": str(i + 2), "text": f"#### {i}"} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return _write_config(tmp_path / "sums.py")


def _write_config(file, reward="brevity:short", prompt_tokens=8, **paths):
    paths = {"train": "train.jsonl", "test": "test.jsonl"} | paths
    file.write_text(CONFIG.format(reward=reward, prompt_tokens=prompt_tokens, **paths))
    return str(file)


def _items(file) -> list[dict]:
    return [json.loads(line) for line in open(file).read().splitlines()]


def test_two_models_side_by_side(config, models, capsys):
    evaluate.main(
        ["--config", config, "--model", *models, "--num-samples", "3", "--temperature", "1.5",
         "--top-k", "9", "--seed", "7", "--json", "deep/all.json"]
    )  # fmt: skip
    found = json.loads(open("deep/all.json").read())
    options = {"split": "eval", "num_problems": 12, "num_samples": 3, "temperature": 1.5,
               "top_k": 9, "top_p": 1.0, "max_tokens": 6, "seed": 7, "dtype": "float32",
               "num_prompts": 12, "confidence": 0.95, "config": config}  # fmt: skip
    assert {k: v for k, v in found.items() if k != "models"} == options
    correct = []
    for model, path, name in zip(found["models"], models, ("one", "two"), strict=True):
        assert (model["model"], model["name"]) == (path, name)
        greedy, sampled = model["items"]["greedy"], model["items"]["sampled_3"]
        assert greedy == f"evaluations/sums/{name}_eval_greedy.jsonl"
        rows, sample_rows = _items(greedy), _items(sampled)
        assert [r["prompt"] for r in rows] == [f"{i}+3-1=" for i in range(12)]
        assert [r["columns"]["answer"] for r in rows] == [str(i + 2) for i in range(12)]
        assert [r["sample"] for r in sample_rows] == [0, 1, 2] * 12
        assert len({r["completion"] for r in sample_rows}) > 12
        assert all(r["correct"] is (len(r["completion"]) < 6) for r in rows + sample_rows)
        value = {n: v["value"] for n, v in model["metrics"].items()}
        correct.append([r["correct"] for r in rows])
        assert value["accuracy"] == pytest.approx(np.mean(correct[-1]))
        assert value["truncated_share"] == pytest.approx(np.mean([not r["stopped"] for r in rows]))
        assert value["length"] == pytest.approx(np.mean([r["length"] for r in rows]))
        assert value["answer_found_share"] == np.mean([r["answer"] is not None for r in rows])
        stopped = [r["length"] for r in rows if r["stopped"]]
        assert value["stopped_length"] == (pytest.approx(np.mean(stopped)) if stopped else None)
        right_PK = np.array([r["correct"] for r in sample_rows]).reshape(12, 3)
        assert value["mean@3"] == pytest.approx(right_PK.mean())
        assert value["pass@1"] == pytest.approx(right_PK.mean())
        assert value["pass@3"] == pytest.approx(right_PK.any(axis=1).mean())
        assert value["pass^3"] == pytest.approx(right_PK.all(axis=1).mean())
        assert value["pass@1"] < value["pass@2"] < value["pass@3"]
        assert not [n for n in value if n.startswith("maj@")]  # brevity compares no answers
        assert all(
            v["low"] <= v["value"] <= v["high"]
            for v in model["metrics"].values() if v["value"] is not None
        )  # fmt: skip
    assert correct[0] != correct[1]
    assert "difference_to_first" not in found["models"][0]
    gain = found["models"][1]["difference_to_first"]["accuracy"]
    assert gain["value"] == pytest.approx(np.mean(correct[1]) - np.mean(correct[0]))
    shown = capsys.readouterr().out
    assert "12 held-out problems" in shown and "3 samples of each at temperature 1.5" in shown
    one = found["models"][0]["metrics"]["accuracy"]
    cell = f"{100 * one['value']:.1f}% [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
    assert cell in shown
    assert "greedy: problem 12/12" in shown and "3 samples each: problem 12/12" in shown
    assert f"{100 * gain['value']:+.1f} [{100 * gain['low']:+.1f}," in shown
    reward = found["models"][0]["metrics"]["reward/short"]
    assert f"{reward['value']:.3f} [{reward['low']:.3f}, {reward['high']:.3f}]" in shown
    assert "difference to one" in shown and "Every completion: evaluations/sums" in shown


def test_rewards_that_fail_too_often_end_it_with_all_written(config, models, tmp_path):
    """Eight of twelve: no share right follows from that. Half is not too many."""
    argv = ["--model", models[0], "--config"]
    config = _write_config(tmp_path / "fails.py", "brevity:mostly_fails")
    with pytest.raises(RewardError, match=r"one: 8 of 12 completions have no reward 'mostly_"):
        evaluate.main([*argv, config])
    assert len(_items("evaluations/fails/one_eval_greedy.jsonl")) == 12
    evaluate.main([*argv, config, "--config.rewards.max_failed_share", "0.7"])


def test_slots_change_no_item_and_are_few(config, models, monkeypatch):
    engines = []
    init = Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *a, **k: (engines.append(self), init(self, *a, **k))[1]
    )
    argv = ["--config", config, "--model", models[0], "--num-samples", "3"]
    argv += ["--config.rollout.compact=False"]  # fewer shapes to compile
    evaluate.main([*argv, "--out", "all"])
    evaluate.main([*argv, "--out", "few", "--config.rollout.num_slots", "4"])
    for name in ("one_eval_greedy.jsonl", "one_eval_sampled_3.jsonl"):
        assert open(f"all/{name}").read() == open(f"few/{name}").read()
    assert engines[0].num_slots == 256 and engines[1].num_slots == 4
    # On each of 8 devices: 12 groups are 2 slots of 3 lanes; 4 completions are a lane.
    assert max(engines[0].shapes)[:2] == (2, 3)
    assert {shape[:2] for shape in engines[1].shapes} == {(1, 1)}


def test_a_run_logs_what_the_program_finds(config, models, mesh, tmp_path, capsys):
    """Of four prompts that stand twice each: intervals know them once."""
    once = open("train.jsonl").read()
    open("train.jsonl", "w").write(f"{once}\n{once}")
    evaluate.main(["--config", config, "--model", models[1], "--split", "train", "--json", "x"])
    path = models[1]
    ours, params = open_model(path, mesh, jnp.float32)
    decoder = decode.Decoder(ours.model, mesh, Sampling(1.0), ours.stop_ids, 6)
    engine = Engine(decoder)
    read = loading.load(config, [])
    problems = load_problems(read)[0]
    with Pool(load_rewards(read)) as pool:
        values = held_out.run(
            engine, engine.publish(params), ours,
            questions(problems, ours, read, "problems", datetime.now()),
            pool, num_samples=0, temperature=1.0,
            key=keys.key_for(0, "evaluate"), file=tmp_path / "in_run.jsonl",
        )  # fmt: skip
    (model,) = json.loads(open("x").read())["models"]
    assert len(problems) == 8
    names = (
        "accuracy",
        "reward",
        "reward/short",
        "answer_found_share",
        "truncated_share",
        "length",
    )
    assert values == {f"eval/{n}": model["metrics"][n]["value"] for n in names}
    items = open(model["items"]["greedy"]).read()
    assert (tmp_path / "in_run.jsonl").read_text() == items
    correct = [json.loads(line)["correct"] for line in items.splitlines()]
    alone = estimates.estimate(estimates.mean(np.array(correct[:4])))
    assert correct[:4] == correct[4:] and len(set(correct)) == 2
    found = model["metrics"]["accuracy"]
    assert [found["low"], found["high"]] == pytest.approx([alone.low, alone.high])
    shown = capsys.readouterr().out
    assert "the 8 training problems have 4 different prompts, one of them 2 times" in shown
    assert "8 training problems of" in shown and ", 4 different" in shown


def test_references(config, shared, capsys):
    """Of a real model's stories: BLEU of the corpus and F1 of the items, as the items say."""
    sacrebleu = pytest.importorskip("sacrebleu")
    path = shared / "models" / "stories260K"
    if not (path / "config.json").exists():
        pytest.skip(f"needs {path}")
    starts = ["Once upon a time", "One day, a cat", "Tom and Sue", "The sun was"]
    rows = [{"prompt": s, "story": "there was a little girl named Lily."} for s in starts]
    with open("test.jsonl", "w") as file:
        file.write("\n".join(map(json.dumps, rows)))
    evaluate.main(
        ["--config", config, "--model", str(path), "--max-tokens", "24", "--json", "x.json",
         "--num-problems", "3", "--config.evaluation.reference=story"]
    )  # fmt: skip
    (model,) = json.loads(open("x.json").read())["models"]
    items = _items(model["items"]["greedy"])
    assert len(items) == 3
    value = {n: v["value"] for n, v in model["metrics"].items()}
    texts, references = [i["completion"] for i in items], [i["columns"]["story"] for i in items]
    assert value["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
    for name in ("f1", "rouge1", "rouge2", "rougeL"):
        assert value[name] == pytest.approx(np.mean([i[name] for i in items])) and value[name] > 0
    assert len({i["bleu"] for i in items}) > 1
    assert "rougeL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-problems", "0"], "--num-problems 0 must be at least 1"),
        (["--num-samples", "-1"], "--num-samples -1 must be from 0"),
        (["--num-samples", "4", "--temperature", "0"], "--num-samples 4 at --temperature 0"),
        (["--temperature", "nan"], "--temperature nan must be"),
        (["--temperature", "-1"], "--temperature -1.0 must be"),
        (["--temperature", "inf"], "--temperature inf must be"),
        (["--top-p", "0"], "--top-p 0.0 must be above 0"),
        (["--top-k", "-1"], "--top-k -1 must be 0 or more"),
        (["--max-tokens", "0"], "--max-tokens 0 must be above 0"),
        (["--seed", "-1"], "--seed -1 must be from 0 to"),
        (["--num_sample", "4"], "Unknown argument '--num_sample'"),
        (["--config.batch.promts", "4"], "There is no option batch.promts"),
        (["--model", "gone"], r"gone.*there is no such folder"),
        (["--max-tokens", "1020"], r"7 tokens.*1020 \(--max-tokens\).*1024"),
        (
            ["--config.data.max_prompt_tokens=5"],
            "tokens = 5, but the prompt of test.jsonl, line 1 has 6",
        ),
        (["--config.data.eval_path="], "has no held-out problems"),
        (["--config.rewards.names=('no_such',)"], "'no_such' is not a built-in reward"),
        (["--config.evaluation.reference=story"], "'story' is no column.*answer, text"),
        (["--out", "sums.py/x"], "sums.py/x cannot be made"),
    ],
)
def test_what_is_refused(config, models, argv, message, monkeypatch, capsys):
    """Before any model has answered."""
    monkeypatch.setattr(evaluate, "_evaluate", lambda *a: pytest.fail("it was not refused"))
    with pytest.raises(ValueError, match=message) as refusal:
        evaluate.main(["--config", config, "--model", models[0], *argv])
    assert "\n" not in str(refusal.value)


def test_one_model_twice_is_refused(config, models):
    with pytest.raises(ValueError, match=r"one/ is given twice"):
        evaluate.main(["--config", config, "--model", models[0], models[1], models[0] + "/"])


def test_a_reference_that_is_no_text_is_refused(config, models):
    rows = [{"prompt": "1+1=", "n": "a"}, {"prompt": "1+2=", "n": 3}]
    with open("test.jsonl", "w") as file:
        file.write("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"'n' holds a int in problem 1"):
        evaluate.main(["--config", config, "--model", models[0], "--config.evaluation.reference=n"])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a/export"], ["a/export"]),
        (["x/a", "y/a", "b"], ["x/a", "y/a", "b"]),
        (["/models/m", "org/m"], ["models/m", "org/m"]),
        (["/m", "m"], ["1_m", "2_m"]),
        (["export"], ["1_export"]),
    ],
)
def test_names_tell_models_apart(paths, names):
    assert compare.names(paths) == names


def test_a_runs_folder(config, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "run" / "export")
    record = {"binding": {}, "options": {"model.path": models[0], "checkpoint.folder": ""}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    evaluate.main(["--config", config, "--model", "run", "--model", models[0], "--json", "x.json"])
    run, exported = json.loads(open("x.json").read())["models"]
    assert run["metrics"] == exported["metrics"] and run["name"] == "run"
    assert exported["difference_to_first"]["length"]["value"] == 0
