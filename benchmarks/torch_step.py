"""A GRPO step of a given shape in PyTorch: `generate` with a static cache, and an update as TRL's.

Random weights, the same sizes as `workload.Step`. The update runs the rows in microbatches without
gradient checkpointing: log-probabilities from the logits of the completion, the reference's
beforehand, the clipped loss with its KL term, and AdamW on the weights in the dtype of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from workload import Work


def measure(work: Work, microbatch: int = 8) -> Iterator[dict[str, Any]]:
    """Seconds of update, reference and rollout and the peak of memory, GiB, as they become known.

    The rollout comes last: compiling `generate` can take minutes.
    """
    import torch
    import transformers

    model, rows = work.shape, work.prompts * work.group
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, work.dtype)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=model.vocab_size, hidden_size=model.width, intermediate_size=model.mlp_width,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads, tie_word_embeddings=model.tied_head,
        max_position_embeddings=model.max_position, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    net = transformers.Qwen2ForCausalLM(config).to(device, dtype)
    reference = transformers.Qwen2ForCausalLM(config).to(device, dtype).eval()
    reference.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Early(transformers.StoppingCriteria):
        """Ends all rows after so many tokens in all."""

        def __init__(self, tokens: int):
            self.tokens = tokens

        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= self.tokens, device=ids.device)

    def rollout(prompt, early: int = 0):
        net.eval()
        with torch.no_grad():
            return net.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0,
                max_new_tokens=work.completion_tokens, min_new_tokens=work.completion_tokens,
                cache_implementation="static", pad_token_id=0,
                stopping_criteria=[Early(prompt.shape[1] + early)] if early else None,
            )  # fmt: skip

    def logp(net, ids):
        tokens = work.completion_tokens
        logits = net(ids, logits_to_keep=tokens + 1).logits[:, :-1].float()
        return torch.log_softmax(logits, -1).gather(-1, ids[:, -tokens:, None])[..., 0]

    def scored(ids):
        with torch.no_grad():
            return torch.cat([logp(reference, part) for part in ids.split(microbatch)])

    def update(ids, ref, advantage):
        net.train()
        parts = zip(ids.split(microbatch), ref.split(microbatch), advantage.split(microbatch))
        for part, ref_logp, adv in parts:
            ours = logp(net, part)
            ratio = torch.exp(ours - ours.detach())
            clipped = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
            kl = torch.exp(ref_logp - ours) - (ref_logp - ours) - 1
            ((-clipped + 0.04 * kl).sum() / (rows * work.completion_tokens)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(call: Callable[[], Any]) -> tuple[Any, float]:
        began = wait()
        value = call()
        return value, wait() - began

    tokens = work.prompt_tokens + work.completion_tokens
    ids = torch.randint(2, model.vocab_size, (rows, tokens), device=device)
    advantage = torch.randn(rows, 1, device=device)
    prompt = ids[:: work.group, : work.prompt_tokens].repeat_interleave(work.group, 0)
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "microbatch": microbatch}

    scored(ids[:microbatch])
    ref, found["prepare"] = timed(lambda: scored(ids))
    yield found
    first = slice(microbatch)
    update(ids[first], ref[first], advantage[first])
    _, found["update"] = timed(lambda: update(ids, ref, advantage))
    if device == "cuda":
        found["memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    yield found
    for _ in range(2):  # compiles, and captures what it compiled
        _, seconds = timed(lambda: rollout(prompt, early=4))
        found["first_rollouts_s"] = found.get("first_rollouts_s", 0.0) + seconds
        yield found
    _, found["rollout"] = timed(lambda: rollout(prompt))
    found["step"] = sum(found[phase] for phase in ("rollout", "prepare", "update"))
    found["completion_tokens_per_s"] = rows * work.completion_tokens / found["step"]
    if device == "cuda":
        found["memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    yield found
