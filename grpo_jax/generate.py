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
from grpo_jax.config import rules
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode
from grpo_jax.devices import sharding
from grpo_jax.messages.console import console, one_line, visible
from grpo_jax.models import policy as policy_lib
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup.model import find_model, load_params
from grpo_jax.structs import Params, Rollouts, Sampling


def complete(
    policy: policy_lib.Policy,
    params: Params,
    mesh: Mesh,
    prompt: list[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    dtype=jnp.float32,
) -> Rollouts:
    """`num_samples` completions of one prompt (token ids), as the engine gives them."""
    decoder = decode.decoder_for(
        policy.model, mesh, sampling, policy.stop_ids, max_tokens, jnp.dtype(dtype)
    )
    engine = Engine(decoder)
    return engine.generate(
        engine.publish(params),
        [prompt],
        group=num_samples,
        key=keys.key_for(seed, "rollout"),
        temperature=sampling.temperature,
    )


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.generate", description="Completes a prompt.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="the prompt is a chat message")
    parser.add_argument("--max_tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P")
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="0: all tokens")
    parser.add_argument("--num_samples", type=int, default=1, metavar="K")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    args = parser.parse_args(argv)
    for name, fine, needed in (
        ("max_tokens", args.max_tokens > 0, "above 0"),
        ("num_samples", args.num_samples > 0, "above 0"),
        ("seed", 0 <= args.seed <= rules.LARGEST, f"from 0 to {rules.LARGEST}"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("temperature", args.temperature >= 0 and math.isfinite(args.temperature), "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
    ):
        if not fine:
            raise ValueError(f"--{name} {getattr(args, name)} must be {needed}.")
    if args.num_samples > 1 and args.temperature == 0:
        raise ValueError(
            f"--num_samples {args.num_samples} at --temperature 0 would give equal completions. "
            "Set --temperature above 0."
        )
    return args


def _encode(policy: policy_lib.Policy, prompt: str, chat: bool, max_tokens: int) -> list[int]:
    problem = Problem(
        [{"role": "user", "content": prompt}] if chat else prompt, {}, "the argument --prompt"
    )
    ids = encode([problem], policy.tokenizer, sys.maxsize).prompt_ids[0]
    policy.refuse_unknown(ids, "--prompt")
    if len(ids) + max_tokens > policy.model.max_position:
        raise ValueError(
            f"--prompt has {len(ids)} tokens, and with --max_tokens {max_tokens} that is more than "
            f"the {policy.model.max_position} that the model takes. Make one of them shorter."
        )
    known = policy.tokenizer.decode(ids, skip_special_tokens=True)
    lost = sorted({c for c in prompt if not c.isspace() and c not in known})
    if lost and not chat:
        print(f"note: the tokenizer has no token for {' '.join(lost)}", file=sys.stderr)
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
    prompt = _encode(policy, args.prompt, args.chat, args.max_tokens)
    rollouts = complete(
        policy,
        params,
        mesh,
        prompt,
        max_tokens=args.max_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        num_samples=args.num_samples,
        seed=args.seed,
        dtype=dtype,
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
