"""What TRL's config classes have in common: reading arguments, and translating some of them."""

from __future__ import annotations

import copy
import difflib
import math
from typing import Any, ClassVar

from grpo_jax.trl.fields import Field

_SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip


class Arguments:
    """A config class of TRL: the arguments in `fields`, with their defaults.

    Raises ValueError for an argument that TRL does not have, and for a value that this trainer does
    not support; the message says what to use.
    """

    fields: ClassVar[dict[str, Field]] = {}

    def __init__(self, output_dir: str | None = None, **arguments: Any):
        fields, own = self.fields, type(self).__name__
        for name in arguments:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=2)
                hint = f" Did you mean {' or '.join(close)}?" if close else ""
                raise ValueError(f"{own} has no argument {name}.{hint}")
        for name, field in fields.items():
            setattr(self, name, copy.copy(arguments.get(name, field.default)))
        self.output_dir = output_dir or arguments.get("output_dir")
        for name, value in arguments.items():
            field = fields[name]
            if field.only and not _is_one_of(value, (field.default, *field.also)):
                raise ValueError(
                    f"{own}({name}={value!r}) is not what this trainer does. It takes "
                    f"{name}={field.default!r}. In its place: {field.only}."
                )


def _is_one_of(value: Any, values: tuple) -> bool:
    return any(value == known and type(value) is type(known) for known in values)


def text_of(value: Any) -> str:
    """The text of a value, which may be one of transformers' enumerations."""
    return str(getattr(value, "value", value))


def one_of(args: Arguments, name: str, value: Any, known: dict[Any, Any]) -> Any:
    """What stands for a value in `known`; ValueError if it is not there."""
    if value not in known:
        raise ValueError(
            f"{type(args).__name__}({name}={value!r}) is not built yet. It takes "
            f"{', '.join(repr(k) for k in known)}."
        )
    return known[value]


def schedule(args: Arguments) -> str:
    """The schedule of the learning rate."""
    return one_of(args, "lr_scheduler_type", text_of(args.lr_scheduler_type), _SCHEDULES)


def warmup(steps: float, updates: int) -> int:
    """The number of warm-up updates; a value below 1 is a share of all, as in transformers 5."""
    return math.ceil(steps * updates) if 0 < steps < 1 else int(steps)


# Values of model_init_kwargs that are in force here anyway.
_WITHOUT_EFFECT = {
    "trust_remote_code": (False,), "revision": ("main",), "use_cache": (True, False),
    "low_cpu_mem_usage": (True, False),
}  # fmt: skip


def precision(args: Arguments) -> dict[str, Any]:
    """The option of the weights' precision."""
    given = {
        name: value
        for name, value in (args.model_init_kwargs or {}).items()
        if value is not None and value not in _WITHOUT_EFFECT.get(name, ())
    }
    dtype = str(given.pop("dtype", given.pop("torch_dtype", "float32"))).removeprefix("torch.")
    given.pop("attn_implementation", None)  # kernels are chosen automatically
    if given:
        raise ValueError(
            f"{type(args).__name__}(model_init_kwargs=...) has {', '.join(sorted(given))}: only "
            "`dtype` is read here."
        )
    return {"model.param_dtype": "float32" if dtype == "auto" else dtype}


_REPORT_TO = ("tensorboard", "wandb", "mlflow", "trackio")


def trackers(args: Arguments) -> dict[str, Any]:
    """The options of trackers."""
    given = args.report_to
    names = [given] if isinstance(given, str) else list(given or [])
    unknown = [n for n in names if n not in ("none", *_REPORT_TO)]
    if unknown:
        raise ValueError(
            f"{type(args).__name__}(report_to={given!r}): {', '.join(unknown)} is not built yet. "
            f"It takes 'none', {', '.join(map(repr, _REPORT_TO))}."
        )
    return {
        "logging.tensorboard": "tensorboard" in names,
        "logging.wandb_project": args.project if "wandb" in names else "",
        "logging.mlflow_experiment": args.project if "mlflow" in names else "",
        "logging.trackio_project": args.project if "trackio" in names else "",
        "logging.run_name": args.run_name or "",
    }
