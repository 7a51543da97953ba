"""What the pages say can be followed: links lead somewhere, commands, code and options are real.

No JAX is imported.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from grpo_jax.__main__ import LISTS, PROGRAMS
from grpo_jax.api import options as api_options
from grpo_jax.config import arguments, completion, loading, options, other_names, parsers
from grpo_jax.config.dotted import assign, flatten, override

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, ROOT / "benchmarks" / "RESULTS.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=NAMES)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash", "shell", "console")


@functools.cache
def hooks() -> ModuleType:
    """docs/hooks.py, which makes the site's links."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, *languages: str) -> list[str]:
    """What stands in a page's code blocks of these languages."""
    return [b[2] for b in FENCE.findall(page.read_text()) if b[1] in languages]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


# --- Links ----------------------------------------------------------------------------------------


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        name = hooks().slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


def links(page: Path) -> list[str]:
    """Where a page's links lead, but for those to other sites."""
    text = re.sub(r"`[^`\n]*`", "code", prose(page))
    targets = [target for _, target in hooks().LINK.findall(text)]
    targets += re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    return [target for target in targets if not re.match(r"\w+:", target)]


@EACH_PAGE
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target} of {sorted(anchors(file))}"


def test_links_of_the_site_are_those_of_the_repository():
    relinked = hooks().relinked
    text = "[`a`](docs/data.md#columns) ![b](docs/quickstart.png) [c](grpo_jax/cli.py) `[d](e)`"
    assert relinked(text, "README.md", "https://example.org/r/") == (
        "[`a`](data.md#columns) ![b](quickstart.png) "
        "[c](https://example.org/r/blob/HEAD/grpo_jax/cli.py) `[d](e)`"
    )
    text = (
        "[a](../README.md) [b](../SECURITY.md#reporting) [c](../configs) [d](#e) [f](https://g.h)"
    )
    assert relinked(text, "docs/x.md", "") == (
        "[a](index.md) [b](security.md#reporting) c [d](#e) [f](https://g.h)"
    )


def test_tables_of_much_text_are_stacked_on_narrow_screens():
    row = "<tr>\n<td>{}</td>\n<td><code>{}</code></td>\n<td>{}</td>\n</tr>\n"
    head = "<tr>\n<th>option</th>\n<th>default</th>\n<th>meaning</th>\n</tr>\n"
    many, few = row.format("a", "1", "long " * 20), row.format("a", "1", "short")
    table = "<table>\n<thead>\n" + head + "</thead>\n<tbody>\n{}</tbody>\n</table>"
    found = hooks().stacked("<p>x</p>" + table.format(2 * many + few.replace("short", "")))
    assert found.startswith("<p>x</p><table data-stacked>") and "<th>default</th>" in found
    assert found.count('<td data-head="default"><code>1</code></td>') == 3
    assert found.count('<td data-head="meaning">long') == 2 and "<td></td>" in found
    assert found.count("<td>a</td>") == 3
    assert hooks().stacked(table.format(2 * few)) == table.format(2 * few)  # figures: they scroll
    two = (
        table.format(many).replace("<th>default</th>\n", "").replace("<td><code>1</code></td>", "")
    )
    assert hooks().stacked(two) == two


def test_every_page_is_in_the_sites_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r": ([\w/]+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == sorted([page.name for page in DOCS] + list(hooks().PAGES))
    assert all((ROOT / source).exists() for source in hooks().PAGES.values())


@EACH_PAGE
def test_lists_and_tables_stand_apart(page):
    """A list or table right after a line of text is none on the site, though GitHub shows it."""
    lines = FENCE.sub("", page.read_text()).splitlines()
    for before, line in itertools.pairwise(lines):
        begins = re.match(r"(- |1\. |\| )", line)
        goes_on = re.match(r"( *(- |\d+\. )|\|| |$|<!-- )", before)
        assert not begins or goes_on, f"{page.name}: {before} / {line}"
        # A further paragraph or table of a list's item: the site ends the list where it has less.
        nested = len(line) - len(line.lstrip()) if not before else 0
        assert nested in (0, 4, 8), f"{page.name}: indent by 4: {line}"


# --- Commands -------------------------------------------------------------------------------------


@functools.cache
def flags(name: str) -> argparse.ArgumentParser:
    """The parser of a program, for commands that leave out what it needs."""
    parser = parsers.BY_PROGRAM[name]()
    parser.exit_on_error = False
    for action in [*parser._actions, *parser._mutually_exclusive_groups]:
        action.required = False
    return parser


def commands(page: Path) -> list[list[str]]:
    """The commands of ours on a page, as words: those in shell blocks, and between backticks."""
    text = "\n".join(blocks(page, *SHELL)).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    inline = re.findall(r"`([^`]+)`", prose(page))
    lines += [" ".join(code.split()) for code in inline]
    found = []
    for line in lines:
        own = re.search(
            r"(?<![\w./-])(python -m grpo_jax\.(\w+)|grpo-jax (\w+)|launch/gpu\.sh)(?= |$)", line
        )
        if own:
            name = own[2] or own[3] or "train"
            if _is_placeholder(name):
                continue
            rest = re.split(r" (?:[|;&]|&&|>) ", line[own.end() :])[0]
            found.append([name, *shlex.split(rest, comments=True)])
    return found


def _is_placeholder(text: str) -> bool:
    """A word such as FILE or DIR_OR_ID, or three dots."""
    return bool(re.fullmatch(r"[A-Z_]+|\.\.\.|\[?\.\.\.\]?", text))


def _stands_for_any(argument: str) -> bool:
    """`[--config.NAME=VALUE`, `--config.seed=S` and the like."""
    name, _, value = argument.strip("[]").partition("=")
    return name in ("--config.NAME", "--config.name") or _is_placeholder(value)


@EACH_PAGE
def test_commands_are_ones_that_there_are(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, *words in commands(page):
        said = f"{page.name}: {name} {' '.join(words)}"
        if name in LISTS:
            shells = completion.SHELLS if name == "completion" else ()
            assert set(words) <= {*options.SECTIONS, *shells}, said
            continue
        if (ROOT / "grpo_jax" / name).is_dir():  # a module that writes a page
            continue
        assert name in PROGRAMS, said
        words = [word for word in words if word != "..."]
        try:
            known, rest = arguments.parse(flags(name), words)
        except argparse.ArgumentError as error:
            pytest.fail(f"{said}: {error}")
        config = getattr(known, "config", None)
        overrides = [word for word in rest if not _stands_for_any(word)]
        if not overrides and (not config or _is_placeholder(config)):
            continue
        assert name not in ("generate", "report", "profile"), said
        try:
            if config and not _is_placeholder(config):
                loading.load(config, overrides)
            else:
                loading.read(None, overrides)
        except ValueError as error:
            pytest.fail(f"{said}: {error}")


@EACH_PAGE
def test_options_in_the_text_have_values_that_they_can_have(page):
    """Such as `model.remat="full"`, `--config.batch.group=8` and `guards.kl_max = 0.5`."""
    if page.name == "from_verl.md":  # verl's names; below
        return
    config = options.default()
    for code in re.findall(r"`([^`]+)`", prose(page)):
        found = re.fullmatch(r"(?:--config\.)?(\w+\.\w+) ?= ?([^=<>]+)", " ".join(code.split()))
        if not found or found[1].partition(".")[0] not in options.SECTIONS:
            continue
        name, text = found[1], found[2]
        if re.fullmatch(r"[A-Z_]+(:[A-Z]+)?|.*\b(DIR|FILE|BUCKET)\b.*", text):
            continue
        try:
            override(config, name, _unquoted(text))
            refused = options.BY_NAME[name].refusal(flatten(config)[name])
        except ValueError as error:
            refused = str(error)
        assert not refused, f"{page.name}: {code}: {refused}"


def _unquoted(text: str) -> str:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, str) else text


def test_commands_are_found():
    """The tests above look at something: each program, and options with values."""
    found = [words for page in PAGES for words in commands(page)]
    assert {name for name, *_ in found} >= set(PROGRAMS) - {"profile"}
    assert len(found) > 60
    assert ["train", "--config", "configs/quickstart.py"] in commands(ROOT / "README.md")


def test_the_readmes_blocks_are_those_that_scripts_run():
    """The first one trains after an installation; the first that names pytest runs the tests."""
    first, *rest = blocks(ROOT / "README.md", *SHELL)
    quickstart = "python -m grpo_jax.train --config configs/quickstart.py"
    assert first.splitlines() == ["python -m pip install -e .", quickstart]
    test = next(block for block in rest if "pytest" in block).splitlines()
    assert test[-2:] == ['python -m pip install -e ".[test]"', "python -m pytest"]
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# --- Code -----------------------------------------------------------------------------------------


# Functions that take options by name, with the section whose options have bare names.
TRAINS = {
    "grpo_jax.train": "",
    "grpo_jax.sft": "sft",
    "grpo_jax.dpo": "preference",
    "grpo_jax.reward_model": "reward_model",
}


@EACH_PAGE
def test_python_is_python(page):
    for block in blocks(page, "python", "py"):
        tree = ast.parse(block, str(page))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and _sets_options(node):
                _set_options(node, page)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in TRAINS:
                _check_train(node, tree, TRAINS[ast.unparse(node.func)])


def _sets_options(node: ast.Assign) -> bool:
    return ast.unparse(node.targets[0]).lstrip("(").startswith("c.")


def _set_options(node: ast.Assign, page: Path) -> None:
    """Runs `c.x.y = v` with a config; each value is one that the option can have."""
    config = options.default()
    exec(compile(ast.Module([node], []), str(page), "exec"), {"c": config})
    default = flatten(options.default())
    for name, value in flatten(config).items():
        if value != default[name]:
            assign(config, name, value)
            refused = options.BY_NAME[name].refusal(value)
            assert not refused, f"{page.name}: {ast.unparse(node)}: {refused}"


def _check_train(call: ast.Call, tree: ast.Module, section: str) -> None:
    """The arguments by name are those of `grpo_jax.train` and its like, or options."""
    taken = {"model", "data", "eval_data", "workdir", "callbacks", "config"}
    taken |= set() if section else {"rewards", "tools", "environments"}
    held = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for keyword in call.keywords:
        value = keyword.value
        if keyword.arg is None:
            value = held.get(value.id) if isinstance(value, ast.Name) else value
            chosen = {ast.literal_eval(k): v for k, v in zip(value.keys, value.values)}
        else:
            chosen = {} if keyword.arg in taken else {keyword.arg: value}
        for name, node in api_options.in_section(section, chosen).items():
            option = api_options.option_of(name)
            if not isinstance(node, ast.Dict):
                config = options.default()
                assign(config, option, ast.literal_eval(node))
                assert not options.BY_NAME[option].refusal(flatten(config)[option]), name


# --- Pages that name others' options --------------------------------------------------------------


def test_verls_names_are_answered_as_the_hint_answers_them():
    text = (ROOT / "docs" / "from_verl.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)`[^|]*\|[^|]*\| ([^|]+) \|", text, re.MULTILINE)
    assert len(rows) > 50
    for theirs, ours in rows:
        named = re.fullmatch(r"`([\w.]+)`", ours)
        assert ours == "-" or (named and named[1] in options.BY_NAME), theirs
        hint = other_names.meant(theirs)
        if named and theirs not in options.BY_NAME and _is_known(theirs):
            assert hint == [named[1]], theirs
    for name in re.findall(r"`((\w+)\.\w+)`", text.partition("## Option by option")[0]):
        assert name[1] not in options.SECTIONS or name[0] in options.BY_NAME, name


def _is_known(name: str) -> bool:
    """Whether the table of others' names has it."""
    parts = name.split(".")
    return any(".".join(parts[i:]) in other_names._ELSEWHERE for i in range(len(parts)))


def test_pages_speak_of_the_project_alone():
    for page in PAGES:
        text = page.read_text()
        found = re.search(r"(?<![\w.])/(work|opt|root|home)/|pypi\.org|files\.pythonhosted", text)
        assert not found, f"{page.name}: {found[0]}"


# --- The site -------------------------------------------------------------------------------------


def test_the_site_is_built(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"needs {module}, of the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first = (tmp_path / "index.html").read_text()
    assert "quickstart.png" in first and 'href="options/"' in first
    elsewhere = re.compile(r'<(?:script|img|link)\b[^>]*(?:src|href)="(https?:[^"]*)"')
    for page in tmp_path.rglob("*.html"):
        loaded = elsewhere.findall(page.read_text())
        assert not loaded, f"{page}: {loaded}"
