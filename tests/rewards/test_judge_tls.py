"""Judges behind https://: certificates that are trusted, refused, for another name, or absent."""

from __future__ import annotations

import shutil
import socketserver
import ssl
import subprocess
import threading

import pytest
from stub_judge import StubJudge
from test_judges import judged

from grpo_jax.rewards.judging.client import Limits

TEXTS = ["a", "bb", "ccc"]
PATIENT = Limits(attempt_s=30.0, deadline_s=60.0, retries=3)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The file of a certificate for 127.0.0.1 that signs itself, and a server's settings."""
    if (program := shutil.which("openssl")) is None:
        pytest.skip("needs the program openssl, which makes a certificate")
    folder = tmp_path_factory.mktemp("tls")
    file, key = folder / "judge.pem", folder / "key.pem"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-subj", "/CN=judge", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    command = [program, *made, *named, "-keyout", str(key), "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    settings = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    settings.load_cert_chain(file, key)
    return file, settings


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Repeated calls wait for no time; nothing is trusted but what the system trusts."""
    monkeypatch.setattr("grpo_jax.rewards.judging.client._FIRST_WAIT_S", 0.001)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


def refused(got) -> str:
    """The one message of judgements that all failed with their first call."""
    assert got.unknown_B.all() and got.sums["judge/failed_by_connection"] == len(TEXTS)
    assert got.sums["judge/retries"] == 0 and got.sums["judge/calls"] == len(TEXTS)
    assert not got.broken(0.5).keys() ^ {"rubric"}
    (message,) = {failure.message for failure in got.failures}
    return message


def test_a_server_whose_certificate_is_named_judges(tmp_path, certificate, monkeypatch):
    file, settings = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with StubJudge(tls=settings) as stub:
        got = judged(tmp_path, stub.url, TEXTS, limits=PATIENT, key="a-secret-key")
    assert stub.url.startswith("https://") and got.reward_B.tolist() == [0.25, 0.5, 0.75]
    assert len(stub.requests) == 3 and "Bearer a-secret-key" in stub.heads[0]


@pytest.mark.parametrize("case", ["not set", "no such file", "another name"])
def test_a_certificate_that_is_wrong_is_told_once_and_never_asked_again(
    tmp_path, certificate, monkeypatch, case
):
    file, settings = certificate
    named = {"not set": None, "no such file": tmp_path / "no.pem", "another name": file}[case]
    if named:
        monkeypatch.setenv("SSL_CERT_FILE", str(named))
    with StubJudge(tls=settings) as stub:
        url = stub.url.replace("127.0.0.1", "localhost") if case == "another name" else stub.url
        message = refused(judged(tmp_path, url, TEXTS, limits=PATIENT))
    why = "Hostname mismatch" if case == "another name" else "self-signed certificate"
    assert f"the judge's certificate is refused: {why}" in message and not stub.requests
    told = "is not set" if named is None else f"is '{named}'"
    told += ", and there is no such file" if case == "no such file" else ""
    assert "the environment variable SSL_CERT_FILE the file (PEM)" in message
    assert message.endswith(f"that variable {told}.") and len(message) < 600


class Plain(socketserver.StreamRequestHandler):
    """Answers what is no HTTP as web servers do."""

    def handle(self):
        self.rfile.read(1)
        self.wfile.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def test_a_server_without_tls_is_told_at_once(tmp_path):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_address[1]}/v1"
        message = refused(judged(tmp_path, url, TEXTS, limits=PATIENT))
        server.shutdown()
    assert "answers without TLS. Begin judge.base_url with http://" in message
