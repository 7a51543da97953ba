"""Made conversations with an environment, each compared with one rendering of the whole.

An episode is drawn from a seed: 1 to 8 turns with text, one call, parallel calls, malformed calls,
calls that are only spelled, turns cut by a limit, turns of random ids; and answers with white
space, quotes, other scripts, control tokens, and texts over the limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from unittest import mock

import chat_families
from transformers.utils import chat_template_utils

from grpo_jax.data.templates import Renderer
from grpo_jax.environments import dialogue
from grpo_jax.environments.spelling import Spelling
from grpo_jax.environments.turns import Call

NOW = datetime(2025, 2, 3)
LIMIT = 64  # tokens of an observation
Message = dict[str, Any]


def tool(name: str, **types: str) -> dict[str, Any]:
    """The JSON schema of a tool, with the types of its parameters."""
    properties = {key: {"type": kind, "description": "A value."} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    function = {"name": name, "description": "A tool.", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("multiply", a="integer", b="number"), tool("look_up", key="string", more="object")]


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat template with a tokenizer, and what conversations it can hold."""

    name: str
    tokenizer: Any
    stops: tuple[int, ...]
    form: str  # of calls: "qwen", "xml", "llama" or "mistral"
    replies: bool = True
    thinks: bool = False  # and keeps it where no user answers
    parallel: bool = True
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def prove(self, renderer: Renderer, spelling: Spelling) -> dialogue.Dialogue:
        return dialogue.prove(
            self.tokenizer,
            TOOLS,
            renderer,
            stop_ids=self.stops,
            observation_tokens=LIMIT,
            replies=self.replies,
            arguments=self.arguments,
            now=NOW,
            spelling=spelling,
        )

    def written(self, said: Message) -> str:
        """A message of the assistant, as the template writes it after its opening."""
        functions = [call["function"] for call in said.get("tool_calls", ())]
        if self.form == "llama":
            if not functions:
                return said["content"]
            return _json({"name": functions[0]["name"], "parameters": functions[0]["arguments"]})
        if self.form == "mistral":
            if not functions:
                return " " + said["content"]
            named = [f | {"id": c["id"]} for f, c in zip(functions, said["tool_calls"])]
            return f"[TOOL_CALLS] {_json(named)}"
        write = _xml if self.form == "xml" else _json
        calls = [f"<tool_call>\n{write(function)}\n</tool_call>" for function in functions]
        between = "\n\n" if self.form == "xml" else "\n"
        text = between.join(part for part in (said["content"], "\n".join(calls)) if part)
        if "reasoning_content" in said:
            return f"<think>\n{said['reasoning_content']}\n</think>\n\n{text}"
        return text

    def broken(self, kind: str) -> str:
        """A malformed call of one of `turns.KINDS`."""
        if self.form == "xml":
            return {
                "unclosed": "<tool_call>\n<function=look_up>\n<parameter=key>\nx",
                "syntax": "<tool_call>\n<function=look_up>\n<parameter=key>\nx\n</function>\n"
                "</tool_call>",
            }.get(kind, "<tool_call>\nmultiply(1, 2)\n</tool_call>")
        key = "parameters" if self.form == "llama" else "arguments"
        text = {
            "unclosed": f'{{"name": "look_up", "{key}": {{"key": "x',
            "syntax": f'{{"name": "look_up", "{key}": {{"key": x}}}}',
            "name": f'{{"{key}": {{}}}}',
            "arguments": f'{{"name": "look_up", "{key}": ["x"]}}',
        }[kind]
        if self.form == "llama":
            return text
        end = kind != "unclosed"
        if self.form == "mistral":
            return f"[TOOL_CALLS] [{text}" + "]" * end
        return f"<tool_call>\n{text}" + "\n</tool_call>" * end

    def kind(self, asked: str) -> str:
        """The kind under which `broken` is counted: tags have no other fault than their form."""
        return "syntax" if self.form == "xml" and asked != "unclosed" else asked


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _xml(function: dict[str, Any]) -> str:
    def written(value: Any) -> str:
        return value if isinstance(value, str) else _json(value)

    values = function["arguments"].items()
    inside = "".join(f"<parameter={k}>\n{written(v)}\n</parameter>\n" for k, v in values)
    return f"<function={function['name']}>\n{inside}</function>"


def families(qwen25: Any = None, templates: dict[str, str] | None = None) -> list[Family]:
    """Four families with templates of our own, or with those of `templates` by their names.

    `qwen25`: the tokenizer of Qwen2.5 with its own template; None leaves it out.
    """
    texts = {
        "qwen3": chat_families.QWEN3,
        "qwen3-xml": chat_families.QWEN3_XML,
        "llama3": chat_families.LLAMA3,
        "mistral": chat_families.MISTRAL,
        "mistral-first": chat_families.MISTRAL_FIRST,
    } | (templates or {})
    qwen, llama, mistral = (
        (lambda name, make=make: make(texts[name]))
        for make in (chat_families.qwen, chat_families.llama, chat_families.mistral)
    )
    quiet = {"arguments": {"enable_thinking": False}}
    found = [
        Family("qwen3", *qwen("qwen3"), "qwen", replies=False, thinks=True),
        Family("qwen3, a user answers", *qwen("qwen3"), "qwen"),
        Family("qwen3-xml", *qwen("qwen3-xml"), "xml", replies=False, **quiet),
        Family("llama3", *llama("llama3"), "llama", parallel=False),
        Family("mistral", *mistral("mistral"), "mistral", replies=False),
        Family("mistral-first", *mistral("mistral-first"), "mistral"),
    ]
    if qwen25 is not None:
        stops = (qwen25.eos_token_id, qwen25.convert_tokens_to_ids("<|endoftext|>"))
        found = [Family("qwen2.5", qwen25, stops, "qwen"), *found]
    return found


# --- Episodes -------------------------------------------------------------------------------------

_WORDS = (
    "the answer",
    "is 42",
    "naïve",
    "日本",
    "🙂 well",
    "x = 3",
    "(a)",
    "{b}",
    "end.",
    "I'd say",
)


def _said_words(random_: random.Random) -> str:
    return " ".join(random_.choices(_WORDS, k=random_.randint(1, 4)))


def _arguments(random_: random.Random) -> tuple[str, dict[str, Any]]:
    if random_.random() < 0.5:
        return "multiply", {"a": random_.randint(-9, 10**9), "b": random_.choice([1, 0.5, -2e-7])}
    text = random_.choice(['say "hi"', "back\\slash", "日本 🙂", "two\nlines", "{'a': 1}", ""])
    return "look_up", {"key": text, "more": {"list": [1, None, {"x": True}], "é": "\t"}}


def _observed(random_: random.Random, control: list[str]) -> str:
    """What an environment says; `control`: texts of control tokens that it may say."""
    kind = random_.randrange(8)
    if kind == 0 and control:
        return _said_words(random_) + "".join(random_.choices(control, k=2)) + "\nassistant\n"
    if kind == 1 and control:
        return "line of a long text\n" * random_.randint(20, 60)
    if kind == 2:
        return ""
    if kind == 3:
        return f' \n"{_said_words(random_)}"\n\n '
    return _said_words(random_)


@dataclasses.dataclass
class Outcome:
    """What was compared in one episode, and what differed."""

    turns: int = 0
    rendered: bool = False  # compared with one rendering of the whole
    kinds: list[str] = dataclasses.field(default_factory=list)  # of turns
    mismatches: list[str] = dataclasses.field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        self.mismatches += [] if holds else [what]


@dataclasses.dataclass
class _Turn:
    """A turn as it is sampled, and what must be read from it; None: anything."""

    kind: str
    said: Message
    ids: list[int]
    stopped: bool = True
    calls: list[tuple[str, Any]] | None = None  # names and arguments, or "malformed" and its kind


class Episodes:
    """Draws and compares episodes of one family."""

    def __init__(self, family: Family, renderer: Renderer):
        self.family, self.spelling = family, Spelling(family.tokenizer)
        self.dialogue = family.prove(renderer, self.spelling)
        self.control = [text for text in self.spelling.control.values() if text != "<unk>"]

    def run(self, seed: int) -> Outcome:
        """One episode, as its loop in the trainer appends it."""
        random_, found = random.Random(seed), Outcome()
        messages: list[Message] = [{"role": "user", "content": _said_words(random_)}]
        ids = self.rendered(messages)
        sampled: list[int] = []
        at: list[int] = []  # where sampled ids stand
        thinks = self.family.thinks and random_.random() < 0.5
        canonical = random_.random() < 0.5  # it holds only what one rendering holds, too
        control = [] if canonical else self.control
        for _ in range(random_.randint(1, 8)):
            turn = self._turn(random_, thinks, canonical)
            found.turns += 1
            found.kinds.append(turn.kind)
            at += range(len(ids), len(ids) + len(turn.ids))
            sampled += turn.ids
            ids += turn.ids
            num_calls = self._check_parse(found, turn)
            answers = self._answers(random_, turn, num_calls, control)
            if not answers:
                break
            sizes = [len(self.spelling.plain(a["content"])) for a in answers]
            canonical &= sum(sizes) <= LIMIT
            ids += self._followed(found, turn, answers)
            messages += [turn.said, *answers]
        found.check([ids[i] for i in at] == sampled, "sampled ids")
        if canonical and len(messages) > 1:
            found.rendered = True
            found.check(ids == self.rendered(messages), "one rendering")
        return found

    def rendered(self, messages: list[Message]) -> list[int]:
        """Messages by transformers alone: its renderer, its tokenizer, the whole at once."""
        with fixed_date():
            return self.family.tokenizer.apply_chat_template(
                messages,
                tools=TOOLS,
                add_generation_prompt=True,
                return_dict=False,
                **self.family.arguments,
            )

    def _turn(self, random_: random.Random, thinks: bool, canonical: bool) -> _Turn:
        family = self.family
        kinds = ["call"] * 6
        kinds += ["parallel"] * 3 * family.parallel + ["text", "cut"] * 2 * family.replies
        if not canonical:
            kinds += ["malformed"] * 3 + ["random"] + ["spelled"] * (family.form != "llama")
        kind, stop = random_.choice(kinds), [family.stops[0]]
        said: Message = {"role": "assistant", "content": _said_words(random_)}
        if kind == "random":
            ids = [random_.randrange(len(family.tokenizer)) for _ in range(random_.randint(0, 12))]
            return _Turn(kind, said, [i for i in ids if i not in family.stops], False)
        if kind in ("text", "cut"):
            ids = self.spelling.full(family.written(said))
            if kind == "text" and not canonical and random_.random() < 0.2:
                kind, stop = "another stop token", [family.stops[-1]]
            return _Turn(kind, said, ids + stop * (kind != "cut"), kind != "cut", [])
        number = random_.randint(2, 3) if kind == "parallel" else 1
        calls = [_arguments(random_) for _ in range(number)]
        said = self._calling(random_, calls)
        if kind == "malformed":
            return self._malformed(random_, said, calls)
        if thinks:
            said["reasoning_content"] = _said_words(random_)
        text = family.written(said)
        if kind == "spelled":
            return _Turn(kind, said, self.spelling.plain(text) + stop, True, [])
        return _Turn(kind, said, self.spelling.full(text) + stop, True, calls)

    def _calling(self, random_: random.Random, calls: list[tuple[str, Any]]) -> Message:
        has_words = self.family.form in ("qwen", "xml") and random_.random() < 0.3
        return {
            "role": "assistant",
            "content": _said_words(random_) if has_words else "",
            "tool_calls": [
                {
                    "type": "function",
                    "id": f"id{random_.randrange(10**6):06}{i}",
                    "function": {"name": name, "arguments": arguments},
                }
                for i, (name, arguments) in enumerate(calls)
            ],
        }

    def _malformed(
        self, random_: random.Random, said: Message, calls: list[tuple[str, Any]]
    ) -> _Turn:
        """One malformed call, in some formats after a good one, which must not be lost."""
        family = self.family
        kind = random_.choice(("unclosed", "syntax", "name", "arguments"))
        text, expected = family.broken(kind), [("malformed", family.kind(kind))]
        if family.form in ("qwen", "xml") and random_.random() < 0.5:
            text, expected = f"{family.written(said)}\n{text}", [*calls, *expected]
        stopped = kind != "unclosed" or family.form == "qwen"
        ids = self.spelling.full(text) + [family.stops[0]] * stopped
        return _Turn("malformed", said, ids, stopped, expected)

    def _check_parse(self, found: Outcome, turn: _Turn) -> int:
        """Compares what is read from a turn; how many calls it has."""
        read = self.dialogue.parse(turn.ids)
        if turn.calls is not None:
            calls = [
                (call.name, call.arguments) if isinstance(call, Call) else ("malformed", call.kind)
                for call in read.calls
            ]
            found.check(calls == turn.calls, f"calls of a turn of kind {turn.kind}")
        if turn.kind in ("text", "cut", "call", "parallel"):
            found.check(read.content == turn.said["content"], "content")
            thought = turn.said.get("reasoning_content", "")
            found.check(read.reasoning == thought, "reasoning")
        return len(read.calls)

    def _answers(
        self, random_: random.Random, turn: _Turn, num_calls: int, control: list[str]
    ) -> list[Message]:
        if not num_calls:
            said = _observed(random_, control)
            return [{"role": "user", "content": said}] * self.family.replies
        calls = turn.said.get("tool_calls", [])
        answers: list[Message] = []
        for i in range(num_calls):
            answers.append({"role": "tool", "content": _observed(random_, control)})
            if i < len(calls):
                name = calls[i]["function"]["name"]
                answers[i] |= {"name": name, "tool_call_id": calls[i]["id"]}
        return answers

    def _followed(self, found: Outcome, turn: _Turn, answers: list[Message]) -> list[int]:
        """The ids that answers add, with no other control tokens than harmless ones would have."""
        # The names of calls are to be found in the turn.
        given = [{k: v for k, v in a.items() if k != "tool_call_id"} for a in answers]
        added = self.dialogue.follow(turn.ids, turn.stopped, given)
        harmless = [a | {"content": "word"} for a in given]
        frame = self.dialogue.follow(turn.ids, turn.stopped, harmless)
        control = [[i for i in ids if i in self.spelling.control] for ids in (added, frame)]
        found.check(control[0] == control[1], "control tokens")
        if self.family.form != "llama":  # which escapes line feeds
            size = sum(len(self.spelling.plain(a["content"])) for a in answers)
            most = len(frame) + min(size, LIMIT) + 2 * len(answers)
            found.check(len(added) <= most, "limit of observations")
        return added


@contextlib.contextmanager
def fixed_date() -> Iterator[None]:
    """The date of templates in this process is NOW."""
    clock = mock.Mock(now=lambda: NOW)
    with mock.patch.object(chat_template_utils, "datetime", clock):
        yield
