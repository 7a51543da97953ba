"""Where a model lies, and what is said of a folder that is none."""

from __future__ import annotations

import time

import huggingface_hub
import pytest

from grpo_jax.models import policy
from grpo_jax.models.hf.folder import read_config, resolve

# --- Where a model lies -------------------------------------------------------------------------


def test_resolve_finds_a_local_folder(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(f"./{tmp_path.name}").samefile(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == tmp_path


@pytest.mark.parametrize("path", ["/gone/x", "./gone", "~/gone", "../gone", "a/b/c", "runs/x", ""])
def test_resolve_refuses_a_path_that_does_not_exist(path, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not even asked
    with pytest.raises(ValueError, match="no such folder, and it does not look like a hub id"):
        resolve(path)


def test_resolve_refuses_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a file\. Give the folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_resolve_tells_where_the_model_of_a_run_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a checkpoint of a run.* --workdir runs/a --step best "):
        resolve("runs/a@best")
    with pytest.raises(
        ValueError, match=r"'runs/a' is the folder of a run\. Write its model: grpo"
    ):
        resolve("runs/a")
    (tmp_path / "runs" / "a" / "export").mkdir()
    with pytest.raises(ValueError, match=r"of a run\. Its model is runs/a/export\."):
        resolve("runs/a")
    with pytest.raises(ValueError, match="no such folder"):
        resolve("runs/b@best")
    assert resolve("runs/a/export").samefile(tmp_path / "runs" / "a" / "export")


def test_resolve_says_at_once_that_the_hub_cannot_be_reached(monkeypatch):
    """It neither waits nor tries again."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ValueError, match=r"model\.path = 'nobody/nothing': there is no"):
        resolve("nobody/nothing")
    assert not waits


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
    assert resolve("owner/name") == tmp_path
    assert fetched == files


# --- config.json ---


@pytest.mark.parametrize(
    "text, said",
    [
        (None, r"model has no config\.json, which a Hugging Face model has"),
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
        read_config(folder)


# --- What other programs leave ------------------------------------------------------------------


ADAPTER = {"adapter_config.json": '{"base_model_name_or_path": "owner/base"}'}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (ADAPTER, r"is an adapter of 'owner/base' \(adapter_config\.json\).* Merge it into"),
        ({"m-Q4_K_M.gguf": ""}, r"holds GGUF weights.*m-Q4_K_M\.gguf.*original weights"),
        ({"latest": "", "zero_to_fp32.py": "", "global_step5/mp_rank_00_model_states.pt": ""},
         r"checkpoint of DeepSpeed.*Run its zero_to_fp32\.py"),
        ({"refs/main": "", "snapshots/abc/config.json": ""}, r"hub's cache.*snapshots/HASH"),
        ({"__0_0.distcp": "", ".metadata": ""}, r"FSDP.*Merge it"),
        ({"latest_checkpointed_iteration.txt": "5"}, r"Megatron.*Convert it"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, r"maker's own form"),
        ({"checkpoint-500/config.json": "{}"}, r"models in it \(checkpoint-500/config\.json\)"),
        ({"notes.md": ""}, r"other files \(notes\.md\)"),
        ({}, "is empty"),
        ({"config.json": '{"binding": {}, "options": {}}'}, r"folder of a run. Give .*/export"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_named(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for option, given in (("--model", "--model '"), ("model.path", "model.path = '")):
        with pytest.raises(ValueError, match=said) as error:
            policy.read(str(tmp_path), option)
        assert str(error.value).startswith(given)


def test_an_adapter_beside_the_weights_is_refused(folder):
    """transformers would load it with them, and the text would be another."""
    (folder / "adapter_config.json").write_text(ADAPTER["adapter_config.json"])
    with pytest.raises(ValueError, match=r"adapter of 'owner/base'.*take adapter_config"):
        read_config(folder)


def test_paths_that_cannot_be_looked_up_are_refused(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").touch()
    for path, said in (
        ("~nosuchuser/m", "nobody's home folder"),
        ("x" * 5000, "too long"),
        (str(tmp_path / "model-Q4_K_M.gguf"), "is GGUF weights.*original weights"),
    ):
        with pytest.raises(ValueError, match=rf"--model .*{said}"):
            resolve(path, "--model")
