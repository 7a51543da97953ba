"""Asks a model: `python -m grpo_jax.generate --model DIR_OR_ID --prompt TEXT`.

The model is a Hugging Face folder or hub id, or the folder of a run, finished or not. The text is
given to the model as it stands; `--chat` puts it into the tokenizer's chat template as the user's
message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys

import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import cli, keys
from grpo_jax.config import arguments, rules
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode
from grpo_jax.devices import sharding
from grpo_jax.messages.console import console, one_line, visible
from grpo_jax.models import policy as policy_lib
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup.model import find_model, load_params
from grpo_jax.structs import Params, Rollouts, Sampling

_NUM_SLOTS = 256  # completions decoded at once


def engine_of(
    policy: policy_lib.Policy, mesh: Mesh, sampling: Sampling, max_tokens: int, dtype=jnp.float32
) -> Engine:
    """What draws a policy's completions of at most so many tokens."""
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
    """`num_samples` completions of each prompt (token ids), as the engine gives them.

    `published`: the weights, by `engine.publish`.
    """
    return engine.generate(
        published,
        prompts,
        group=num_samples,
        key=keys.key_for(seed, "rollout"),
        temperature=temperature,
    )


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=arguments.prog("generate"), description="Completes a prompt.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="the prompt is a chat message")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all tokens")
    parser.add_argument("--num-samples", type=int, default=1, metavar="K")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    args = parser.parse_args(arguments.joined(argv))
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
    """Raises ValueError where one is out of its range, named as the command line has it or not."""
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
    policy: policy_lib.Policy, prompt: str | list, max_tokens: int, where: str, limit: str = ""
) -> list[int]:
    """The tokens of a text or of chat messages. `where`: it stands; `limit`: how it is called.

    Raises ValueError where the model cannot take them with `max_tokens` more.
    """
    ids = encode([Problem(prompt, {}, where)], policy.tokenizer, sys.maxsize).prompt_ids[0]
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
    """Says something on standard error: what the model says alone goes to standard output."""
    with contextlib.suppress(OSError):
        print(one_line(text), file=sys.stderr)


def show(text: str) -> None:
    """Prints a model's text: into a pipe or a file as it is, on a terminal what that shows."""
    text = visible(text) if console.is_terminal else text
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main(argv: list[str]) -> None:
    args = _arguments(argv)
    found = find_model(args.model)
    cli.show_devices(note)
    cli.use_compile_cache()
    mesh, dtype = sharding.make_mesh(), jnp.dtype(args.dtype)
    if found.said:
        note(f"{found.said} answers.")
    policy, params = found.policy, load_params(found, mesh, dtype)
    asked = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
    prompt = encode_prompt(policy, asked, args.max_tokens, "--prompt", "--max-tokens")
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    engine = engine_of(policy, mesh, sampling, args.max_tokens, dtype)
    rollouts = complete(
        engine,
        engine.publish(params),
        [prompt],
        num_samples=args.num_samples,
        seed=args.seed,
        temperature=args.temperature,
    )
    for g in range(args.num_samples):
        length = int(rollouts.length_PG[0, g])
        ids = rollouts.completion_PGC[0, g, :length].tolist()
        text = policy.text(ids, after=prompt)
        if args.json:
            logps = rollouts.logp_PGC[0, g, :length].tolist()
            stopped = bool(rollouts.stopped_PG[0, g])
            fields = {"text": text, "token_ids": ids, "logprobs": logps, "stopped": stopped}
            print(json.dumps(fields), flush=True)
        else:
            show(("\n" if g else "") + args.prompt + text)


if __name__ == "__main__":
    cli.main(main)
