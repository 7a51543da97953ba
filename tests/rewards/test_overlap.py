"""N-grams and facts in common with a reference, meaning, language and tone."""

import functools

import numpy as np
import pytest

from grpo_jax.rewards import overlap
from grpo_jax.rewards.language import language_consistency, language_fault
from grpo_jax.rewards.overlap import bleu, fact_overlap, rouge
from grpo_jax.rewards.similarity import similarity
from grpo_jax.rewards.tone import clean_language, sentiment, toxicity

TEXT, ANSWER = "the cat sat on the mat today", "the cat sat on a mat"


def test_bleu_is_sacrebleus():
    pytest.importorskip("sacrebleu")
    from sacrebleu.metrics import BLEU

    want = BLEU(effective_order=True).sentence_score(TEXT, [ANSWER]).score / 100
    assert bleu([""], [TEXT], answer=[ANSWER]) == [want] and 0.3 < want < 0.7
    assert bleu([""], [ANSWER], answer=[["no", ANSWER]]) == pytest.approx([1.0])
    assert bleu([""], [""], answer=[ANSWER]) == [0.0]


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    score = lambda kind, answer=ANSWER: rouge([""], [TEXT], answer=[answer], kind=kind)  # noqa: E731
    # 7 and 6 words; in common: the cat sat on mat. Precision 5/7, recall 5/6.
    assert score("rouge1") == score("rougeL") == pytest.approx([2 * 5 / 13])
    # bigrams: 6 and 5; in common: the cat, cat sat, sat on
    assert score("rouge2") == pytest.approx([2 * 3 / 11])
    assert score("rougeL", ["nothing", TEXT]) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("The capital of France is Paris.", "Paris is the capital of France.", 1.0),
        ("It has 2,100 people.", "2100 people live there", 1.0),
        # facts 1969, Armstrong | 1969, Armstrong, Aldrin: 2 * 2 / 5
        ("In 1969 it was Armstrong.", "1969: both Armstrong and Aldrin", 0.8),
        # an invented name: Paris, Rome | Paris
        ("It is Paris or Rome.", "the city of Paris", 2 / 3),
        ("nothing", "Paris, 1969", 0.0),
        ("anything", "no fact at all", None),
        ("Paris.", "Paris", 1.0),
        ("Rome.", "Paris", 0.0),
        ("1/2", "0.5", 0.0),  # 1 and 2 are not 0.5
    ],
)
def test_facts(text, answer, value):
    got = fact_overlap([""], [text], answer=[answer])
    assert got == ([None] if value is None else pytest.approx([value]))


def test_an_answer_is_needed():
    for reward in (fact_overlap, bleu, rouge):
        with pytest.raises(ValueError, match="`answer`"):
            reward([""], ["x"], answer=[""])
    assert overlap.bleu.column_faults["answer"]("")


# --- Language -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("all of it", "en", 1.0),
        ("это is", "ru", 3 / 5),
        ("это is", "en", 2 / 5),
        ("你好 ok", "zh", 2 / 4),
        ("こんにちは 世界", "ja", 1.0),
        ("12 + 3 = 15", "en", None),
        ("$x^2$ 你好 \\frac ```code```", "zh", 1.0),  # formulas and code are no prose
    ],
)
def test_scripts(text, language, value):
    got = language_consistency([""], [text], language=language)
    assert got == ([None] if value is None else pytest.approx([value]))


def test_a_language_of_each_row():
    assert language_consistency([""] * 2, ["это", "это"], language=["ru", "en"]) == [1.0, 0.0]
    assert language_fault("xx") and language_fault(None) == "is null" and not language_fault("en")


def test_sentences():
    pytest.importorskip("py3langid")
    text = "Nous avons trois pommes dans le panier. We have three apples in the basket."
    how = {"by": "sentence", "among": ["en", "fr"]}
    # 32 and 34 letters
    (french,) = language_consistency([""], [text], language="fr", **how)
    (english,) = language_consistency([""], [text], language="en", **how)
    assert french + english == pytest.approx(1.0) and 0.45 < french < 0.55
    assert language_consistency([""], ["ok."], by="sentence") == [None]
    assert language_consistency([""], ["\ud800 hello this is a text"], by="sentence", among=["en"])


# --- Tone -----------------------------------------------------------------------------------------


def test_sentiment_is_vaders():
    pytest.importorskip("vaderSentiment")
    texts = ["VADER is smart, handsome, and funny!", "The book was bad.", "A table."]
    got = sentiment([""] * 3, texts)
    assert got == pytest.approx([0.8439, -0.5423, 0.0], abs=1e-4)  # of its README
    assert sentiment([""], ["<think>bad"]) == [0.0]


def test_clean_language():
    clean = functools.partial(clean_language, words=["darn", "dirty word"])
    texts = ["D@rn it", "darning", "a dirty word", "dirty, and a word", "<think>darn</think>", "4"]
    assert clean([""] * 6, texts) == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


def test_clean_language_by_better_profanity():
    pytest.importorskip("better_profanity")
    assert clean_language([""] * 3, ["what a b1tch", "a kind word", "455 apples"]) == [
        0.0,
        1.0,
        1.0,
    ]


def test_toxicity():
    pytest.importorskip("profanity_check")
    bad, good = toxicity([""] * 2, ["you are a stupid idiot", "thank you for your help"])
    assert bad > 0.8 and good < 0.2


# --- Meaning --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random encoder of two layers with the words of a line as its tokens."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "the", "cat", "sat", "dog", "ran"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["", "pooling_mode_cls_token", "pooling_mode_lasttoken"])
def test_similarity_is_the_cosine_of_transformers_embeddings(encoder, pooling, tmp_path):
    """Each text alone, without padding, against batches of texts of unlike lengths."""
    import json
    import shutil

    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = shutil.copytree(encoder, tmp_path / "encoder")
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True}))
    texts = ["the cat sat", "the dog ran the cat sat the dog", "ran", "", "cat " * 30]
    answers = ["the cat", ["dog ran", "the cat sat"], "ran", "cat", "cat"]
    got = similarity([""] * 5, texts, answer=answers, folder=str(folder))
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def embed(text):
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            hidden = model(**given).last_hidden_state[0]
        place = {"": hidden.mean(0), "pooling_mode_cls_token": hidden[0]}
        vector = place.get(pooling, hidden[-1])
        return (vector / vector.norm()).numpy()

    want = [
        max(embed(t) @ embed(a) for a in ([row] if isinstance(row, str) else row)) if t else 0.0
        for t, row in zip(texts, answers)
    ]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got[2] == pytest.approx(1.0, abs=1e-5) and len({round(v, 3) for v in got}) > 2
