"""Kinds of input that a user or a stranger gives the program, at random, and what reads them.

A kind has a strategy that makes cases, and a function of a case and an empty folder that reads it
as a run would: it returns, or raises a ValueError with a message for the user. Nothing compiles.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import tokenizers
import transformers
from hypothesis import strategies as st
from pyarrow import parquet

from grpo_jax.config import loading, options, record
from grpo_jax.config.dotted import flatten
from grpo_jax.data import prompts
from grpo_jax.data.problems import Form, Problem, load
from grpo_jax.data.sources import Source
from grpo_jax.models.hf import weights
from grpo_jax.models.hf.config_json import in_every_spelling
from grpo_jax.models.hf.folder import read_config, read_json
from grpo_jax.models.hf.tokenizer import load_tokenizer, stop_ids
from grpo_jax.models.hf.weights import stored_dtype
from grpo_jax.models.policy import Policy
from grpo_jax.rewards import registry

TINY = Path(__file__).resolve().parents[1] / "helpers" / "tiny_config.py"


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str
    share: float  # of a campaign's cases
    cases: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]


# --- Values ---------------------------------------------------------------------------------------

# Whatever a text can be, halves of surrogate pairs, NUL and directions of writing included.
TEXT = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(
    [
        "", " ", "\0", "\ud800", "\udfff\ud800", "\u202e\u2066", "\ufeff", "a\u2028b", "\x1b[31m",
        "../../x", "/etc/passwd", "~", "{}", "{prompt}", "{{ x }}", "{0.__class__}",
        "{prompt!r:9999}",
        "%s%n", "x" * 5000, "<|im_start|>", "<pad>", "e\u0301" * 40, "٣", "NaN", "1e999", "None",
        "__import__('os').abort()", "9**9**9", "\\boxed{", "#### ", "🏳️‍🌈",
    ]
)  # fmt: skip
NUMBER = (
    st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.sampled_from(
        [2**31 - 1, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400, 1e308, 5e-324, -0.0]
    )
)
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
JSON = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.just("role"), inner, max_size=4)
    ),
    max_leaves=8,
)


def changed(base: dict[str, Any], most: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """`base` with some keys left out, and others given or replaced by anything."""
    keys = st.sampled_from(sorted(base)) | TEXT
    return st.builds(
        lambda gone, put: {k: v for k, v in base.items() if k not in gone} | put,
        st.lists(st.sampled_from(sorted(base)), max_size=1),
        st.dictionaries(keys, JSON, max_size=most),
    )


def damaged(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes of which a part is cut out, repeated, or replaced."""

    def damage(content: bytes, start: int, length: int, put: bytes) -> bytes:
        start = start % (len(content) + 1)
        return content[:start] + put + content[start + length :]

    some = st.binary(max_size=8) | st.sampled_from([b"[" * 5000, b"\xff\xfe", b'"', b"\n", b"\0"])
    cut = st.builds(damage, whole, st.integers(0, 10**6), st.integers(0, 99) | st.just(10**9), some)
    return st.one_of(whole, whole, cut)


def as_json(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: json.dumps(value).encode())


def nested(depth: int, opening: str = "[") -> bytes:
    return opening.encode() * depth


# --- Overrides of a config ------------------------------------------------------------------------

OPTIONS = flatten(options.default())
_CHOICES = (
    "float32 bfloat16 int8 none full dots auto xla splash same refuse drop truncate token sequence "
    "constant linear cosine token sequence truncate mask exact_answer math_answer arithmetic "
    "stories train test prompt=question question=q answer_format soft_overlong"
).split()


def _value(name: str) -> st.SearchStrategy[str]:
    """Texts for one option: mostly of its type."""
    kind = type(OPTIONS[name])
    fitting = {
        bool: st.sampled_from(["True", "False", "true", "false"]),
        int: st.integers(-2, 20).map(str),
        float: st.floats(-0.5, 4).map(repr),
        str: st.sampled_from(_CHOICES),
        tuple: st.lists(st.sampled_from(_CHOICES) | NUMBER | TEXT, max_size=3).map(repr),
    }[kind]
    odd = st.one_of(
        NUMBER.map(_written),
        TEXT,
        JSON.map(repr_of),
        st.sampled_from(["(" * 9999, "-" * 9999 + "1", "{[]: 1}", "[[]]", "f(a=" + "[" * 999]),
    )
    return st.one_of(*[fitting] * 7, odd)


def _written(number: float) -> str:
    return "1" + "0" * 400 if number == 10**400 else repr(number)


def repr_of(value: Any) -> str:
    return json.dumps(value)[:5000]


OVERRIDE = (
    st.sampled_from(sorted(OPTIONS))
    .flatmap(lambda name: st.tuples(st.just(name), _value(name)))
    .map(lambda pair: f"--config.{pair[0]}={pair[1]}")
)
OVERRIDES = st.lists(st.one_of(*[OVERRIDE] * 18, TEXT, TEXT.map("--config.{}".format)), max_size=3)


def read_overrides(arguments: list[str], folder: Path) -> None:
    config = loading.load(str(TINY), arguments)
    registry.load(config.rewards.names, config.rewards.weights)
    json.dumps({"binding": record.binding(config), "options": flatten(config)})


# --- Rows of a dataset ----------------------------------------------------------------------------

MESSAGE = changed({"role": "user", "content": "1+1="}, most=2) | JSON
ROW = changed({"prompt": "1+1=", "answer": "2"}) | st.fixed_dictionaries(
    {"prompt": st.lists(MESSAGE, max_size=3) | TEXT, "answer": SCALAR}, optional={"question": JSON}
)
ROWS = st.lists(ROW | JSON, max_size=4) | st.builds(
    lambda row, times: [row] * times, ROW, st.integers(1, 3)
)
FORM = st.sampled_from(
    [{}, {"chat": True}, {"prompt_template": "{prompt} {answer}"}]
) | st.fixed_dictionaries(
    {},
    optional={
        "columns": st.lists(
            st.sampled_from(["prompt=answer", "x=prompt", "answer=question", "a=b=c", "="]) | TEXT,
            max_size=2,
        ).map(tuple),
        "prompt_template": st.sampled_from(["{prompt}", "{answer} is", "{prompt:9}", "{", "{a.b}"])
        | TEXT,
        "chat": st.booleans(),
        "system_prompt": TEXT,
    },
)


def _jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _csv(rows: list) -> bytes:
    texts = [",".join(str(v) for v in r.values()) for r in rows if isinstance(r, dict)]
    return "\n".join(["prompt,answer", *texts]).encode("utf-8", "surrogatepass")


def _table(rows: list, suffix: str) -> bytes:
    """The rows that Arrow can hold as one of its two kinds of file."""
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        sink = pa.BufferOutputStream()
        if suffix == "parquet":
            parquet.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return b""
    return sink.getvalue().to_pybytes()


TABLES = st.sampled_from(["parquet", "arrow"]).flatmap(
    lambda suffix: st.tuples(
        st.just(f"p.{suffix}"), damaged(ROWS.map(lambda rows: _table(rows, suffix)))
    )
)
FILES = st.one_of(
    *[st.tuples(st.just("p.jsonl"), damaged(ROWS.map(_jsonl)))] * 18,
    st.tuples(st.just("p.jsonl"), st.sampled_from([nested(9999), nested(9999, '{"a":')])),
    st.tuples(st.just("p.json"), damaged(as_json(ROWS)) | st.just(nested(99999))),
    st.tuples(st.just("p.csv"), damaged(ROWS.map(_csv))),
    TABLES,
    st.tuples(st.sampled_from(["p.parquet", "p.arrow", "p.txt", "p.jsonl.gz"]), st.binary()),
)


def read_rows(case: tuple[tuple[str, bytes], dict], folder: Path) -> None:
    (name, content), form = case
    (folder / name).write_bytes(content)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    problems = load(Source(str(folder / name)), Form(**form))
    rewards = registry.load(("exact_answer", "math_answer"), (1.0, 1.0))
    registry.refuse_columns(rewards, problems)
    wrong = registry.faulty_rows(rewards, problems)
    texts = [p for i, p in enumerate(problems) if i not in wrong and isinstance(p.prompt, str)]
    prompts.encode(texts, TOKENIZER, 64, "truncate")
    for problem in texts:  # scoring must take what was let in
        columns = {"answer": [problem.columns["answer"]]}
        for reward in rewards:
            function = registry.function(reward.spec)
            assert function([problem.prompt], ["It is #### 2"], **columns)[0] in (0.0, 1.0)


# --- Tokenizers and texts -------------------------------------------------------------------------


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, so that every text has tokens, and a few words."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<|im_start|>", *alphabet])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>"
    )


TOKENIZER = _tokenizer()
POLICY = Policy(None, TOKENIZER, (1,), None)


def read_text(case: tuple[list[str], list[int], int, str], folder: Path) -> None:
    texts, ids, limit, overlong = case
    problems = [Problem(text, {}, f"row {i}") for i, text in enumerate(texts)]
    rows = prompts.encode(problems, TOKENIZER, limit, overlong).prompt_ids if texts else []
    for row in rows:
        assert 0 < len(row) <= limit and all(0 <= i < len(TOKENIZER) for i in row)
    text = POLICY.text(ids, after=rows[0] if rows else ())
    json.dumps(text).encode()


TEXTS = st.tuples(
    st.lists(TEXT, max_size=4),
    st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=20),
    st.integers(1, 64),
    st.sampled_from(["refuse", "drop", "truncate"]),
)

_TOKENIZER_FILE = json.loads(TOKENIZER.backend_tokenizer.to_str())
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>",
    "model_max_length": 512, "added_tokens_decoder": {"1": {"content": "<eos>", "special": True}},
    "auto_map": {"AutoTokenizer": ["x.X", None]}, "chat_template": "{{ messages }}",
    "fast_tokenizer_files": ["tokenizer.json"], "extra_special_tokens": ["<pad>"],
    "clean_up_tokenization_spaces": False, "padding_side": "left", "model_input_names": ["x"],
}  # fmt: skip
_PARTS = {
    key: changed(value, most=2) if isinstance(value, dict) else JSON
    for key, value in _TOKENIZER_FILE.items()
}
TOKENIZER_FILES = st.fixed_dictionaries(
    {
        "tokenizer.json": damaged(
            as_json(
                st.one_of(
                    st.just(_TOKENIZER_FILE),
                    st.builds(
                        lambda put: _TOKENIZER_FILE | put,
                        st.fixed_dictionaries({}, optional=_PARTS),
                    ),
                )
            )
        ),
        "tokenizer_config.json": damaged(as_json(st.just(_SETTINGS) | changed(_SETTINGS))),
    },
    optional={
        "generation_config.json": damaged(as_json(changed({"eos_token_id": [1, 2]}))),
        "special_tokens_map.json": damaged(as_json(changed({"eos_token": "<eos>"}))),
        "added_tokens.json": damaged(as_json(changed({"<x>": 300}))),
        "vocab.json": damaged(as_json(changed({"a": 0}))),
        "config.json": damaged(as_json(changed({"model_type": "qwen2", "eos_token_id": 1}))),
        "chat_template.jinja": TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")),
    },
)


def read_tokenizer(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenizer = load_tokenizer(folder)
    stop_ids(folder, tokenizer, 300)
    prompts.encode([Problem("1+1=", {}, "row 0")], tokenizer, 64)


# --- Chat templates -------------------------------------------------------------------------------

_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% if m %}",
    "{% endif %}", "{{ bos_token }}", "{{ messages }}", "{{ raise_exception('no') }}",
    "{% set x = 'a' * 2000000 %}", "{{ x }}", "{{ x ~ x }}", "{{ 10**10**10 }}", "{{ loop.index }}",
    "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}", "{{ ''.__class__ }}",
    "{% include 'x' %}", "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}", "{{ range(10**9) }}", "{{ 'a' | center(10**11) }}",
    "{{ messages | tojson }}", "{%- generation %}", "{% endgeneration %}", "{% break %}", "\n",
    "{#", "{{", "}}",
    "{{ strftime_now('%Y') }}", "{{ 1 / 0 }}", "{{ '%99999999999d' | format(1) }}", "%}",
    "{% for i in range(99999) %}", "{{ namespace(x=1).x }}",
)  # fmt: skip
TEMPLATES = st.lists(st.sampled_from(_PIECES) | TEXT, max_size=8).map("".join)


@dataclasses.dataclass
class Templated:
    """The tokenizer with another template."""

    chat_template: str
    special_tokens_map = TOKENIZER.special_tokens_map
    bos_token = TOKENIZER.bos_token

    def get_chat_template(self, tools=None) -> str:
        return self.chat_template

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return TOKENIZER(*args, **kwargs)


def read_template(case: tuple[str, list], folder: Path) -> None:
    template, chats = case
    problems = [Problem(chat, {}, f"row {i}") for i, chat in enumerate(chats)]
    prompts.encode(problems, Templated(template), 2**21, "truncate")


CHATS = st.lists(
    st.lists(
        st.fixed_dictionaries({"role": TEXT, "content": TEXT}, optional={"name": JSON}), min_size=1
    ),
    min_size=1,
    max_size=2,
)


# --- Models ---------------------------------------------------------------------------------------

_MODEL = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 12, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1e4, "hidden_act": "silu",
    "rope_scaling": None, "head_dim": 4, "attention_bias": False, "sliding_window": None,
    "use_sliding_window": False, "layer_types": ["full_attention"] * 2,
    "torch_dtype": "bfloat16", "eos_token_id": 1, "partial_rotary_factor": 1.0,
}  # fmt: skip
_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 1e4,
}  # fmt: skip
_QWEN = _MODEL | {"max_window_layers": 1}
_FAMILY = st.sampled_from(["llama", "qwen2", "qwen3", "mistral"])
MODELS = st.one_of(
    st.builds(lambda c, f: c | {"model_type": f}, changed(_MODEL), _FAMILY),
    st.builds(
        lambda c, f: c | {"model_type": f}, changed(_QWEN), st.sampled_from(["qwen2", "qwen3"])
    ),
    st.builds(
        lambda f, key, rope: _MODEL | {"model_type": f, key: rope},
        _FAMILY,
        st.sampled_from(["rope_scaling", "rope_parameters"]),
        changed(_ROPE),
    ),
    JSON,
)


def read_model(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    config = read_config(folder)
    assert config.num_params > 0
    weights.leaves_of(config)
    stop_ids(folder, TOKENIZER, config.vocab_size)
    in_every_spelling(read_json(folder / "config.json"))
    stored_dtype(folder)


_TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
_HEADER = {
    "w": _TENSOR, "v": _TENSOR | {"data_offsets": [24, 48]}, "__metadata__": {"format": "pt"},
}  # fmt: skip
_OFFSETS = st.lists(st.integers(-8, 64) | NUMBER, max_size=3)
HEADERS = st.builds(
    lambda header, tensor: header | {"w": tensor},
    changed(_HEADER, most=1),
    st.just(_TENSOR)
    | changed(_TENSOR)
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "pickle"]) | TEXT,
            "shape": st.lists(st.integers(-1, 6) | NUMBER, max_size=3),
            "data_offsets": _OFFSETS,
        }
    ),
)


def _safetensors(header: bytes, length: int | None, rest: bytes) -> bytes:
    length = len(header) if length is None else length
    return struct.pack("<Q", length % 2**64) + header + rest


SAFETENSORS = st.builds(
    _safetensors,
    damaged(as_json(HEADERS)),
    st.none() | st.none() | st.integers(0, 300) | NUMBER.filter(lambda n: isinstance(n, int)),
    st.sampled_from([b"\0" * 48, b"\0" * 48, b"\0" * 47, b""]) | st.binary(max_size=64),
)
WEIGHTS = st.fixed_dictionaries(
    {"model.safetensors": damaged(SAFETENSORS)},
    optional={
        weights.INDEX: damaged(
            as_json(
                st.fixed_dictionaries(
                    {
                        "weight_map": st.dictionaries(TEXT, TEXT | st.just("model.safetensors"))
                        | JSON
                    }
                )
            )
        )
    },
)


def read_weights(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for tensor in weights._open(folder).values():
        tensor.slices[()] if tensor.shape == () else tensor.slices[:1]


KINDS = [
    Kind("config overrides", 0.275, OVERRIDES, read_overrides),
    Kind("dataset rows", 0.26, st.tuples(FILES, FORM), read_rows),
    Kind("tokenizer texts", 0.12, TEXTS, read_text),
    Kind("tokenizer files", 0.06, TOKENIZER_FILES, read_tokenizer),
    Kind("chat templates", 0.005, st.tuples(TEMPLATES, CHATS), read_template),
    Kind("config.json", 0.14, damaged(as_json(MODELS)) | st.just(nested(9999)), read_model),
    Kind("safetensors headers", 0.14, WEIGHTS, read_weights),
]
