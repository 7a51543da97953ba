"""Config files and overrides: what they may say, and how they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_jax.config import arguments, loading, options, other_names, parsers
from grpo_jax.config.dotted import flatten

ROOT = Path(options.__file__).parents[1]
CONFIGS = sorted((ROOT.parent / "configs").rglob("*.py"))
OPTIONS = flatten(options.default())


def test_a_reward_function_may_stand_in_place_of_its_name(tmp_path, monkeypatch):
    """Where a worker can import it; one of the config file itself is refused by a message."""
    (tmp_path / "own_rewards.py").write_text("def words(completions, **columns):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "from own_rewards import words\n"
        "from grpo_jax.config import options as config_lib\n"
        "def here(completions, **columns):\n    return []\n"
        "def get_config():\n"
        "    c = config_lib.default()\n"
        "    c.data.task, c.sft.num_steps = 'arithmetic', 1\n"
        "    c.rewards.names, c.rewards.weights = ('exact_answer', words), (1.0, 1.0)\n"
        "    return c\n"
    )
    file = tmp_path / "named.py"
    file.write_text(text)
    assert loading.load(str(file), []).rewards.names == ("exact_answer", "own_rewards:words")
    file.write_text(text.replace(", words)", ", here)"))
    with pytest.raises(ValueError, match=r"rewards.names holds the function 'here' itself"):
        loading.load(str(file), [])
    file.write_text("import sys\nsys.exit()\n")
    with pytest.raises(ValueError, match=r"does not give a config \(SystemExit"):
        loading.load(str(file), [])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_files_in_configs_load(file):
    config = loading.load(str(file), [])
    assert flatten(config).keys() == OPTIONS.keys()


def test_values_that_people_write_in_another_way():
    overrides = ["--config.model.dtype=bf16", "--config.checkpoint.export_dtype=fp32"]
    names = "('my.own:f','my_rewards.happy','trl.rewards.get(a=1.5)','exact_answer','a.b',"
    names += "'my_rewards.py:f(words=1)','./own/r.py:f','my.f as a.b')"
    found = loading.read(None, [*overrides, f"--config.rewards.names={names}"])
    assert found.model.dtype == "bfloat16" and found.checkpoint.export_dtype == "float32"
    assert found.rewards.names == (
        "my.own:f", "my_rewards:happy", "trl.rewards:get(a=1.5)", "exact_answer", "a:b",
        "my_rewards:f(words=1)", "own.r:f", "my:f as a.b",
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["/some/my.py:f", "../my.py:f", "my-rewards.py:f"])
def test_a_file_that_is_no_module_from_here_is_refused(spec):
    with pytest.raises(ValueError, match="is no module from the current folder"):
        loading.read(None, [f"--config.rewards.names={spec}"])


def test_there_are_config_files():
    assert "quickstart.py" in [file.name for file in CONFIGS]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from grpo_jax.config import options as config\n"
        "def get_config():\n"
        "    c = config.default()\n"
        "    c.data.task = 'arithmetic'\n"
        "    c.sft.num_steps = 1\n"
        "    return c\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seed=3", 3),
        ("optim.learning_rate=1e-5", 1e-5),
        ("optim.learning_rate=1", 1.0),
        ("rollout.compact=False", False),
        ("rollout.compact=false", False),
        ("checkpoint.export=true", True),
        ("model.dtype=bfloat16", "bfloat16"),
        ("logging.wandb_project=3", "3"),
        ("model.path=a=b", "a=b"),
        ("rewards.names=answer_format", ("answer_format",)),
        ("rewards.names=['answer_format']", ("answer_format",)),
        ("rewards.weights=(2.0,)", (2.0,)),
        ("rewards.weights=2.0", (2.0,)),
        ("data.columns=prompt=question", ("prompt=question",)),
        ("data.columns=('prompt=a','answer=b')", ("prompt=a", "answer=b")),
        ("data.columns=prompt=a, answer=b", ("prompt=a", "answer=b")),
        ("data.chat_template_kwargs=a=(1,2),b='x,y'", ("a=(1,2)", "b='x,y'")),
        ("mesh.fsdp=-1", -1),
    ],
)
def test_overrides_of_each_type(file, argument, value):
    more = ["--config.mesh.data=1"] if argument.startswith("mesh") else []
    if argument.startswith("data"):
        more = ["--config.data.task=", "--config.data.path=p", "--config.model.path=m"]
    config = loading.load(file, [*more, f"--config.{argument}"])
    found = flatten(config)[argument.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("optim.learning_rat=1", ["no option optim.learning_rat", "optim.learning_rate"]),
        ("learning_rate=1", ["optim.learning_rate or critic.learning_rate"]),
        ("zzz=1", ["no option zzz. `python -m grpo_jax.train --help` lists"]),
        ("optim=1", ["no option optim."]),
        ("optim.warmup_steps=1.5", ["optim.warmup_steps = '1.5'", "a whole number", "0 now"]),
        ("optim.warmup_steps=True", ["optim.warmup_steps", "a whole number"]),
        ("optim.learning_rate=fast", ["optim.learning_rate = 'fast'", "a number"]),
        ("rollout.compact=1", ["rollout.compact = '1'", "True or False"]),
        ("rewards.names={1}", ["rewards.names", "a tuple"]),
        ("batch.group=" + "(" * 10**5, ["batch.group = '(((", "a whole number"]),
        ("optim.eps=" + "-" * 10**5 + "1", ["optim.eps = '---", "a number"]),
        ("optim.eps=1" + "0" * 400, ["optim.eps = '1000", "a number"]),
        ("seed={[]: 1}", ["seed = '{[]: 1}' is not a whole number"]),
    ],
)
def test_a_wrong_override_is_refused(file, argument, parts):
    with pytest.raises(ValueError) as info:
        loading.load(file, [f"--config.{argument}"])
    assert all(part in str(info.value) for part in parts), info.value
    # A name that is none is a wrong command line, status 2; a wrong value is a mistake, status 1.
    assert isinstance(info.value, loading.Usage) == ("There is no option" in str(info.value))


@pytest.mark.parametrize("argument", ["--seed=1", "--config.seed", "seed=1", "--config.seed 1"])
def test_an_argument_of_another_form_is_refused(file, argument):
    with pytest.raises(ValueError, match="Unknown argument") as info:
        loading.load(file, [argument])
    assert argument in str(info.value)


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("--config.optim", "It is a section: `grpo-jax options optim` lists its options."),
        ("--config.seed", "It lacks a value."),
        ("--dry-run", "Did you mean --check?"),
        ("--dry_run", "Did you mean --check?"),
        ("--num_process=2", "Did you mean --num-processes?"),
        ("--learning_rate=1e-5", "Did you mean --config.optim.learning_rate?"),
        ("--num_generations", "Did you mean --config.batch.group?"),
        ("--version", "Did you mean grpo-jax --version?"),
    ],
)
def test_an_argument_that_a_run_does_not_take_names_the_one_that_is_meant(argument, hint):
    with pytest.raises(loading.Usage, match="Unknown argument") as info:
        arguments.of_run(["--config", "quickstart", argument], "train")
    assert f"{hint} Options of the run are written --config.name=value" in str(info.value)


def test_a_program_without_a_config_does_not_speak_of_options():
    with pytest.raises(loading.Usage) as info:
        arguments.parse(parsers.export(), ["--workdir", "w", "--stp", "4"])
    assert str(info.value) == "Unknown argument '--stp'. Did you mean --step?"
    with pytest.raises(loading.Usage) as info:
        arguments.parse(parsers.export(), ["--workdir", "w", "--config.seed=4"])
    assert str(info.value) == "Unknown argument '--config.seed=4'. --help lists what there is."


def test_a_loaded_config_takes_no_new_option(file):
    config = loading.load(file, [])
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 1.0


def test_a_file_that_misspells_an_option_is_refused(file):
    Path(file).write_text(Path(file).read_text().replace("c.sft.num_steps", "c.sft.num_step"))
    with pytest.raises(ValueError, match="num_step") as info:
        loading.load(file, [])
    assert f"{file}, line 5: There is no option sft.num_step. Did you mean sft.num_steps" in str(
        info.value
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "c.optim.lr = 1e-5",
            "line 5: There is no option optim.lr. Did you mean optim.learning_rate?",
        ),
        ("c.rollout.n = 8", "There is no option rollout.n. Did you mean batch.group?"),
        ("c.rollout.cache = 'int8'", "Did you mean rollout.kv_cache_dtype?"),
        (
            "print(c.optim.moments)",
            "There is no option optim.moments. Did you mean optim.moments_d",
        ),
        (
            "o = c.optim; o.clip_norm = 1.0",
            "There is no option clip_norm. Did you mean optim.max_g",
        ),
        ("c.zzz = 1", "There is no option zzz. `python -m grpo_jax.train --help` lists all"),
    ],
)
def test_a_name_that_a_file_has_from_elsewhere_is_told_by_ours(file, line, told, monkeypatch):
    monkeypatch.chdir(Path(file).parent)
    file = Path(file).name  # as one writes it
    Path(file).write_text(Path(file).read_text().replace("c.sft.num_steps = 1", line))
    with pytest.raises(ValueError) as info:
        loading.load(file, [])
    assert told in str(info.value) and len(str(info.value)) < 300


@pytest.mark.parametrize("line", ["None.optim", "{}['beta']", "import nothing_of_this_name"])
def test_other_errors_of_a_file_are_told_as_they_are(file, line):
    Path(file).write_text(Path(file).read_text().replace("c.sft.num_steps = 1", line))
    with pytest.raises(ValueError, match="does not give a config") as info:
        loading.load(file, [])
    assert "no option" not in str(info.value)


# --- Names of TRL, of verl, and of before ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("num_generations", "batch.group"),  # TRL
        ("batch.num_generations", "batch.group"),
        ("algorithm.beta", "algorithm.kl_coef"),
        ("epsilon_high", "algorithm.clip_high"),
        ("vllm_importance_sampling_mode", "rollout_correction.level"),
        ("max_completion_length", "rollout.max_tokens"),
        ("multi_objective_aggregation", "algorithm.aggregate"),
        ("algorithm.adv_estimator", "algorithm.baseline"),  # verl
        ("algorithm.use_kl_in_reward", "algorithm.kl_in"),
        ("actor_rollout_ref.rollout.n", "batch.group"),  # verl
        ("actor_rollout_ref.rollout.val_kwargs.n", "evaluation.num_samples"),
        ("actor_rollout_ref.actor.optim.lr", "optim.learning_rate"),
        ("data.max_response_length", "rollout.max_tokens"),
        ("actor_rollout_ref.actor.clip_ratio_low", "algorithm.clip_low"),
        ("trainer.test_freq", "evaluation.every_steps"),
        ("rewards.time_limit_s", "rewards.timeout_s"),  # ours of before
        ("hosts.lost_limit_s", "hosts.heartbeat_timeout_s"),
        ("algorithm.importance_correction", "rollout_correction.level"),
    ],
)
def test_names_from_elsewhere_are_told_by_ours(file, name, ours):
    with pytest.raises(ValueError) as info:
        loading.load(file, [f"--config.{name}=1"])
    assert f"There is no option {name}. Did you mean {ours}? " in str(info.value)


def test_names_from_elsewhere_are_none_of_ours():
    known = options.BY_NAME
    assert set(other_names._ELSEWHERE.values()) | set(other_names._FORMERLY.values()) <= set(known)
    assert not known.keys() & (other_names._ELSEWHERE.keys() | other_names._FORMERLY.keys())


def test_rewards_and_weights_are_split_at_commas_alike(file):
    names = "--config.rewards.names=mine.f,repetition_penalty(n=2,p=1)"
    config = loading.load(file, [names, "--config.rewards.weights=1,2.5"])
    assert config.rewards.names == ("mine:f", "repetition_penalty(n=2,p=1)")
    assert config.rewards.weights == (1, 2.5)
