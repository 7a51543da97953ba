"""Reward models as rewards, beside transformers: 200 chats, both paddings, one device and eight."""

from __future__ import annotations

import datetime
import json

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hf_model import SIZES, edit_json, rewrite, save_random_model
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from grpo_jax.config.options import default
from grpo_jax.devices import sharding
from grpo_jax.models import policy
from grpo_jax.rewards.registry import Reward
from grpo_jax.setup import inputs, lora, reward_models

NOW = datetime.datetime(2026, 1, 1)
GROUP = 8
WORDS = [f"w{i}" for i in range(40)]
# Each turn ends with the token that ends texts; without it as pad token, padding is another one.
TEMPLATE = (
    "{% for m in messages %}{{ 'user' if m.role == 'user' else 'bot' }} {{ m.content }} <end> "
    "{% endfor %}"
)


def make_tokenizer(pad: str):
    words = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", "user", "bot", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token=pad, eos_token="<end>", unk_token="<unk>"
    )
    found.chat_template = TEMPLATE
    return found


def save(folder, pad="<end>", seed=0, kind="Qwen2", **settings):
    """A random reward model with its tokenizer; returns both."""
    tokenizer = make_tokenizer(pad)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES | {"max_position_embeddings": 128} | settings,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def chats() -> tuple[list, list[str]]:
    """25 prompts as messages of one or three turns, and 8 completions of each."""
    rng = np.random.default_rng(0)

    def text(most):
        words = list(rng.choice(WORDS, rng.integers(1, most)))
        if rng.random() < 0.3:  # a turn's end within a text, as models write it
            words.insert(rng.integers(len(words) + 1), "<end>")
        return " ".join(words)

    prompts = [
        [
            {"role": "assistant" if turn % 2 else "user", "content": text(9)}
            for turn in range(2 * rng.integers(2) + 1)
        ]
        for _ in range(25)
    ]
    return prompts, [text(30) for _ in range(25 * GROUP)]


def by_transformers(model, tokenizer, prompts, texts, side):
    """Scores [B] of all texts in one batch that is padded on a side."""
    whole = [
        prompts[i // GROUP] + [{"role": "assistant", "content": t}] for i, t in enumerate(texts)
    ]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in whole]
    tokenizer.padding_side = side
    rows = tokenizer(rendered, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    return logits[:, 0].numpy()


@pytest.mark.parametrize("pad", ["<end>", "<pad>"])
def test_200_chats_score_as_with_transformers(pad, tmp_path):
    model, tokenizer = save(tmp_path / "rm", pad)
    prompts, texts = chats()
    wanted = by_transformers(model, tokenizer, prompts, texts, "right")
    assert wanted.std() > 0.1 and len(set(map(len, texts))) > 30
    other_side = by_transformers(model, tokenizer, prompts, texts, "left")
    np.testing.assert_allclose(wanted, other_side, atol=1e-4)
    meshes = [sharding.make_mesh(devices=jax.devices()[:1])]
    meshes += [sharding.make_mesh(data=4, fsdp=2)] if pad == "<end>" else []
    for mesh in meshes:
        judge = reward_models.load(str(tmp_path / "rm"), mesh, "float32", NOW)
        got = judge.score(prompts, texts, GROUP)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    if pad == "<pad>":  # as texts, to which the stop token is added: what the template writes
        rendered = [tokenizer.apply_chat_template(p, tokenize=False) + "bot " for p in prompts[:2]]
        plain = judge.score(rendered, texts[: 2 * GROUP], GROUP)
        np.testing.assert_allclose(plain, wanted[: 2 * GROUP], rtol=1e-4, atol=1e-4)


def test_several_models_score_at_once(tmp_path):
    """Each by its own tokenizer and weights, in one call."""
    one, two = tmp_path / "one", tmp_path / "two"
    models = [save(one), save(two, "<pad>", seed=1, kind="Llama")]
    config = ConfigDict({"model": {"dtype": "float32", "attention": "auto"}, "mesh": {}})
    rewards = [Reward(p.name, f"model:{p}", 1.0) for p in (one, two)]
    rewards.insert(1, Reward("answer_format", "answer_format", 1.0))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    found = reward_models.load_all(config, rewards, mesh, NOW)
    prompts, texts = chats()
    prompts, texts = prompts[:2], texts[: 2 * GROUP]
    problems = [reward_models.Problem(prompt, {}) for prompt in prompts]
    got = found(problems, texts, GROUP)
    assert list(got) == ["one", "two"] and list(found.sizes) == ["reward one", "reward two"]
    for name, (model, tokenizer) in zip(got, models):
        wanted = by_transformers(model, tokenizer, prompts, texts, "right")
        np.testing.assert_allclose(got[name], wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(got["one"] - got["two"]).max() > 0.1
    assert reward_models.load_all(config, rewards[1:2], mesh, NOW) is None


@pytest.mark.parametrize("base", ["a language model", "a reward model"])
def test_an_adapter_of_peft_scores_as_there(base, tmp_path):
    """On a language model with a head beside it; on a reward model the head is that one's."""
    peft_lib = pytest.importorskip("peft")
    _, tokenizer = save(tmp_path / "base")
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    if base == "a language model":
        save_random_model(tmp_path / "base", "Qwen2", {"max_position_embeddings": 128})
        settings["task_type"] = "SEQ_CLS"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    wrapped = peft_lib.get_peft_model(model, peft_lib.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    prompts, texts = chats()
    prompts, texts = prompts[:3], texts[: 3 * GROUP]
    wanted = by_transformers(wrapped, tokenizer, prompts, texts, "right")

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    judge = reward_models.load(str(tmp_path / "adapter"), mesh, "float32", NOW)
    got = judge.score(prompts, texts, GROUP)

    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), wrapped.disable_adapter():
        without = by_transformers(wrapped, tokenizer, prompts, texts, "right")
    assert np.abs(without - wanted).max() > 0.1
    config = default()
    config.rewards.names = (f"model:{tmp_path / 'adapter'}",)
    (planned,) = reward_models.planned(config, mesh).values()
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.sharding), tree)  # noqa: E731
    assert kind(planned.params) == kind(judge.params)

    # A run that goes on with it begins with its adapters and the same head.
    config.lora.path = str(tmp_path / "adapter")
    found = policy.read(str(tmp_path / "base"), head="scalar")
    begins = lora.adapted_policy(found, config)
    trained = lora.first_params(config, begins, mesh, None)
    frozen = lora.frozen_params(begins, mesh, "float32")
    weights = lora.attached(frozen, trained, begins.model, mesh)
    jax.tree.map(np.testing.assert_array_equal, weights, judge.params)


def test_an_adapter_counts_with_its_base(tmp_path):
    """Checksums of a run's inputs: of its tensors, of its settings, and of the base's."""
    save(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    seen = [inputs.of_reward_model(str(tmp_path / "adapter"))]
    save_adapter(tmp_path / "adapter", tmp_path / "base", value=1.0)
    seen.append(inputs.of_reward_model(str(tmp_path / "adapter")))
    edit_json(tmp_path / "adapter" / "adapter_config.json", lora_alpha=3)
    seen.append(inputs.of_reward_model(str(tmp_path / "adapter")))
    save(tmp_path / "base", seed=1)
    seen.append(inputs.of_reward_model(str(tmp_path / "adapter")))
    assert len({str(sums) for sums in seen}) == 4


def save_adapter(folder, base, value=0.0, **settings):
    """An adapter of a base by its files, without a head."""
    folder.mkdir(exist_ok=True)
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    said |= {"base_model_name_or_path": str(base)} | settings
    (folder / "adapter_config.json").write_text(json.dumps(said))
    save_file({"x": np.full(2, value, np.float32)}, folder / "adapter_model.safetensors")


REFUSED = {
    "an adapter without a head": "is an adapter of a language model",
    "an adapter of nothing": "adapter_config.json: base_model_name_or_path = '/gone'",
    "an adapter with more": "modules_to_save = ['embed_tokens', 'score']",
    "no head": "1 tensor missing: score.weight",
    "two labels": "with 2 labels",
    "a language model": "a new one would give random rewards",
    "an encoder": "classifier:",
    "no model": "there is no such folder",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_reward_model_is_refused_by_name(fault, tmp_path):
    folder = tmp_path / "rm"
    if fault == "a language model":
        save_random_model(folder, "Qwen2", {})
        make_tokenizer("<end>").save_pretrained(folder)
    elif fault == "an encoder":
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, num_labels=1,
        )  # fmt: skip
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    elif fault.startswith("an adapter"):
        save_random_model(tmp_path / "lm", "Qwen2", {})
        make_tokenizer("<end>").save_pretrained(tmp_path / "lm")
        base = "/gone" if "nothing" in fault else tmp_path / "lm"
        more = {"modules_to_save": ["embed_tokens", "score"]} if "more" in fault else {}
        save_adapter(folder, base, **more)
        if more:
            head = {"base_model.model.score.weight": np.zeros((1, 32), np.float32)}
            save_file(head, folder / "adapter_model.safetensors")
    elif fault != "no model":
        save(folder)
    if fault == "no head":
        rewrite(folder, lambda tensors: tensors.pop("score.weight"))
    if fault == "two labels":
        edit_json(folder / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(ValueError) as refused:
        reward_models.load(
            str(folder), sharding.make_mesh(devices=jax.devices()[:1]), "float32", NOW
        )
    assert REFUSED[fault] in str(refused.value) and str(folder) in str(refused.value), refused.value
