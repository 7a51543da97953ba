"""The table of options: each has a meaning and a reader, and refuses what it cannot be."""

from __future__ import annotations

import ast
import functools
import math
from pathlib import Path

import pytest
from valid_config import refusal_of, valid

from grpo_jax.algorithm import objective
from grpo_jax.config import options
from grpo_jax.config.dotted import flatten

ROOT = Path(options.__file__).parents[1]
TABLE = options.TABLE
OF_EITHER_SIGN = {
    "hybrid.pass_reward",
    "algorithm.entropy_coef",
    "prompts.low_rate",
    "prompts.high_rate",
}
NUMBERS = [option for option in TABLE if type(option.default) in (int, float)]


def name_of(option) -> str:
    return option.name


def test_the_defaults_are_the_tables():
    assert flatten(options.default()) == {option.name: option.default for option in TABLE}
    assert len(options.BY_NAME) == len(TABLE) == len(flatten(options.default()))


def test_sections_are_described_and_stand_together():
    """As `--help` and docs/options.md list them."""
    sections = [option.section for option in TABLE]
    assert [s for s, before in zip(sections, [None, *sections]) if s != before] == list(
        options.SECTIONS
    )


@pytest.mark.parametrize("option", TABLE, ids=name_of)
def test_every_option_says_what_it_is(option):
    """Its meaning; a number its range, a word its choices, a text or tuple what it names."""
    assert len(option.meaning) > 5 and not option.meaning.endswith(".")
    assert option.meaning[0] == option.meaning[0].upper()
    if type(option.default) in (int, float):
        assert option.within is not None
        assert option.name in OF_EITHER_SIGN or str(option.within)
    elif isinstance(option.default, (str, tuple)):
        assert bool(option.choices) != bool(option.unit)
    assert option.refusal(option.default) is None


def test_durations_and_sizes_have_their_unit():
    for option in TABLE:
        assert option.name.endswith("_s") == (option.unit == "s"), option.name


# --- What it cannot be ----------------------------------------------------------------------------


def outside(option) -> list[float]:
    """For each bound of a number the nearest value of its type that lies beyond it."""
    kind, within = type(option.default), option.within
    step = 1 if kind is int else 1e-3
    bounds = [within.above, None if within.at_least is None else within.at_least - step]
    bounds += [within.below, None if within.at_most is None else within.at_most + step]
    beyond = [kind(bound) for bound in bounds if bound is not None]
    while any(value in option.special for value in beyond):  # -1 below 0, say
        beyond = [value - step if value in option.special else value for value in beyond]
    return beyond


@pytest.mark.parametrize("option", NUMBERS, ids=name_of)
def test_numbers_stay_within_their_range(option):
    for value in outside(option):
        message = refusal_of(valid(**{option.name.replace(".", "__"): value}))
        assert message.startswith(f"{option.name} = {value} must be {option.within}")
        others = [special for special in option.special if special not in option.within]
        assert message.count(" (") >= len(others)
        assert all(f"or {special!r} (" in message for special in others)


def test_the_ranges_by_hand():
    """What each kind of range says and takes."""
    number = options.BY_NAME
    assert number["optim.eps"].refusal(0.0) == "optim.eps = 0.0 must be above 0."
    assert number["optim.beta1"].refusal(1.0) == "optim.beta1 = 1.0 must be at least 0 and below 1."
    assert number["optim.beta1"].refusal(0.0) is None
    assert number["mesh.data"].refusal(0) == (
        "mesh.data = 0 must be at least 1, or -1 (the rest of the devices)."
    )
    assert number["mesh.data"].refusal(-1) is None
    assert number["rollout.top_p"].refusal(1.0) is None
    assert "above 0 and at most 1" in number["rollout.top_p"].refusal(1.5)
    assert number["rollout.temperature"].refusal(0.0) == (
        "rollout.temperature = 0.0 must be above 0: 0 gives a group of equal completions, and so "
        "no advantage. 1.0 is usual."
    )
    assert number["algorithm.entropy_coef"].refusal(-math.pi) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"mesh.{axis}", -1) for axis in ("data", "fsdp", "sequence", "tensor")),
        *((f"batch.{name}", 0) for name in ("microbatch", "memory_limit_gib")),
        ("batch.microbatch", -1), ("rollout.num_slots", 0), ("rollout.top_k", 0),
        ("algorithm.kl_target", 0.0), ("algorithm.entropy_target", 0.0),
        ("algorithm.reference_refresh_steps", 0), ("algorithm.top_entropy_share", 1.0),
        ("optim.max_grad_norm", 0.0), ("loop.stall_timeout_s", 0.0), ("loop.num_epochs", 0.0),
        ("rewards.num_workers", 0), ("rewards.memory_limit_gib", 0.0),
        ("evaluation.every_steps", 0), ("evaluation.num_problems", 0),
        ("evaluation.num_samples", 0), ("checkpoint.every_steps", 0),
        ("logging.samples_every_steps", 0), ("sft.num_steps", 0),
        ("sft.num_epochs", 0.0), ("critic.clip", 0.0), ("critic.max_grad_norm", 0.0),
        ("algorithm.gae_length_scale", 0.0),
    ],
)  # fmt: skip
def test_what_turns_an_option_off_is_taken(name, value):
    assert options.BY_NAME[name].refusal(value) is None


@pytest.mark.parametrize("option", [o for o in TABLE if o.choices], ids=name_of)
def test_words_are_of_their_choices(option):
    message = refusal_of(valid(**{option.name.replace(".", "__"): "neither"}))
    assert message == f"{option.name} = 'neither' must be one of {', '.join(option.choices)}."


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


@functools.cache
def _reads() -> set[str]:
    """What the package reads; who checks an option, or only tells it, does not use it."""
    found: set[str] = set()
    names = (
        "options",
        "objective_options",
        "given_options",
        "critic_options",
        "critic_rules",
        "rules",
        "objective_rules",
        "definitions",
    )
    no_readers = {ROOT / "config" / f"{name}.py" for name in names}
    assert all(file.exists() for file in no_readers)
    for file in ROOT.rglob("*.py"):
        if file not in no_readers:
            found |= _chains(ast.parse(file.read_text()))
    return found


@pytest.mark.parametrize("name", options.BY_NAME)
def test_every_option_is_read(name):
    section, _, leaf = name.rpartition(".")
    readers = {f"{section or 'config'}.{leaf}"}
    if section == "model":  # model.new is given the section as its parameter `options`
        readers.add(f"options.{leaf}")
    if section in {"sft", "preference", "reward_model"}:
        # `given` reads them of any section as `schedule = config[section]`
        readers.add(f"schedule.{leaf}")
    field = objective.OPTIONS.get(name.removeprefix("algorithm."))
    readers |= {f"objective.{field}", f"self.{field}"} if field else set()
    assert readers & _reads(), f"nothing in grpo_jax/ reads {name}"


def test_an_option_without_a_reader_is_seen():
    code = "def f(config):\n    batch, x = config.batch, config.optim\n    return batch.group"
    assert _chains(ast.parse(code)) >= {"batch.group", "config.optim"}
    assert "batch.prompts" not in _chains(ast.parse(code))
    assert "optim.momentum" not in _reads()


# --- What a run is --------------------------------------------------------------------------------


def test_what_a_run_is_that_changes_nothing():
    """What a run has unless its config says otherwise; docs/definitions.md compares it with TRL."""
    flat = flatten(options.default())
    groups = ("algorithm.", "optim.", "batch.", "rollout.", "rollout_correction.")
    assert {n: v for n, v in flat.items() if n.startswith(groups)} == {
        "batch.prompts": 32, "batch.group": 8, "batch.minibatches": 1, "batch.microbatch": 0,
        "batch.memory_limit_gib": 0.0,
        "rollout.max_tokens": 256, "rollout.temperature": 1.0, "rollout.top_k": 0,
        "rollout.top_p": 1.0, "rollout.num_slots": 0, "rollout.weights_dtype": "auto",
        "rollout.kv_cache_dtype": "auto", "rollout.attention": "auto", "rollout.compact": True,
        "algorithm.num_iterations": 1, "algorithm.baseline": "mean", "algorithm.scale_by": "std",
        "algorithm.aggregate": "sum", "algorithm.credit": "reward", "algorithm.whiten": "none",
        "algorithm.clip_low": 0.2, "algorithm.clip_high": 0.2, "algorithm.kl_in": "loss",
        "algorithm.kl_coef": 0.0,
        "algorithm.kl_estimator": "k3", "algorithm.entropy_coef": 0.0,
        "algorithm.preset": "", "algorithm.ratio": "token", "algorithm.surrogate": "clip",
        "algorithm.dual_clip_ratio": 0.0, "algorithm.dual_clip_loss": 0.0,
        "algorithm.ratio_cap": 5.0, "algorithm.sapo_positive": 1.0,
        "algorithm.sapo_negative": 1.05, "algorithm.vespo_positive": (2.0, 3.0),
        "algorithm.vespo_negative": (3.0, 2.0), "algorithm.mask_threshold": 0.2,
        "algorithm.max_sequence_drift": 0.0, "rollout_correction.floor": 0.0,
        "algorithm.normalizer": "token", "algorithm.mask_truncated": False,
        "algorithm.kl_target": 0.0, "algorithm.kl_horizon": 10_000,
        "algorithm.entropy_target": 0.0, "algorithm.entropy_coef_delta": 0.005,
        "algorithm.entropy_coef_min": 0.0, "algorithm.entropy_coef_max": 1.0,
        "algorithm.reference_refresh_steps": 0, "algorithm.reference_mix": 0.6,
        "algorithm.top_entropy_share": 1.0,
        "algorithm.critic": False, "algorithm.discount": 1.0, "algorithm.gae_lambda": 0.95,
        "algorithm.gae_length_scale": 0.0,
        "rollout_correction.level": "none", "rollout_correction.bound": "truncate",
        "rollout_correction.cap": 2.0,
        "optim.learning_rate": 1e-6, "optim.warmup_steps": 0, "optim.schedule": "constant",
        "optim.end_fraction": 0.0, "optim.beta1": 0.9, "optim.beta2": 0.99, "optim.eps": 1e-8,
        "optim.weight_decay": 0.0, "optim.max_grad_norm": 1.0, "optim.moments_dtype": "float32",
        "optim.master_weights": False, "optim.offload": False,
    }  # fmt: skip


def test_the_options_of_random_runs_are_options():
    """tests/fuzz/steps.py names them; one that is none would have every run of it refused."""
    file = ROOT.parent / "tests" / "fuzz" / "steps.py"
    tables = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.Assign)]
    named = {n.targets[0].id: n.value for n in tables if isinstance(n.value, ast.Dict)}
    keys = [ast.literal_eval(key) for name in named for key in named[name].keys]
    assert named.keys() == {"_ONE_STEP", "_VALUES"} and len(keys) > 40
    assert set(keys) <= options.BY_NAME.keys()
    for key, values in zip(named["_VALUES"].keys, named["_VALUES"].values):
        option = options.BY_NAME[ast.literal_eval(key)]
        for value in ast.literal_eval(ast.unparse(values)) if option.choices else []:
            assert option.refusal(value) is None
