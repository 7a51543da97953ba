"""The options of conversations with an environment: section `environment`."""

from __future__ import annotations

from grpo_jax.config.schema import (
    COUNT,
    POSITIVE,
    Range,
    choice,
    flag,
    number,
    several,
)

# fmt: off
ENVIRONMENT = (
    several("environment.classes", (), "\"module:Class\" or \"name=module:Class\"",
            "Environments: a class each, with `reset` and with methods that are tools. Several "
            "need names, and the column `environment` says which of them a problem has",
            special={(): "none"}),
    several("environment.tools", (), "\"module:function\"",
            "Functions that the policy may call, with type hints and a docstring",
            special={(): "none"}),
    number("environment.max_turns", 8, COUNT, "turns",
           "Turns of the policy in an episode; rollout.max_tokens is its limit in tokens, those "
           "of the environment included"),
    number("environment.turn_tokens", 0, COUNT, "tokens", "Limit of one turn of the policy",
           special={0: "what is left of rollout.max_tokens"}),
    number("environment.observation_tokens", 256, Range(at_least=8), "tokens",
           "Limit of what the environment says between two turns; of a longer text the head and "
           "the tail are kept"),
    flag("environment.allow_control_tokens", False,
         "Read control tokens in the environment's texts as such, and not as plain text"),
    number("environment.tool_timeout_s", 10.0, POSITIVE, "s",
           "Time limit of a call; a process that takes longer is killed", free=True),
    number("environment.episode_timeout_s", 300.0, POSITIVE, "s",
           "Time limit of an episode's calls together", free=True),
    number("environment.memory_limit_gib", 1.0, POSITIVE, "GiB",
           "Memory of an environment's process, with all that it starts",
           special={0: "no limit"}, free=True),
    choice("environment.order", "fixed", {
               "fixed": "all turns are answered before the next are sampled: a resumed run "
                        "repeats the step bit for bit",
               "eager": "an episode goes on as soon as its turn is answered: the device idles "
                        "less, and the order, so also rounding, depends on the clock"},
           "When episodes go on"),
    choice("environment.history", "append", {
               "append": "from the tokens as they were sampled",
               "fork": "from what the template writes now, as a further part of the episode, whose "
                       "parts have one advantage and count as one completion"},
           "What an episode goes on from where the chat template rewrites its earlier turns, as "
           "one does that drops their thinking"),
    flag("environment.turn_rewards", False,
         "Advantages of turns, by the rewards from each turn on, in place of one for the episode"),
)
# fmt: on
