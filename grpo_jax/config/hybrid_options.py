"""The options of hybrids and of distillation: sections `hybrid` and `distill`."""

from __future__ import annotations

from grpo_jax.algorithm.hybrid_methods import METHODS
from grpo_jax.config.schema import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    choice,
    number,
    text,
)

_SHARE = Range(at_least=0, at_most=1)
_USUAL = ", ".join(f"{row.nll_coef:g} for {name}" for name, row in METHODS.items() if row.nll)

# fmt: off
HYBRID = (
    choice("hybrid.method", "", {
               "": "no demonstrations",
               "luffy": "a demonstration is one more completion of each group, with a shaped ratio",
               "chord": "policy loss and nll of a demonstration, mixed by a schedule",
               "chord_phi": "the same, the nll of a token weighed by p (1 - p)",
               "srft": "policy loss and nll of a demonstration, weighed by the entropy",
               "hpt": "the nll of the demonstration where the policy fails, else the policy loss",
               "uft": "completions begin with a part of the demonstration, which gets shorter",
               "positive_nll": "nll of drawn completions that earned hybrid.pass_reward (VAPO)"},
           "Supervised learning beside the policy loss (docs/hybrids.md). A demonstration is the "
           "column `completion` of a problem, or the task's worked solution"),
    choice("hybrid.missing", "refuse", {
               "refuse": "do not start",
               "policy": "train it by its rewards alone"},
           "What is done with a problem without a demonstration"),
    number("hybrid.nll_coef", -1.0, NOT_NEGATIVE, "", "Weight of the nll",
           special={-1: f"the usual one: {_USUAL}"}),
    number("hybrid.shaping", 0.1, POSITIVE, "",
           "Gamma of \"luffy\": a token of probability p has the weight p / (p + gamma)"),
    number("hybrid.pass_reward", 1.0, Range(), "",
           "Reward from which a drawn completion counts as passed, for \"hpt\" and "
           "\"positive_nll\""),
    number("hybrid.max_pass_rate", 0.0, FRACTION, "",
           "Share of passed completions up to which \"hpt\" takes the demonstration of a prompt"),
    number("hybrid.mix_peak", 0.9, _SHARE, "",
           "Largest share of the nll in the loss of \"chord\" and \"chord_phi\""),
    number("hybrid.mix_valley", 0.05, _SHARE, "", "The share after the decay"),
    number("hybrid.mix_warmup_steps", 0, NOT_NEGATIVE, "steps",
           "The share rises from 0 to the peak in so many steps"),
    number("hybrid.mix_decay_steps", 200, NOT_NEGATIVE, "steps",
           "After that, it falls along a cosine to the valley in so many"),
    number("hybrid.hint_high", 0.95, _SHARE, "",
           "Mean share of a demonstration that \"uft\" shows in the first step"),
    number("hybrid.hint_low", 0.05, _SHARE, "", "The share at the end of hybrid.hint_steps"),
    number("hybrid.hint_steps", 300, COUNT, "steps",
           "The share falls along a cosine in so many steps; after them, it is 0"),
)

DISTILL = (
    text("distill.teacher", "", "Hugging Face folder or hub id",
         "A model with the same tokenizer, which the policy learns to imitate on its own "
         "completions (docs/distillation.md)", special={"": "none"}),
    choice("distill.loss", "divergence", {
               "divergence": "the generalised Jensen-Shannon divergence over the whole vocabulary, "
                             "as a loss (GKD)",
               "reward": "log-probability of the teacher minus that of the policy, added to the "
                         "advantage of each token"},
           "How the teacher counts"),
    number("distill.coef", 1.0, POSITIVE, "",
           "Weight of the teacher beside the policy loss, or in the advantage"),
    number("distill.beta", 1.0, _SHARE, "",
           "Of the divergence: 0 is KL(teacher || policy), 1 is KL(policy || teacher), between "
           "them both to their mixture"),
)
# fmt: on
