"""Published models by the sizes of their config.json: as many parameters as transformers makes."""

from __future__ import annotations

import math

import jax
import pytest

from grpo_jax.models import parameters
from grpo_jax.models.families import model_config


def _sizes(width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more) -> dict:
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, **more,
    }  # fmt: skip


_R1 = {"use_mrope": False, "use_sliding_window": False, "sliding_window": 4096}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768,
         "attn_factor": 0.8782488562869419}  # fmt: skip
_OLMO3 = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
          "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1}  # fmt: skip
_MINISTRAL = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0,
              "original_max_position_embeddings": 16_384, "beta_fast": 32.0, "beta_slow": 1.0,
              "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}  # fmt: skip
_LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}

# By name: model_type, keys of the file, parameters of the text model.
MODELS = {
    "gemma-2-2b": ("gemma2", _sizes(2304, 9216, 26, 8, 4, 256_000, head_dim=256), 2_614_341_888),
    "gemma-2-9b": ("gemma2", _sizes(3584, 14_336, 42, 16, 8, 256_000, head_dim=256), 9_241_705_984),
    "gemma-3-270m": ("gemma3_text", _sizes(640, 2048, 18, 4, 1, 262_144, head_dim=256),
                     268_098_176),
    "gemma-3-1b": ("gemma3_text", _sizes(1152, 6912, 26, 4, 1, 262_144, sliding_window=512,
                                         rope_local_base_freq=1e4, sliding_window_pattern=6),
                   999_885_952),
    "gemma-3-4b": ("gemma3", {"text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240,
        "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}, 3_880_263_168),
    "gemma-3-27b": ("gemma3", {"text_config": {"model_type": "gemma3_text", "head_dim": 128,
        "query_pre_attn_scalar": 168, **_sizes(5376, 21_504, 62, 32, 16, 262_208)}},
                    27_009_346_304),
    "SmolLM3-3B": ("smollm3", _sizes(2048, 11_008, 36, 16, 4, 128_256, rope_theta=5e6,
                                     no_rope_layer_interval=4), 3_075_098_624),
    "OLMo-2-7B": ("olmo2", _sizes(4096, 11_008, 32, 32, 32, 100_352), 7_298_617_344),
    "Olmo-3-7B": ("olmo3", _sizes(4096, 11_008, 32, 32, 32, 100_278, rope_scaling=_OLMO3,
                                  rope_theta=500_000), 7_298_011_136),
    "Phi-3-mini-4k": ("phi3", _sizes(3072, 8192, 32, 32, 32, 32_064, sliding_window=2047,
                                     resid_pdrop=0.0, embd_pdrop=0.0), 3_821_079_552),
    "phi-4": ("phi3", _sizes(5120, 17_920, 40, 40, 10, 100_352, rope_theta=250_000.0,
                             original_max_position_embeddings=16_384), 14_659_507_200),
    "Phi-4-mini": ("phi3", _sizes(3072, 8192, 32, 24, 8, 200_064, tie_word_embeddings=True,
                                  partial_rotary_factor=0.75, rope_scaling=_LONG, full_attn_mod=1,
                                  interpolate_factor=1, lm_head_bias=False), 3_836_021_760),
    "Seed-OSS-36B": ("seed_oss", _sizes(5120, 27_648, 64, 80, 8, 155_136, head_dim=128,
                                        attention_out_bias=False, residual_dropout=0.1),
                     36_151_104_512),
    "granite-3.0-2b": ("granite", _sizes(2048, 8192, 40, 32, 8, 49_155, attention_multiplier=0.0156,
                                         embedding_multiplier=12.0, residual_multiplier=0.22,
                                         logits_scaling=8.0, tie_word_embeddings=True),
                       2_533_531_648),
    "GLM-4-9B-0414": ("glm4", _sizes(4096, 13_696, 40, 32, 2, 151_552, head_dim=128,
                                     partial_rotary_factor=0.5, attention_bias=True),
                      9_400_279_040),
    "Ministral-3-3B": ("mistral3", {"image_token_index": 10, "text_config": {
        "model_type": "ministral3", "rope_parameters": _MINISTRAL, "head_dim": 128,
        "tie_word_embeddings": True, **_sizes(3072, 9216, 26, 32, 8, 131_072)}}, 3_429_006_336),
    "Ministral-3-8B": ("ministral3", _sizes(4096, 14_336, 34, 32, 8, 131_072, head_dim=128,
                                            rope_parameters=_MINISTRAL), 8_489_553_920),
    "deepseek-llm-7b": ("llama", _sizes(4096, 11_008, 30, 32, 32, 102_400, pretraining_tp=1,
                                        rope_scaling=None, rope_theta=1e4), 6_910_365_696),
    "deepseek-coder-6.7b": ("llama", _sizes(4096, 11_008, 32, 32, 32, 32_256, rope_theta=1e5,
                            rope_scaling={"type": "linear", "factor": 4.0}), 6_740_512_768),
    "R1-Distill-Qwen-1.5B": ("qwen2", _sizes(1536, 8960, 28, 12, 2, 151_936, max_window_layers=21,
                                             rope_theta=10_000, **_R1), 1_777_088_000),
    "R1-Distill-Qwen-32B": ("qwen2", _sizes(5120, 27_648, 64, 40, 8, 152_064, max_window_layers=64,
                                            rope_theta=1e6, **_R1), 32_763_876_352),
    "R1-Distill-Llama-8B": ("llama", _sizes(4096, 14_336, 32, 32, 8, 128_256, rope_scaling=_LLAMA3,
                            attention_bias=False, mlp_bias=False, pretraining_tp=1), 8_030_261_248),
    "R1-0528-Qwen3-8B": ("qwen3", _sizes(4096, 12_288, 36, 32, 8, 151_936, head_dim=128,
                                         rope_scaling=_YARN, max_window_layers=36), 8_190_735_360),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_as_many_parameters_as_published(name):
    family, hf, published = MODELS[name]
    model = model_config({"model_type": family} | hf, f"{name}/config.json")
    shapes = jax.tree.leaves(parameters.param_shapes(model))
    assert sum(math.prod(x.shape) for x in shapes) == published
    assert model.num_params == published
