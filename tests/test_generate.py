"""Asking a model: what is refused, what is printed, a run's folder, and transformers' answer."""

from __future__ import annotations

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import cli, generate
from grpo_jax.config import options
from grpo_jax.data import tasks
from grpo_jax.devices import sharding
from grpo_jax.learner import optim, train_state
from grpo_jax.models import policy
from grpo_jax.models.hf.export import save
from grpo_jax.run import workdir
from grpo_jax.run.checkpoints import Checkpoints
from grpo_jax.setup import model as model_lib
from grpo_jax.setup.model import find_model, open_model
from grpo_jax.setup.run_folder import open_for
from grpo_jax.structs import Sampling


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def _config():
    config = options.default()
    config.data.task = "arithmetic"
    config.model.update(num_layers=1, width=32, mlp_width=48)
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory, mesh):
    """A random model's folder."""
    folder = tmp_path_factory.mktemp("model") / "m"
    tokenizer = tasks.load("arithmetic").make_tokenizer()
    new = model_lib.new(_config().model, tokenizer)
    params = policy.load_params(new, mesh, seed=0)
    save(folder, params, new.model, source=None, dtype="float32", tokenizer=tokenizer)
    return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(cli, "use_compile_cache", lambda: None)


def _ask(capsys, *argv: str) -> tuple[str, str]:
    generate.main(list(argv))
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-tokens", "0"], r"--max-tokens 0 must be above 0"),
        (["--num-samples", "0"], r"--num-samples 0 must be above 0"),
        (["--seed", "-1"], r"--seed -1 must be from 0 to"),
        (["--top-k", "-1"], r"--top-k -1 must be 0 or more"),
        (["--temperature", "-1"], r"--temperature -1.0 must be 0 or more"),
        (["--temperature", "nan"], r"--temperature nan must be"),
        (["--top-p", "0"], r"--top-p 0.0 must be above 0 and at most 1"),
        (["--top-p", "1.5"], r"--top-p 1.5 must be"),
        (["--num-samples", "2"], r"--num-samples 2 at --temperature 0.*Set --temperature above 0"),
        (["--max-tokens", "1024"], r"--prompt has 4 tokens.*--max-tokens 1024.*1024"),
        (["--chat"], r"--chat: the tokenizer of .* has no chat template\. Leave --chat out"),
    ],
)
def test_what_is_refused(model, argv, message):
    with pytest.raises(ValueError, match=message):
        generate.main(["--model", str(model), "--prompt", "1+1=", *argv])


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone.*there is no such folder"):
        generate.main(["--model", str(tmp_path / "gone"), "--prompt", "1+1="])


def test_text_and_json(model, capsys):
    base = ["--model", str(model), "--prompt", "1+1=", "--max-tokens", "5"]
    out, _ = _ask(capsys, *base, "--json")
    row = json.loads(out)
    assert row.keys() == {"text", "token_ids", "logprobs", "stopped"}
    assert 1 <= len(row["token_ids"]) == len(row["logprobs"]) <= 5
    assert all(x <= 0 for x in row["logprobs"])
    assert row["stopped"] is (row["token_ids"][-1] == 1)
    assert row["stopped"] or len(row["token_ids"]) == 5
    text = policy.read(str(model)).text(row["token_ids"])
    assert row["text"] == text
    out, _ = _ask(capsys, *base)
    assert out == f"1+1={text}\n"
    sampled = ["--num-samples", "3", "--temperature", "2.0", "--json"]
    rows = [json.loads(line) for line in _ask(capsys, *base, *sampled)[0].splitlines()]
    assert len(rows) == 3 and len({tuple(r["token_ids"]) for r in rows}) > 1
    again = [json.loads(line) for line in _ask(capsys, *base, *sampled)[0].splitlines()]
    assert [r["token_ids"] for r in again] == [r["token_ids"] for r in rows]
    other = [json.loads(x) for x in _ask(capsys, *base, *sampled, "--seed", "1")[0].splitlines()]
    assert [r["token_ids"] for r in other] != [r["token_ids"] for r in rows]


def test_unknown_characters_are_told(model, capsys):
    _, err = _ask(capsys, "--model", str(model), "--prompt", "1×1=", "--max-tokens", "1")
    assert "no token for ×" in err


def _run_folder(folder, mesh, model, number: int):
    """The folder of a run that is unfinished, with a checkpoint of random weights; and those."""
    config = _config()
    with config.unlocked():
        config.model.path = str(model)
    open_for(config, folder)
    read = policy.read(str(model))
    optimizer = optim.adamw(lambda step: 0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0,
                            clip_norm=0.0)  # fmt: skip
    params = policy.load_params(read, mesh, seed=0)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
    state = train_state.start(params, read.model, mesh, optimizer)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    facts = {"state": {"step": 7}}
    checkpoints.save(state.replace(num_updates=jnp.int32(number)), facts)
    checkpoints.close()
    return read, jax.device_get(state.params)


def _same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_the_folder_of_an_unfinished_run(tmp_path, mesh, model, capsys):
    read, params = _run_folder(tmp_path, mesh, model, 3)
    opened, found = open_model(str(tmp_path), mesh, jnp.float32)
    assert opened.model == read.model and _same(found, params)
    assert jax.tree.leaves(open_model(str(tmp_path), mesh, jnp.bfloat16)[1])[0].dtype == (
        jnp.bfloat16
    )
    out, _ = _ask(capsys, "--model", str(tmp_path), "--prompt", "1+1=", "--max-tokens", "3")
    assert out.startswith("1+1=")


@pytest.mark.parametrize(("updates", "answers"), [(3, "export"), (2, "checkpoint")])
def test_the_folder_of_a_run_that_has_exported(tmp_path, mesh, model, capsys, updates, answers):
    """What it exported, unless it went on after that and has a newer checkpoint."""
    _, params = _run_folder(tmp_path, mesh, model, 3)
    shutil.copytree(model, tmp_path / "export")
    workdir.note_export(tmp_path / "export", step=1, updates=updates)
    _, found = open_model(str(tmp_path), mesh, jnp.float32)
    exported = policy.load_params(policy.read(str(model)), mesh, seed=0)
    assert not _same(exported, params)
    assert _same(found, exported if answers == "export" else params)
    out, err = _ask(capsys, "--model", str(tmp_path), "--prompt", "1+1=", "--max-tokens", "1")
    step = {"export": "export of step 1", "checkpoint": "checkpoint of step 7"}[answers]
    assert f"{tmp_path}: {step} answers." in err and out.startswith("1+1=")
    assert "WARNING" not in err


def test_an_export_of_an_unknown_step_is_older_than_a_checkpoint(tmp_path, mesh, model):
    _run_folder(tmp_path, mesh, model, 3)
    shutil.copytree(model, tmp_path / "export")
    assert find_model(str(tmp_path)).said.endswith("checkpoint of step 7")
    shutil.rmtree(tmp_path / "checkpoints")
    assert find_model(str(tmp_path)).said.endswith("export of an unknown step")


def test_the_checkpoints_of_a_run_may_lie_elsewhere(tmp_path, mesh, model):
    _, params = _run_folder(tmp_path / "run", mesh, model, 3)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["options"]["checkpoint.folder"] = str(tmp_path / "elsewhere")
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    _, found = open_model(str(tmp_path / "run"), mesh, jnp.float32)
    assert _same(found, params)


@pytest.mark.parametrize("seed", ["-1", str(2**31), str(2**63)])
def test_a_seed_that_no_device_holds_is_refused(seed):
    with pytest.raises(ValueError, match=rf"--seed {seed} must be from 0 to 2147483647"):
        generate.main(["--model", "any", "--prompt", "1", "--temperature", "1", "--seed", seed])


TEXT = "می\u200cخواهم\tx \U0001f468\u200d\U0001f469 \x1b[31m\u202e"


def test_a_model_s_text_goes_into_a_pipe_as_it_is(capsys):
    generate.show("1+\t1", TEXT)
    assert capsys.readouterr().out == "1+\t1" + TEXT + "\n"


def test_a_terminal_shows_what_it_would_obey(capsys, monkeypatch):
    monkeypatch.setattr(type(generate.console), "is_terminal", property(lambda console: True))
    generate.show("", TEXT)
    shown = TEXT.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert capsys.readouterr().out == shown + "\n"


def test_prompts_of_a_file_are_completed_as_each_alone(tmp_path, capsys, model, monkeypatch):
    (tmp_path / "prompts.txt").write_text("1+1=\r\n\n 9-4=\n")
    more = ["--model", str(model), "--max-tokens", "4", "--json"]
    out, _ = _ask(capsys, *more, "--prompts", str(tmp_path / "prompts.txt"))
    together = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in together] == ["1+1=", " 9-4="]
    for row in together:
        (alone,) = _ask(capsys, *more, "--prompt", row.pop("prompt"))[0].splitlines()
        assert json.loads(alone) == row
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=\n"))
    out, _ = _ask(capsys, *more, "--prompts", "-")
    assert json.loads(out) == together[0] | {"prompt": "1+1="}


def test_files_of_prompts_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b"\xe9\n")
    for name, words in (("gone", "No such file"), ("empty", "no prompt"), ("latin", "not UTF-8")):
        with pytest.raises(ValueError, match=rf"--prompts .*{name}.*{words}"):
            generate.main(["--model", "any", "--prompts", str(tmp_path / name)])


def test_the_folder_of_a_run_that_has_saved_nothing(tmp_path, mesh, model):
    config = _config()
    with config.unlocked():
        config.model.path = str(model)
    open_for(config, tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint"):
        open_model(str(tmp_path), mesh, jnp.float32)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"no .*checkpoint"):
        open_model(str(tmp_path), mesh, jnp.float32)


def test_a_story_as_transformers_tells_it(shared, mesh):
    """Greedy over 200 tokens: the same ids, and log-probabilities within 1e-4."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = shared / "models" / "stories260K"
    if not (path / "config.json").exists():
        pytest.skip(f"needs {path}")
    ours, params = open_model(str(path), mesh, jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = ours.tokenizer("Once upon a time")["input_ids"]
    engine = generate.engine_of(ours, mesh, Sampling(0.0), 200)
    rollouts = generate.complete(
        engine, engine.publish(params), [prompt], num_samples=1, seed=0, temperature=0.0
    )
    length = int(rollouts.length_PG[0, 0])
    ids = rollouts.completion_PGC[0, 0, :length].tolist()
    with torch.no_grad():
        whole = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=200, do_sample=False, pad_token_id=0,
        )[0]  # fmt: skip
        logits = theirs(whole[None]).logits[0]
    expected = whole[len(prompt) :].tolist()
    assert ids == expected and len(ids) > 100
    logp = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    logp = logp[torch.arange(length), whole[len(prompt) :]].numpy()
    np.testing.assert_allclose(rollouts.logp_PGC[0, 0, :length], logp, atol=1e-4, rtol=0)


# --- Conversations --------------------------------------------------------------------------------


def test_a_conversation_goes_on_line_by_line(model, tmp_path, capsys, monkeypatch):
    """Each message is answered with all before it; an empty line ends it."""
    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    config = json.loads((chat / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ m['content'] }}={% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    (chat / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n2+2\n\n3+3\n"))
    out, _ = _ask(capsys, "--model", str(chat), "--chat", "--max-tokens", "4")
    first, second = out.splitlines()
    again, _ = _ask(capsys, "--model", str(model), "--prompt", "1+1=", "--max-tokens", "4")
    assert again.removeprefix("1+1=").rstrip("\n") == first
    whole = f"1+1={first}=2+2="
    again, _ = _ask(capsys, "--model", str(model), "--prompt", whole, "--max-tokens", "4")
    assert again.removeprefix(whole).rstrip("\n") == second


def test_a_model_talks_to_an_environment(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "digits.py").write_text(
        "class Digits:\n"
        "    def reset(self, **row):\n        self.turns = 0\n"
        "    def respond(self, messages):\n"
        "        self.turns += 1\n        return '9' * 3 if self.turns < 2 else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    how = ["--model", str(model), "--prompt", "1+1=", "--max-tokens", "40", "--json"]
    how += ["--num-samples", "8", "--temperature", "1"]
    alone, _ = _ask(capsys, *how)
    out, err = _ask(capsys, *how, "--environment", "digits:Digits")
    pairs = [*zip(map(json.loads, alone.splitlines()), map(json.loads, out.splitlines()))]
    assert len(pairs) == 8 and any(
        one["stopped"] and len(one["token_ids"]) < 36 for one, _ in pairs
    )
    for one, talked in pairs:
        n = len(one["token_ids"])
        assert talked["token_ids"][:n] == one["token_ids"]
        if one["stopped"] and n < 36:  # the environment's three tokens follow
            assert talked["logprobs"][n : n + 3] == [0.0] * 3 and talked["logprobs"][n + 3]
        elif not one["stopped"]:
            assert "ended as tokens" in err


def test_without_a_prompt_it_says_what_to_give(model):
    with pytest.raises(ValueError, match="Give --prompt TEXT, --prompts FILE, or --chat"):
        generate.main(["--model", str(model)])
