"""How completions of questions are drawn: in one turn, or as conversations with environments.

Both ways have the same method, so that training, dynamic sampling and evaluation do not differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from grpo_jax.data import prompts, streams
from grpo_jax.data.templates import Renderer
from grpo_jax.environments import episodes
from grpo_jax.environments.episodes import Dialogue, Limits, Start, Told, World
from grpo_jax.environments.questions import Questions
from grpo_jax.models.policy import Policy
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Array, Params, Rollouts

# Takes a prompt's number and its completions; of conversations, also their episodes.
Add = Callable[..., None]


class OneTurn:
    """A completion is one turn of the policy."""

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
            meanwhile=meanwhile,
            on_harvest=on_harvest,
        )
        return completions, None


ONE_TURN = OneTurn()


@dataclasses.dataclass(frozen=True)
class Conversations:
    """A completion is a conversation with an environment, an episode."""

    world: World
    dialogues: Mapping[str | None, Dialogue]  # by the column `environment`; None: without it
    limits: Limits
    eager: bool
    seed: int  # of the run
    policy: Policy
    renderer: Renderer
    now: datetime  # the date for chat templates
    max_prompt_tokens: int

    def draw(
        self, engine, params, questions, prompt_ids, add, *, group, key, temperature, numbers, draw,
        held_out=False, meanwhile=None, on_harvest=lambda: None,
    ) -> tuple[Rollouts, Told | None]:  # fmt: skip
        """As `OneTurn.draw`."""
        starts = [
            Start(
                problem.prompt,
                problem.columns,
                self._seed_of(number, held_out),
                self.dialogues[problem.columns.get("environment")],
                self._with_text(problem),
            )
            for problem, number in zip(questions.problems, numbers, strict=True)
        ]
        rows = len(starts) * group
        own = streams.stream(self.seed, "rollouts", 2 * draw + held_out).integers(2**31, size=rows)
        return episodes.sample(
            engine,
            params,
            self.world,
            starts,
            prompt_ids,
            self.limits,
            group=group,
            key=key,
            temperature=temperature,
            rollout_seeds=own.tolist(),
            eager=self.eager,
            on_group=lambda p, ended: add(p, [e.ids for e in ended], ended),
            meanwhile=meanwhile,
            on_harvest=on_harvest,
        )

    def _seed_of(self, number: int, held_out: bool) -> int:
        """The seed of the environments of a group: of the problem alone, in every epoch the same."""
        stream = streams.stream(self.seed, "environment", 2 * int(number) + held_out)
        return int(stream.integers(2**31))

    def _with_text(self, problem: Any) -> Callable[[str], list[int]]:
        def ids(text: str) -> list[int]:
            prompt = problem.prompt
            if isinstance(prompt, str):
                prompt = prompt + text
            else:
                last = prompt[-1] | {"content": f"{prompt[-1].get('content') or ''}{text}"}
                prompt = [*prompt[:-1], last]
            begun = dataclasses.replace(problem, prompt=prompt)
            how = {"now": self.now, "renderer": self.renderer}
            found = prompts.encode([begun], self.policy.tokenizer, self.max_prompt_tokens, **how)
            return found.prompt_ids[0]

        return ids
