"""Trains a model of stories to write short words, with a reward of one's own: ten steps."""

import datasets

import grpo_jax


def short_words(completions, **columns):
    return [-len(text) / max(len(text.split()), 1) for text in completions]


data = datasets.Dataset.from_dict({"prompt": ["Once upon a time", "One day", "Lily saw"] * 8})
options = {"num_steps": 10, "prompts": 8, "group": 8, "max_tokens": 32, "learning_rate": 1e-4}
run = grpo_jax.train("stories260K", short_words, data, workdir="runs/short_words", **options)
print(run.curves(), run.metrics[-1]["reward"])
for answer in run.model().generate(["Once upon", "The dog", "Mom"], max_tokens=32):
    print(answer.text)
