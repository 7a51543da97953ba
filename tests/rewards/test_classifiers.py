"""Classifiers of texts as rewards, beside transformers; what cannot be one is refused."""

import json

import numpy as np
import pytest
import tokenizers
import transformers

from grpo_jax.data.problems import Problem
from grpo_jax.rewards import classifiers, extras, registry
from grpo_jax.rewards.pool import Pool

torch = pytest.importorskip("torch")

WORDS = "a b c d e f g h".split()
LABELS = ["contradiction", "neutral", "entailment"]


def save(folder, labels=LABELS, problem=None):
    """A tiny random BERT with its tokenizer; returns both."""
    words = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", model_max_length=24, **names
    )
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24, problem_type=problem,
        id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers") / "nli"
    return str(folder), *save(folder)


def one_by_one(model, tokenizer, rows, finish=lambda x: torch.softmax(x, -1)):
    """Values [B, labels] of texts or pairs, each alone and without padding."""
    with torch.no_grad():
        given = [tokenizer(*row, return_tensors="pt", truncation=True) for row in rows]
        return torch.cat([finish(model(**g).logits) for g in given]).numpy()


TEXTS = ["a b", "c " * 20, "", "<think> a </think> h g f", "e"] * 9  # more than a batch
READ = ["a b", "c " * 20, "", " h g f", "e"] * 9


def test_probabilities_are_those_of_transformers(saved):
    folder, model, tokenizer = saved
    wanted = one_by_one(model, tokenizer, [(t,) for t in READ[:5]])
    for number, label in enumerate(LABELS):
        found = registry.function(f"classifier:{folder}#{label}")
        got = found(prompts=["p"] * len(TEXTS), completions=TEXTS)
        np.testing.assert_allclose(got, np.tile(wanted[:, number], 9), atol=1e-6)
        assert np.std(got) > 1e-3
    chats = [[{"role": "assistant", "content": t}] for t in TEXTS]
    prompts = [[{"role": "user", "content": "p"}]] * len(TEXTS)
    assert found(prompts=prompts, completions=chats) == got


@pytest.mark.parametrize("against", ["prompt", "reference"])
def test_pairs_of_texts(against, saved):
    """Both are read as the tokenizer's pairs, with the completion as the second."""
    folder, model, tokenizer = saved
    found = registry.function(f'classifier:{folder}#entailment(against="{against}")')
    first = ["a h", "b", "c d e"]
    given = {"prompts": first, "completions": ["h", "g a", "a"]}
    if against == "reference":
        given |= {"prompts": ["p"] * 3, "reference": first}
    wanted = one_by_one(model, tokenizer, list(zip(first, given["completions"])))
    np.testing.assert_allclose(found(**given), wanted[:, 2], atol=1e-6)
    swapped = one_by_one(model, tokenizer, list(zip(given["completions"], first)))
    assert np.abs(wanted - swapped).max() > 1e-3
    reward = registry.load([f'classifier:{folder}#entailment(against="{against}")'], [1.0])
    problem = Problem("p", {"answer": "x"}, where="row 1")
    if against == "reference":
        with pytest.raises(ValueError, match="needs a column `reference`, and row 1"):
            registry.refuse_columns(reward, [problem])
    else:
        registry.refuse_columns(reward, [problem])


def test_labels_of_one_two_and_many_at_once(tmp_path):
    texts = ["a b", "c"]
    given = {"prompts": ["p"] * 2, "completions": texts}
    for labels, problem, finish in (
        (["score"], None, lambda x: x),
        (["fine", "toxic"], None, lambda x: torch.softmax(x, -1)),
        (["toxic", "rude"], "multi_label_classification", torch.sigmoid),
    ):
        model, tokenizer = save(tmp_path / labels[0] / str(problem), labels, problem)
        wanted = one_by_one(model, tokenizer, [(t,) for t in texts], finish)
        folder = tmp_path / labels[0] / str(problem)
        for entry, number in ((f"{folder}", len(labels) - 1), (f"{folder}#{labels[0]}", 0)):
            got = registry.function(f"classifier:{entry}")(**given)
            np.testing.assert_allclose(got, wanted[:, number], atol=1e-6)


def test_in_the_workers(saved):
    """By its label's name, beside another label of the same folder."""
    folder, model, tokenizer = saved
    names = [f"classifier:{folder}#neutral", f"classifier(folder='{folder}', label='entailment')"]
    rewards = registry.load(names, [1.0, -1.0])
    assert [reward.name for reward in rewards] == ["neutral", "classifier"]
    with Pool(rewards, num_workers=1) as pool:
        scores = pool.score(["p"] * 2, ["a b", "c"], {}, group=2)
    wanted = one_by_one(model, tokenizer, [("a b",), ("c",)])
    np.testing.assert_allclose(scores.reward_B, wanted[:, 1] - wanted[:, 2], atol=1e-6)
    assert not scores.failures


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("/none/there#x", "no folder with a config.json"),
        ("FOLDER#joy", "label = 'joy' is none of"),
        ("FOLDER", "label = '' is none of"),
        ("FOLDER#neutral(against=7)", "against = 7"),
        ("FOLDER#neutral(what=7)", "what"),
        ("CAUSAL#neutral", "not of a classifier"),
    ],
)
def test_what_is_no_classifier_is_refused(after, said, saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    entry = "classifier:" + after.replace("FOLDER", saved[0]).replace("CAUSAL", str(tmp_path))
    with pytest.raises(ValueError, match=r"rewards\.names") as refused:
        registry.load([entry], [1.0])
    assert said in str(refused.value)


def test_without_torch_it_is_refused_in_one_sentence(saved, monkeypatch):
    find = extras.importlib.util.find_spec
    hidden = lambda name, *more: None if name == "torch" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(extras.importlib.util, "find_spec", hidden)
    with pytest.raises(ValueError, match="needs torch, which is not installed: pip install torch"):
        registry.load([f"classifier:{saved[0]}#neutral"], [1.0])


def test_a_head_that_is_missing_is_refused(saved, tmp_path):
    import safetensors.numpy

    model, _ = save(tmp_path)
    assert model is not None
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors.pop("classifier.weight")
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the tensors \['classifier.weight'\]"):
        classifiers.classifier(["p"], ["a"], folder=str(tmp_path), label="neutral")
