"""How many CPUs a process may use, from trees of files as control groups have them."""

import os

import pytest

from grpo_jax.hosts import cpus


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A function of the files of control groups, by path, and of /proc/self/cgroup: CPUs of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)

    def usable(own: str, **files: str) -> int:
        for name, text in files.items():
            file = tmp_path / "groups" / name.replace("__", "/").replace("_max", ".max")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "own").write_text(own)
        return cpus.usable(tmp_path / "groups", tmp_path / "own")

    return usable


def test_the_affinity_counts(monkeypatch, host):
    assert host("") == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert host("") == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert host("") == 64


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu_max": "max 100000"}, 64),
        ({"cpu_max": "250000 100000"}, 3),
        ({"cpu_max": "5000 100000"}, 1),
        ({"a__b__cpu_max": "max 100000", "a__cpu_max": "400000 100000"}, 4),
        ({"a__b__cpu_max": "200000 100000", "a__cpu_max": "400000 100000"}, 2),
        ({"a__b__cpu_max": "nonsense"}, 64),
        ({"c__cpu_max": "100000 100000"}, 64),  # another's
    ],
)
def test_the_quotas_of_control_groups_count(host, files, count):
    assert host("0::/a/b\n", **files) == count


def test_the_quotas_of_the_first_version_count(host, tmp_path):
    group = tmp_path / "groups" / "cpu" / "job"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("150000\n")
    (group / "cpu.cfs_period_us").write_text("50000\n")
    own = "4:memory:/job\n2:cpu,cpuacct:/job\n"
    assert host(own) == 3
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert host(own) == 64
