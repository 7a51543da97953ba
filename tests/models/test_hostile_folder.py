"""Model folders that are made to do harm: each is refused by a message, or its harm is not done."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers

from grpo_jax.models.hf import weights
from grpo_jax.models.hf.folder import read_config
from grpo_jax.models.hf.tokenizer import load_tokenizer, stop_ids

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 5, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder with a config, a tokenizer and one tensor, all as they should be."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "one": 3, "two": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    tensors = {"model.norm.weight": np.ones(8, np.float32)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(call, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        call(folder)
    message = str(error.value)
    assert len(message) < 1000
    return message


# --- Code -----------------------------------------------------------------------------------------


def test_code_of_a_model_is_not_run(folder, tmp_path):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass Own:\n    from_pretrained = print\n"
    (folder / "own.py").write_text(code)
    edit(folder / "config.json", auto_map={"AutoConfig": "own.Own", "AutoTokenizer": "own.Own"})
    # As transformers writes it: the class without a Rust backend, and the one with.
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    assert read_config(folder).family == "llama"
    for changes in ({}, {"tokenizer_class": "Own"}):
        edit(folder / "tokenizer_config.json", **changes)
        try:
            tokenizer = load_tokenizer(folder)
        except ValueError as error:
            assert "the tokenizer cannot be loaded" in str(error)
        else:
            assert tokenizer("two").input_ids == [4]
    assert not mark.exists()


def test_only_safetensors_are_weights(folder):
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(b"\x80\x04.")
    assert set(weights._open(folder)) == {"model.norm.weight"}
    (folder / "model.safetensors").unlink()
    message = refused(weights._open, folder)
    assert "model.pt, pytorch_model.bin" in message or "pytorch_model.bin, model.pt" in message
    assert "pickles can run code and are not read" in message
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")  # under a false name
    assert "not a whole safetensors file" in refused(weights._open, folder)


# --- Paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", 3])
def test_shards_outside_of_the_folder_are_refused(folder, name):
    (folder.parent / "x.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "weight_map must give a file of the folder" in refused(weights._open, folder)


def test_links_are_followed_as_the_hubs_cache_needs(folder, tmp_path):
    """It keeps files by their hash and gives a model's folder links to them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert read_config(folder).width == 8
    assert load_tokenizer(folder)("two").input_ids == [4]
    assert weights._open(folder)["model.norm.weight"].shape == (8,)


@pytest.mark.parametrize("key", ["fast_tokenizer_files", "tokenizer_file", "vocab_file"])
def test_tokenizers_outside_of_the_folder_are_not_read(folder, key):
    """They would give `two` another number."""
    other = folder.parent / "tokenizer.1.json"
    text = (folder / "tokenizer.json").read_text()
    other.write_text(text.replace('"one":3,"two":4', '"one":4,"two":3').replace(
        '"one": 3,\n      "two": 4', '"one": 4,\n      "two": 3'))  # fmt: skip
    assert other.read_text() != text
    files = {"fast_tokenizer_files": ["../tokenizer.1.json"]}
    edit(folder / "tokenizer_config.json", **files if key in files else {key: str(other)})
    if key in files:
        assert "'../tokenizer.1.json' is not one" in refused(load_tokenizer, folder)
    else:
        assert load_tokenizer(folder)("two").input_ids == [4]


@pytest.mark.parametrize("changes", [{"model_max_length": []}, {"padding_side": 3}])
def test_settings_of_a_tokenizer_that_are_none_are_refused(folder, changes):
    """transformers looks at some of them when a text comes."""
    edit(folder / "tokenizer_config.json", **changes)
    assert "the tokenizer cannot be loaded" in refused(load_tokenizer, folder)


# --- What would fill the memory, or never end -----------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_files_without_an_end_are_refused(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)  # reading it would wait for a writer for ever
    assert f"{name} is not a plain file" in refused(_all_of, folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_of_absurd_sizes_are_refused(folder, name):
    os.truncate(folder / name, 10**10)
    assert f"{name} has 10000000000 bytes, and a file of its kind at most" in refused(
        _all_of, folder
    )


def _all_of(folder: Path) -> None:
    read_config(folder)
    stop_ids(folder, load_tokenizer(folder), 5)


_TWICE = {"type": "Replace", "pattern": {"String": "t"}, "content": "tt"}
_NOTHING = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 999}  # at each place
_UNTYPED = {"pattern": {"String": "t"}, "content": "tt"}
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_COPIES = [{"Sequence": {"id": "A", "type_id": 0}}] * 32
_MANY = {"<x>": {"id": "<x>", "ids": [1] * 999, "tokens": ["<x>"] * 999}}


def _template(pieces: list, tokens: dict) -> dict:
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": tokens}


@pytest.mark.parametrize(
    ("stage", "rule", "times"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [_TWICE] * 40}, "1.1e+12"),
        ("normalizer", {"normalizers": [{"normalizers": [_UNTYPED] * 20}] * 2}, "1.1e+12"),
        ("normalizer", {"type": "Sequence", "normalizers": [_TWICE, _NOTHING]}, "2e+03"),
        ("normalizer", {"type": "Prepend", "prepend": "t" * 10**6}, "1e+06"),
        ("normalizer", {"type": "Sequence", "normalizers": [_TWICE] * 10**4}, "inf"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [_BYTES] * 6}, "4.1e+03"),
        ("post_processor", {"type": "Sequence", "processors": [_template(_COPIES, {})] * 2},
         "1.02e+03"),
        ("post_processor",
         _template([{"SpecialToken": {"id": "<x>", "type_id": 0}}] * 99, _MANY), "9.89e+04"),
        ("decoder", {"type": "Sequence", "decoders": [_TWICE] * 40}, "1.1e+12"),
    ],
)  # fmt: skip
def test_rules_that_lengthen_texts_without_measure_are_refused(folder, stage, rule, times):
    """Rust would end the process once the memory is full."""
    edit(folder / "tokenizer.json", **{stage: rule})
    message = refused(load_tokenizer, folder)
    assert f"{stage}" in message and f"may make a text {times} times as long" in message


def test_a_table_that_lengthens_texts_is_refused(folder):
    """SentencePiece's: what characters turn into stands after a trie, here an empty one."""
    table = struct.pack("<I", 4) + bytes(4) + b"t" * 5000 + b"\0"
    rule = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    edit(folder / "tokenizer.json", normalizer=rule)
    assert "may make a text 5e+03 times as long" in refused(load_tokenizer, folder)


def test_rules_that_stand_twice_are_refused(folder):
    """Of a rule and a null after it Rust takes the rule, and Python the null."""
    file = folder / "tokenizer.json"
    rule = json.dumps({"type": "Sequence", "normalizers": [_TWICE] * 40})
    text = file.read_text().replace(
        '"normalizer": null', f'"normalizer": {rule}, "normalizer": null'
    )
    assert rule in text
    file.write_text(text)
    assert "a key stands twice" in refused(load_tokenizer, folder)


def test_rules_of_common_tokenizers_are_taken(folder):
    """Llama's way with spaces, and bytes after Qwen's splitting."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    llama = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    edit(folder / "tokenizer.json", normalizer=llama)
    load_tokenizer(folder)
    splits = {"type": "Split", "pattern": {"Regex": " ?[a-z]+"}, "behavior": "Isolated",
              "invert": False}  # fmt: skip
    edit(folder / "tokenizer.json", normalizer={"type": "NFC"}, decoder=_BYTES,
         post_processor=_BYTES,
         pre_tokenizer={"type": "Sequence", "pretokenizers": [splits, _BYTES]})  # fmt: skip
    load_tokenizer(folder)


@pytest.mark.parametrize("folded", [False, True])
def test_a_pipe_among_a_tokenizers_files_is_refused(folder, folded):
    name = "additional_chat_templates/x.jinja" if folded else "chat_template.jinja"
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is not a plain file" in refused(load_tokenizer, folder)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6])
def test_deeply_nested_json_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json cannot be read as JSON" in refused(read_config, folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 10**12}, "hidden_size = 1000000000000 must be at most 16777216"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be at most 2000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1 must be a whole number above 0"),
        ({"vocab_size": "32000"}, "vocab_size = '32000' must be a whole number above 0"),
        ({"vocab_size": float("nan")}, "vocab_size = nan must be a whole number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be a number above 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps = 10^300 or more must be a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta = inf must be a number above 0"),
        ({"layer_types": [["full_attention"]]}, "layer_types = [['full_attention']] is not"),
        ({"model_type": "x" * 10**6}, "model_type = 'xxx"),
        ({"hidden_size": [[0]] * 10**5}, "hidden_size = [[0], [0]"),
    ],
)
def test_absurd_values_of_a_config_are_refused(folder, changes, said):
    edit(folder / "config.json", **changes)
    assert said in refused(read_config, folder)


# --- Headers that lie -----------------------------------------------------------------------------

_TENSOR = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


def _header(length: int | None = None, **tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 32


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        _header(10**6, w=_TENSOR),
        _header(2**63, w=_TENSOR),
        struct.pack("<Q", 10**6) + b"[" * 10**6,
        _header(w=_TENSOR | {"data_offsets": [0, 64]}),
        _header(w=_TENSOR | {"data_offsets": [32, 0]}),
        _header(w=_TENSOR | {"data_offsets": [-32, 0]}),
        _header(w=_TENSOR | {"data_offsets": [4, 36]}),
        _header(w=_TENSOR, v=_TENSOR),
        _header(w=_TENSOR | {"shape": [7]}),
        _header(w=_TENSOR | {"shape": [-8]}),
        _header(w=_TENSOR | {"shape": [2**62, 2**62]}),
        _header(w=_TENSOR | {"shape": ["8"]}),
        _header(w=_TENSOR | {"dtype": "pickle"}),
        _header(w=[]),
    ],
)
def test_a_header_that_lies_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    message = refused(weights._open, folder)
    assert "model.safetensors is not a whole safetensors file" in message
