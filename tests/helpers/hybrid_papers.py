"""Hybrids as their papers write them, in PyTorch and float64, a completion at a time.

Beside `grpo_jax.algorithm`, of which nothing is used here. Every function gets a list of groups; a
group is a dict with `drawn`, a list of completions, and `demo`, one more or None. A completion is a
dict: `logp` and `entropy` of its tokens (tensors), `old` (fixed), `hint`, the number of its first
tokens that come from a demonstration, and its `reward`.
"""

from __future__ import annotations

import torch


def normalized(rewards: list[float]) -> list[float]:
    """(r - mean) / std of a group, as in GRPO; the deviation is that of the numbers themselves."""
    r = torch.tensor(rewards, dtype=torch.float64)
    std = r.std(unbiased=False)
    return [0.0] * len(r) if std < 1e-4 else ((r - r.mean()) / std).tolist()


def clipped(one: dict, advantage: float, start: int = 0) -> torch.Tensor:
    """Sum over tokens of -min(rho A, clip(rho) A), of those after `start`."""
    rho = torch.exp(one["logp"] - one["old"])[start:]
    return -torch.minimum(rho * advantage, torch.clamp(rho, 0.8, 1.2) * advantage).sum()


def mean(sums: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    return sum(sums) / sum(counts) if sum(counts) else torch.zeros((), dtype=torch.float64)


def grpo(groups: list[dict]) -> torch.Tensor:
    """The token mean over what was drawn."""
    sums, counts = [], []
    for group in groups:
        for one, a in zip(group["drawn"], normalized([x["reward"] for x in group["drawn"]])):
            sums.append(clipped(one, a, one["hint"]))
            counts.append(len(one["logp"]) - one["hint"])
    return mean(sums, counts)


def nll(ones: list[dict], weight=lambda one: 1.0) -> torch.Tensor:
    """The token mean of -log pi, each times a fixed weight."""
    sums = [(-one["logp"] * weight(one)).sum() for one in ones]
    return mean(sums, [len(one["logp"]) for one in ones])


def demos(groups: list[dict]) -> list[dict]:
    return [group["demo"] for group in groups if group["demo"] is not None]


def luffy(groups: list[dict]) -> torch.Tensor:
    """Mixed-policy GRPO with policy shaping, f(x) = x / (x + 0.1), pi_phi = 1, no clip there."""
    sums, counts = [], []
    for group in groups:
        whole = group["drawn"] + ([group["demo"]] if group["demo"] else [])
        advantage = normalized([one["reward"] for one in whole])
        for one, a in zip(whole, advantage):
            if one is group["demo"]:
                pi = torch.exp(one["logp"])
                sums.append(-(pi / (pi + 0.1) * a).sum())
            else:
                sums.append(clipped(one, a))
            counts.append(len(one["logp"]))
    return mean(sums, counts)


def chord(groups: list[dict], mu: float) -> torch.Tensor:
    return (1 - mu) * grpo(groups) + mu * nll(demos(groups))


def chord_phi(groups: list[dict], mu: float) -> torch.Tensor:
    def phi(one):
        p = torch.exp(one["logp"]).detach()
        return p * (1 - p)

    return (1 - mu) * grpo(groups) + mu * nll(demos(groups), phi)


def srft(groups: list[dict]) -> torch.Tensor:
    """L_SFT + L_RL of the demonstrations and of the rollouts, with weights by each token's entropy.

    All tokens of the policy loss share one mean, and all completions of a group one baseline.
    """
    sft = nll(demos(groups), lambda one: 0.5 * torch.exp(-one["entropy"]).detach())
    sums, counts = [], []
    for group in groups:
        whole = group["drawn"] + ([group["demo"]] if group["demo"] else [])
        for one, a in zip(whole, normalized([one["reward"] for one in whole])):
            if one is group["demo"]:
                sums.append(-(torch.exp(one["logp"]) * a).sum())
            else:
                rho = torch.exp(one["logp"] - one["old"])
                token = -torch.minimum(rho * a, torch.clamp(rho, 0.8, 1.2) * a)
                if a > 0:
                    token = token * 0.1 * torch.exp(one["entropy"]).detach()
                sums.append(token.sum())
            counts.append(len(one["logp"]))
    return sft + mean(sums, counts)


def hpt(groups: list[dict], gamma: float) -> torch.Tensor:
    """alpha L_RL + beta L_SFT with (alpha, beta) = (1, 0) where P > gamma, else (0, 1)."""
    fails = []
    for group in groups:
        rate = sum(one["reward"] >= 1 for one in group["drawn"]) / len(group["drawn"])
        fails.append(rate <= gamma and group["demo"] is not None)
    learned = [group for group, failed in zip(groups, fails) if not failed]
    return grpo(learned) + nll(demos([g for g, failed in zip(groups, fails) if failed]))


def uft(groups: list[dict], beta: float = 0.001) -> torch.Tensor:
    """RL after the hint, and beta times the mean nll of the hints' tokens."""
    hinted = [one for group in groups for one in group["drawn"] if one["hint"]]
    sums = [-one["logp"][: one["hint"]].sum() for one in hinted]
    return grpo(groups) + beta * mean(sums, [one["hint"] for one in hinted])


def positive_nll(groups: list[dict], mu: float = 0.1) -> torch.Tensor:
    """The actor's loss plus mu times the nll of its correct completions."""
    right = [one for group in groups for one in group["drawn"] if one["reward"] >= 1]
    return grpo(groups) + mu * nll(right)
