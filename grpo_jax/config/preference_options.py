"""The options of training on preferences: section `preference` of `options.TABLE`."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.algorithm.presets import PAIRS, SMOOTHED
from grpo_jax.config.given_options import schedule_options
from grpo_jax.config.schema import NOT_NEGATIVE, POSITIVE, Range, choice, number
from grpo_jax.messages.values import shown

LOSSES = {
    "sigmoid": "DPO; with preference.label_smoothing conservative DPO",
    "ipo": "the square of the difference of log-ratios from 1 / (2 beta) (IPO)",
    "hinge": "0 from a margin of 1 / beta on (SLiC)",
    "robust": "DPO without the bias of wrong labels, of which there is a share of "
    "preference.label_smoothing",
    "apo_zero": "the chosen become likelier and the rejected less likely (APO)",
    "apo_down": "both become less likely, the rejected more so (APO)",
    "orpo": "nll of the chosen and the odds ratio of both, without a reference (ORPO)",
    "kto": "of unpaired data: each completion against the mean divergence (KTO)",
    "apo_zero_unpaired": 'of unpaired data: "apo_zero" of each completion alone',
}

# fmt: off
PREFERENCE = (
    *schedule_options("preference", "row", "rows", "Updates on preferences, by grpo_jax.dpo",
                      learning_rate=1e-6, warmup_steps=0, weight_decay=0.0),
    choice("preference.loss", "sigmoid", LOSSES,
           "What is minimized; docs/preference.md has the formulas. A row is a pair, or of "
           "unpaired data a completion with its label"),
    number("preference.beta", 0.1, POSITIVE, "",
           "Factor of log-ratios, by which a policy stays near the reference; of \"ipo\" the "
           "paper's tau, of \"orpo\" the weight of the odds ratio"),
    number("preference.label_smoothing", 0.0, Range(at_least=0, below=0.5), "",
           "Share of pairs whose label is wrong, of \"sigmoid\" and \"robust\""),
    choice("preference.reference", "start", {
               "start": "the model as training begins; \"orpo\" has none",
               "none": "none: a log-ratio is the log-probability itself (CPO, SimPO)"},
           "What log-ratios compare with, of \"sigmoid\", \"ipo\" and \"hinge\""),
    number("preference.margin", 0.0, NOT_NEGATIVE, "",
           "Implicit reward by which the chosen is to exceed the rejected, of \"sigmoid\": SimPO's "
           "gamma"),
    choice("preference.log_ratio", "auto", {
               "auto": "the mean of \"ipo\", as in TRL, and the sum of others",
               "sum": "the sum over its tokens, as in the papers",
               "mean": "the mean over its tokens, whatever their number"},
           "What of a completion is compared, of losses of pairs other than \"orpo\""),
    number("preference.nll_weight", 0.0, NOT_NEGATIVE, "",
           "Weight of the mean nll of the chosen beside a loss of pairs, so that they do not "
           "become less likely"),
    number("preference.desirable_weight", 1.0, POSITIVE, "",
           "Weight of completions whose label is True, of losses of unpaired data"),
    number("preference.undesirable_weight", 1.0, POSITIVE, "", "The same of the others"),
)
# fmt: on


def check(config: ConfigDict) -> None:
    """Raises ValueError for options that the loss does not read."""
    asked, usual = config.preference, {option.name: option.default for option in PREFERENCE}
    readers = {
        "reference": ("sigmoid", "ipo", "hinge"),
        "margin": ("sigmoid",),
        "label_smoothing": SMOOTHED,
        "log_ratio": tuple(loss for loss in PAIRS if loss != "orpo"),
        "nll_weight": tuple(loss for loss in PAIRS if loss != "orpo"),
        "desirable_weight": tuple(loss for loss in LOSSES if loss not in PAIRS),
    }
    readers["undesirable_weight"] = readers["desirable_weight"]
    for name, losses in readers.items():
        value = asked[name]
        if value != usual[f"preference.{name}"] and asked.loss not in losses:
            why = " It has the nll of the chosen already." * (name == "nll_weight")
            raise ValueError(
                f"preference.{name} = {shown(value)} is not read by preference.loss = "
                f"{shown(asked.loss)}, but by {', '.join(losses)}.{why * (asked.loss == 'orpo')} "
                f"Leave it at {shown(usual[f'preference.{name}'])}, or set another loss."
            )
    if asked.loss == "kto" and asked.batch == 1:
        raise ValueError(
            'preference.batch = 1, but preference.loss = "kto" compares each completion with the '
            "mean of a batch of others. Set it to 2 or more; 64 is usual."
        )
