"""A config's environments and tools: read and tried, and the conversations with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime

from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.data.chats import TOOLS
from grpo_jax.data.problems import Problem, form_of
from grpo_jax.data.templates import Renderer
from grpo_jax.environments import contract as contract_lib
from grpo_jax.environments.contract import Contract
from grpo_jax.environments.dialogue import prove
from grpo_jax.environments.drawing import ONE_TURN, Conversations, OneTurn
from grpo_jax.environments.episode import Dialogue
from grpo_jax.environments.live import Limits as LiveLimits
from grpo_jax.environments.live import Live
from grpo_jax.environments.plain_dialogue import PlainDialogue
from grpo_jax.environments.spelling import Spelling
from grpo_jax.messages.console import say
from grpo_jax.models.policy import Policy
from grpo_jax.rewards.registry import Reward


@dataclasses.dataclass(frozen=True)
class Environment:
    """The environments and tools of a config, found and tried."""

    contract: Contract
    rewards: list[Reward]  # those of the config, and those that the environments give

    def asked(self, problems: Sequence[Problem], limit_s: float) -> list[Problem]:
        """The problems with the tools that their prompts show; ValueError for one that is no use.

        Each kind of environment is reset for its first problem, within `limit_s`.
        """
        self.contract.check(((_row(p), p.where or "a problem") for p in problems), limit_s)
        return [self._with_tools(problem) for problem in problems]

    def _with_tools(self, problem: Problem) -> Problem:
        schemas = self.contract.schemas(problem.columns)
        if not schemas or isinstance(problem.prompt, str):
            return problem
        if TOOLS in problem.arguments:
            raise ValueError(
                f"{problem.where or 'A problem'} has a column `{TOOLS}`, and the tools are those "
                "of environment.classes and environment.tools. Leave the column out."
            )
        return dataclasses.replace(problem, arguments=problem.arguments | {TOOLS: list(schemas)})

    def close(self) -> None:
        """Ends the process that has imported the user's modules."""
        self.contract.close()


def _row(problem: Problem) -> dict:
    return {**problem.columns, "prompt": problem.prompt}


def read(config: ConfigDict, rewards: list[Reward], *, rewarded: bool = True) -> Environment | None:
    """The config's environments and tools, imported and looked at; None if it has none.

    Raises ValueError for those that are not found or lack what they need, and with `rewarded` if
    nothing rewards an episode.
    """
    if not derived.has_environment(config):
        return None
    taking = [
        dataclasses.replace(r, takes_environments=contract_lib.takes_environments(r))
        for r in rewards
    ]
    asked = config.environment
    contract = contract_lib.read(
        asked.classes, asked.tools, rewards=taking, memory_bytes=int(asked.memory_limit_gib * 2**30)
    )
    named = {reward.name for reward in taking}
    accuracy = "" if any(r.gives_accuracy for r in taking) else contract.accuracy
    own = [
        Reward(
            name,
            f"environment:{name}",
            1.0,
            gives_accuracy=name == accuracy,
            on_failure=config.rewards.on_failure,
        )
        for name in contract.reward_names
        if name not in named
    ]
    if rewarded and not taking and not own:
        contract.close()
        raise ValueError(
            "rewards.names is (), and no class of environment.classes has a method `get_reward`: "
            "nothing would reward an episode. Write that method, or name a reward function."
        )
    return Environment(contract, [*taking, *own])


def dialogues(
    config: ConfigDict,
    environment: Environment,
    policy: Policy,
    problems: Sequence[Problem],
    now: datetime,
) -> dict[str | None, Dialogue]:
    """How conversations are written, by the column `environment`; proved before anything compiles.

    Raises ValueError where the model's chat template cannot hold such conversations.
    """
    is_chat, arguments = not isinstance(problems[0].prompt, str), form_of(config.data).arguments
    for problem in problems:
        if {n: v for n, v in problem.arguments.items() if n != TOOLS} not in ({}, arguments):
            raise ValueError(
                f"{problem.where or 'A problem'} has arguments of its own for the chat template. "
                "All turns of a run with environments are written alike: leave out the column "
                "`chat_template_kwargs`, and set data.chat_template_kwargs."
            )
    spelling = Spelling(policy.tokenizer)
    how = {
        "stop_ids": policy.stop_ids,
        "observation_tokens": config.environment.observation_tokens,
        "allow_control_tokens": config.environment.allow_control_tokens,
        "spelling": spelling,
    }
    found: dict[str | None, Dialogue] = {}
    forks = config.environment.history == "fork"
    renderer = Renderer()
    with nullcontext() if forks else renderer:  # where episodes fork, it renders during the run
        for name, kind in environment.contract.kinds.items():
            if not is_chat:
                found[name] = PlainDialogue(policy.tokenizer, kind.schemas, **how)
                continue
            found[name] = prove(
                policy.tokenizer,
                kind.schemas,
                renderer,
                replies=kind.responds,
                arguments=arguments,
                now=now,
                forks=forks,
                **how,
            )
    for note in dict.fromkeys(note for dialogue in found.values() for note in dialogue.notes):
        say(note)
    return found


def live(config: ConfigDict, environment: Environment | None) -> Live | nullcontext:
    """The environments' processes, which start as episodes do; an empty context without any."""
    if environment is None:
        return nullcontext()
    asked = config.environment
    return Live(
        environment.contract,
        LiveLimits(asked.tool_timeout_s, asked.episode_timeout_s),
        max_tokens=config.rollout.max_tokens,
    )


def conversations(
    config: ConfigDict, world: Live, dialogues: Mapping[str | None, Dialogue]
) -> Conversations:
    """The conversations of a run or an evaluation with these environments."""
    asked = config.environment
    return Conversations(
        world,
        dialogues,
        asked.max_turns,
        asked.turn_tokens,
        asked.order == "eager",
        config.seed,
        config.data.max_prompt_tokens,
        config.batch.prompts * config.batch.group,  # as many as a step has
        asked.history == "fork",
    )


def drawing_of_run(
    config: ConfigDict,
    environment: Environment | None,
    dialogues: Mapping[str | None, Dialogue],
) -> OneTurn:
    """How the run draws completions."""
    if environment is None:
        return ONE_TURN
    return conversations(config, live(config, environment), dialogues)
