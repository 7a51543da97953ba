"""What is exported: what transformers reads of it equals what was trained."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
import transformers
from hf_model import (
    CASES,
    K_PROJ,
    assert_trees_equal,
    edit_json,
    load,
    save_random_model,
    tensors_of,
)

from grpo_jax.devices import sharding
from grpo_jax.learner import optim
from grpo_jax.models import parameters, policy
from grpo_jax.models.hf import export
from grpo_jax.models.hf.export import save
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.hf.tokenizer import load_tokenizer, stop_ids
from grpo_jax.structs import Layer, ModelConfig, Rotary, TrainState
from grpo_jax.trainers import exporting

# --- Saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_export_gives_transformers_the_same_model(case, tmp_path, tokenizer):
    kind, settings = CASES[case]
    want = save_random_model(tmp_path / "source", kind, settings)
    tokenizer.save_pretrained(tmp_path / "source")
    config, params = load(tmp_path / "source", data=2, fsdp=2, tensor=2)
    save(tmp_path / "out", params, config, source=tmp_path / "source", dtype=jnp.float32,
            tokenizer=tokenizer)  # fmt: skip

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    got = model.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    source, out = (tensors_of(tmp_path / name) for name in ("source", "out"))
    assert source.keys() == out.keys()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    source_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert torch.equal(model(ids).logits, source_model(ids).logits)

    read = transformers.AutoTokenizer.from_pretrained
    if case == "qwen2":  # for which it splits words as Qwen2 does, whatever tokenizer.json says
        read = load_tokenizer
    again = read(tmp_path / "out")
    assert again("one two three").input_ids == [3, 4, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def new_model() -> tuple[ModelConfig, dict]:
    config = ModelConfig(
        family="qwen2", vocab_size=48, width=32, mlp_width=56, layers=(Layer(),) * 2, num_heads=4,
        num_kv_heads=2, head_size=8, rotaries=(Rotary(10_000.0),), norm_eps=1e-6, max_position=64,
        tied_head=True, qkv_bias=True,
    )  # fmt: skip
    return config, jax.jit(lambda: parameters.init(config, jax.random.key(0)))()


def test_a_new_model_is_exported_in_shards(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 8000)
    config, params = new_model()
    save(tmp_path / "out", params, config, source=None, dtype=jnp.bfloat16, tokenizer=tokenizer)

    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    sizes = [sum(t.nbytes for t in safetensors.numpy.load_file(f).values()) for f in shards]
    assert len(shards) > 2 and max(sizes) <= 8000
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()) and model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    again, reread = load(tmp_path / "out")
    assert again == config
    assert_trees_equal(
        reread, jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), params)
    )
    assert stop_ids(tmp_path / "out", load_tokenizer(tmp_path / "out"), 48) == (1,)


@pytest.mark.parametrize("number", [1, 2])
def test_two_shards_have_an_index_and_one_has_none(tmp_path, tokenizer, monkeypatch, number):
    config, params = new_model()
    whole = sum(x.size * 2 for x in jax.tree.leaves(params))
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", whole if number == 1 else whole * 2 // 3)
    save(tmp_path / "out", params, config, source=None, dtype=jnp.bfloat16, tokenizer=tokenizer)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == number
    assert (tmp_path / "out" / export.INDEX).exists() == (number == 2)
    again, _ = load(tmp_path / "out")
    assert again == config


def test_export_keeps_the_configs_of_the_source(folder, tmp_path, tokenizer):
    edit_json(
        folder / "config.json", torch_dtype="float32", eos_token_id=[2, 3], unsloth_version="kept"
    )
    edit_json(folder / "generation_config.json", eos_token_id=[2, 3], temperature=0.5)
    config, params = load(folder)
    save(tmp_path / "out", params, config, source=folder, dtype=jnp.bfloat16,
            tokenizer=tokenizer)  # fmt: skip
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((folder / "config.json").read_text())
    rope = {"rope_theta": 10_000.0, "rope_scaling": None}  # as transformers 4 has it
    assert written == source | rope | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert stop_ids(tmp_path / "out", tokenizer, 48) == (1, 2, 3)
    (folder / "generation_config.json").unlink()
    save(tmp_path / "out", params, config, source=folder, dtype=jnp.bfloat16,
            tokenizer=tokenizer)  # fmt: skip
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert made == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}


def test_an_interrupted_export_leaves_the_old_one(tmp_path, tokenizer, monkeypatch):
    config, params = new_model()
    arguments = {"source": None, "dtype": jnp.float32, "tokenizer": tokenizer}
    save(tmp_path / "out", params, config, **arguments)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    changed = jax.tree.map(lambda a: a + 1, params)

    with monkeypatch.context() as patch:
        patch.setattr(export, "_save_configs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path / "out", changed, config, **arguments)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path / "first", changed, config, **arguments)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "first").exists()

    save(tmp_path / "out", changed, config, **arguments)
    assert_trees_equal(load(tmp_path / "out")[1], changed)


def test_export_does_not_replace_what_is_no_model(tmp_path, tokenizer):
    (tmp_path / "thesis.tex").touch()
    config, params = new_model()
    with pytest.raises(ValueError, match="is not empty and holds no model"):
        save(tmp_path, params, config, source=None, dtype=jnp.float32, tokenizer=tokenizer)
    assert (tmp_path / "thesis.tex").exists()


# --- What came with the model is kept -------------------------------------------------------------


def exported(source: Path, out: Path, dtype: str = "auto", change=lambda params: params) -> Path:
    """The export of a run that began with `source`, which is gone before it ends."""
    read = policy.read(str(source))
    params = policy.load_params(read, sharding.make_mesh(), seed=0)
    read = policy.keep(read, out.with_name(f"{out.name}_kept"))
    source.rename(source.with_name("moved"))
    exporting.export(read, out, TrainState(change(params), (), 0, 0), dtype)
    source.with_name("moved").rename(source)
    return out


def test_tokenizer_files_are_kept_byte_for_byte(folder, tmp_path):
    """As transformers 4 wrote them: with the list of added tokens, and two templates."""
    words = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
             "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
             "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2},
                       "unk_token": "<s>"},
             "added_tokens": [{"id": 1, "content": "</s>", "single_word": False, "lstrip": False,
                               "rstrip": False, "normalized": False, "special": True}]}  # fmt: skip
    eos = {key: value for key, value in words["added_tokens"][0].items() if key != "id"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                "added_tokens_decoder": {"1": eos}, "chat_template": "{{ messages[0].content }}",
                "additional_special_tokens": ["</s>"]}  # fmt: skip
    files = {
        "tokenizer.json": json.dumps(words, indent=3),
        "tokenizer_config.json": json.dumps(settings, indent=7),
        "special_tokens_map.json": '{"eos_token":   "</s>"}',
        "additional_chat_templates/tool_use.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": [1, 2], "temperature": 0.5}',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "notes.md").touch()
    (folder / "tokenizer.json").chmod(0o444)
    out = exported(folder, tmp_path / "out")
    for name in files.keys() - {"generation_config.json"}:
        assert (out / name).read_bytes() == files[name].encode(), name
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
    assert not (out / "notes.md").exists()
    assert (out / "tokenizer.json").stat().st_mode & 0o200  # another export may replace it


def test_what_only_transformers_5_reads_is_put_so_that_all_do(folder, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "<turn>{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    before = json.loads((folder / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend" and before["is_local"]
    assert before["extra_special_tokens"] == ["<turn>"] and "chat_template" not in before
    out = exported(folder, tmp_path / "out")
    after = json.loads((out / "tokenizer_config.json").read_text())
    gone = {"is_local", "local_files_only", "backend", "auto_map", "extra_special_tokens"}
    assert not gone & after.keys()
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert after["additional_special_tokens"] == ["<turn>"]
    assert after["chat_template"] == tokenizer.chat_template
    assert after["added_tokens_decoder"]["5"]["content"] == "<turn>"
    assert (out / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    was, now = (load_tokenizer(f) for f in (folder, out))
    assert was.special_tokens_map == now.special_tokens_map
    assert was("one <turn>two").input_ids == now("one <turn>two").input_ids == [3, 5, 4]


def test_rotary_settings_stand_where_every_transformers_looks(tmp_path, tokenizer):
    """Version 4 passes over `rope_parameters`, and takes a base of 10,000."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    source = tmp_path / "source"
    save_random_model(source, "Llama", {"rope_parameters": scaling | {"rope_theta": 1000.0}})
    tokenizer.save_pretrained(source)
    out = exported(source, tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (1000.0, scaling)
    assert written["rope_parameters"] == scaling | {"rope_theta": 1000.0}
    assert read_config(out) == read_config(source)


def test_the_rights_of_an_export_are_those_of_any_new_file(folder, tokenizer, tmp_path):
    """Not for its owner alone, as safetensors leaves its files: a server is another user."""
    tokenizer.save_pretrained(folder)
    before = os.umask(0o027)
    try:
        out = exported(folder, tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}


# --- Dtype ----------------------------------------------------------------------------------------


def dtype_of(folder: Path) -> set[str]:
    """Of the tensors, and what config.json says of them."""
    settings = json.loads((folder / "config.json").read_text())
    said = {settings["dtype"], settings["torch_dtype"]}
    return said | {tensor.dtype.name for tensor in tensors_of(folder).values()}


def test_training_in_float32_is_not_rounded_away(tmp_path, tokenizer, capsys):
    """A step of 1e-6 on weights near 0.5 is lost in bfloat16, in which the source is kept."""
    source = tmp_path / "source"
    save_random_model(source, "Llama", {}, torch.bfloat16)
    tokenizer.save_pretrained(source)

    def trained(params):
        return jax.tree.map(lambda x: x + 1e-6, params)

    was = tensors_of(source)[K_PROJ].astype(np.float32)
    out = exported(source, tmp_path / "out", change=trained)
    assert dtype_of(out) == {"float32"} and capsys.readouterr().out == ""
    assert (tensors_of(out)[K_PROJ] != was).mean() > 0.9
    rounded = exported(source, tmp_path / "rounded", "bfloat16", trained)
    assert dtype_of(rounded) == {"bfloat16"}
    assert (tensors_of(rounded)[K_PROJ].astype(np.float32) != was).mean() < 0.1
    said = " ".join(capsys.readouterr().out.split())
    assert "rounded from float32 to bfloat16, as checkpoint.export_dtype asks for" in said


@pytest.mark.parametrize(
    ("said", "kept", "trained", "dtype"),
    [
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        (None, "bfloat16", "bfloat16", "bfloat16"),  # the weights tell
        ("float32", "float32", "bfloat16", "float32"),
        ("float16", "float16", "bfloat16", "float32"),  # neither holds the other's values
    ],
)
def test_an_export_is_as_wide_as_source_and_training(
    tmp_path, tokenizer, said, kept, trained, dtype
):
    source = tmp_path / "source"
    save_random_model(source, "Llama", {}, getattr(torch, kept))
    tokenizer.save_pretrained(source)
    edit_json(source / "config.json", dtype=said)
    out = exported(source, tmp_path / "out", "auto",
                   lambda params: jax.tree.map(lambda x: x.astype(trained), params))  # fmt: skip
    assert dtype_of(out) == {dtype}


@pytest.mark.parametrize("copied", [True, False])
def test_a_float32_copy_is_what_is_exported(tmp_path, tokenizer, copied):
    """A step of 1e-6 is in the copy alone."""
    save_random_model(tmp_path / "source", "Llama", {}, torch.bfloat16)
    tokenizer.save_pretrained(tmp_path / "source")
    read = policy.read(str(tmp_path / "source"))
    params = policy.load_params(read, sharding.make_mesh(), seed=0, dtype=jnp.bfloat16)
    optimizer = optim.with_master_weights(optax.sgd(1e-6)) if copied else optax.sgd(1e-6)
    grads = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), params)
    _, opt_state = optimizer.update(grads, optimizer.init(params), params)
    exporting.export(read, tmp_path / "out", TrainState(params, opt_state, 1, 0), "auto")
    was, found = (tensors_of(tmp_path / f)[K_PROJ] for f in ("source", "out"))
    assert dtype_of(tmp_path / "out") == {"float32" if copied else "bfloat16"}
    changed = (found.astype(np.float32) != was.astype(np.float32)).mean()
    assert changed > 0.9 if copied else changed == 0


# --- A model that goes away -----------------------------------------------------------------------


def test_a_run_goes_on_where_its_model_is_gone(tmp_path, tokenizer, capsys):
    source, kept = tmp_path / "source", tmp_path / "kept"
    save_random_model(source, "Llama", {}, torch.bfloat16)
    tokenizer.save_pretrained(source)
    edit_json(source / "config.json", dtype=None)  # the weights tell, which are not kept
    before = policy.keep(policy.read(str(source)), kept)
    assert before.source == source and before.kept == kept
    source.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="there is no such folder"):
        policy.read(str(source), kept=tmp_path / "of_another_run")
    capsys.readouterr()
    after = policy.read(str(source), kept=kept)
    assert "is not there any more" in " ".join(capsys.readouterr().out.split())
    assert (after.model, after.stop_ids) == (before.model, before.stop_ids)
    assert after.stored == before.stored == "bfloat16"
    assert after.tokenizer("one two").input_ids == [3, 4]
    assert policy.keep(after, kept) is after  # it is kept already
    with pytest.raises(ValueError, match="has no weights"):
        policy.load_params(after, sharding.make_mesh(), seed=0)
