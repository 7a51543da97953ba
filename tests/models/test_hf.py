"""Hugging Face folders: what is read equals what transformers wrote, and the other way round."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers

from grpo_jax import sharding
from grpo_jax.models import hf, transformer
from grpo_jax.structs import ModelConfig

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CASES = {
    "llama": ("Llama", {"attention_bias": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": 4}),
}
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def save_random_model(folder: Path, kind: str, settings: dict, dtype=torch.float32, **kwargs):
    """Writes a transformers model whose every parameter is random, and returns its tensors."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder, **kwargs)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A Llama of 20 tensors with its own head, in one file."""
    folder = tmp_path_factory.mktemp("saved")
    save_random_model(folder, "Llama", {})
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of `saved` that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "one": 3, "two": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def load(folder: Path, dtype=jnp.float32, **mesh):
    config = hf.read_config(folder)
    return config, hf.load_params(folder, config, sharding.make_mesh(**mesh), dtype)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    files = folder.glob("*.safetensors")
    return {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}


def rewrite(folder: Path, change) -> None:
    """Replaces the checkpoint's tensors by those that `change` leaves in the dict."""
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_trees_equal(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# --- Loading ------------------------------------------------------------------------------------


def test_kernels_are_transposed_and_layers_stacked(folder):
    tensors = tensors_of(folder)
    _, params = load(folder)

    np.testing.assert_array_equal(params["layers"]["attention"]["k"]["kernel"][1],
                                  tensors[K_PROJ].T)  # fmt: skip
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors[hf._EMBEDDING])
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["model.norm.weight"])


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_holds_what_one_device_holds(case, tmp_path):
    save_random_model(tmp_path, *CASES[case])
    config, whole = load(tmp_path, data=8)
    _, split = load(tmp_path, data=2, fsdp=2, tensor=2)

    assert_trees_equal(whole, split)
    shapes = transformer.param_shapes(config)
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

    opened = hf._open
    monkeypatch.setattr(
        hf,
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
    (tmp_path / hf.INDEX).unlink()
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


def test_a_tied_head_is_accepted_only_as_a_copy(tmp_path, monkeypatch):
    save_random_model(tmp_path, "Qwen2", {"tie_word_embeddings": True})
    _, want = load(tmp_path)
    rewrite(tmp_path, lambda t: t.update({hf._HEAD: t[hf._EMBEDDING].copy()}))
    monkeypatch.setattr(hf, "_COMPARED_ROWS", 10)  # of 48, so that the last part is a short one
    assert_trees_equal(load(tmp_path)[1], want)

    def change_one_number(tensors):
        tensors[hf._HEAD][47, 31] += 1

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
    (folder / hf.INDEX).write_text(index)
    with pytest.raises(ValueError, match=said):
        load(folder)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, r"config\.json: there is no such file"),
        ("{", r"config\.json cannot be read as JSON"),
        ("[]", r"config\.json holds list, not a JSON object"),
        ("\udcff", r"config\.json cannot be read as JSON"),
        ('{"model_type": "mamba"}', r"config\.json: model_type = 'mamba' is not supported"),
    ],
)
def test_a_broken_config_is_refused(folder, text, said):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=said):
        hf.read_config(folder)


# --- Where a model lies -------------------------------------------------------------------------


def test_resolve_finds_a_local_folder(tmp_path, monkeypatch):
    assert hf.resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert hf.resolve(f"./{tmp_path.name}").samefile(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert hf.resolve(f"~/{tmp_path.name}") == tmp_path


@pytest.mark.parametrize("path", ["/gone/x", "./gone", "~/gone", "../gone", "a/b/c", "runs/x", ""])
def test_resolve_refuses_a_path_that_does_not_exist(path, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not even asked
    with pytest.raises(ValueError, match="no such folder, and it does not look like a hub id"):
        hf.resolve(path)


def test_resolve_refuses_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a file\. Give the folder"):
        hf.resolve(str(tmp_path / "model.safetensors"))


def test_resolve_says_at_once_that_the_hub_cannot_be_reached(monkeypatch):
    """It neither waits nor tries again."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ValueError, match=r"model\.path = 'nobody/nothing': there is no"):
        hf.resolve("nobody/nothing")
    assert not waits


def test_resolve_names_a_user_that_is_not_there():
    with pytest.raises(ValueError, match=r"model\.path = '~nosuchuser/m': ~nosuchuser stands for"):
        hf.resolve("~nosuchuser/m")


def test_resolve_downloads_no_pickles(monkeypatch, tmp_path):
    files = ["config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja"]
    others = ["pytorch_model.bin", "x.pt", "consolidated.safetensors", "original/a.json", "a.py"]
    fetched = []

    def download(name, *, allow_patterns, ignore_patterns, **_):
        fetched.extend(
            huggingface_hub.utils.filter_repo_objects(
                files + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.resolve("owner/name") == tmp_path
    assert fetched == files


# --- Saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_export_gives_transformers_the_same_model(case, tmp_path, tokenizer):
    kind, settings = CASES[case]
    want = save_random_model(tmp_path / "source", kind, settings)
    config, params = load(tmp_path / "source", data=2, fsdp=2, tensor=2)
    hf.save(tmp_path / "out", params, config, source=tmp_path / "source", dtype=jnp.float32,
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

    load_tokenizer = transformers.AutoTokenizer.from_pretrained
    if case == "qwen2":  # for which it splits words as Qwen2 does, whatever tokenizer.json says
        load_tokenizer = hf.load_tokenizer
    again = load_tokenizer(tmp_path / "out")
    assert again("one two three").input_ids == [3, 4, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def new_model() -> tuple[ModelConfig, dict]:
    config = ModelConfig(
        family="qwen2", vocab_size=48, width=32, mlp_width=56, num_layers=2, num_heads=4,
        num_kv_heads=2, head_size=8, rope_theta=10_000.0, norm_eps=1e-6, max_position=64,
        tied_head=True, qkv_bias=True,
    )  # fmt: skip
    return config, jax.jit(lambda: transformer.init(config, jax.random.key(0)))()


def test_a_new_model_is_exported_in_shards(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 8000)
    config, params = new_model()
    hf.save(tmp_path / "out", params, config, source=None, dtype=jnp.bfloat16, tokenizer=tokenizer)

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
    assert hf.stop_ids(tmp_path / "out", hf.load_tokenizer(tmp_path / "out")) == (1,)


def test_export_keeps_the_configs_of_the_source(folder, tmp_path, tokenizer):
    edit_json(folder / "config.json", torch_dtype="float32", eos_token_id=[2, 3], extra="kept")
    edit_json(folder / "generation_config.json", eos_token_id=[2, 3], temperature=0.5)
    config, params = load(folder)
    hf.save(tmp_path / "out", params, config, source=folder, dtype=jnp.bfloat16,
            tokenizer=tokenizer)  # fmt: skip
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((folder / "config.json").read_text())
    assert written == source | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert hf.stop_ids(tmp_path / "out", tokenizer) == (1, 2, 3)
    (folder / "generation_config.json").unlink()
    hf.save(tmp_path / "out", params, config, source=folder, dtype=jnp.bfloat16,
            tokenizer=tokenizer)  # fmt: skip
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert made == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}


def test_an_interrupted_export_leaves_the_old_one(tmp_path, tokenizer, monkeypatch):
    config, params = new_model()
    arguments = {"source": None, "dtype": jnp.float32, "tokenizer": tokenizer}
    hf.save(tmp_path / "out", params, config, **arguments)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    changed = jax.tree.map(lambda a: a + 1, params)

    with monkeypatch.context() as patch:
        patch.setattr(hf, "_save_configs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hf.save(tmp_path / "out", changed, config, **arguments)
        with pytest.raises(ZeroDivisionError):
            hf.save(tmp_path / "first", changed, config, **arguments)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "first").exists()

    hf.save(tmp_path / "out", changed, config, **arguments)
    assert_trees_equal(load(tmp_path / "out")[1], changed)


def test_export_does_not_replace_what_is_no_model(tmp_path, tokenizer):
    (tmp_path / "thesis.tex").touch()
    config, params = new_model()
    with pytest.raises(ValueError, match="is not empty and holds no model"):
        hf.save(tmp_path, params, config, source=None, dtype=jnp.float32, tokenizer=tokenizer)
    assert (tmp_path / "thesis.tex").exists()


# --- Tokenizer ----------------------------------------------------------------------------------


def test_a_missing_or_broken_tokenizer_is_refused(folder, tokenizer):
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer\.json"):
        hf.load_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    assert hf.load_tokenizer(folder)("two").input_ids == [4]
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        hf.load_tokenizer(folder)


@pytest.mark.parametrize(
    "generation, config, ids",
    [
        (7, 9, (1, 7)),
        ([9, 7], None, (1, 7, 9)),
        (None, 9, (1, 9)),
        (None, None, (1,)),
        (1, [1, 2], (1,)),
    ],
)
def test_stop_ids(folder, tokenizer, generation, config, ids):
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    edit_json(folder / "config.json", eos_token_id=config)
    assert hf.stop_ids(folder, tokenizer) == ids


def test_stop_ids_that_are_none_or_no_ids_are_refused(folder, tokenizer):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id = '</s>' must be a token id"):
        hf.stop_ids(folder, tokenizer)
    edit_json(folder / "config.json", eos_token_id=None)
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="names no token that ends a completion"):
        hf.stop_ids(folder, bare)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_tokenizer_is_the_one_that_transformers_chooses(shared, tmp_path, family):
    folder = Path(shutil.copytree(shared / "tokenizers" / "qwen2.5-instruct", tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    want = transformers.AutoTokenizer.from_pretrained(folder)
    got = hf.load_tokenizer(folder)
    assert type(got) is type(want)
    assert got.special_tokens_map == want.special_tokens_map and len(got) == len(want)
    chat = [
        {"role": "user", "content": "How many are 12345 + 678?\n\n\tAnd don't  guess: ½ é 东京"}
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in (got, want)]
    assert texts[0] == texts[1] and got(texts[0]).input_ids == want(texts[1]).input_ids


# --- Memory -------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory of this process that is not a view of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def save_large_model(folder: Path, num_files: int) -> tuple[int, int]:
    """A random Llama of 2 GB in several files; its bytes and those of its largest tensor."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 27}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32_000}
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
    assert total > 2e9 > 15 * largest
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
    assert most[0] - before - total < 1.3 * largest + 2**26
