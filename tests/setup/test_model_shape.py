"""The shape of a config's model, as the run of that config has it."""

from __future__ import annotations

import json

import pytest

from grpo_jax.config import derived, options
from grpo_jax.models import frequencies
from grpo_jax.setup import model

PHI3 = {
    "model_type": "phi3", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
}  # fmt: skip


@pytest.mark.parametrize(("max_tokens", "divisor"), [(32, 1), (33, 8)])
def test_long_rope_has_the_list_of_the_longest_row_that_a_run_may_have(
    tmp_path, max_tokens, divisor
):
    (tmp_path / "config.json").write_text(json.dumps(PHI3))
    config = options.default()
    config.model.path = str(tmp_path)
    config.data.max_prompt_tokens, config.sft.max_tokens = 32, 8
    config.rollout.max_tokens = max_tokens

    shape = model.model_shape(config)

    assert shape.longest == derived.longest_row(config) == 32 + max_tokens
    of_run = frequencies.of(shape.rotaries[0], shape.head_size, shape.longest)
    assert of_run[0] == pytest.approx(1 / divisor)
