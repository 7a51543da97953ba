"""Chat templates, which are programs that come with a model, rendered where they can do no harm.

transformers renders them in Jinja's sandbox, which keeps them from everything but the messages, but
not from looping for ever or filling the memory; neither can be stopped from a thread. So they run
in a process of their own, with a limit of time, memory and text. What passes to it and back are
lines of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from typing import Any

from grpo_jax.data.problems import Messages

TIME_LIMIT_S = 10  # for one conversation; usual templates take less than a millisecond
MAX_CHARS = 2**20  # of one rendered conversation
_MEMORY_BYTES = 2**31  # of the whole process, which takes a tenth of it
_START_LIMIT_S = 120  # the libraries are read from a disk that may be slow


class TemplateError(ValueError):
    """A template did not render a conversation; `number` says which, from 0."""

    def __init__(self, number: int, reason: str):
        super().__init__(reason)
        self.number = number


def render(tokenizer: Any, conversations: list[Messages]) -> list[str]:
    """Each conversation as the tokenizer's chat template writes it, with the assistant's opening.

    Raises TemplateError for the first that the template does not take, or that needs more than the
    limits at the top of this module, and where the tokenizer has no template.
    """
    try:
        template = tokenizer.get_chat_template()
    except Exception as error:  # of no template, or of several without a default
        raise TemplateError(0, _one_line(error)) from error
    job = {
        "template": template,
        "limit_s": TIME_LIMIT_S,
        "special": _as_text(tokenizer.special_tokens_map),
        # As in transformers' apply_chat_template: a key without a value is one that is not there.
        "conversations": [
            [{k: v for k, v in message.items() if v is not None} for message in messages]
            for messages in conversations
        ],
    }
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from grpo_jax.data import templates; "
        "templates.main()"
    )
    single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(job, default=str),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | single,
    )
    texts: list[str] = []
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(len(texts), answer["error"])
        texts.append(answer["text"])
    if len(texts) < len(conversations):
        raise TemplateError(len(texts), _end(done))
    return texts


def _as_text(tokens: dict[str, Any]) -> dict[str, Any]:
    """Special tokens by name as texts or lists of texts; tokenizers have classes for them."""
    return {
        name: [str(t) for t in token] if isinstance(token, (list, tuple)) else str(token)
        for name, token in tokens.items()
    }


def _end(done: subprocess.CompletedProcess) -> str:
    """What ended the process before it was done."""
    if done.returncode == -signal.SIGALRM:
        return f"it was not done after {TIME_LIMIT_S} s"
    last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
    return f"the process that renders it ended: {last[0][:200]}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- The process ----------------------------------------------------------------------------------


def main() -> None:
    """Renders the job on standard input: a line for each conversation, up to the first error."""
    signal.alarm(_START_LIMIT_S)  # what is not done by then is ended by the system, in any state
    from transformers.utils.chat_template_utils import render_jinja_template

    job = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    for messages in job["conversations"]:
        signal.alarm(job["limit_s"])
        try:
            (text,), _ = render_jinja_template(
                [messages],
                chat_template=job["template"],
                add_generation_prompt=True,
                **job["special"],
            )
        except MemoryError:
            answer = {"error": f"it asked for more than {_MEMORY_BYTES / 2**30:.0f} GiB of memory"}
        except Exception as error:  # templates are programs, and raise what they like
            answer = {"error": _one_line(error)}
        else:
            answer = {"text": text}
            if len(text) > MAX_CHARS:
                answer = {"error": f"it made a text of {len(text)} characters, {MAX_CHARS} at most"}
        out.write(json.dumps(answer) + "\n")
        out.flush()
        if "error" in answer:
            return
