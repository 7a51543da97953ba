"""A scalar head: read and written as transformers' models with one label, with equal scores."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from hf_model import CASES, edit_json, rewrite, save_random_model

from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import scalars
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models import parameters, policy
from grpo_jax.models.hf import config_json, export
from grpo_jax.structs import Sampling

PAD = EOS = 2  # the pad token is the stop token
# Texts of two groups: with stop tokens inside (of turns) and at the end, once and twice; a text
# that is another's beginning; one of a single token besides the group's first.
TEXTS = [
    [[5, 9, EOS, 7, 11, 4, EOS], [5, 9, EOS, 7, 12, EOS, 13, 14]],
    [[8, 4, 3, EOS, EOS], [8, 6]],
    [[9, 9, 9, 10], [9, 9, 9, 10, 11]],
]


def save_classifier(folder, tokenizer, kind="Qwen2", settings=None, dtype=torch.float32):
    """A random reward model as transformers writes it."""
    torch.manual_seed(0)
    from hf_model import SIZES

    config = getattr(transformers, f"{kind}Config")(
        **SIZES | (settings or {}), num_labels=1, pad_token_id=PAD, eos_token_id=EOS
    )
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def our_scores(found, texts=TEXTS, **mesh):
    """Rewards [P, G] of texts by packed rows."""
    devices = None if mesh else jax.devices()[:1]
    mesh = sharding.make_mesh(**mesh, devices=devices)
    params = policy.load_params(found, mesh, seed=3)
    values = scalars.make_values(Scorer(found.model, mesh, Sampling()))
    given = scalars.as_rollouts(texts, found.pad_id, sharding.num_row_shards(mesh))
    rows = transfer.shard_rows(mesh, given)
    value_PGC = transfer.to_host(values.call(params, rows, given.length_PG, "rewards")())
    return np.where(given.chosen_PGC, value_PGC, 0).sum(-1)[: len(texts)]


def their_scores(model, side: str, texts=TEXTS):
    """The same by transformers, padded to one length on a side."""
    rows = [text for group in texts for text in group]
    longest = max(map(len, rows)) + 2
    pads = [[PAD] * (longest - len(row)) for row in rows]
    ids = [row + pad if side == "right" else pad + row for row, pad in zip(rows, pads)]
    mask = [[0 if side == "left" else 1] * len(p) + [1] * len(r) for r, p in zip(rows, pads)]
    if side == "right":
        mask = [[1] * len(r) + [0] * len(p) for r, p in zip(rows, pads)]
    with torch.no_grad():
        logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    return logits[:, 0].numpy().reshape(len(texts), -1)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers(case, tmp_path, tokenizer):
    """Read from its folder and written again; pad = eos, turn ends, both sides of padding."""
    kind, settings = CASES[case]
    model = save_classifier(tmp_path / "source", tokenizer, kind, settings)
    found = policy.read(str(tmp_path / "source"), head="scalar")
    assert found.model.head == "scalar" and not found.has_new_head and found.pad_id == PAD
    got = our_scores(found, **({"data": 2, "fsdp": 2, "tensor": 2} if case == "qwen3" else {}))
    assert got.std() > 0.1
    for side in ("right", "left"):
        np.testing.assert_allclose(got, their_scores(model, side), rtol=1e-5, atol=1e-5)

    mesh = tiny.one_device()
    params = policy.load_params(found, mesh, seed=0)
    assert found.model.num_params == sum(x.size for x in jax.tree.leaves(params))
    how = {"source": found.source, "dtype": jnp.float32, "tokenizer": tokenizer}
    export.save(tmp_path / "out", params, found.model, **how)
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()) and again.config.num_labels == 1
    np.testing.assert_array_equal(their_scores(again, "right"), their_scores(model, "right"))


def test_a_language_model_gets_a_new_head(tmp_path, tokenizer):
    save_random_model(tmp_path / "lm", *CASES["llama"])
    tokenizer.save_pretrained(tmp_path / "lm")
    found = policy.read(str(tmp_path / "lm"), head="scalar")
    assert found.has_new_head and found.model.head == "scalar"
    mesh = tiny.one_device()
    params = policy.load_params(found, mesh, seed=3)
    kernel = params["score"]["kernel"]
    assert kernel.shape == (32, 1) and kernel.dtype == jnp.float32 and "head" not in params
    other = policy.load_params(found, mesh, seed=4)["score"]["kernel"]
    assert not np.array_equal(kernel, other)
    how = {"source": found.source, "dtype": jnp.float32, "tokenizer": tokenizer}
    export.save(tmp_path / "out", params, found.model, **how)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id == found.pad_id
    plain = [[[t if t != found.pad_id else 7 for t in text] for text in g] for g in TEXTS]
    ids = [torch.tensor([text]) for g in plain for text in g]
    with torch.no_grad():
        want = [model(row).logits.item() for row in ids]
    np.testing.assert_allclose(our_scores(found, plain).ravel(), want, rtol=1e-5, atol=1e-5)


def test_a_fresh_head_has_the_variance_of_its_source():
    model = dataclasses.replace(tiny.MODEL, width=4096, head="scalar")
    kernel = np.asarray(parameters.scalar_head(model, jax.random.key(0))["kernel"])
    assert kernel.shape == (4096, 1)
    np.testing.assert_allclose(kernel.var() * 4097, 1, atol=0.1)
    shapes = parameters.param_shapes(dataclasses.replace(tiny.MODEL, head="scalar"))
    assert shapes["score"]["kernel"].shape == (32, 1) and "head" not in shapes


def test_a_new_model_is_written_with_its_head(tmp_path, tokenizer):
    model = dataclasses.replace(
        tiny.MODEL, family="qwen2", qk_norm="", qkv_bias=True, tied_head=True, head="scalar"
    )
    hf = config_json.hf_config(model, bos_id=None, eos_ids=(3,), pad_id=0)
    assert hf["architectures"] == ["Qwen2ForSequenceClassification"] and hf["pad_token_id"] == 0
    assert transformers.Qwen2Config(**hf).num_labels == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no tensor", "1 tensor missing: score.weight [1, 32]. config.json says that it is"),
        ("two labels", "with 2 labels"),
        ("labels unsaid", "with 2 labels (id2label, num_labels; 2 where neither is given)"),
        ("as a policy", "is a reward model (config.json: ForSequenceClassification)"),
    ],
)
def test_wrong_folders_are_refused(change, said, tmp_path, tokenizer):
    folder = tmp_path / "source"
    save_classifier(folder, tokenizer)
    head = "vocabulary" if change == "as a policy" else "scalar"
    if change == "no tensor":
        rewrite(folder, lambda tensors: tensors.pop("score.weight"))
    if change == "two labels":
        edit_json(folder / "config.json", id2label={"0": "a", "1": "b"})
    if change == "labels unsaid":
        file = folder / "config.json"
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in kept.items() if k != "id2label"}))
    with pytest.raises(ValueError) as info:
        policy.load_params(policy.read(str(folder), head=head), tiny.one_device(), seed=0)
    assert said in str(info.value)


def test_a_family_without_such_a_class_is_refused():
    for change in ({"family": "granite"}, {"family": "gemma3_text", "wrapper": "gemma3"}):
        with pytest.raises(ValueError, match="transformers has no text model with a score"):
            config_json.refuse_scalar(dataclasses.replace(tiny.MODEL, **change), "model.path = 'x'")


def test_texts_without_a_common_beginning_are_refused():
    with pytest.raises(ValueError, match="begin with different tokens"):
        scalars.as_rollouts([[[1, 2], [2, 2]]], None)


def test_a_text_of_pad_tokens_is_read_at_its_first():
    given = scalars.as_rollouts([[[PAD, PAD], [PAD, 5, PAD]]], PAD, shards=2)
    assert given.length_PG.tolist() == [[1, 2], [1, 1]]
    assert given.prompt_PQ[0, 0] == PAD and given.prompt_length_P.tolist() == [1, 1]
    assert given.chosen_PGC.sum((1, 2)).tolist() == [2, 0]
