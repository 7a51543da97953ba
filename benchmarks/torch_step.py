"""A GRPO step of a given shape in PyTorch: `generate` with a static cache, and an update as TRL's.

Random weights, the same sizes as `workload.Step`. The update runs the rows in microbatches without
gradient checkpointing: log-probabilities from the logits of the completion, the reference's
beforehand, the clipped loss with its KL term, and AdamW on the weights in the dtype of the run.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from workload import Work


def measure(work: Work, steps: int = 1, microbatch: int = 8) -> dict[str, Any]:
    """Seconds of rollout, reference and update, medians of `steps`, and the peak of memory, GiB."""
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

    seconds: dict[str, list[float]] = {"rollout": [], "prepare": [], "update": []}
    shape = (work.prompts, work.prompt_tokens)
    began = wait()
    prompt = torch.randint(2, model.vocab_size, shape, device=device)
    for _ in range(2):  # compiles, and captures what it compiled
        rollout(prompt.repeat_interleave(work.group, 0), early=4)
    found: dict[str, Any] = {"first_rollouts_s": wait() - began}
    for _ in range(steps):
        prompt = torch.randint(2, model.vocab_size, shape, device=device)
        times = [wait()]
        ids = rollout(prompt.repeat_interleave(work.group, 0))
        times.append(wait())
        ref = scored(ids) if work.kl else torch.zeros(rows, work.completion_tokens, device=device)
        times.append(wait())
        update(ids, ref, torch.randn(rows, 1, device=device))
        times.append(wait())
        for name, begin, end in zip(seconds, times, times[1:]):
            seconds[name].append(end - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found |= medians | {"step": sum(medians.values())}
    found["completion_tokens_per_s"] = rows * work.completion_tokens / found["step"]
    if device == "cuda":
        found["memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found | {"device": device, "torch": torch.__version__, "microbatch": microbatch}
