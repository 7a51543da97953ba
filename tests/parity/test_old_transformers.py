"""An export read by the transformers of many servers and converters, 4.56, and by the newest.

The old one is installed from the package registry once, without what it depends on, into a folder
of the user's cache, and used by a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import read_export
import tokenizers
import torch
import transformers

from grpo_jax.config import options as options_lib
from grpo_jax.data import tasks
from grpo_jax.devices import sharding
from grpo_jax.models import policy
from grpo_jax.setup import model
from grpo_jax.structs import TrainState
from grpo_jax.trainers import exporting

pytestmark = pytest.mark.slow

# With the torch, safetensors and others of this environment.
OLD = (
    "transformers==4.56.2 tokenizers==0.22.2 huggingface_hub==0.36.0 "
    "requests urllib3 certifi charset-normalizer idna"
).split()

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3 | {"rope_theta": 1000.0}, "attention_bias": True},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
              "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 16,
              "tie_word_embeddings": True},
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
                "sliding_window": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def old_transformers() -> Path:
    """A folder of packages with transformers 4.56.

    Where no registry gives them the tests skip, but not where GRPO_JAX_NEEDS_OLD_TRANSFORMERS is
    set, as .ci/run does.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / "grpo_jax" / "tests" / f"{OLD[0].replace('==', '-')}-python-{python}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(partial), *OLD], capture_output=True, text=True
    )
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        said = f"pip does not give {OLD[0]}: {' '.join(done.stderr.split())[-300:]}"
        if os.environ.get("GRPO_JAX_NEEDS_OLD_TRANSFORMERS"):
            pytest.fail(said)
        pytest.skip(f"needs a package registry. {said}")
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words, bytes, added tokens and a template, as version 5 saves them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = [("o", "n"), ("c", "e"), ("on", "ce"), ("Ġ", "t"), ("#", "#"), ("##", "##")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    rules = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="</s>",
                                        pad_token="<pad>", unk_token="</s>")  # fmt: skip
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules.backend_tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="</s>",
    )
    made.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def random_model(family: str, settings: dict, folder: Path) -> None:
    config = transformers.AutoConfig.for_model(family, **SIZES | settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def as_4_writes_it(folder: Path) -> None:
    """The config.json with the names that version 4 has."""
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    settings["torch_dtype"] = settings.pop("dtype")
    file.write_text(json.dumps(settings))


def export(source: Path, folder: Path) -> None:
    """What a run that learned nothing would export of a model."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    read = policy.read(str(source))
    params = policy.load_params(read, mesh, seed=0)
    kept = policy.keep(read, folder.with_name(f"{folder.name}_kept"))
    exporting.export(kept, folder, TrainState(params, (), 0, 0), "auto")


@pytest.fixture(scope="module")
def exports(tmp_path_factory, shared) -> dict[str, tuple[Path, Path]]:
    """Sources and what was exported of them, by name."""
    base, made = tmp_path_factory.mktemp("exports"), {}
    for family, settings in FAMILIES.items():
        for version in (4, 5):
            source = base / f"{family}_{version}"
            random_model(family, settings, source)
            byte_tokenizer().save_pretrained(source)
            if version == 4:
                as_4_writes_it(source)
            made[source.name] = source
    made["stories"] = shared / "models" / "stories260K"
    made["qwen2.5"] = base / "qwen2.5"
    random_model("qwen2", {"vocab_size": 151_936, "hidden_size": 8, "num_attention_heads": 2},
                 made["qwen2.5"])  # fmt: skip
    for file in (shared / "tokenizers" / "qwen2.5-instruct").iterdir():
        shutil.copyfile(file, made["qwen2.5"] / file.name)
    made = {name: (source, base / f"{name}_export") for name, source in made.items()}
    for source, folder in made.values():
        export(source, folder)
    mesh, options = sharding.make_mesh(devices=jax.devices()[:1]), options_lib.default().model
    new = model.new(options, tasks.load("arithmetic").make_tokenizer())
    state = TrainState(policy.load_params(new, mesh, seed=0), (), 0, 0)
    exporting.export(new, base / "quickstart", state, "auto")
    return made | {"quickstart": (base / "quickstart", base / "quickstart")}


def test_old_and_new_transformers_read_the_same(old_transformers, exports):
    folders = {name: str(folder) for name, (_, folder) in exports.items()}
    environment = os.environ | {"PYTHONPATH": str(old_transformers)}
    command = [sys.executable, read_export.__file__, *folders.values()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    old = json.loads(done.stdout.splitlines()[-1])
    assert old["version"] == "4.56.2" and transformers.__version__.startswith("5.")
    for name, folder in folders.items():
        was, now = old["folders"][folder], read_export.read(folder)
        came = read_export.read(str(exports[name][0]))  # the source, by the new one
        for key in now:
            if key in ("rotary", "logits"):
                for found in (was, now):
                    np.testing.assert_allclose(found[key], came[key], rtol=1e-5, atol=1e-5)
            else:
                assert was[key] == now[key] == came[key], (name, key)
        assert np.ptp(now["logits"]) > 0.1
    chats = {name for name, folder in folders.items() if old["folders"][folder]["chat"]}
    assert chats == folders.keys() - {"stories", "quickstart"}
