"""Dense families against transformers: tiny models with noise in every parameter, in float32.

    python tests/parity/families.py [FAMILY ...]     prints a table, family by check

A model has a whole period of its layers and a remainder, windows shorter than its rows, and rotary
scalings that are felt. The checks are functions of a `Pair`, for the tests too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as conftest.py does for tests
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers

from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.devices import sharding
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import families, logits, parameters, transformer
from grpo_jax.models.families import model_config, names
from grpo_jax.models.hf import export
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.hf.keys import HARMLESS
from grpo_jax.models.hf.weights import load_params
from grpo_jax.models.lanes import PackedInputs
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import ModelConfig, Rollouts, Sampling

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 8.0, "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
LISTS = {
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.9, 2.3],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0],
}
MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.1}
KINDS = {
    "full_attention": LINEAR | {"rope_theta": 5000.0},
    "sliding_attention": PLAIN | {"rope_theta": 100.0},
}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
# Models of images and text: the config of the text, what images need, what is beside them.
WRAPPED = {
    "gemma3": ("Gemma3TextConfig", {"model_type": "siglip_vision_model"},
               {"mm_tokens_per_image": 4}),
    "mistral3": ("Ministral3Config", {"model_type": "pixtral", "head_dim": 8},
                 {"tie_word_embeddings": False}),
}  # fmt: skip

# transformers' class and what is special about the case.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama linear": ("Llama", {"rope_parameters": LINEAR}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN | {"truncate": False}}),
    "qwen3 proportional": ("Qwen3", {"head_dim": 16, "rope_parameters": PLAIN | {
        "rope_type": "proportional", "partial_rotary_factor": 0.5}}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6,
                          "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3Text", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6,
                                   "num_hidden_layers": 7, "rope_parameters": KINDS}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 2,
                          "rope_parameters": KINDS, "num_key_value_heads": 1}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "rope_parameters": PLAIN}),
    "smollm3 windows": ("SmolLM3", {"num_hidden_layers": 5, "rope_parameters": PLAIN,
                                    "use_sliding_window": True, "sliding_window": 6,
                                    "attention_bias": True}),
    "olmo2": ("Olmo2", {"rope_parameters": PLAIN}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 6, "sliding_window": 6, "rope_parameters": {
        "full_attention": YARN | {"attention_factor": 1.3}, "sliding_attention": PLAIN}}),
    "phi3": ("Phi3", {"sliding_window": 6, "rope_parameters": PLAIN}),
    "phi3 longrope": ("Phi3", {"hidden_size": 64, "original_max_position_embeddings": 8,
                               "rope_parameters": LISTS | {
                                   "rope_type": "longrope", "rope_theta": 1000.0,
                                   "partial_rotary_factor": 0.75}}),
    "seed_oss": ("SeedOss", {"head_dim": 16, "rope_parameters": PLAIN}),
    "granite": ("Granite", {"attention_multiplier": 0.1, "embedding_multiplier": 3.0,
                            "residual_multiplier": 0.4, "logits_scaling": 2.5,
                            "rope_parameters": PLAIN}),
    "ministral3": ("Ministral3", {"head_dim": 16, "rope_parameters": MINISTRAL}),
    "mistral3": ("Mistral3", {"head_dim": 16, "rope_parameters": MINISTRAL}),
    "glm4": ("Glm4", {"head_dim": 16, "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}),
}  # fmt: skip

GREEDY = 64  # tokens
# Tiny models: compiling takes longer than computing, and half as long without optimization.
compiled = functools.partial(
    jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of transformers in a folder, and ours, read from it."""

    theirs: Any
    folder: Path
    model: ModelConfig
    params: Any


def random_model(case: str) -> Any:
    """The transformers model of a case, every parameter random."""
    kind, settings = CASES[case]
    of, settings = functools.partial(getattr, transformers), SIZES | settings
    if case in WRAPPED:
        text, vision, more = WRAPPED[case]
        text = of(text)(**settings).to_dict()
        config = of(f"{kind}Config")(text_config=text, vision_config=VISION | vision, **more)
        model = of(f"{kind}ForConditionalGeneration")
    else:
        config = of(f"{kind}Config")(**settings)
        model = of(f"{kind.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    config._attn_implementation = "eager"  # caps scores, as others do not
    made = model(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.normal_(0 if kind.startswith("Gemma") else 1, 0.3)
            elif "vision" not in name:
                parameter.normal_(0, 0.2)
    return made


def make(case: str, folder: Path) -> Pair:
    theirs = random_model(case)
    theirs.save_pretrained(folder)
    model = read_config(folder)
    model = dataclasses.replace(model, longest=48)  # as a run of such rows would have it
    return Pair(theirs, folder, model, load_params(folder, model, one_device()))


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device alone: eight that compute the same take eight times as long."""
    return sharding.make_mesh(devices=jax.devices()[:1])


# --- Checks ---------------------------------------------------------------------------------------


PROMPT_LENGTHS = np.array([21, 9], np.int32)  # past windows and original lengths
COMPLETION_LENGTHS = np.array([[20, 3], [9, 20]])


def rows(vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [P, Q], their lengths, and completions [P, G, C], with garbage in the padding."""
    rng = np.random.default_rng(0)
    prompt_PQ = rng.integers(0, vocab, (2, 24), dtype=np.int32)
    return prompt_PQ, PROMPT_LENGTHS, rng.integers(0, vocab, (2, 2, 20), dtype=np.int32)


@compiled
def _score(params, model: ModelConfig, *rows):
    inputs = PackedInputs.of(*rows)
    hidden = inputs.by_completion(transformer.completion_states(params, model, inputs))
    return logits.logits(hidden, parameters.head_kernel(params), model.logit_cap)


def _texts(pair: Pair) -> dict[tuple[int, int], np.ndarray]:
    prompt_PQ, length_P, completion_PGC = rows(pair.model.vocab_size)
    return {
        (p, g): np.concatenate([prompt_PQ[p, :length], completion_PGC[p, g, :own]])
        for p, length in enumerate(length_P)
        for g, own in enumerate(COMPLETION_LENGTHS[p])
    }


def logits_apart(pair: Pair) -> float:
    """The largest difference to transformers' logits, of completions that share their prompts."""
    got = _score(pair.params, pair.model, *rows(pair.model.vocab_size))
    worst = 0.0
    for (p, g), text in _texts(pair).items():
        with torch.no_grad():
            out = pair.theirs(input_ids=torch.tensor(text[None]).long()).logits[0].float().numpy()
        first, own = PROMPT_LENGTHS[p] - 1, COMPLETION_LENGTHS[p][g]
        worst = max(worst, float(np.abs(got[p, g, :own] - out[first : first + own]).max()))
        assert np.ptp(out) > 1, "logits that are all alike show nothing"
    return worst


def packed_apart(pair: Pair) -> float:
    """The largest difference between log-probabilities as a run scores them, and of a row each.

    Scoring packs completions of all groups into lanes behind their prompts.
    """
    prompt_PQ, length_P, completion_PGC = rows(pair.model.vocab_size)
    length_PG = COMPLETION_LENGTHS.astype(np.int32)
    there_PGC = np.arange(completion_PGC.shape[2]) < length_PG[..., None]
    rollouts = Rollouts(
        prompt_PQ=np.where(np.arange(24) < length_P[:, None], prompt_PQ, 0),
        prompt_length_P=length_P,
        completion_PGC=np.where(there_PGC, completion_PGC, 0),
        logp_PGC=np.zeros(completion_PGC.shape, np.float32),
        length_PG=length_PG,
        stopped_PG=length_PG > 0,
    )
    scorer = Scorer(pair.model, one_device(), Sampling())
    prepare = make_prepare(
        scorer, AdvantageOptions(scale_by="none"), mask_truncated=False, with_old=True
    )
    got_PGC = np.asarray(prepare.log_probs(pair.params, None, rollouts).old_logp_PGC)
    of_each = np.repeat(prompt_PQ, 2, 0), np.repeat(length_P, 2), completion_PGC.reshape(4, 1, -1)
    alone = jax.nn.log_softmax(_score(pair.params, pair.model, *of_each))
    alone = alone.reshape(*completion_PGC.shape, -1)
    want_PGC = np.take_along_axis(np.asarray(alone), completion_PGC[..., None], axis=-1)[..., 0]
    return float(np.abs(got_PGC - want_PGC)[there_PGC].max())


def greedy_equal(pair: Pair) -> int:
    """How many of 64 tokens, decoded through the engine's cache, begin as transformers' do.

    And with the same log-probabilities, to 1e-4.
    """
    equal = GREEDY
    for got_C, logp_C, best in _decoded(pair, 0.0):
        # The likeliest after each of our tokens is our next: so theirs are the same, by induction.
        tokens = best.argmax(-1) == got_C
        same = tokens & (np.abs(best.max(-1) - logp_C) < 1e-4)
        equal = min(equal, int(np.argmin([*same, False])))
    return equal


def int8_apart(pair: Pair) -> float:
    """The mean difference to transformers of sampled tokens' log-probabilities.

    Weights and cache are in 8 bits.
    """
    return float(
        np.mean(
            [
                np.abs(logp_C - np.take_along_axis(want_CV, got_C[:, None], 1)[:, 0])
                for got_C, logp_C, want_CV in _decoded(pair, 1.0, weights="int8", cache="int8")
            ]
        )
    )


def _decoded(pair: Pair, temperature: float, **precision: str):
    """Of each prompt 64 tokens through the engine, their log-probabilities and transformers'."""
    prompt_PQ, length_P, _ = rows(pair.model.vocab_size)
    model = dataclasses.replace(pair.model, longest=24 + GREEDY)
    decoder = decode.decoder_for(
        model, one_device(), Sampling(temperature), (), GREEDY, jnp.float32, **precision
    )
    engine = Engine(decoder, num_slots=2)
    prompts = [[int(i) for i in row[:n]] for row, n in zip(prompt_PQ, length_P)]
    params, key = engine.publish(pair.params), jax.random.key(0)
    made = engine.generate(params, prompts, group=1, key=key, temperature=temperature)
    found = (np.asarray(x[:, 0]) for x in (made.completion_PGC, made.logp_PGC))
    for prompt, got_C, logp_C in zip(prompts, *found):
        with torch.no_grad():
            out = pair.theirs(torch.tensor([[*prompt, *got_C]])).logits[0, len(prompt) - 1 : -1]
        yield got_C, logp_C, out.float().log_softmax(-1).numpy()


def round_trip(pair: Pair, out: Path) -> str:
    """What is not bit for bit as it was after an export, and once transformers has read it; "".

    The export is of a run that has kept what it needs of the model's folder.
    """
    kept, how = out.with_name("kept"), {"dtype": "float32", "tokenizer": _tokenizer()}
    export.keep(kept, pair.model, pair.folder, **how)
    if any(kept.glob("*.safetensors")):
        return "what a run keeps looks like a model's weights"
    export.save(out, pair.params, pair.model, source=kept, **how)
    before, after = (_tensors(folder) for folder in (pair.folder, out))
    before = {names.spelled(name, pair.model): x for name, x in before.items()}
    if wrong := _unequal(before, after):
        return f"files: {wrong}"
    if read_config(out) != read_config(pair.folder):
        return "config.json is another"
    again, notes = type(pair.theirs).from_pretrained(out, output_loading_info=True)
    if wrong := [f"{k}: {v}" for k, v in notes.items() if v]:
        return f"transformers: {wrong}"
    return _unequal(pair.theirs.state_dict(), again.state_dict())


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}


def _unequal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> str:
    if before.keys() != after.keys():
        return f"{sorted(before.keys() ^ after.keys())}"
    return " ".join(name for name in before if not torch.equal(before[name], after[name]))


def taken(folder: Path) -> list[str]:
    """Keys of a folder's config that may have any value, and a key that nobody knows."""
    hf = json.loads((folder / "config.json").read_text())
    parts = [()] + [("text_config",)] * ("text_config" in hf)
    found = []
    for part in parts:
        for key in [*functools.reduce(lambda d, k: d[k], part, hf), "odd_key"]:
            changed = json.loads(json.dumps(hf))
            functools.reduce(lambda d, k: d[k], part, changed)[key] = {"odd": [1]}
            try:
                model_config(changed, "config.json")
                found.append(key)
            except ValueError as error:
                assert key in str(error), (key, error)
    return [k for k in found if k not in HARMLESS and k[0] != "_" and k not in families.OF_IMAGES]


def main(asked: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"{'':20}{'logits':>10}{'packed':>10}{'greedy':>8}{'int8':>8}  round trip   any value")
    for case in asked or CASES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            pair = make(case, Path(folder) / "model")
            numbers = [f(pair) for f in (logits_apart, packed_apart, greedy_equal, int8_apart)]
            trip = round_trip(pair, Path(folder) / "out") or "equal"
            odd = ", ".join(taken(pair.folder)) or "none"
        told = "{:20}{:10.1e}{:10.1e}{:8}{:8.4f}  ".format(case, *numbers)
        print(f"{told}{trip:13}{odd}  {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
