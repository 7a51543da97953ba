"""Keys and passwords are refused where a run would record them, and hidden where it speaks."""

from __future__ import annotations

import base64
import json
import sys
import urllib.parse

import pytest
from valid_config import refusal_of, valid

from grpo_jax import cli
from grpo_jax.config import record as record_lib
from grpo_jax.config.dotted import flatten
from grpo_jax.messages import credentials
from grpo_jax.messages.console import say
from grpo_jax.messages.credentials import redact

OF_ENVIRONMENT = "0123456789abcdef0123456789abcdef01234567"  # as Weights & Biases shapes them
SHAPED = [
    "hf_" + "aB3" * 11,
    "sk-proj-" + "Zz9_" * 8,
    "ghp_" + "aB3" * 12,
    "AKIA" + "ABCD" * 4,
    "https://user:hunter2pass@host/data.jsonl",
    "https://bucket/data.jsonl?X-Amz-Signature=0123456789abcdef",
    "https://host/d?a=b&token=0123456789",
    "-----BEGIN RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\\n"
    + "Zz9" * 21
    + "\n"
    + "aB3" * 7
    + "\n-----END PRIVATE KEY-----",
    "gsk_" + "aB3" * 12,
    "sk_live_" + "aB3" * 8,
    "xai-" + "aB3" * 8,
    "SG." + "aB3" * 7 + "." + "Zz9" * 9,
    "https://hooks.slack.com/services/T00/B00/" + "aB3" * 8,
    "Server=tcp:db;Password=hunter2pass;Port=1",
    "AccountName=a;AccountKey=" + "aB3" * 8 + "==;EndpointSuffix=x",
    "{'Authorization': 'Bearer 0123456789abcdef'}",
]
PLAIN = [
    "", "Qwen/Qwen2.5-0.5B", "/home/me/hf_models/sk-learn", "gs://bucket/runs/1", "a:b@c",
    "mine.rewards:f(key='x')", "https://host:8080/data?page=1", "Solve {prompt} @home: 1://2",
    "module:hf_transfer_is_a_name_of_a_reward",
]  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", OF_ENVIRONMENT)
    monkeypatch.setenv("PIN_KEY", "1234")  # too short to look for


@pytest.mark.parametrize("text", [*SHAPED, OF_ENVIRONMENT])
def test_a_secret_is_found_and_hidden(text, environment):
    around = f"before {text} after 1234"
    assert credentials.find_secret(around)
    clean = redact(around)
    assert clean.startswith("before ") and clean.endswith(" after 1234") and "***" in clean
    for part in ("aB3aB3", "Zz9_", "ABCDABCD", "hunter2", "0123456789"):
        assert part not in clean and part not in credentials.find_secret(around)


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_are_left_alone(text, environment):
    assert credentials.find_secret(text) is None and redact(text) == text


@pytest.mark.parametrize(
    "secret",
    ["pa\\ss\"w'ordé-1234 ü\U0001f600\n/x", '\\x\\\\n"-ord1234567', "correct horse=1-ord+"],
)
def test_a_secret_is_hidden_however_python_writes_it(secret, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", secret)
    raw = secret.encode()
    for written in (
        repr(secret), ascii(secret), repr('"' + secret), repr(KeyError(repr(secret))),
        json.dumps(secret), json.dumps(secret, ensure_ascii=False), json.dumps(repr(secret)),
        repr(raw), ascii(repr(secret)), str({"a": secret}),
        urllib.parse.quote(secret), urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret), urllib.parse.urlencode({"p": secret}),
        *(base64.b64encode(before + raw).decode() for before in (b"", b"u:", b"me:", b"user:")),
        base64.urlsafe_b64encode(b"user:" + raw + b"xy").decode(),
    ):  # fmt: skip
        clean = redact(f"before {written} after")
        assert (
            credentials.find_secret(written) == "the value of the environment variable MY_PASSWORD"
        )
        assert clean.startswith("before ") and clean.endswith(" after") and "***" in clean, written
        assert "ord" not in clean.removeprefix("before "), clean
    assert redact("\\" * 100_000).count("\\") == 100_000  # in time, too


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("OPENAI_APIKEY", True), ("PGPASSWORD", True), ("AZURE_STORAGE_CONNECTION_STRING", True),
        ("OPENAI_API_KEY_2", True), ("HF_TOKEN", True), ("MYSQL_PWD", True), ("SENTRY_DSN", True),
        ("AWS_SECRET_ACCESS_KEY", True), ("CLIENTSECRET", True), ("DB_PASS", True),
        ("PWD", False), ("OLDPWD", False), ("MONKEY", False), ("COMPASS", False),
        ("TOKENIZERS_PARALLELISM", False), ("SSH_AUTH_SOCK", False), ("XDG_SESSION_PATH", False),
    ],
)  # fmt: skip
def test_which_variables_hold_secrets(name, is_one, monkeypatch):
    monkeypatch.setenv(name, "a-value-of-some-length")
    assert ("***" == redact("a-value-of-some-length")) == is_one


def test_an_option_that_holds_a_secret_is_refused(environment):
    for name, value in {
        "model__path": OF_ENVIRONMENT,
        "logging__wandb_project": SHAPED[0],
        "checkpoint__folder": SHAPED[4],
        "rewards__names": (f"judge:ask(key='{SHAPED[1]}')",),
    }.items():
        message = refusal_of(valid(**{name: value}))
        option = name.replace("__", ".")
        assert message.startswith(f"{option} holds ") and "in the environment" in message
        assert redact(message) == message


def test_what_a_run_records_has_no_environment(environment):
    config = valid()
    record = json.dumps([record_lib.binding(config), flatten(config)])
    assert OF_ENVIRONMENT not in record


def test_messages_hide_secrets(environment, capsys):
    def run(argv):
        say(f"asked with {OF_ENVIRONMENT}")
        raise ValueError(f"refused {SHAPED[4]} \x1b[2J\nthen " + "x" * 9999)

    with pytest.raises(SystemExit):
        cli.main(run)
    out, err = capsys.readouterr()
    assert out == "asked with ***\n"
    first = err.splitlines()[0]  # what a terminal would obey is spelled out
    assert first.startswith("error: refused https://***@host/data.jsonl \\x1b[2J then xxx")
    assert len(first) < 2100 and first.endswith("xxx")


def test_tracebacks_hide_secrets(environment, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(argv):
        raise KeyError(OF_ENVIRONMENT)

    with pytest.raises(KeyError) as error:
        cli.main(run)
    sys.excepthook(error.type, error.value, error.tb)  # as Python does at the end
    err = capsys.readouterr().err
    assert "KeyError: '***'" in err and "in run" in err and OF_ENVIRONMENT not in err
