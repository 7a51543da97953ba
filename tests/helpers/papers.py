"""The objectives as their papers write them, in PyTorch and float64, a completion at a time.

Beside `grpo_jax.algorithm`, of which nothing is used here: names of options are the only thing in
common. `loss` gives the batch's loss and its gradient in the log-probabilities.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def _sign(advantage) -> int:
    return 1 if advantage > 0 else -1


def clip(d, advantage, o, by_sequence):
    low, high = o.get("clip_low", 0.2), o.get("clip_high", 0.2)
    if by_sequence:  # GSPO: s = (pi(y) / pi_old(y))^(1 / n)
        d = torch.full_like(d, 1.0) * d.sum() / len(d)
    ratio = torch.exp(d)
    first = ratio
    if o.get("dual_clip_ratio"):
        first = torch.clamp(ratio, max=o["dual_clip_ratio"])
    objective = torch.minimum(first * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)
    if o.get("dual_clip_loss"):
        bounded = torch.maximum(objective, o["dual_clip_loss"] * advantage)
        objective = torch.where(advantage < 0, bounded, objective)
    return -objective


def gmpo(d, advantage, o):
    """Equation 4 of arXiv:2507.20673, for an advantage that all tokens of a completion share."""
    sign = _sign(advantage[0])
    bound = o["clip_high"] if sign > 0 else o["clip_low"]
    product = torch.ones((), dtype=d.dtype)
    for t in range(len(d)):
        product = product * torch.exp(sign * torch.minimum(sign * d[t], torch.tensor(bound)))
    return -(product ** (1 / len(d))) * advantage


def cispo(d, advantage, logp, o, by_sequence):
    if by_sequence:
        d = torch.full_like(d, 1.0) * d.mean()
    weight = torch.clamp(torch.exp(d), max=o["ratio_cap"]).detach()
    return -weight * advantage * logp


def sapo(d, advantage, o, by_sequence):
    if by_sequence:
        d = torch.full_like(d, 1.0) * d.mean()
    out = []
    for t in range(len(d)):
        tau = o.get("sapo_positive", 1.0) if advantage[t] > 0 else o.get("sapo_negative", 1.05)
        gate = 4 / tau / (1 + torch.exp(-tau * (torch.exp(d[t]) - 1)))
        out.append(-gate * advantage[t])
    return torch.stack(out)


def vespo(d, advantage, logp, weight):
    log_w = math.log(max(math.exp(min(float((d.detach() + torch.log(weight)).sum()), 20)), 1e-8))
    w = math.exp(log_w)
    k, lam = (2.0, 3.0) if advantage[0] >= 0 else (3.0, 2.0)
    return -math.exp(lam) * w**k * math.exp(-lam * w) * advantage * logp


def masked(kind, d, advantage, logp, old, sampler, o):
    delta, out = o.get("mask_threshold", 0.2), []
    for t in range(len(d)):
        p, q = math.exp(logp[t].item()), math.exp(float(old[t]))
        a = float(advantage[t])
        if kind == "sampler_mask":
            r = torch.exp(logp[t] - sampler[t])
            is_open = abs(p - math.exp(float(sampler[t]))) <= delta
            out.append(-r * a if is_open else 0 * r)
            continue
        if kind == "tv_mask":
            is_open = p - q <= delta if a > 0 else q - p <= delta
        else:
            kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            moved = p > q if a > 0 else p < q
            is_open = not (moved and kl > delta)
        weight = min(math.exp(d[t].item()), 20.0)
        out.append(-weight * a * logp[t] if is_open else 0 * logp[t])
    return torch.stack(out)


def kl(o, logp, old, ref):
    diff = logp - ref
    kind = o.get("kl_estimator", "k3")
    if kind == "k1":
        return diff
    if kind == "k2":
        return 0.5 * diff**2
    k3 = torch.exp(-diff) + diff - 1
    return k3 * torch.exp(logp - old) if kind == "k3_ratio" else k3


def correction(o, old, sampler):
    level = o.get("rollout_correction.level", "none")
    if level == "none":
        return torch.ones_like(old)
    log_ratio = old - sampler
    if level == "sequence":
        log_ratio = torch.full_like(old, 1.0) * log_ratio.sum()
    ratio, cap = torch.exp(log_ratio), o.get("rollout_correction.cap", 2.0)
    floor = o.get("rollout_correction.floor", 0.0)
    if o.get("rollout_correction.bound", "truncate") == "mask":
        return torch.where((ratio > cap) | (ratio < floor), 0.0, ratio)
    return torch.clamp(ratio, floor, cap)


def _of_completion(o, logp, old, ref, sampler, entropy, advantage):
    """Losses of the tokens of one completion."""
    d, ratio = logp - old, o.get("ratio", "token")
    kind, weight = o.get("surrogate", "clip"), correction(o, old, sampler)
    sequence = ratio == "sequence"
    if kind == "clip" and ratio == "geometric":
        out = gmpo(d, advantage, o)
    elif kind == "clip":
        out = clip(d, advantage, o, sequence)
    elif kind == "cispo":
        out = cispo(d, advantage, logp, {"ratio_cap": 5.0, **o}, sequence)
    elif kind == "sapo":
        out = sapo(d, advantage, o, sequence)
    elif kind == "vespo":
        out = vespo(d, advantage, logp, weight)
    elif kind == "reinforce":
        out = -advantage * logp
    else:
        out = masked(kind, d, advantage, logp, old, sampler, o)
    if kind != "vespo":
        out = out * weight
    drift = o.get("max_sequence_drift", 0.0)
    if drift and float((sampler - logp.detach()).mean()) > drift:
        out = torch.where(advantage < 0, 0.0, out)
    out = out + o.get("kl_coef", 0.0) * kl(o, logp, old, ref)
    return out - o.get("entropy_coef", 0.0) * entropy


def loss(o, *, logp, advantage, action, old=None, ref=None, sampler=None, entropy=None, limit=None):
    """The loss of a batch and its gradient in `logp`, float64 [B, T]; `o`: options by name.

    `advantage` [B] or [B, T]. Without `old` it is `logp`, fixed.
    """
    logp = torch.tensor(np.float64(logp), requires_grad=True)
    fixed = lambda x: None if x is None else torch.tensor(np.float64(x))  # noqa: E731
    old = logp.detach() if old is None else fixed(old)
    zeros = torch.zeros_like(old)
    ref, sampler, entropy = (zeros if x is None else fixed(x) for x in (ref, sampler, entropy))
    advantage = fixed(advantage)
    advantage = advantage if advantage.ndim == 2 else advantage[:, None] + zeros
    sums, lengths = [], []
    for b in range(len(logp)):
        at = torch.tensor(np.flatnonzero(action[b]))
        if len(at):
            values = [x[b][at] for x in (logp, old, ref, sampler, entropy, advantage)]
            sums.append(_of_completion(o, *values).sum())
            lengths.append(len(at))
    sums, lengths = torch.stack(sums), torch.tensor(lengths, dtype=torch.float64)
    normalizer = o.get("normalizer", "token")
    if normalizer == "token":
        total = sums.sum() / lengths.sum()
    elif normalizer == "sequence":
        total = (sums / lengths).mean()
    elif normalizer == "sequence_sum":
        total = sums.mean()
    else:
        total = sums.sum() / (len(logp) * (limit or logp.shape[1]))
    total.backward()
    return float(total.detach()), logp.grad.numpy()
