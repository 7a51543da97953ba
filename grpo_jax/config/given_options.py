"""The options of training on given completions: sections `sft` and its like, of `options.TABLE`."""

from __future__ import annotations

from grpo_jax.config.schema import COUNT, NOT_NEGATIVE, POSITIVE, Option, choice, number

LOSSES = {
    "nll": "the mean cross-entropy of the tokens that are trained on",
    "dft": "the same, each token weighted by its probability, which is held fixed "
    "(arXiv:2508.05629)",
}
LOSS_ON = {
    "completion": "the completion; where a row is one text or chat, all of it",
    "assistant": "the assistant's turns of a chat, of the completion where a row has one",
    "all": "every token, those of a prompt too",
}


def schedule_options(
    section: str,
    row: str,
    rows: str,
    updates: str,
    *,
    batch: int = 64,
    learning_rate: float = 1e-3,
    warmup_steps: int = 20,
    weight_decay: float = 0.01,
    max_tokens: int = 256,
) -> tuple[Option, ...]:
    """The options that every training on given completions has, in its own section.

    `row`, `rows`: what a row of its data is, such as "pair" and "pairs". `updates`: the meaning of
    `num_steps`. They are read as `schedule = config[section]`.
    """
    # fmt: off
    return (
        number(f"{section}.num_steps", 0, NOT_NEGATIVE, "updates", updates),
        number(f"{section}.num_epochs", 0.0, NOT_NEGATIVE, "epochs",
               f"How often the training reads each {row}, in the place of {section}.num_steps",
               special={0: f"{section}.num_steps counts"}),
        number(f"{section}.batch", batch, COUNT, rows, f"{rows.capitalize()} in an update"),
        number(f"{section}.microbatch", 0, COUNT, rows,
               f"As many tokens are computed at once as so many of the longest {rows} have",
               special={0: "the usual number of tokens"}, free=True),
        number(f"{section}.learning_rate", learning_rate, POSITIVE, "",
               f"The peak, from which it goes on as {section}.schedule says"),
        choice(f"{section}.schedule", "cosine", {
                   "cosine": "falls to 0 along a cosine",
                   "linear": "falls to 0 along a line",
                   "constant": "stays"},
               "The learning rate after warm-up"),
        number(f"{section}.warmup_steps", warmup_steps, NOT_NEGATIVE, "updates",
               "Linear warm-up of the learning rate"),
        number(f"{section}.weight_decay", weight_decay, NOT_NEGATIVE, "",
               "Of matrices; norms and biases have none"),
        number(f"{section}.max_tokens", max_tokens, COUNT, "tokens",
               "Limit of a completion, stop token included, or of a text or chat as a whole"),
        choice(f"{section}.too_long", "refuse", {
                   "refuse": "do not start",
                   "drop": f"leave the {row} out",
                   "truncate": "cut the end, and so the stop token"},
               "What is done with a longer completion; data.overlong is of prompts"),
        number(f"{section}.checkpoint_every_steps", 500, COUNT, "updates",
               "Updates between checkpoints", special={0: "at the end only"}, free=True),
        number(f"{section}.evaluate_every_steps", 0, COUNT, "updates",
               "Updates between evaluations on held-out data",
               special={0: "at the start and the end only"}, free=True),
    )
    # fmt: on


SFT = (
    *schedule_options(
        "sft",
        "worked solution",
        "worked solutions",
        "Supervised updates: of a new model before GRPO, or of any by grpo_jax.sft",
    ),
    choice("sft.loss", "nll", LOSSES, "What is minimized"),
    choice("sft.loss_on", "completion", LOSS_ON, "Which tokens are trained on"),
)
