"""Weights of Hugging Face folders: what is read equals what transformers wrote."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hf_model import (
    CASES,
    K_PROJ,
    SIZES,
    assert_trees_equal,
    edit_json,
    load,
    rewrite,
    save_random_model,
    tensors_of,
)

from grpo_jax.models import parameters
from grpo_jax.models.hf import weights

# --- Loading ------------------------------------------------------------------------------------


def test_kernels_are_transposed_and_layers_stacked(folder):
    tensors = tensors_of(folder)
    _, params = load(folder)

    np.testing.assert_array_equal(params["layers"]["attention"]["k"]["kernel"][1],
                                  tensors[K_PROJ].T)  # fmt: skip
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors[weights._EMBEDDING])
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["model.norm.weight"])


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_holds_what_one_device_holds(case, tmp_path):
    save_random_model(tmp_path, *CASES[case])
    config, whole = load(tmp_path, data=8)
    _, split = load(tmp_path, data=2, fsdp=2, tensor=2)

    assert_trees_equal(whole, split)
    shapes = parameters.param_shapes(config)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), split) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    gate = split["layers"]["mlp"]["gate"]["kernel"]  # [L, D, F]: fsdp halves D, tensor F
    assert gate.addressable_shards[0].data.shape == (2, 16, 28)


def test_each_device_reads_only_its_slices(folder, monkeypatch):
    """Of every kernel a mesh of fsdp 2 and tensor 2 reads four quarters, each once."""
    read = []

    class Counted:
        def __init__(self, slices):
            self.slices = slices

        def __getitem__(self, index):
            value = self.slices[index]
            read.append(value.shape)
            return value

    opened = weights._open
    monkeypatch.setattr(
        weights,
        "_open",
        lambda folder: {
            name: t._replace(slices=Counted(t.slices)) if name == K_PROJ else t
            for name, t in opened(folder).items()
        },
    )
    load(folder, data=2, fsdp=2, tensor=2)
    assert read == [(8, 16)] * 4  # of [16, 32]


def test_sharded_checkpoints_with_and_without_index(saved, tmp_path):
    save_random_model(tmp_path, "Llama", {}, max_shard_size="15KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    _, want = load(saved)
    assert_trees_equal(load(tmp_path)[1], want)
    (tmp_path / weights.INDEX).unlink()
    assert_trees_equal(load(tmp_path)[1], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(dtype, tmp_path):
    tensors = save_random_model(tmp_path, "Qwen2", {}, dtype)
    _, params = load(tmp_path)
    got = params["layers"]["attention"]["k"]["kernel"]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got[1], tensors[K_PROJ].float().numpy().T)


def test_loading_as_bfloat16_rounds(folder):
    _, params = load(folder, jnp.bfloat16, fsdp=2)
    want = tensors_of(folder)[K_PROJ].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["layers"]["attention"]["k"]["kernel"][1], want)


def test_old_rotary_buffers_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _, want = load(folder)
    rewrite(folder, lambda t: t.update({name: np.ones(4, np.float32)}))
    assert_trees_equal(load(folder)[1], want)


def test_a_shared_tensor_under_the_heads_name_alone_is_the_embedding(tmp_path):
    """As safetensors' `save_model` leaves it."""
    save_random_model(tmp_path, "Qwen2", {"tie_word_embeddings": True})
    _, want = load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({weights._HEAD: t.pop(weights._EMBEDDING)}))
    assert_trees_equal(load(tmp_path)[1], want)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 tensor missing: model\.embed_tokens\.weight"):
        load(tmp_path)


def test_a_decoder_saved_without_its_head_lacks_the_prefix(tmp_path):
    save_random_model(tmp_path, "Qwen2", {"tie_word_embeddings": True})
    _, want = load(tmp_path)

    def cut(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path, cut)
    assert_trees_equal(load(tmp_path)[1], want)


def test_a_tied_head_is_accepted_only_as_a_copy(tmp_path, monkeypatch):
    save_random_model(tmp_path, "Qwen2", {"tie_word_embeddings": True})
    _, want = load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({weights._HEAD: t[weights._EMBEDDING].copy()}))
    monkeypatch.setattr(weights, "_COMPARED_ROWS", 10)  # of 48: the last part is a short one
    assert_trees_equal(load(tmp_path)[1], want)

    def change_one_number(tensors):
        tensors[weights._HEAD][47, 31] += 1

    rewrite(tmp_path, change_one_number)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true .* lm_head\.weight \["):
        load(tmp_path)


# --- Refusals -----------------------------------------------------------------------------------


def drop_and_reshape(tensors):
    del tensors[K_PROJ], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.ones(33, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((1, 2), np.float32)


def test_tensors_that_do_not_fit_are_named_together(folder):
    rewrite(folder, drop_and_reshape)
    with pytest.raises(ValueError) as error:
        load(folder)
    for said in (
        str(folder),
        f"2 tensors missing: lm_head.weight [48, 32], {K_PROJ} [16, 32]",
        "1 tensor not used by the model: model.layers.2.mlp.up_proj.weight [1, 2] "
        "(model.safetensors)",
        "1 tensor of another shape: model.norm.weight is [33], needed [32] (model.safetensors)",
    ):
        assert said in str(error.value)


def test_many_wrong_tensors_are_counted(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"9 tensors not used by the model: .* and 5 more"):
        load(folder)


def test_a_bias_that_the_config_does_not_have_is_refused(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda t: t.update({name: np.zeros(32, np.float32)}))
    with pytest.raises(ValueError, match=rf"not used by the model: {name} \[32\]"):
        load(folder)


def test_a_model_without_a_head_is_told_how_to_have_one(folder):
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"If the head is the embedding, set tie_word_embeddings"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("index", [True, False])
def test_a_pipe_in_the_place_of_weights_is_refused(folder, name, index):
    """Opening it would wait for a writer for ever."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if index:
        (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=rf"{name} is not a plain file"):
        load(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user for a moment")
def test_weights_that_one_may_not_read_are_not_called_broken(saved):
    with tempfile.TemporaryDirectory() as base:  # pytest's own are closed to others
        os.chmod(base, 0o755)
        folder = Path(shutil.copytree(saved, Path(base) / "model"))
        folder.chmod(0o755)
        (folder / "model.safetensors").chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=r"cannot be read: Permission denied\."):
                load(folder)
        finally:
            os.seteuid(0)


def test_integer_weights_are_refused(folder):
    rewrite(folder, lambda t: t.update({K_PROJ: np.zeros((16, 32), np.int8)}))
    with pytest.raises(ValueError, match=r"dtype that is not F32, F16, BF16: .*k_proj.* is I8"):
        load(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    tensor = {K_PROJ: tensors_of(folder)[K_PROJ]}
    safetensors.numpy.save_file(tensor, folder / "model-00001-of-00001.safetensors")
    files = r"\(model\.safetensors and model-00001-of-00001\.safetensors\)"
    with pytest.raises(ValueError, match=rf"1 tensor in more than one file: {K_PROJ} {files}"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no weights.* pytorch_model\.bin, but pickles can run"):
        load(folder)


def test_no_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: no model\.safetensors") as error:
        load(folder)
    assert "pickles" not in str(error.value)


@pytest.mark.parametrize(
    "index, said",
    [
        ("{", r"index\.json cannot be read as JSON"),
        ("{}", "weight_map must give a file"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "weight_map must give a file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"names gone\.safetensors, which"),
    ],
)
def test_a_broken_index_is_refused(folder, index, said):
    (folder / weights.INDEX).write_text(index)
    with pytest.raises(ValueError, match=said):
        load(folder)


# --- Memory -------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory of this process that is not a view of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def save_large_model(folder: Path, num_files: int) -> tuple[int, int]:
    """A random Llama of 0.5 GB in several files; its bytes and those of its largest tensor."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 28}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 14_000}
    config = transformers.LlamaConfig(**SIZES | sizes)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    rng, where, largest = np.random.default_rng(0), {}, 0
    for i, names in enumerate(np.array_split(list(shapes), num_files)):
        tensors = {n: rng.random(shapes[n].shape, np.float32) for n in names.tolist()}
        largest = max(largest, *(x.nbytes for x in tensors.values()))
        where |= dict.fromkeys(tensors, f"model-{i}.safetensors")
        safetensors.numpy.save_file(tensors, folder / where[names[0]])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return 4 * sum(x.numel() for x in shapes.values()), largest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_than_the_parameters(tmp_path):
    """On simulated devices the parameters themselves lie in the process's memory too."""
    total, largest = save_large_model(tmp_path, num_files=8)
    assert total > 5e8 > 17 * largest
    before, most, done = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, params = load(tmp_path, data=1, fsdp=8)
    jax.block_until_ready(params)
    done.set()
    watcher.join()
    assert sum(x.nbytes for x in jax.tree.leaves(params)) == total
    assert most[0] - before - total < 1.3 * largest + 2**25
