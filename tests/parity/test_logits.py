"""Our logits against those of tiny random transformers models, in float32, by all three ways."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from grpo_jax.devices import sharding
from grpo_jax.kernels.kv_cache import DecodeStep
from grpo_jax.models import frequencies, logits, parameters, transformer
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.hf.tokenizer import load_tokenizer, stop_ids
from grpo_jax.models.hf.weights import load_params
from grpo_jax.structs import RopeScaling, Rotary

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 3}

# transformers' config class and what is special about the case.
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama bias": (
        "Llama",
        {
            "attention_bias": True,
            "head_dim": 12,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 later layers slide": ("Qwen2", {**SLIDING, "max_window_layers": 1}),
    "qwen2 listed layers slide": (
        "Qwen2",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral sliding": ("Mistral", {"sliding_window": 4}),
}

# Tiny models: compiling takes longer than computing, and half as long without optimization.
compiled = functools.partial(
    jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
)

PROMPT_LENGTHS = [7, 1, 4]  # P = 3, padded to Q = 8
COMPLETION_LENGTHS = [[6, 1], [5, 6], [2, 4]]  # G = 2, padded to C = 6


def random_model(kind: str, settings: dict):
    """A transformers model whose every parameter is random, norms and biases included."""
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.normal_(1, 0.3)
    return model


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory):
    """The torch model and ours, read from what it saved."""
    theirs = random_model(*CASES[request.param])
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    config = read_config(folder)
    params = load_params(folder, config, one_device())
    return theirs, config, params


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device alone: eight that compute the same take eight times as long."""
    return sharding.make_mesh(devices=jax.devices()[:1])


def group_rows(vocab_size: int):
    """Prompts and completions with garbage in the padding, and the rows torch sees."""
    rng = np.random.default_rng(0)
    prompt_PQ = rng.integers(0, vocab_size, (len(PROMPT_LENGTHS), 8), dtype=np.int32)
    completion_PGC = rng.integers(0, vocab_size, (len(PROMPT_LENGTHS), 2, 6), dtype=np.int32)
    return prompt_PQ, np.array(PROMPT_LENGTHS, np.int32), completion_PGC


def torch_logits(model, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of each row, computed in one batch padded on the right."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        out_BTV = model(input_ids=ids_BT.long(), attention_mask=mask_BT).logits.numpy()
    return [out[: len(row)] for out, row in zip(out_BTV, rows, strict=True)]


def expected(model, prompt_PQ, completion_PGC) -> dict[tuple[int, int], np.ndarray]:
    """torch's logits [length + 1, V] from the prompt's last token on, of each completion."""
    cells, rows = [], []
    for p, prompt_length in enumerate(PROMPT_LENGTHS):
        for g, length in enumerate(COMPLETION_LENGTHS[p]):
            cells.append((p, g))
            rows.append(
                np.concatenate([prompt_PQ[p, :prompt_length], completion_PGC[p, g, :length]])
            )
    out = torch_logits(model, rows)
    return {(p, g): out[i][PROMPT_LENGTHS[p] - 1 :] for i, (p, g) in enumerate(cells)}


def test_score_equals_transformers(models):
    theirs, config, params = models
    prompt_PQ, length_P, completion_PGC = group_rows(config.vocab_size)
    want = expected(theirs, prompt_PQ, completion_PGC)

    got = score_logits(params, config, prompt_PQ, length_P, completion_PGC)

    for (p, g), rows in want.items():  # the last row predicts what comes after the completion
        length = COMPLETION_LENGTHS[p][g]
        np.testing.assert_allclose(got[p, g, :length], rows[:length], atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", [0, 2])  # column of the first token: the cache is a ring
def test_prefill_and_decoding_equal_transformers(models, first):
    theirs, config, params = models
    prompt_RQ, length_R, completion_RWC = group_rows(config.vocab_size)
    want = expected(theirs, prompt_RQ, completion_RWC)

    got_RV, prefix = prefill_logits(params, config, prompt_RQ, length_R)

    for (r, _), rows in want.items():
        np.testing.assert_allclose(got_RV[r], rows[0], atol=1e-4, rtol=0)

    num_slots, num_lanes, num_tokens = completion_RWC.shape
    lead = (num_slots, config.num_kv_heads, num_lanes)
    keys = np.zeros((*lead, config.head_size, num_tokens), np.float32)
    values = np.zeros((*lead, num_tokens, config.head_size), np.float32)
    cache = tuple((layer, (keys, values)) for layer in prefix)
    live_RW = np.ones((num_slots, num_lanes), bool)
    for t in range(num_tokens):
        time_RW = np.full((num_slots, num_lanes), t, np.int32)
        token_RW = completion_RWC[..., t]
        column = (t + first) % num_tokens
        step = DecodeStep(length_R, time_RW, live_RW, column, num_tokens)
        got_RWV, cache = decode_logits(params, config, token_RW, cache, step)
        for (r, w), rows in want.items():
            if t < COMPLETION_LENGTHS[r][w]:
                np.testing.assert_allclose(got_RWV[r, w], rows[t + 1], atol=1e-4, rtol=0)


@compiled
def score_logits(params, config, *rows):
    hidden = tiny.completion_states(params, config, *rows)
    return logits.logits(hidden, parameters.head_kernel(params))


def by_layer(params, config):
    return params | {"layers": tiny.unstacked(params["layers"], config)}


@compiled
def prefill_logits(params, config, *rows):
    hidden, cache = transformer.prefill(by_layer(params, config), config, *rows)
    return logits.logits(hidden, parameters.head_kernel(params)), cache


@compiled
def decode_logits(params, config, *state):
    hidden, cache = transformer.decode_token(by_layer(params, config), config, *state)
    return logits.logits(hidden, parameters.head_kernel(params)), cache


def test_stories260k_equals_transformers(shared):
    folder = shared / "models" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    config = read_config(folder)
    params = load_params(folder, config, one_device())
    ids = np.array(tokenizer("Once upon a time, there was a little girl").input_ids, np.int32)

    (want,) = torch_logits(theirs, [ids])
    got = score_logits(params, config, ids[None, :3], np.array([3]), ids[None, None, 3:])[0, 0]

    np.testing.assert_allclose(got, want[2:-1], atol=1e-4, rtol=0)
    assert stop_ids(folder, tokenizer, config.vocab_size) == (1, 2)


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192)])
@pytest.mark.parametrize(
    ("theta", "size"), [(1e4, 64), (1e4, 80), (5e5, 128), (1e6, 64), (1e6, 128)]
)
def test_rotary_frequencies_to_the_last_bit(theta, size, scaling):
    """All but one at most, which is next to theirs: torch's power is not rounded exactly."""
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope |= LLAMA3 | {"rope_theta": theta, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        head_dim=size, rope_parameters=rope, max_position_embeddings=65_536
    )
    llama = transformers.models.llama.modeling_llama  # found when it is named
    theirs = llama.LlamaRotaryEmbedding(config).inv_freq.numpy()

    ours = frequencies.of(Rotary(theta, scaling), size)

    assert ours.dtype == theirs.dtype == np.float32
    units = np.abs(ours.view(np.int32) - theirs.view(np.int32))  # in the last place
    assert units.max() <= 1 and units.sum() <= 1
