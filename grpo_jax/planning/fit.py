"""Chooses remat and microbatch size for a device's memory, by compiling; the run keeps the choice.

More memory is usually faster: fewer microbatches gather and read the weights less often, and stored
activations need no recomputation. But storing them takes time too, so where the chip's rates are
known, the compiled programs decide. Neither choice changes the result except for the order of sums;
therefore a resumed run keeps its first choice.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.devices import memory, sharding
from grpo_jax.hosts import processes
from grpo_jax.learner.scoring import usual_tokens
from grpo_jax.messages.console import say
from grpo_jax.planning import topologies
from grpo_jax.planning.compiled import Compiled, Known
from grpo_jax.planning.lengths import Lengths
from grpo_jax.planning.programs import Step
from grpo_jax.planning.topologies import Chip
from grpo_jax.run.whole_files import write_json
from grpo_jax.setup.learner import DEFAULT, MemoryPlan
from grpo_jax.structs import ModelConfig

_REMAT = ("none", "dots", "full")  # the fastest first
_GIB = 2**30


def is_auto(config: ConfigDict) -> bool:
    """Whether the config leaves remat or the microbatch to this choice."""
    return config.model.remat == "auto" or config.batch.microbatch == -1


def of_run(
    config: ConfigDict, model: ModelConfig, mesh: Mesh, longest: int, folder: Path
) -> MemoryPlan:
    """The choice for a run with prompts of at most `longest` tokens, equal on every process.

    It is read from `fit.json` in the run's folder if that file is of these options and this mesh;
    otherwise it is made, and written there.
    """
    if not is_auto(config):
        return DEFAULT
    asked = {
        "model.remat": config.model.remat,
        "batch.microbatch": config.batch.microbatch,
        "batch.memory_limit_gib": config.batch.memory_limit_gib,
        "mesh": dict(mesh.shape),
    }
    file = folder / "fit.json"
    known = json.loads(file.read_text()) if processes.is_first() and file.exists() else None
    known = processes.gather(known, "the choice of a microbatch")[0]
    if known is None or known["asked"] != asked:
        limit, chip = limit_of_all(), topologies.of_device(mesh.devices.flat[0])
        own = choose(config, model, mesh, Lengths.of(config, longest), limit, chip)
        chosen = processes.gather(dataclasses.asdict(own), "the choice of a microbatch")[0]
        known = {"asked": asked, "chosen": chosen}
        if processes.is_first():
            write_json(file, known)
    return MemoryPlan(**known["chosen"])


def limit_of_all() -> float | None:
    """Bytes that programs may use on each device of the run (the smallest's); None if unknown.

    Every process must call it.
    """
    limits = processes.gather(memory.limit(), "the choice of a microbatch")
    return None if None in limits else min(limits)


def choose(
    config: ConfigDict,
    model: ModelConfig,
    mesh: Mesh,
    lengths: Lengths,
    limit: float | None,
    chip: Chip | None = None,
    known: Known | None = None,
) -> MemoryPlan:
    """The choice whose compiled gradient program needs at most `limit` bytes of each device.

    `config.batch.memory_limit_gib` overrides `limit`; without either, the result is the default.
    First comes remat, among the values with which the default number of tokens fits: the fastest on
    the chip, or the one with the least recomputation if the chip's rates are unknown. Then come the
    tokens: doubled for as long as that is faster, or as many as fit if the rates are unknown. If
    nothing fits, the result is the smallest, and the run will report the missing memory. Programs
    in `known` are not compiled again.
    """
    if config.batch.memory_limit_gib:
        limit = config.batch.memory_limit_gib * _GIB
    if not is_auto(config) or limit is None:
        return DEFAULT

    @functools.cache
    def program(fit: MemoryPlan) -> Compiled:
        step = Step(config, model, mesh, lengths, fit, known=known)
        return step.compile(lambda name: name == "gradient")[0]

    peak = lambda fit: program(fit).peak  # noqa: E731
    rated = chip is not None and chip.flops is not None
    seconds = lambda fit: program(fit).seconds(chip)["in turn"]  # noqa: E731

    sizes = _sizes(config, model, mesh, lengths) if config.batch.microbatch == -1 else [0]
    usual = max((n for n in sizes if n <= usual_tokens(mesh)), default=sizes[0])
    remats = _REMAT if config.model.remat == "auto" else (config.model.remat,)
    fitting = (MemoryPlan(r, usual) for r in remats if peak(MemoryPlan(r, usual)) <= limit)
    if rated and len(remats) > 1:
        fit = min(fitting, key=seconds, default=MemoryPlan(remats[-1], usual))
    else:
        fit = next(fitting, MemoryPlan(remats[-1], usual))
    of_size = [dataclasses.replace(fit, tokens=tokens) for tokens in sizes]
    if rated and peak(fit) <= limit:
        for larger in of_size[sizes.index(usual) + 1 :]:
            if peak(larger) > limit or seconds(larger) >= seconds(fit):
                break
            fit = larger
    else:
        fit = of_size[max(bisect.bisect_right(of_size, limit, key=peak) - 1, 0)]
    tokens = f" and microbatches of {fit.tokens:,} tokens a row" if fit.tokens else ""
    say(
        f'The update takes model.remat = "{fit.remat}"{tokens}: {peak(fit) / _GIB:.2f} GiB of each '
        f"device, of {limit / _GIB:.2f}."
    )
    return fit


def _sizes(config: ConfigDict, model: ModelConfig, mesh: Mesh, lengths: Lengths) -> list[int]:
    """Numbers of tokens per row to try: of one completion, powers of two, and of all groups."""
    longest = max(int(lengths.completion_PG.max()) - 1, 1)
    groups = config.batch.prompts // config.batch.minibatches // mesh.shape["data"]
    least = lengths.prompt + longest
    rows = mesh.shape["fsdp"] * sharding.attention_parts(mesh, model.num_kv_heads)
    most = -(-groups // rows) * (lengths.prompt + lengths.completion_PG.shape[1] * longest)
    between = (usual_tokens(mesh) * 2**k // 8 for k in range(32))
    return [least, *(n for n in between if least < n < most), most]
