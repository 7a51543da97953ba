"""Conversations in token ids: ids are the truth, and text is a view of them.

A conversation only grows: the prompt, the ids that the policy sampled, the ids that its
environment's messages add, and so on. Nothing is decoded and encoded again, and nothing that was
sampled is rendered again. What a chat template writes around messages comes from frames.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from grpo_jax.data.templates import Renderer, TemplateError
from grpo_jax.environments import frames, proof
from grpo_jax.environments.frames import Frames, Message
from grpo_jax.environments.observations import Observations
from grpo_jax.environments.rewriting import Rewriting
from grpo_jax.environments.spelling import Spelling
from grpo_jax.environments.tool_calls import Reader
from grpo_jax.environments.turns import Call, Turn


class Dialogue:
    """The turns of one tokenizer, one list of tools and one set of template arguments.

    `prove` makes it. `notes`: sentences for the user, such as that the template rewrites earlier
    thinking. `rewriting`: what it writes then, if episodes go on from that.
    """

    def __init__(
        self,
        made: Frames,
        reader: Reader,
        close: Sequence[int],
        *,
        observation_tokens: int,
        allow_control_tokens: bool,
        notes: Sequence[str] = (),
        rewriting: Rewriting | None = None,
    ):
        self._frames, self._reader, self._close = made, reader, list(close)
        self._observations = Observations(made.spelling, observation_tokens)
        self.rewriting = rewriting
        self._allow_control = allow_control_tokens
        self.notes = tuple(notes)

    def parse(self, turn_ids: Sequence[int]) -> Turn:
        """The turn that the policy sampled, its stop token included if it ended with one."""
        return self._reader.read(turn_ids)

    def follow(
        self, turn_ids: Sequence[int], stopped: bool, messages: Sequence[Message]
    ) -> list[int]:
        """The ids to append after a turn: the messages of its environment, and the next opening.

        They begin after the stop token that was sampled, whichever it was. A turn that was cut by a
        limit (not `stopped`) is closed first, as the template closes one. The messages have the
        role "tool", in the order of the turn's calls, or "user"; they are one group, as templates
        write results of parallel calls into one turn. What they say has at most
        `observation_tokens` tokens together, see `Observations`.
        """
        spelling = self._frames.spelling
        contents = self._observations.fitted([str(m.get("content") or "") for m in messages])
        written = [self._frames.written(c, m) for c, m in zip(contents, messages)]
        values = frames.values_of(messages, written, self._names(turn_ids, messages))
        added = self._frames.group(messages).ids(
            values, spelling, allow_control=self._allow_control
        )
        return added if stopped else self._close + added

    def begin(
        self,
        prompts: Sequence[Sequence[Message]],
        texts: Sequence[str],
        arguments: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[int]]:
        """Prompts that end with what their environments said at the reset, as ids.

        A text comes at the end of the last message, if that is the user's; else it is a message of
        the user. Its control tokens stay text, too. `arguments`: of the template, for each prompt,
        tools included; None: those of this dialogue.
        """
        given = [None] * len(prompts) if arguments is None else arguments
        found = self._frames.starts([frames.with_slot(prompt) for prompt in prompts], given)
        slot, spelling = frames.slot(0), self._frames.spelling
        return [
            frame.ids(
                {slot: self._frames.written_last(said)}, spelling, allow_control=self._allow_control
            )
            for frame, said in zip(found, texts)
        ]

    def _names(self, turn_ids: Sequence[int], messages: Sequence[Message]) -> list[str]:
        """The names that the model gave its calls; few models do, and only their templates ask."""
        if not self._frames.asks_for_names(messages):
            return []
        return [call.id if isinstance(call, Call) else "" for call in self.parse(turn_ids).calls]


def prove(
    tokenizer: Any,
    tools: Sequence[dict[str, Any]],
    renderer: Renderer,
    *,
    stop_ids: Sequence[int],
    observation_tokens: int,
    replies: bool = False,
    arguments: dict[str, Any] | None = None,
    now: datetime | None = None,
    allow_control_tokens: bool = False,
    spelling: Spelling | None = None,
    forks: bool = False,
) -> Dialogue:
    """The Dialogue of a tokenizer's chat template, proven to hold for made conversations.

    `tools`: JSON schemas. `renderer`: stays open as long as the dialogue is used; a new shape of
    messages costs one rendering. `stop_ids`: the tokens that end a turn. `replies`: the environment
    may answer turns without calls, as a user; without tools it always does. `arguments`: of the
    template. `now`: the time that it sees. `allow_control_tokens`: what an environment says is
    encoded with its control tokens. `spelling`: one for several dialogues of a tokenizer. `forks`:
    episodes go on from what the template writes where it rewrites earlier turns.

    What is proven: the template prints tools, calls and results; it ends turns with a stop token;
    its calls are in a format that can be read; and ids appended turn by turn equal the ids of one
    rendering of the whole, for a call, two calls, a turn cut by a limit, and a user's answer.
    Raises ValueError with both texts where they differ, unless only earlier thinking does: then a
    note says so, and that the conversation keeps what was sampled, unless it `forks`.
    """
    made = Frames(
        tokenizer,
        renderer,
        spelling or Spelling(tokenizer),
        tools=tools,
        stop_ids=stop_ids,
        arguments=arguments or {},
        now=now,
    )
    try:
        found = proof.examine(made, tokenizer, tools, replies=replies or not tools)
        how = (made, found.reader, found.close)
        # What the made environment of a proof says is short, and not to be cut.
        unlimited = Dialogue(*how, observation_tokens=proof.TOKENS, allow_control_tokens=False)
        notes, rewriting = proof.compare(made, unlimited, found), None
        if forks and proof.KEPT in notes:
            limited = Observations(made.spelling, observation_tokens)
            rewriting = Rewriting(made, limited, allow_control=allow_control_tokens)
            rewriting.learn(unlimited, found)
            notes = [proof.FORKED if note == proof.KEPT else note for note in notes]
    except TemplateError as error:
        raise ValueError(proof.refused(error)) from error
    return Dialogue(
        *how,
        observation_tokens=observation_tokens,
        allow_control_tokens=allow_control_tokens,
        notes=notes,
        rewriting=rewriting,
    )
