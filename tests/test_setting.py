"""The setting that conftest.py makes for every test."""

from __future__ import annotations

import socket

import jax
import pytest


def test_there_are_eight_cpu_devices():
    assert [d.platform for d in jax.devices()] == ["cpu"] * 8


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 80)])
def test_the_network_is_out_of_reach(address):
    with socket.socket() as s, pytest.raises(PermissionError, match="tests use no network"):
        s.connect(address)


def test_this_machine_is_within_reach():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as s:
        s.connect(server.getsockname())
