"""Rubrics: what an LLM judge is asked, read from a TOML file. docs/judges.md describes the format.

Everything is checked when it is read: a rubric with a mistake ends the program before a run starts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

SHIPPED = Path(__file__).parents[2] / "configs" / "rubrics"
MODES = ("single", "pairwise", "listwise")
AGAINST = ("group", "reference")

_NAME = re.compile(r"[A-Za-z]\w{0,39}")
_BLOCK = re.compile(r"\{([A-Za-z]\w*)\}")
_TAKEN = ("question", "reference", "answer", "answers")  # blocks that are no columns
_SAMPLING = MappingProxyType({"temperature": 0.0, "max_tokens": 1024})
_NOT_SAMPLING = ("messages", "model", "stream", "n", "tools")


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One question to the judge, with a scale whose numbers are explained."""

    name: str
    ask: str
    weight: float = 1.0
    low: float = 1.0
    high: float = 5.0
    anchors: tuple[tuple[float, str], ...] = ()  # what some of the numbers mean, in order

    def share(self, value: float) -> float:
        """The value as a share of the scale, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Server:
    """Where the judge is; each "" leaves it to the option of the same name in section `judge`."""

    base_url: str = ""
    model: str = ""
    key_env: str = ""


@dataclasses.dataclass(frozen=True)
class Rubric:
    """What a judge is asked."""

    mode: str  # one of MODES
    task: str
    criteria: tuple[Criterion, ...]
    reference: str = ""  # the column with a reference answer; "": there is none
    columns: tuple[tuple[str, str], ...] = ()  # further columns that the judge sees, with titles
    template: str = ""  # the order of the blocks; "": as `messages.blocks` has them
    against: str = "group"  # what a pairwise judge compares an answer with
    opponents: int = 0  # answers of its group that each one is compared with; 0: all others
    sees_thinking: bool = False  # whether the judge reads what stands before </think>
    sampling: tuple[tuple[str, Any], ...] = tuple(sorted(_SAMPLING.items()))  # of the request
    server: Server = Server()

    @property
    def digest(self) -> str:
        """A checksum of all that decides a verdict; comments and the server do not."""
        known = dataclasses.asdict(dataclasses.replace(self, server=Server()))
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    @property
    def columns_read(self) -> list[str]:
        """Names of the columns that a problem must have."""
        return [name for name in (self.reference, *dict(self.columns)) if name]

    def score(self, values: dict[str, float]) -> float:
        """The weighted mean over the criteria of their shares, at most 1.

        The weights of the mean are absolute: a criterion with a weight below 0 subtracts.
        """
        total = sum(c.weight * c.share(values[c.name]) for c in self.criteria)
        return total / sum(abs(c.weight) for c in self.criteria)


def as_function(path: str) -> Callable:
    """The reward function of an entry "judge:FILE": it tells its columns, and is not called.

    Its attribute `digest` is that of the rubric.
    """
    rubric = read(path)

    def judged(**columns: Any) -> list[float]:
        raise AssertionError(f"the judge of {path!r} is no function of the workers")

    kind = inspect.Parameter.KEYWORD_ONLY
    names = ["prompts", "completions", *rubric.columns_read]
    judged.digest = rubric.digest
    judged.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return judged


@functools.lru_cache(64)
def _parsed(text: str, path: str) -> Rubric:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML file ({error}).") from error
    return _Reading(path).rubric(found)


def find(path: str) -> Path:
    """The file of a rubric: at `path`, or one of ours by its name alone, such as helpful."""
    ours = SHIPPED / f"{path}.toml"
    return ours if re.fullmatch(r"\w+", path) and ours.is_file() else Path(path)


def read(path: str) -> Rubric:
    """The rubric in a file; ValueError, naming the file and the key, for one with a mistake."""
    try:
        text = find(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ValueError(
            f"rewards.names: the rubric {path} cannot be read: {why}. Write judge:FILE with a TOML "
            f"file, or one of ours: {', '.join(sorted(p.stem for p in SHIPPED.glob('*.toml')))}. "
            "docs/judges.md has the format."
        ) from error
    return _parsed(text, str(path))


# --- What a file may say --------------------------------------------------------------------------


class _Reading:
    """Reads a rubric's tables, and refuses what it does not know."""

    def __init__(self, path: str):
        self._path = path

    def fail(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self._path}: {key} {what}")

    def take(self, table: dict, key: str, kind: type | tuple, default: Any, where: str = "") -> Any:
        if key not in table:
            return default
        value, kinds = table.pop(key), kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise self.fail(where + key, f"= {value!r} must be a {names}.")
        return value

    def nothing_left(self, table: dict, where: str, known: str) -> None:
        if table:
            raise self.fail(where + next(iter(table)), f"is not known; there is {known}.")

    def rubric(self, found: dict) -> Rubric:
        mode = self.take(found, "mode", str, "single")
        if mode not in MODES:
            raise self.fail("mode", f"= {mode!r} must be one of {', '.join(MODES)}.")
        task = self.take(found, "task", str, "").strip()
        if not task:
            raise self.fail("task", "is missing: say in a few sentences what is judged.")
        criteria = self.take(found, "criteria", list, [])
        if not criteria:
            raise self.fail("criteria", "is missing: write at least one table [[criteria]].")
        rubric = Rubric(
            mode=mode,
            task=task,
            criteria=tuple(self.criterion(c, i) for i, c in enumerate(criteria, 1)),
            reference=self.take(found, "reference", str, ""),
            columns=self.columns(self.take(found, "columns", dict, {})),
            template=self.take(found, "template", str, "").strip(),
            **self.pairs(mode, self.take(found, "pairs", dict, {})),
            sees_thinking=self.take(found, "sees_thinking", bool, False),
            sampling=self.sampling(self.take(found, "sampling", dict, {})),
            server=self.server(self.take(found, "server", dict, {})),
        )
        names = [c.name for c in rubric.criteria]
        if len(set(names)) < len(names):
            raise self.fail("criteria", f"have the same name twice: {', '.join(names)}.")
        if rubric.against == "reference" and not rubric.reference:
            raise self.fail("reference", 'is missing, and pairs.against = "reference" needs one.')
        self.nothing_left(
            found, "", "mode, task, criteria, reference, columns, template, pairs, "
            "sees_thinking, sampling and server",
        )  # fmt: skip
        self.check_template(rubric)
        return rubric

    def criterion(self, table: Any, number: int) -> Criterion:
        where = f"criteria {number}: "
        if not isinstance(table, dict):
            raise self.fail("criteria", "must be tables: [[criteria]].")
        name = self.take(table, "name", str, "", where)
        if not _NAME.fullmatch(name):
            raise self.fail(f"{where}name", f"= {name!r} must be letters, digits and _.")
        ask = self.take(table, "ask", str, "", where).strip()
        if not ask:
            raise self.fail(f"{where}ask", "is missing: the question that the judge answers.")
        weight = float(self.take(table, "weight", (int, float), 1.0, where))
        scale = self.take(table, "scale", list, [1, 5], where)
        is_number = lambda x: type(x) in (int, float) and math.isfinite(x)  # noqa: E731
        if len(scale) != 2 or not all(map(is_number, scale)) or scale[0] >= scale[1]:
            raise self.fail(f"{where}scale", f"= {scale!r} must be [lowest, highest].")
        if not math.isfinite(weight) or weight == 0:
            raise self.fail(f"{where}weight", f"= {weight!r} must be a number other than 0.")
        anchors = {}
        for key, text in self.take(table, "anchors", dict, {}, where).items():
            try:
                anchors[float(key)] = str(text)
            except ValueError:
                raise self.fail(f"{where}anchors", f"has {key!r}, which is no number.") from None
            if not scale[0] <= float(key) <= scale[1]:
                raise self.fail(f"{where}anchors", f"has {key}, which is not on the scale {scale}.")
        self.nothing_left(table, where, "name, ask, weight, scale and anchors")
        low, high = map(float, scale)
        return Criterion(name, ask, weight, low, high, tuple(sorted(anchors.items())))

    def columns(self, table: dict) -> tuple[tuple[str, str], ...]:
        for name, title in table.items():
            if name in _TAKEN or not isinstance(title, str) or not re.fullmatch(r"[\w ]+", title):
                raise self.fail(
                    f"columns.{name}", f"= {title!r} must be a column with a title of words."
                )
        return tuple(table.items())

    def pairs(self, mode: str, table: dict) -> dict[str, Any]:
        if table and mode != "pairwise":
            raise self.fail("pairs", f'is of mode = "pairwise", and mode = {mode!r}.')
        against = self.take(table, "against", str, "group", "pairs.")
        if against not in AGAINST:
            raise self.fail("pairs.against", f"= {against!r} must be one of {', '.join(AGAINST)}.")
        opponents = self.take(table, "opponents", int, 0, "pairs.")
        if opponents < 0:
            raise self.fail("pairs.opponents", f"= {opponents} must be at least 0 (0: all).")
        self.nothing_left(table, "pairs.", "against and opponents")
        return {"against": against, "opponents": opponents}

    def sampling(self, table: dict) -> tuple[tuple[str, Any], ...]:
        for name in table:
            if name in _NOT_SAMPLING:
                raise self.fail(f"sampling.{name}", "is set by the judge itself.")
        return tuple(sorted({**_SAMPLING, **table}.items()))

    def server(self, table: dict) -> Server:
        names = [field.name for field in dataclasses.fields(Server)]
        values = {name: self.take(table, name, str, "", "server.") for name in names}
        self.nothing_left(table, "server.", ", ".join(names))
        return Server(**values)

    def check_template(self, rubric: Rubric) -> None:
        if not rubric.template:
            return
        answers = "answer" if rubric.mode == "single" else "answers"
        possible = ["question", answers, *dict(rubric.columns)]
        possible += ["reference"] if rubric.reference and rubric.against == "group" else []
        used = _BLOCK.findall(rubric.template)
        for name in used:
            if name not in possible:
                known = ", ".join(f"{{{n}}}" for n in possible)
                raise self.fail("template", f"has {{{name}}}; there is {known}.")
        if used.count(answers) != 1:
            raise self.fail("template", f"must have {{{answers}}} once.")
