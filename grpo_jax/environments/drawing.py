"""How completions of questions are drawn: in one turn, or as conversations with environments.

Both ways have the same method, so that training, dynamic sampling and evaluation do not differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from grpo_jax.data import streams
from grpo_jax.data.problems import Problem
from grpo_jax.environments import episodes
from grpo_jax.environments.episode import Dialogue, Limits, Start, Told, World
from grpo_jax.environments.questions import Questions
from grpo_jax.sampling.early_stop import FirstGroups
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Array, Params, Rollouts

# Takes a prompt's number and its completions; of conversations, also their episodes.
Add = Callable[..., None]


class OneTurn:
    """A completion is one turn of the policy. A context manager, as `Conversations` is."""

    def __enter__(self) -> OneTurn:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def close_dialogues(self) -> None:
        """Ends the processes in which conversations are rendered; they start again if needed."""

    def parts(self, num_prompts: int, group: int) -> list[range]:
        """The numbers of the prompts that an evaluation draws at once."""
        return [range(num_prompts)]

    def draw(
        self,
        engine: Engine,
        params: Params,
        questions: Questions,
        prompt_ids: list[list[int]],
        add: Add,
        *,
        group: int,
        key: Array,
        temperature: float,
        numbers: Sequence[int],
        draw: int,
        held_out: bool = False,
        first: FirstGroups | None = None,
        meanwhile: Callable[[], None] | None = None,
        on_harvest: Callable[[], None] = lambda: None,
    ) -> tuple[Rollouts, Told | None]:
        """`group` completions of each question, and what is told of their episodes.

        `add` gets the completions of each question once they have finished. `numbers` of the
        questions among those of training, or with `held_out` of evaluation, and `draw`, the number
        of the draw, seed environments. The rest is as for `Engine.generate`.
        """
        completions = engine.generate(
            params,
            prompt_ids,
            group=group,
            key=key,
            temperature=temperature,
            on_group=add,
            first=first,
            meanwhile=meanwhile,
            on_harvest=on_harvest,
        )
        return completions, None


ONE_TURN = OneTurn()


@dataclasses.dataclass(frozen=True)
class Conversations(OneTurn):
    """A completion is a conversation with an environment, an episode. The end kills these."""

    world: World
    dialogues: Mapping[str | None, Dialogue]  # by the column `environment`; None: without it
    max_turns: int
    turn_tokens: int  # of one turn of the policy; 0: what is left of the completion
    eager: bool
    seed: int  # of the run
    max_prompt_tokens: int
    most_at_once: int  # episodes of an evaluation, each of which has a process
    forks: bool = False  # where the template rewrites earlier turns

    def __exit__(self, *error: object) -> None:
        self.world.close()
        self.close_dialogues()

    def close_dialogues(self) -> None:
        """As `OneTurn.close_dialogues`."""
        for dialogue in self.dialogues.values() if self.forks else ():
            if dialogue.rewriting is not None:
                dialogue.rewriting.close()

    def parts(self, num_prompts: int, group: int) -> list[range]:
        """As `OneTurn.parts`."""
        size = max(self.most_at_once // group, 1)
        return [range(i, min(i + size, num_prompts)) for i in range(0, num_prompts, size)]

    def draw(
        self, engine, params, questions, prompt_ids, add, *, group, key, temperature, numbers, draw,
        held_out=False, first=None, meanwhile=None, on_harvest=lambda: None,
    ) -> tuple[Rollouts, Told | None]:  # fmt: skip
        """As `OneTurn.draw`; all episodes are finished."""
        assert first is None, "`rules` refuses it"
        starts = [
            Start(
                problem.prompt,
                problem.columns,
                self._seed_of(number, held_out),
                self._dialogue(problem),
                functools.partial(self._begun, problem),
                problem.arguments,
            )
            for problem, number in zip(questions.problems, numbers, strict=True)
        ]
        rows, limit = len(starts) * group, engine.decoder.max_tokens
        own = streams.stream(self.seed, "rollouts", 2 * draw + held_out).integers(2**31, size=rows)
        return episodes.sample(
            engine,
            params,
            self.world,
            starts,
            prompt_ids,
            Limits(self.max_turns, limit, self.turn_tokens or limit),
            group=group,
            key=key,
            temperature=temperature,
            rollout_seeds=own.tolist(),
            eager=self.eager,
            forks=self.forks,
            on_group=lambda p, ended: add(p, [e.said_ids for e in ended], ended),
            meanwhile=meanwhile,
            on_harvest=on_harvest,
        )

    def _seed_of(self, number: int, held_out: bool) -> int:
        """The seed of a group's environments: of the problem alone, in every epoch the same."""
        stream = streams.stream(self.seed, "environment", 2 * int(number) + held_out)
        return int(stream.integers(2**31))

    def _dialogue(self, problem: Problem) -> Dialogue:
        name = problem.columns.get("environment")
        return self.dialogues[name if name in self.dialogues else None]

    def _begun(self, problem: Problem, text: str) -> list[int]:
        """The prompt of a problem with the text of its environment's reset, as token ids."""
        dialogue = self._dialogue(problem)
        (ids,) = dialogue.begin([problem.prompt], [text], [problem.arguments])
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"data.max_prompt_tokens = {self.max_prompt_tokens}, but the prompt of "
                f"{problem.where or 'a problem'} with the text of its environment's reset has "
                f"{len(ids)} tokens. Raise the limit, or let reset say less."
            )
        return ids
