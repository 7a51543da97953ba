"""The copy of lora.path in a run's folder."""

from __future__ import annotations

from grpo_jax.config import options
from grpo_jax.hosts import processes
from grpo_jax.setup import lora


def test_an_adapter_is_copied_once_and_nothing_waits_without_one(tmp_path, monkeypatch):
    met: list[str] = []
    monkeypatch.setattr(processes, "barrier", met.append)
    config, run = options.default(), tmp_path / "run"

    lora.keep(config, run)

    assert not met and not run.exists()
    given = tmp_path / "given"
    given.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (given / name).write_text("first")
    config.lora.path = str(given)
    for text in ("first", "second"):  # of a start, and of one that goes on
        (given / "adapter_config.json").write_text(text)
        lora.keep(config, run)
    assert (run / lora.KEPT / "adapter_config.json").read_text() == "first"
    assert len(met) == 2
