"""Options: each is read, each rule speaks, overrides keep their types, resumes must agree."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from valid_config import refusal_of, valid

from grpo_jax.config import loading, options, record
from grpo_jax.config import rules as rules_lib
from grpo_jax.config.dotted import flatten

ROOT = Path(options.__file__).parents[1]
CONFIGS = sorted((ROOT.parent / "configs").glob("*.py"))
OPTIONS = flatten(options.default())


# Changes that read problems from a dataset.
_DATASET = {"data__task": "", "data__path": "owner/name", "model__path": "m"}


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


# --- Every option has a reader --------------------------------------------------------------------


def _chains(tree: ast.AST) -> set[str]:
    """Attributes that code reads, as "section.leaf" or, below a name, the name's own section.

    `algorithm = config.algorithm` makes `algorithm.clip_low` a read of that option; so does a
    parameter's name, for the few functions that are given one section.
    """
    sections: dict[str, str] = {}

    def dotted(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Attribute):
            return [*dotted(node.value), node.attr]
        return [node.id] if isinstance(node, ast.Name) else ["?"]

    def bind(target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts):
                bind(one, other)
        elif isinstance(target, ast.Name) and isinstance(value, ast.Attribute):
            sections[target.id] = dotted(value)[-1]

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            bind(node.targets[0], node.value)
        if isinstance(node, ast.Call):  # policy.new(config.model, ...): its parameter `options`
            for value in node.args:
                if isinstance(value, ast.Attribute) and dotted(value)[-2:-1] == ["config"]:
                    sections.setdefault("options", dotted(value)[-1])
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            *before, leaf = dotted(node)
            section = sections.get(before[-1], before[-1]) if before else ""
            found.add(f"{section}.{leaf}")
    return found


def _reads() -> set[str]:
    """What the package reads outside of options.py and rules.py: a check does not use an option."""
    found, config = set(), ROOT / "config"
    for file in ROOT.rglob("*.py"):
        if file not in (config / "options.py", config / "rules.py"):
            found |= _chains(ast.parse(file.read_text()))
    return found


READS = _reads()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_read(name):
    section, _, leaf = name.rpartition(".")
    readers = {f"{section or 'config'}.{leaf}"}
    if section == "model":  # model.new is given the section as its parameter `options`
        readers.add(f"options.{leaf}")
    assert readers & READS, f"nothing in grpo_jax/ reads {name}"


def test_an_option_without_a_reader_is_seen():
    code = "def f(config):\n    batch, x = config.batch, config.optim\n    return batch.group"
    assert _chains(ast.parse(code)) >= {"batch.group", "config.optim"}
    assert "batch.prompts" not in _chains(ast.parse(code))
    assert "optim.momentum" not in READS


def test_every_option_has_one_line_and_what_it_means_is_near():
    """Each leaf is assigned once in default()."""
    body = ast.parse((ROOT / "config" / "options.py").read_text())
    default = next(n for n in body.body if getattr(n, "name", "") == "default")
    assigned = [
        ast.unparse(n.targets[0]).removeprefix("c.")
        for n in ast.walk(default)
        if isinstance(n, ast.Assign) and "ConfigDict" not in ast.unparse(n.value)
    ]
    assert sorted(assigned) == sorted(OPTIONS)


# --- Files and overrides --------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_files_in_configs_load(file):
    config = loading.load(str(file), [])
    assert flatten(config).keys() == OPTIONS.keys()


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
        ("learning_rate=1", ["optim.learning_rate or sft.learning_rate"]),
        ("zzz=1", ["no option zzz. grpo_jax/config/options.py"]),
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


@pytest.mark.parametrize("argument", ["--seed=1", "--config.seed", "seed=1", "--config.seed 1"])
def test_an_argument_of_another_form_is_refused(file, argument):
    with pytest.raises(ValueError, match="Unknown argument") as info:
        loading.load(file, [argument])
    assert argument in str(info.value)


def test_a_loaded_config_takes_no_new_option(file):
    config = loading.load(file, [])
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 1.0


def test_a_file_that_misspells_an_option_is_refused(file):
    Path(file).write_text(Path(file).read_text().replace("c.sft.num_steps", "c.sft.num_step"))
    with pytest.raises(ValueError, match="num_step") as info:
        loading.load(file, [])
    assert file in str(info.value)


# --- Rules ----------------------------------------------------------------------------------------


def test_the_base_of_these_tests_is_valid():
    rules_lib.check(valid(), options.default())


@pytest.mark.parametrize("name", rules_lib._POSITIVE)
def test_positive_options(name):
    key = name.replace(".", "__")
    zero = type(OPTIONS[name])(0)
    assert refusal_of(valid(**{key: zero})).startswith(f"{name} = {zero} must be above 0")


@pytest.mark.parametrize("name", rules_lib._NOT_NEGATIVE)
def test_options_that_are_not_negative(name):
    minus = type(OPTIONS[name])(-1)
    message = refusal_of(valid(**{name.replace(".", "__"): minus}))
    assert message.startswith(f"{name} = {minus} must not be below 0")


def test_every_number_has_a_range():
    """A number that no rule mentions could be anything."""
    others = {"batch.group", "optim.beta1", "optim.beta2", "rollout.top_p"}
    others |= {"algorithm.entropy_coef"}  # of either sign: a penalty or a bonus
    others |= {"mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"}
    others |= {"batch.microbatch"}
    numbers = {n for n, v in OPTIONS.items() if type(v) in (int, float)}
    ruled = set(rules_lib._POSITIVE) | set(rules_lib._NOT_NEGATIVE)
    assert numbers == ruled | others


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"optim__beta1": 1.0}, ["optim.beta1 = 1.0", "below 1"]),
        ({"optim__beta2": -0.1}, ["optim.beta2 = -0.1", "at least 0"]),
        ({"algorithm__clip_low": 1.0}, ["algorithm.clip_low = 1.0", "below 1"]),
        ({"profile__steps": (3,)}, ["profile.steps = (3,)", "(first, last)", "100"]),
        ({"profile__steps": (5, 4)}, ["profile.steps = (5, 4)"]),
        ({"profile__steps": (0, 4)}, ["profile.steps = (0, 4)"]),
        ({"profile__steps": (99, 101)}, ["profile.steps = (99, 101)", "loop.num_steps = 100"]),
        ({"rollout__top_p": 0.0}, ["rollout.top_p = 0.0", "above 0"]),
        ({"rollout__top_p": 1.1}, ["rollout.top_p = 1.1", "at most 1"]),
        ({"rollout__temperature": 0.0}, ["rollout.temperature = 0", "no advantage", "above 0"]),
        ({"optim__learning_rate": float("nan")}, ["optim.learning_rate = nan"]),
        ({"optim__eps": float("inf")}, ["optim.eps = inf must be a finite number"]),
        ({"batch__prompts": 2**31}, ["batch.prompts = 2147483648 must be at most 2147483647"]),
        ({"seed": 10**5000}, ["seed = 10^300 or more must be at most"]),
        ({"rewards__memory_gb": 1e300}, ["rewards.memory_gb = 1e+300 must be at most"]),
        ({"rewards__weights": ([1],)}, ["rewards.weights: [1] must be a text or a number"]),
        ({"checkpoint__folder": "a\0b"}, ["checkpoint.folder = 'a\\x00b' holds what is no char"]),
        ({"data__system": "\ud800"}, ["data.system = '\\ud800' holds what is no character"]),
        ({"model__dtype": "float16"}, ["model.dtype = 'float16'", "float32, bfloat16"]),
        (
            {"algorithm__normalizer": "mean"},
            ["algorithm.normalizer = 'mean'", "token, sequence, constant"],
        ),
        ({"optim__moments": "int4"}, ["optim.moments = 'int4'", "float32, bfloat16, int8"]),
        (
            {"checkpoint__export_dtype": "int8"},
            ["checkpoint.export_dtype = 'int8'", "auto, float32, bfloat16, float16"],
        ),
        ({"model__param_dtype": "int8"}, ["model.param_dtype = 'int8'", "float32, bfloat16"]),
        ({"model__layers": "scan"}, ["model.layers = 'scan'", "auto, loop, apart"]),
        ({"optim__float32_copy": True}, ["optim.float32_copy = True", "model.param_dtype"]),
        ({"rollout__weights": "int4"}, ["rollout.weights = 'int4'", "same, int8"]),
        ({"rollout__cache": "fp8"}, ["rollout.cache = 'fp8'", "same, int8"]),
        (
            {"algorithm__importance_correction": "token"},
            ["algorithm.importance_correction = 'token'", "token_truncate", "sequence_mask"],
        ),
        (
            {"loop__async_rollouts": True},
            ["loop.async_rollouts = True", 'algorithm.importance_correction = "none"'],
        ),
        ({"optim__schedule": "step"}, ["optim.schedule = 'step'", "constant, linear, cosine"]),
        ({"batch__group": 1}, ["batch.group = 1", "at least 2"]),
        (
            {"batch__prompts": 6, "batch__minibatches": 4, "batch__group": 3},
            ["6 * 3 = 18 rows", "batch.minibatches = 4", "multiple of 4"],
        ),
        (
            {"batch__prompts": 12, "batch__minibatches": 2, "batch__microbatch": 4},
            ["12 / 2 = 6 prompts per update", "batch.microbatch = 4", "multiple of 8"],
        ),
        ({"batch__microbatch": -2}, ["batch.microbatch = -2", "-1 for as many as fit"]),
        ({"sft__batch": 6, "sft__microbatch": 4}, ["sft.batch = 6", "sft.microbatch = 4"]),
        (
            {"optim__schedule": "linear", "optim__warmup_steps": 100},
            ["optim.warmup_steps = 100", "100 updates", "optim.schedule = 'linear'"],
        ),
        ({"data__task": ""}, ["data.task = ''", "data.path = ''", "exactly one"]),
        (
            {"data__path": "p.jsonl"},
            ["data.task = 'arithmetic'", "data.path = 'p.jsonl'", "exactly one"],
        ),
        ({"data__eval_path": "p.jsonl"}, ["data.eval_path goes with data.path", "data.task"]),
        ({"data__eval_split": "test"}, ["data.eval_split goes with data.path"]),
        ({"data__name": "main"}, ["data.name goes with data.path"]),
        ({"data__eval_name": "main"}, ["data.eval_name goes with data.path"]),
        ({"data__columns": ("a=b",)}, ["data.columns goes with data.path"]),
        ({"data__template": "{a}"}, ["data.template goes with data.path"]),
        ({"data__chat": True}, ["data.chat goes with data.path"]),
        ({"data__system": "Think."}, ["data.system goes with data.path"]),
        ({**_DATASET, "data__eval_name": "main"}, ["data.eval_name = 'main' goes with", "_path"]),
        ({**_DATASET, "data__columns": ("question",)}, ["data.columns: 'question'", "ours=theirs"]),
        ({**_DATASET, "data__template": "{}"}, ["data.template = '{}'", "{{ and }}"]),
        ({"data__overlong": "cut"}, ["data.overlong = 'cut'", "refuse, drop, truncate"]),
        ({"guards__kl": "ignore"}, ["guards.kl = 'ignore'", "warn, skip, roll_back, stop"]),
        ({"guards__nonfinite": "warn"}, ["guards.nonfinite = 'warn'", "skip, roll_back, stop"]),
        ({"guards__after_skips": "skip"}, ["guards.after_skips = 'skip'", "of roll_back, stop"]),
        (
            {"guards__reward": "roll_back", "checkpoint__every_steps": 0},
            ['guards.reward = "roll_back"', "checkpoint.every_steps = 0", "another action"],
        ),
        ({"guards__kl_max": 0.5}, ["guards.kl_max = 0.5", "algorithm.kl_coef = 0", "reference"]),
        (
            {"guards__entropy_min": 1.0, "guards__entropy_max": 1.0},
            ["guards.entropy_max = 1.0", "above guards.entropy_min = 1.0"],
        ),
        ({"rewards__weights": (1.0, 2.0)}, ["rewards.names has 1", "rewards.weights 2"]),
        ({"rewards__weights": (), "rewards__names": ()}, ["at least one reward"]),
        ({"checkpoint__folder": "gs://b/r"}, ["checkpoint.folder = 'gs://b/r'", "model.path"]),
        ({"sft__num_steps": 0}, ['model.path = ""', "sft.num_steps = 0"]),
        ({"data__task": "", "data__path": "p"}, ['model.path = ""', "data.task"]),
        (
            {"model__num_heads": 4, "model__num_kv_heads": 3},
            ["model.num_heads = 4", "model.num_kv_heads = 3"],
        ),
        ({"model__width": 132}, ["model.width = 132", "multiple of 2 * model.num_heads = 8"]),
        ({"mesh__data": 0}, ["mesh.data = 0", "-1"]),
        ({"mesh__tensor": -2}, ["mesh.tensor = -2", "-1"]),
        ({"mesh__fsdp": -1}, ["mesh.data and mesh.fsdp are -1", "only one"]),
    ],
)
def test_rules(changes, parts):
    message = refusal_of(valid(**changes))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "changes",
    [
        {"batch__prompts": 12, "batch__minibatches": 2, "batch__microbatch": 3},
        {"sft__batch": 8, "sft__microbatch": 4},
        {"optim__schedule": "linear", "optim__warmup_steps": 99},
        {"data__task": "", "data__path": "p.jsonl", "data__eval_path": "q.jsonl",
         "model__path": "m"},
        {"model__path": "m", "sft__num_steps": 0, "model__num_kv_heads": 3},
        {**_DATASET, "data__name": "main", "data__eval_split": "test", "data__chat": True},
        {**_DATASET, "data__eval_path": "owner/name", "data__eval_name": "main"},
        {**_DATASET, "data__columns": ("prompt=a",), "data__template": "{prompt} {b} {{}}"},
        {"data__overlong": "drop"},
        {"rollout__top_p": 1.0, "optim__beta1": 0.0},
        {"mesh__data": 1, "mesh__tensor": -1},
        {"model__param_dtype": "bfloat16", "optim__float32_copy": True},
        {"loop__async_rollouts": True, "algorithm__importance_correction": "token_mask"},
        {"guards__kl_max": 0.5, "algorithm__kl_coef": 1e-6, "guards__kl": "roll_back"},
        {"guards__entropy_min": 1.0},
    ],
)  # fmt: skip
def test_what_the_rules_allow(changes):
    rules_lib.check(valid(**changes), options.default())


def test_types_are_checked():
    config = valid()
    config.optim.unlock()
    with config.ignore_type():
        config.optim.learning_rate = "fast"
    assert "optim.learning_rate = 'fast' is not of type float" in refusal_of(config)


def test_a_missing_option_is_named():
    config = valid()
    with config.unlocked():
        del config.optim.learning_rate
    assert "optim.learning_rate = None" in refusal_of(config)


def test_groups_split_over_devices():
    config = valid(batch__prompts=12, batch__minibatches=3)
    rules_lib.check_devices(config, 4)
    with pytest.raises(ValueError, match=r"give 4 prompts at once.*= 8 devices.*multiple of 8"):
        rules_lib.check_devices(config, 8)
    with pytest.raises(ValueError, match=r"batch.microbatch = 2 give 2 prompts at once"):
        rules_lib.check_devices(valid(batch__prompts=12, batch__microbatch=2), 4)


def test_heads_split_over_the_devices_of_a_row():
    rules_lib.check_heads(4, sequence=2, tensor=2)
    rules_lib.check_heads(3, sequence=1, tensor=2)  # tensor alone: by column
    with pytest.raises(
        ValueError, match=r"mesh\.sequence = 4 and mesh\.tensor = 2.*a divisor of 4"
    ):
        rules_lib.check_heads(4, sequence=4, tensor=2)


# --- What resumed runs agree on -------------------------------------------------------------------


def _recorded(config, folder: Path) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(record.new(config)))
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"optim__learning_rate": 1.0},
        {"rewards__weights": (0.5,)},
        {"batch__group": 4},
        {"rollout__temperature": 0.9},
        {"model__width": 64},
        {"data__num_train": 5},
        {"data__overlong": "drop"},
        {"optim__moments": "int8"},
        {"rollout__cache": "int8"},
    ],
)
def test_what_changes_the_result_binds(changes, tmp_path):
    file = _recorded(valid(), tmp_path)
    assert record.continued(file, valid()) is None
    (key, value), name = next(iter(changes.items())), next(iter(changes)).replace("__", ".")
    then, now = OPTIONS[name], value
    if isinstance(then, tuple):
        then, now = list(then), list(now)
    with pytest.raises(ValueError) as info:
        record.continued(file, valid(**{key: value}))
    assert f"{name}: {then!r} there, {now!r} now" in str(info.value)
    assert str(tmp_path) in str(info.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"loop__num_steps": 7},
        {"evaluation__every_steps": 3},
        {"checkpoint__keep": 9},
        {"logging__tensorboard": False},
        {"mesh__data": 1},
        {"compile_cache": False},
        {"profile__steps": (1, 2)},
        {"debug__nans": True},
        {"batch__microbatch": 4},
        {"batch__microbatch": -1, "model__remat": "auto", "batch__memory_limit_gib": 8.0},
        {"guards__reward": "stop"},
        {"sft__checkpoint_every_steps": 4},
    ],
)
def test_what_only_carries_it_out_does_not_bind(changes, tmp_path):
    assert record.continued(_recorded(valid(), tmp_path), valid(**changes)) is None


def test_the_length_of_a_run_binds_where_the_schedule_ends_with_it(tmp_path):
    file = _recorded(valid(optim__schedule="cosine"), tmp_path)
    with pytest.raises(ValueError, match=r"loop.num_steps: 100 there, 7 now"):
        record.continued(file, valid(optim__schedule="cosine", loop__num_steps=7))


def test_many_changes_are_counted(tmp_path):
    other = valid(seed=1, model__width=64, batch__group=4, batch__prompts=8, data__num_train=5,
                  rollout__top_k=3, optim__beta1=0.5)  # fmt: skip
    with pytest.raises(ValueError, match="and 2 more"):
        record.continued(_recorded(valid(), tmp_path), other)


def test_what_a_run_is_that_changes_nothing():
    """What a run has unless its config says otherwise; docs/definitions.md compares it with TRL."""
    flat = flatten(options.default())
    groups = ("algorithm.", "optim.", "batch.", "rollout.")
    assert {n: v for n, v in flat.items() if n.startswith(groups)} == {
        "batch.prompts": 32, "batch.group": 8, "batch.minibatches": 1, "batch.microbatch": 0,
        "batch.memory_limit_gib": 0.0,
        "rollout.max_tokens": 256, "rollout.temperature": 1.0, "rollout.top_k": 0,
        "rollout.top_p": 1.0, "rollout.num_slots": 0, "rollout.weights": "same",
        "rollout.cache": "same", "rollout.attention": "auto", "rollout.compact": True,
        "algorithm.num_iterations": 1, "algorithm.scale_by": "std", "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.2, "algorithm.kl_coef": 0.0,
        "algorithm.kl_gradient": "reference_policy", "algorithm.entropy_coef": 0.0,
        "algorithm.normalizer": "token", "algorithm.mask_truncated": False,
        "algorithm.importance_correction": "none", "algorithm.importance_cap": 2.0,
        "optim.learning_rate": 1e-6, "optim.warmup_steps": 0, "optim.schedule": "constant",
        "optim.end_fraction": 0.0, "optim.beta1": 0.9, "optim.beta2": 0.99, "optim.eps": 1e-8,
        "optim.weight_decay": 0.0, "optim.clip_norm": 1.0, "optim.moments": "float32",
        "optim.float32_copy": False, "optim.offload": False,
    }  # fmt: skip
