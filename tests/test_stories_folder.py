"""examples/stories260K.py makes of llama2.c's files a model that computes what llama2.c does."""

from __future__ import annotations

import importlib.util
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "stories260K.py"
WIDTH, MLP, LAYERS, HEADS, KV_HEADS, POSITIONS = 16, 24, 2, 4, 2, 8
HEAD = WIDTH // HEADS
BYTES = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
MERGED = [" a", "bc", "ab", "cd", " abc"]
PIECES = [*BYTES, *MERGED, " ", "a", "b", "c", "d"]  # as llama2.c has them, by score
KERNELS = {
    "wq": (HEADS * HEAD, WIDTH), "wk": (KV_HEADS * HEAD, WIDTH), "wv": (KV_HEADS * HEAD, WIDTH),
    "wo": (WIDTH, WIDTH), "w1": (MLP, WIDTH), "w2": (WIDTH, MLP), "w3": (MLP, WIDTH),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The weights by llama2.c's names, and the folder made of its files."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    held = {"embedding": draw(len(PIECES), WIDTH), "att": draw(LAYERS, WIDTH)}
    held |= {n: draw(LAYERS, *shape) for n, shape in KERNELS.items() if n[1] in "qkvo"}
    held |= {"ffn": draw(LAYERS, WIDTH)}
    held |= {n: draw(LAYERS, *shape) for n, shape in KERNELS.items() if n[1] in "123"}
    held |= {"norm": draw(WIDTH)}
    source = tmp_path_factory.mktemp("llama2c")
    sizes = WIDTH, MLP, LAYERS, HEADS, KV_HEADS, len(PIECES), POSITIONS
    angles = np.full(POSITIONS * HEAD, 7.0, np.float32)  # not read: they follow from the sizes
    (source / "stories260K.bin").write_bytes(
        struct.pack("<7i", *sizes) + b"".join(x.tobytes() for x in [*held.values(), angles])
    )
    words = struct.pack("<i", 8)
    for number, text in enumerate(PIECES):
        score = -float(number - len(BYTES)) if number >= len(BYTES) else 0.0
        words += struct.pack("<fi", score, len(text.encode())) + text.encode()
    (source / "tok512.bin").write_bytes(words)
    spec = importlib.util.spec_from_file_location("stories260K", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(source, source / "made")
    return held, source / "made"


def _logits(held, ids):
    """llama2.c's forward pass in float64: neighbours of a head are turned together."""
    at = lambda name, layer: held[name][layer].astype(float)  # noqa: E731
    norm = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w  # noqa: E731
    x = held["embedding"][ids].astype(float)
    angle = np.arange(len(ids))[:, None] * 10000.0 ** -(np.arange(0, HEAD, 2) / HEAD)

    def turned(v):
        out = v.copy()
        out[..., 0::2] = v[..., 0::2] * np.cos(angle) - v[..., 1::2] * np.sin(angle)
        out[..., 1::2] = v[..., 0::2] * np.sin(angle) + v[..., 1::2] * np.cos(angle)
        return out

    for layer in range(LAYERS):
        y = norm(x, at("att", layer))
        q, k, v = (
            (y @ at(n, layer).T).reshape(len(ids), -1, HEAD).swapaxes(0, 1)
            for n in ("wq", "wk", "wv")
        )
        q, k = turned(q), np.repeat(turned(k), HEADS // KV_HEADS, 0)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(HEAD)
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = share / share.sum(-1, keepdims=True) @ np.repeat(v, HEADS // KV_HEADS, 0)
        x = x + mixed.swapaxes(0, 1).reshape(len(ids), WIDTH) @ at("wo", layer).T
        y = norm(x, at("ffn", layer))
        gate = y @ at("w1", layer).T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ at("w3", layer).T)) @ at("w2", layer).T
    return norm(x, held["norm"]) @ held["embedding"].T


def test_the_model_computes_what_llama2c_does(made):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    held, folder = made
    ids = [1, 260, 4, 262, 259, 5]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, _logits(held, ids), atol=2e-5)


def _encoded(text):
    """llama2.c's encoding: characters, or bytes, and the best merge as long as there is one."""
    ids = []
    for character in " " + text:
        known = character in PIECES
        ids += [PIECES.index(character)] if known else [3 + b for b in character.encode()]
    while True:
        pairs = [PIECES[a] + PIECES[b] for a, b in itertools.pairwise(ids)]
        known = [(PIECES.index(pair), i) for i, pair in enumerate(pairs) if pair in MERGED]
        if not known:
            return [1, *ids]
        number, i = min(known)
        ids[i : i + 2] = [number]


@pytest.mark.parametrize("text", ["abc", "abcd a", "babcd\nab  é", ""])
def test_texts_become_the_tokens_of_llama2c(made, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made[1])
    ids = tokenizer(text)["input_ids"]
    assert ids == (_encoded(text) if text else [1])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
