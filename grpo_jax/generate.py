"""Asks a model: `python -m grpo_jax.generate --model DIR_OR_ID --prompt TEXT`.

The model is a Hugging Face folder or hub id, or the folder of a run, finished or not. The text is
given to the model as it stands; `--chat` puts it into the tokenizer's chat template as the user's
message.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import cli, keys
from grpo_jax.config import arguments, options, parsers, rules
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode
from grpo_jax.devices import sharding
from grpo_jax.environments.episode import Episode
from grpo_jax.environments.questions import Questions
from grpo_jax.messages.console import console, one_line, visible
from grpo_jax.models import policy as policy_lib
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup import environment as environment_lib
from grpo_jax.setup.model import find_model, load_params
from grpo_jax.structs import Params, Rollouts, Sampling

_NUM_SLOTS = 256  # completions decoded at once


def engine_of(
    policy: policy_lib.Policy, mesh: Mesh, sampling: Sampling, max_tokens: int, dtype=jnp.float32
) -> Engine:
    """The engine that samples a policy's completions of at most `max_tokens` tokens."""
    decoder = decode.decoder_for(
        policy.model, mesh, sampling, policy.stop_ids, max_tokens, jnp.dtype(dtype)
    )
    return Engine(decoder, num_slots=_NUM_SLOTS)


def complete(
    engine: Engine,
    published: Params,
    prompts: list[list[int]],
    *,
    num_samples: int,
    seed: int,
    temperature: float,
) -> Rollouts:
    """`num_samples` completions of each prompt (token ids), as the engine returns them.

    `published`: the weights from `engine.publish`.
    """
    return engine.generate(
        published,
        prompts,
        group=num_samples,
        key=keys.key_for(seed, "rollout"),
        temperature=temperature,
    )


@dataclasses.dataclass(frozen=True)
class Completions:
    """The completions of one prompt; entry i of each list is of completion i."""

    texts: list[str]
    token_ids: list[list[int]]
    logprobs: list[list[float]]  # by token, under the sampling distribution
    stopped: list[bool]  # False if cut at `max_tokens`

    @property
    def text(self) -> str:
        """The first completion."""
        return self.texts[0]


def completions(
    policy: policy_lib.Policy, prompts: list[list[int]], rollouts: Rollouts
) -> list[Completions]:
    """The engine's completions, prompt by prompt."""
    found = []
    for prompt, completion_GC, logp_GC, length_G, stopped_G in zip(
        prompts, rollouts.completion_PGC, rollouts.logp_PGC, rollouts.length_PG, rollouts.stopped_PG
    ):
        rows = [row[:n].tolist() for row, n in zip(completion_GC, length_G)]
        texts = [policy.text(row, after=prompt) for row in rows]
        logps = [row[:n].tolist() for row, n in zip(logp_GC, length_G)]
        found.append(Completions(texts, rows, logps, [bool(stopped) for stopped in stopped_G]))
    return found


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = parsers.generate()
    args, _ = arguments.parse(parser, argv)
    names = ("max_tokens", "num_samples", "seed", "top_k", "temperature", "top_p")
    check(is_command=True, **{name: getattr(args, name) for name in names})
    return args


def check(
    *,
    is_command: bool = False,
    max_tokens: int,
    num_samples: int,
    seed: int,
    top_k: int,
    temperature: float,
    top_p: float,
) -> None:
    """Raises ValueError if an argument is out of its range; `is_command`: names it as an option."""
    for name, value, fine, needed in (
        ("max_tokens", max_tokens, max_tokens > 0, "above 0"),
        ("num_samples", num_samples, num_samples > 0, "above 0"),
        ("seed", seed, 0 <= seed <= rules.LARGEST, f"from 0 to {rules.LARGEST}"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("temperature", temperature, temperature >= 0 and math.isfinite(temperature), "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not fine:
            shown = f"--{name.replace('_', '-')}" if is_command else name
            raise ValueError(f"{shown} {value} must be {needed}.")
    if num_samples > 1 and temperature == 0:
        before, shown = ("--", "--num-samples") if is_command else ("", "num_samples")
        raise ValueError(
            f"{shown} {num_samples} at {before}temperature 0 would give equal "
            f"completions. Set {before}temperature above 0."
        )


def encode_prompt(
    policy: policy_lib.Policy, problem: Problem, max_tokens: int, limit: str = ""
) -> list[int]:
    """The tokens of a prompt, a text or chat messages.

    `limit` names the option of `max_tokens` in messages. Raises ValueError if prompt and completion
    exceed the model's length.
    """
    prompt, where = problem.prompt, problem.where
    ids = encode([problem], policy.tokenizer, sys.maxsize).prompt_ids[0]
    policy.refuse_unknown(ids, where)
    if len(ids) + max_tokens > policy.model.max_position:
        raise ValueError(
            f"{where} has {len(ids)} tokens, and with {limit or 'max_tokens'} {max_tokens} that is "
            f"more than the {policy.model.max_position} that the model takes. Make one of them "
            "shorter."
        )
    known = policy.tokenizer.decode(ids, skip_special_tokens=True)
    if isinstance(prompt, str):
        lost = sorted({c for c in prompt if not c.isspace() and c not in known})
        if lost:
            note(f"note: the tokenizer has no token for {' '.join(lost)}")
    return ids


def note(text: str) -> None:
    """Prints a note on standard error: standard output is only for the model's text."""
    with contextlib.suppress(OSError):
        print(one_line(text), file=sys.stderr)


def _notes() -> contextlib.AbstractContextManager:
    """Within it, what others say is a note."""
    return contextlib.redirect_stdout(sys.stderr)


def show(prompt: str, text: str) -> None:
    """Prints a prompt and its completion; for a terminal, dims the prompt and escapes controls."""
    if console.is_terminal:
        prompt, text = visible(prompt), visible(text)
        if console.color_system:
            prompt = f"\x1b[2m{prompt}\x1b[0m"
    encoding = sys.stdout.encoding or "utf-8"
    print((prompt + text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def talk(args: argparse.Namespace, policy: policy_lib.Policy, params: Params, mesh: Mesh) -> None:
    """A conversation: each line of standard input is a message, which the model answers.

    An empty line, or the end of the input, ends it.
    """
    sampling, dtype = Sampling(args.temperature, args.top_k, args.top_p), jnp.dtype(args.dtype)
    engine = engine_of(policy, mesh, sampling, args.max_tokens, dtype)
    published, messages = engine.publish(params), []
    while True:
        print("> " * console.is_terminal, end="", flush=True)
        text = sys.stdin.readline().strip()
        if not text:
            return
        messages.append({"role": "user", "content": text})
        problem = Problem(messages, {}, "the conversation")
        ids = encode_prompt(policy, problem, args.max_tokens, "--max-tokens")
        seed = args.seed + len(messages)
        how = {"num_samples": 1, "seed": seed, "temperature": args.temperature}
        (made,) = completions(policy, [ids], complete(engine, published, [ids], **how))
        show("", made.text)
        messages.append({"role": "assistant", "content": made.text})


def _environment_options(args: argparse.Namespace) -> ConfigDict:
    """A config with the environments and tools of the arguments."""
    config = ConfigDict(options.default().to_dict())
    config.environment.classes, config.environment.tools = (*args.environment,), (*args.tool,)
    config.environment.history = args.history
    config.data.max_prompt_tokens, config.seed = sys.maxsize, args.seed
    config.rollout.max_tokens = args.max_tokens
    return config


def _conversations(
    config: ConfigDict,
    environment: environment_lib.Environment,
    policy: policy_lib.Policy,
    engine: Engine,
    params: Params,
    asked: Questions,
    *,
    num_samples: int,
    seed: int,
    temperature: float,
) -> Rollouts:
    """Conversations of the model with environments, `num_samples` for each prompt."""
    dialogues = environment_lib.dialogues(
        config, environment, policy, asked.problems, datetime.now()
    )
    ended: dict[int, list[Episode]] = {}
    with environment_lib.drawing_of_run(config, environment, dialogues) as drawing:
        rollouts, told = drawing.draw(
            engine,
            engine.publish(params),
            asked,
            asked.prompt_ids,
            lambda p, _, episodes: ended.update({p: episodes}),
            group=num_samples,
            key=keys.key_for(seed, "rollout"),
            temperature=temperature,
            numbers=range(len(asked.problems)),
            draw=0,
        )
    for row, outcome in enumerate(told.outcomes):
        if outcome != "done":
            note(f"note: conversation {row + 1} ended as {outcome}")
    return _as_said(rollouts, ended) if config.environment.history == "fork" else rollouts


def _as_said(rollouts: Rollouts, episodes_P: Mapping[int, list[Episode]]) -> Rollouts:
    """Conversations with each token once, where their completions repeat some."""
    said = [e.said for p in sorted(episodes_P) for e in episodes_P[p]]
    shape, width = rollouts.length_PG.shape, max(len(ids) for ids, _ in said)
    row = lambda values: [*values, *[0] * (width - len(values))]  # noqa: E731
    return rollouts.replace(
        completion_PGC=np.int32([row(ids) for ids, _ in said]).reshape(*shape, width),
        logp_PGC=np.float32([row(logp) for _, logp in said]).reshape(*shape, width),
        length_PG=np.int32([len(ids) for ids, _ in said]).reshape(shape),
    )


def _prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Each prompt, and its origin for messages."""
    if args.prompts is None:
        if args.prompt is None:
            raise ValueError("Give --prompt TEXT, --prompts FILE, or --chat for a conversation.")
        return [(args.prompt, "--prompt")]
    try:
        text = (
            sys.stdin.read() if args.prompts == "-" else Path(args.prompts).read_text("utf-8-sig")
        )
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"--prompts {args.prompts} cannot be read: {reason}.") from error
    lines = [(line, f"--prompts, line {n}") for n, line in enumerate(text.split("\n"), start=1)]
    found = [(line.removesuffix("\r"), where) for line, where in lines if line.strip()]
    if not found:
        raise ValueError(f"--prompts {args.prompts} holds no prompt. Give one a line.")
    return found


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    is_talk = args.chat and args.prompt is None and args.prompts is None
    prompts = [] if is_talk else _prompts(args)
    found = find_model(args.model)
    cli.show_devices(note)
    cli.use_compile_cache()
    mesh, dtype = sharding.make_mesh(), jnp.dtype(args.dtype)
    if found.said:
        note(f"{found.said} answers.")
    policy, params = found.policy, load_params(found, mesh, dtype)
    if args.chat and not policy.tokenizer.chat_template:
        raise ValueError(
            f"--chat: the tokenizer of {args.model} has no chat template. Leave --chat out, or "
            "take a model that has one, as instruct models do."
        )
    if is_talk:
        talk(args, policy, params, mesh)
        return
    as_asked = lambda text: [{"role": "user", "content": text}] if args.chat else text  # noqa: E731
    problems = [Problem(as_asked(text), {}, where) for text, where in prompts]
    config = _environment_options(args)
    arguments.find_modules([*args.environment, *args.tool], Path.cwd())
    with _notes():
        environment = environment_lib.read(config, [], rewarded=False)
    if environment is None and args.history != "append":
        raise ValueError(
            f"--history {args.history} is of conversations with an environment, and there is "
            "none. Name one by --environment or --tool, or leave --history out."
        )
    if environment is not None:
        with _notes():
            problems = environment.asked(problems, config.environment.tool_timeout_s)
    prompt_ids = [
        encode_prompt(policy, problem, args.max_tokens, "--max-tokens") for problem in problems
    ]
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    policy = policy.within(max(map(len, prompt_ids)) + args.max_tokens)
    engine = engine_of(policy, mesh, sampling, args.max_tokens, dtype)
    how = {"num_samples": args.num_samples, "seed": args.seed, "temperature": args.temperature}
    if environment is None:
        rollouts = complete(engine, engine.publish(params), prompt_ids, **how)
    else:
        texts = [text for text, _ in prompts]
        asked = Questions(problems, prompt_ids, texts)
        with _notes():
            rollouts = _conversations(config, environment, policy, engine, params, asked, **how)
    number = 0
    for (prompt, _), made in zip(prompts, completions(policy, prompt_ids, rollouts)):
        for text, ids, logps, stopped in zip(
            made.texts, made.token_ids, made.logprobs, made.stopped
        ):
            fields = {"text": text, "token_ids": ids, "logprobs": logps, "stopped": stopped}
            if args.json:
                own = {} if args.prompts is None else {"prompt": prompt}
                print(json.dumps(own | fields), flush=True)
            else:
                show(("\n" if number else "") + prompt, text)
            number += 1


if __name__ == "__main__":
    cli.main(main)
