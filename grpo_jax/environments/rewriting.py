"""What a chat template writes of a conversation whose earlier turns it rewrites.

A template may drop the thinking of earlier turns when the user speaks again. The model will be used
with what it writes then. So an episode can go on from there: as a further part, whose context is
the conversation as the template writes it now. Nothing is rendered where the template keeps what
stands.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from grpo_jax.data.templates import OPEN, TemplateError
from grpo_jax.environments import frames, proof
from grpo_jax.environments.frames import Frame, Frames, Message, asking, calling
from grpo_jax.environments.observations import Observations
from grpo_jax.messages.console import say


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A conversation up to what its environment said last."""

    prompt: Sequence[Message]
    begun: str  # what the reset said
    arguments: dict[str, Any] | None  # of the template; None: those of the dialogue
    prompt_ids: list[int]
    steps: Sequence[tuple[Message, list[Message]]]  # turns, each with the environment's messages
    ids: list[int]  # that stand: the context of the next turn, if nothing is rewritten


class Rewriting:
    """The rewriting of one chat template, with its tools and arguments."""

    def __init__(self, made: Frames, observations: Observations, *, allow_control: bool):
        self._frames, self._observations = made, observations
        self._allow_control = allow_control
        stops = [re.escape(text) for i in made.stop_ids if (text := made.spelling.control.get(i))]
        ends = "|".join(["</think>", *stops, r"\Z"])  # a limit may have cut the turn
        self._thought = re.compile(f"<think>(.*?)(?:{ends})", re.DOTALL)
        # Roles of messages at which earlier thinking is rewritten, each with whether it says a word
        self.rewritten: frozenset[tuple[str, bool]] = frozenset()
        self.tail = 0  # tokens at the end of a prompt that are written otherwise later
        self._tail_text = ""

    def close(self) -> None:
        """Ends the process that renders; it starts again if it is needed."""
        self._frames.close()

    def learn(self, dialogue: Any, found: proof.Found) -> None:
        """Finds when the template rewrites turns, by made conversations.

        `dialogue`: appends messages without a limit. Raises ValueError for a template that takes
        one call in a turn, since what the policy said could not be written again.
        """
        spelling, cases = self._frames.spelling, _cases(self._frames, found)
        said = proof.turns(self._frames, [turn for _, turn, _ in cases])
        asked = asking(frames.QUESTION)
        opened, *wholes = self._frames.render(
            [asked, *([*asked, turn, *group] for _, turn, group in cases)],
            [OPEN] * (len(cases) + 1),
        )
        start, rewritten = spelling.full(opened), set()
        for (role, own, group), turn, whole in zip(cases, said, wholes):
            grown = spelling.text([*start, *turn, *dialogue.follow(turn, True, group)])
            if grown == whole:
                continue
            rewritten.add((role, "reasoning_content" in own))
            shared = next(
                n for n in range(len(start), -1, -1) if whole.startswith(spelling.text(start[:n]))
            )
            self.tail = max(self.tail, len(start) - shared)
        self.rewritten = frozenset(rewritten)
        self._tail_text = spelling.text(start[len(start) - self.tail :])
        if rewritten and not self._frames.takes_several:
            raise ValueError(
                'environment.history = "fork": the chat template rewrites earlier turns, and it '
                "takes one call in a turn, so that a turn with several could not be written again. "
                'Set environment.history = "append", or give the tokenizer another template.'
            )

    def contexts(self, spoken: Sequence[Spoken]) -> list[list[int] | None]:
        """Of each conversation what the template writes now after the prompt; None: it stands.

        The ids follow the prompt's without the last `tail`. Other spellings, as of a call, are no
        rewriting: thinking that is gone is one. What cannot be rendered stands, with a warning.
        """
        found: list[list[int] | None] = [None] * len(spoken)
        asked = [n for n, one in enumerate(spoken) if self._may_change(one)]
        slotted = [self._slotted(spoken[n]) for n in asked]
        while asked:
            given = [spoken[n].arguments for n in asked]
            given = [self._frames.arguments if x is None else x for x in given]
            try:
                texts = self._frames.render([x for x, _ in slotted], [OPEN] * len(asked), given)
                break
            except TemplateError as error:
                say(f"warning: the chat template does not render an episode again: {error}")
                del asked[error.number], slotted[error.number]
        for n, (_, values), text in zip(asked, slotted, texts if asked else ()):
            found[n] = self._context(spoken[n], values, text)
        return found

    def _may_change(self, spoken: Spoken) -> bool:
        roles = {self._frames.role(message) for message in spoken.steps[-1][1]}
        says = {bool(thought) for thought in self._thoughts(spoken.ids)}
        return any((role, some) in self.rewritten for role in roles for some in says)

    def _thoughts(self, ids: Sequence[int]) -> list[str]:
        return [found.strip() for found in self._thought.findall(self._frames.spelling.text(ids))]

    def _context(self, spoken: Spoken, values: dict[str, str], text: str) -> list[int] | None:
        spelling = self._frames.spelling
        kept = self._begin(spoken).text.removesuffix(self._tail_text)
        if not text.startswith(kept):
            raise ValueError(
                'environment.history = "fork": the chat template rewrites the prompt itself when '
                f"the conversation goes on. The prompt {kept[-150:]!r} became "
                f'{text[: len(kept)][-150:]!r}. Set environment.history = "append", or give the '
                "tokenizer a template that keeps prompts."
            )
        rest = frames.make_frame(text[len(kept) :], None, spelling, is_start=False)
        ids = rest.ids(values, spelling, allow_control=self._allow_control)
        prompt = spoken.prompt_ids[: len(spoken.prompt_ids) - self.tail]
        return None if self._thoughts(spoken.ids) == self._thoughts([*prompt, *ids]) else ids

    def _begin(self, spoken: Spoken) -> Frame:
        """The frame of the prompt, with a slot for what the reset said."""
        prompt = frames.with_slot(spoken.prompt) if spoken.begun else list(spoken.prompt)
        return self._frames.starts([prompt], [spoken.arguments])[0]

    def _slotted(self, spoken: Spoken) -> tuple[list[Message], dict[str, str]]:
        """The conversation with slots for what its environment said, and what comes in them."""
        made, values = self._frames, {}
        messages = list(spoken.prompt)
        if spoken.begun:
            messages = frames.with_slot(messages)
            values[frames.slot(0)] = made.written_last(spoken.begun)
        number = 1  # of the next slot
        for turn, group in spoken.steps:
            calls = [
                call | {"id": frames.call_id(number + i)}
                for i, call in enumerate(turn.get("tool_calls", ()))
            ]
            messages.append(turn | {"tool_calls": calls} if calls else turn)
            names = [call.get("id", "") for call in turn.get("tool_calls", ())]
            contents = self._observations.fitted([str(m.get("content") or "") for m in group])
            written = [made.written(content, m) for content, m in zip(contents, group)]
            values |= frames.values_of(group, written, names, first=number)
            for i, message in enumerate(group):
                own: Message = {"role": made.role(message), "content": frames.slot(number + i)}
                if own["role"] == "tool":
                    call = number + min(i, max(len(calls) - 1, 0))
                    own |= {"name": frames.tool_name(number + i)}
                    own |= {"tool_call_id": frames.call_id(call)}
                messages.append(own)
            for i in range(len(group), len(calls)):  # calls that an end of the episode left out
                values[frames.call_id(number + i)] = f"call{i:05}"
            number += max(len(group), len(calls))
        return messages, values


def _cases(made: Frames, found: proof.Found) -> list[tuple[str, Message, list[Message]]]:
    """Roles, each with a turn before a message of that role, and the message."""
    thinking = [{}, {"reasoning_content": "zqthinkqz"}] if found.thinks else [{}]
    cases: list[tuple[str, Message, list[Message]]] = []
    for fields in thinking:
        if made.tool_names:
            name = made.tool_names[0]
            result = {"role": "tool", "name": name, "tool_call_id": frames.call_id(0)}
            said = calling([(name, {"x": "1"})], **fields)
            cases.append(("tool", said, [result | {"content": "42"}]))
        if found.replies:
            said = {"role": "assistant", "content": "I say."} | fields
            cases.append(("user", said, asking("And then?")))
    return cases
