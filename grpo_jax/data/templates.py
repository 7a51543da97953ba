"""Renders chat templates, which are programs that come with a model, in a safe process.

transformers renders them in Jinja's sandbox. It denies access to everything but the arguments, but
a template may still loop forever or fill the memory, and a thread cannot be stopped. So they run in
a separate process with limited time, memory and text, which exchanges lines of JSON. The result
depends only on the arguments: a template that asks for the time gets the run's date, and one that
draws random values draws the same ones at each start.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from grpo_jax.data.chats import TOOLS, Messages

TIME_LIMIT_S = 10  # for one conversation; usual templates take less than a millisecond
MAX_CHARS = 2**20  # of one rendered conversation
MAX_CHARS_OF_ALL = 2**30  # of all conversations, which the trainer holds until they are tokens
_MEMORY_BYTES = 2**31  # of the whole process, which uses a tenth of it
_START_LIMIT_S = 120  # libraries may be on a slow disk
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks of the assistant's tokens


class TemplateError(ValueError):
    """A template failed to render a conversation; `number` is its index, from 0."""

    def __init__(self, number: int, reason: str, *, missing: bool = False):
        super().__init__(reason)
        self.number = number
        self.missing = missing  # there is no template


# How the text of a conversation ends: with the assistant's opening, or in its last message if that
# is the assistant's, without its end (`continue_final_message` of transformers); with the opening
# whatever the last message is; or after the last message.
REPLY, OPEN, CLOSED = "reply", "open", "closed"

Span = tuple[int, int]  # of characters: first, and one past the last


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Conversations as texts, and the names that their templates read, without special tokens."""

    texts: list[str]
    reads: frozenset[str]
    # Of each text the parts within {% generation %}; None: not asked, or its template has no such.
    spans: list[list[Span] | None]


def render(
    tokenizer: Any,
    conversations: Sequence[Messages],
    arguments: Sequence[dict[str, Any]] | None = None,
    *,
    now: datetime | None = None,
    on_text: Callable[[int], None] = lambda done: None,
    ends: Sequence[str] | None = None,
    with_spans: bool = False,
) -> Rendered:
    """Renders conversations by the tokenizer's chat template.

    `arguments`: further template arguments of each conversation, with "tools". `now`: the time that
    templates see; None: the current time. `on_text` is called after each text, with the number of
    texts so far. `ends`: how each text ends; None: all with REPLY. `with_spans`: of CLOSED texts.

    Raises TemplateError for the first conversation that the template refuses, or that exceeds the
    limits at the top of this module, and if the tokenizer has no template.
    """
    arguments = arguments or [{}] * len(conversations)
    templates, chosen = _templates(tokenizer, arguments)
    job = {
        "templates": templates,
        "limit_s": TIME_LIMIT_S,
        "now": (now or datetime.now()).isoformat(),
        "special": _as_text(tokenizer.special_tokens_map),
        "conversations": [
            {"messages": messages, "template": index, "arguments": given, "end": end}
            for messages, index, given, end in zip(
                conversations, chosen, arguments, ends or [REPLY] * len(conversations)
            )
        ],
        "with_spans": with_spans,
    }
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from grpo_jax.data import templates; "
        "templates.main()"
    )
    single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    with (
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | single,
        ) as process,
    ):
        last_lines: deque[str] = deque(maxlen=1)  # read at once: a full pipe would block it
        listener = threading.Thread(target=last_lines.extend, args=[process.stderr], daemon=True)
        listener.start()
        try:
            return _conversation_with(process, listener, last_lines, job, on_text)
        finally:
            process.kill()
            listener.join()


def _templates(tokenizer: Any, arguments: Sequence[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """The templates in use, and the index of each conversation's template.

    Some tokenizers have a separate template for conversations with tools.
    """
    templates: list[str] = []
    number_of: dict[bool, int] = {}
    chosen = []
    for number, given in enumerate(arguments):
        tools = TOOLS in given
        if tools not in number_of:
            try:
                asked = {"tools": given[TOOLS]} if tools else {}
                templates.append(tokenizer.get_chat_template(**asked))
            except Exception as error:  # no template, or several without a default
                raise TemplateError(number, _one_line(error), missing=True) from error
            number_of[tools] = len(templates) - 1
        chosen.append(number_of[tools])
    return templates, chosen


def _conversation_with(
    process: subprocess.Popen,
    listener: threading.Thread,
    last_lines: deque[str],
    job: dict[str, Any],
    on_text: Callable[[int], None],
) -> Rendered:
    try:
        with process.stdin:
            process.stdin.write(json.dumps(job, default=str))
    except BrokenPipeError:  # it ended before reading everything; its error follows below
        pass
    texts: list[str] = []
    spans: list[list[Span] | None] = []
    num_chars = 0
    for line in process.stdout:
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(len(texts), answer["error"])
        if "reads" in answer:
            return Rendered(texts, frozenset(answer["reads"]), spans)
        num_chars += len(answer["text"])
        if num_chars > MAX_CHARS_OF_ALL:
            raise TemplateError(
                len(texts),
                f"with it, the texts of {len(texts) + 1} prompts have {num_chars} characters, and "
                f"all together may have {MAX_CHARS_OF_ALL}",
            )
        texts.append(answer["text"])
        found = answer.get("spans")
        spans.append(None if found is None else [(first, past) for first, past in found])
        on_text(len(texts))
    process.wait()
    listener.join()
    raise TemplateError(
        min(len(texts), len(job["conversations"]) - 1),
        _end(process.returncode, "".join(last_lines)),
    )


def _as_text(tokens: dict[str, Any]) -> dict[str, Any]:
    """Special tokens by name, as texts or lists of texts; tokenizers use classes for them."""
    return {
        name: [str(t) for t in token] if isinstance(token, (list, tuple)) else str(token)
        for name, token in tokens.items()
    }


def _end(status: int, last_line: str) -> str:
    """The reason why the process ended early."""
    if status == -signal.SIGALRM:
        return f"it was not done after {TIME_LIMIT_S} s"
    return f"the process that renders it ended: {last_line.strip()[:200] or f'status {status}'}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- The process ----------------------------------------------------------------------------------


class _Clock:
    """A replacement of `datetime` with a fixed time."""

    def __init__(self, now: datetime):
        self._now = now

    def now(self) -> datetime:
        return self._now


def main() -> None:
    """Renders the job on standard input; prints a line per conversation, up to the first error.

    A last line has the names that the templates read.
    """
    signal.alarm(_START_LIMIT_S)  # then the system ends this process, in any state
    from transformers.utils import chat_template_utils as library

    job = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr
    library.datetime = _Clock(datetime.fromisoformat(job["now"]))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))

    def answer(make: Callable[[], dict[str, Any]]) -> None:
        signal.alarm(job["limit_s"])
        try:
            line = make()
        except MemoryError:
            line = {"error": f"it asked for more than {_MEMORY_BYTES / 2**30:.0f} GiB of memory"}
        except Exception as error:  # templates are programs, and may raise any error
            line = {"error": _one_line(error)}
        out.write(json.dumps(line) + "\n")
        out.flush()
        if "error" in line:
            sys.exit()

    for item in job["conversations"]:
        answer(lambda item=item: _rendered(library, job, item))
    answer(lambda: {"reads": sorted(_names_read(library, job) - job["special"].keys())})


def _rendered(library: Any, job: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    random.seed(0)  # for Jinja's filter `random`
    messages, end, template = item["messages"], item["end"], job["templates"][item["template"]]
    continues = end == REPLY and messages[-1]["role"] == "assistant"
    marks = job["with_spans"] and end == CLOSED and bool(_GENERATION.search(template))
    (text,), spans = library.render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=end != CLOSED and not continues,
        continue_final_message=continues,
        return_assistant_tokens_mask=marks,
        **job["special"] | item["arguments"],
    )
    if len(text) > MAX_CHARS:
        return {"error": f"it made a text of {len(text)} characters, {MAX_CHARS} at most"}
    return {"text": text, "spans": spans[0] if marks else None}


def _names_read(library: Any, job: dict[str, Any]) -> set[str]:
    """The names that templates read but do not set themselves, without Jinja's own."""
    from jinja2 import meta

    names = set()
    for template in job["templates"]:
        environment = library._compile_jinja_template(template).environment
        read = meta.find_undeclared_variables(environment.parse(template))
        names |= read - environment.globals.keys()
    return names
