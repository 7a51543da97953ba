"""The losses of preferences as their papers write them, in PyTorch and float64, a pair at a time.

Beside `grpo_jax.algorithm`, of which nothing is used here. Each function gives the batch's loss and
its gradient in the log-probabilities [P, G, C]; `action` marks the tokens that count.
"""

from __future__ import annotations

import numpy as np
import torch


def _sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def _pair(o, x):
    """Loss of one pair; `x` by completion: the log-ratios of its tokens."""
    beta, e = o.get("beta", 0.1), o.get("label_smoothing", 0.0)
    way = o.get("log_ratio", "auto")
    means = way == "mean" or (way == "auto" and o["loss"] == "ipo")
    chosen, rejected = (v.mean() if means else v.sum() for v in x)
    d = chosen - rejected
    p = _sigmoid(beta * d - o.get("margin", 0.0))
    right, wrong = -torch.log(p), -torch.log(1 - p)
    return {
        "sigmoid": lambda: (1 - e) * right + e * wrong,
        "robust": lambda: ((1 - e) * right - e * wrong) / (1 - 2 * e),
        "ipo": lambda: (d - 1 / (2 * beta)) ** 2,
        "hinge": lambda: torch.clamp(1 - beta * d, min=0),
        "apo_zero": lambda: 1 - _sigmoid(beta * chosen) + _sigmoid(beta * rejected),
        "apo_down": lambda: _sigmoid(beta * chosen) + 1 - _sigmoid(beta * d),
    }[o["loss"]]()


def _orpo(o, logp):
    """The odds of a completion are those of the geometric mean of its tokens' probabilities."""
    odds = []
    for tokens in logp:
        p = torch.exp(tokens).prod() ** (1 / len(tokens))
        odds.append(p / (1 - p))
    return -o.get("beta", 0.1) * torch.log(_sigmoid(torch.log(odds[0] / odds[1])))


def of_pairs(o, *, logp, ref, action, nll=0.0):
    """`ref` [P, 2, C]; `nll`: weight of the mean nll over all tokens of chosen completions."""
    logp = torch.tensor(np.float64(logp), requires_grad=True)
    losses, chosen = [], []
    for p in range(len(logp)):
        at = [torch.tensor(np.flatnonzero(action[p, g])) for g in (0, 1)]
        if not all(map(len, at)):
            continue
        tokens = [logp[p, g][at[g]] for g in (0, 1)]
        if o["loss"] == "orpo":
            losses.append(_orpo(o, tokens))
        else:
            old = ref if o.get("reference") != "none" else np.zeros_like(ref)
            fixed = [torch.tensor(np.float64(old[p, g]))[at[g]] for g in (0, 1)]
            losses.append(_pair(o, [new - old for new, old in zip(tokens, fixed)]))
        chosen.append(-tokens[0])
    total = torch.stack(losses).mean() + nll * torch.cat(chosen).mean()
    total.backward()
    return float(total.detach()), logp.grad.numpy()


def of_completions(o, *, logp, ref, action, desirable, mismatched=None):
    """[P, 1, C]; `mismatched`: log-ratios of completions of other prompts, fixed."""
    logp = torch.tensor(np.float64(logp), requires_grad=True)
    beta, z = o.get("beta", 0.1), 0.0
    if o["loss"] == "kto":
        z = max(0.0, float(np.mean(mismatched)))
    losses = []
    for p in range(len(logp)):
        at = torch.tensor(np.flatnonzero(action[p, 0]))
        if not len(at):
            continue
        x = (logp[p, 0][at] - torch.tensor(np.float64(ref[p, 0]))[at]).sum()
        if desirable[p, 0]:
            losses.append(o.get("desirable_weight", 1.0) * (1 - _sigmoid(beta * (x - z))))
        else:
            losses.append(o.get("undesirable_weight", 1.0) * (1 - _sigmoid(beta * (z - x))))
    total = torch.stack(losses).mean()
    total.backward()
    return float(total.detach()), logp.grad.numpy()
