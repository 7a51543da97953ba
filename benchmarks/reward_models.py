"""Times a reward model beside the same one in transformers, on the same CPU cores.

    python benchmarks/reward_models.py
    python benchmarks/reward_models.py --prompts 16 --prompt_words 192 --completion_words 64

A random reward model scores prompts with 8 completions each, once by grpo_jax (packed rows, each
prompt computed once for its group) and once by transformers, in batches that are padded to their
longest text, as TRL's GRPOTrainer has them: all at once, and in batches of `--batch` sorted by
length, of which the faster counts. Both get texts and make tokens of them. They go in turns;
both must give the same scores to 1e-3. Prints rows per second of each and their ratio, the bar
being 2.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime

import jax
import numpy as np
import timing  # noqa: F401 (finds the package)
import tokenizers
import torch
import transformers

from grpo_jax.devices import sharding
from grpo_jax.setup import reward_models

WORDS = [f"w{i}" for i in range(4000)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, value in (
        ("prompts", 8), ("group", 8), ("prompt_words", 192), ("completion_words", 64),
        ("width", 256), ("layers", 6), ("heads", 8), ("batch", 16), ("steps", 7),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def save(folder: str, asked: argparse.Namespace) -> tuple:
    """Writes a random model with a tokenizer of words; returns both as transformers' objects."""
    vocabulary = {w: i for i, w in enumerate(["<end>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<end>", eos_token="<end>", unk_token="<unk>"
    )
    config = transformers.Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=asked.width, intermediate_size=3 * asked.width,
        num_hidden_layers=asked.layers, num_attention_heads=asked.heads,
        num_key_value_heads=asked.heads, max_position_embeddings=4096, num_labels=1,
        pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def texts(asked: argparse.Namespace, step: int) -> tuple[list[str], list[str]]:
    """Prompts of equal length, completions of half to twice `completion_words`."""
    rng = np.random.default_rng(step)
    draw = lambda number: " ".join(rng.choice(WORDS, number))  # noqa: E731
    prompts = [f"{draw(asked.prompt_words)} " for _ in range(asked.prompts)]
    low, high = max(asked.completion_words // 2, 1), 2 * asked.completion_words
    lengths = rng.integers(low, high + 1, asked.prompts * asked.group)
    return prompts, [draw(n) for n in lengths]


def by_transformers(
    model: torch.nn.Module, tokenizer: object, rows: list[str], batch: int
) -> np.ndarray:
    """Scores of texts in padded batches; sorted by length, where they are several."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i])) if batch < len(rows) else range(
        len(rows))  # fmt: skip
    scores = np.zeros(len(rows), np.float32)
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            part = order[start : start + batch]
            given = tokenizer([rows[i] for i in part], padding=True, return_tensors="pt")
            given.pop("token_type_ids", None)
            scores[part] = model(**given).logits[:, 0].numpy()
    return scores


def main() -> None:
    asked = arguments()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    jax.config.update("jax_num_cpu_devices", cores)  # as the programs have it for small models
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = save(folder, asked)
        mesh = sharding.make_mesh(data=-1)
        judge = reward_models.load(folder, mesh, "float32", datetime(2026, 1, 1))
    number = asked.prompts * asked.group
    ways: dict[str, Callable] = {
        "grpo_jax": lambda p, c, rows: judge.score(p, c, asked.group),
        "transformers": lambda p, c, rows: by_transformers(model, tokenizer, rows, number),
        "transformers, sorted": lambda p, c, rows: by_transformers(
            model, tokenizer, rows, asked.batch
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(asked.steps + 3):  # three that warm up
        prompts, completions = texts(asked, step % 3)  # shapes that were compiled then
        rows = [prompts[i // asked.group] + c for i, c in enumerate(completions)]
        scores = {}
        for name, way in ways.items():
            began = time.perf_counter()
            scores[name] = way(prompts, completions, rows)
            if step >= 3:
                seconds[name].append(time.perf_counter() - began)
        for name in scores:
            np.testing.assert_allclose(scores[name], scores["transformers"], rtol=1e-3, atol=1e-3)
    print(f"{number} rows: {asked.prompts} prompts of {asked.prompt_words} words, {asked.group} "
          f"completions of {asked.completion_words} in the mean; {cores} cores, jax "
          f"{jax.__version__}, {len(jax.devices())} devices, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    rate = {name: number / statistics.median(s) for name, s in seconds.items()}
    for name, value in rate.items():
        print(f"{name:24} {value:8.1f} rows per second")
    theirs = max(value for name, value in rate.items() if name != "grpo_jax")
    print(f"ratio {rate['grpo_jax'] / theirs:.2f} (bar 2)")


if __name__ == "__main__":
    main()
