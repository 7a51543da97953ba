"""What mkdocs needs besides mkdocs.yml: pages made of files at the top, and links to the source.

The pages read well in the repository, where README.md stands above docs/ and `../grpo_jax/...` is a
file. On the site README.md is the first page, and a link to a file that is no page leads to the
repository that `repo_url` names, or is plain text where it names none.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Pages of files that do not stand in docs/.
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "results.md": "benchmarks/RESULTS.md",
}
_PAGE_OF = {source: page for page, source in PAGES.items()}
_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with what is no code changed; a link whose words are code is no code."""
    held: list[str] = []

    def hold(found: re.Match) -> str:
        held.append(found[0])
        return f"\0{len(held) - 1}\0"

    changed = change(_CODE.sub(hold, text))
    return re.sub(r"\0(\d+)\0", lambda found: held[int(found[1])], changed)


def relinked(text: str, source: str, repository: str) -> str:
    """A page's text with its links as the site needs them.

    `source`: the page's file, from the top of the repository.
    """

    def link(found: re.Match) -> str:
        words, target = found[1], found[2]
        path, hash_mark, anchor = target.partition("#")
        if not path or re.match(r"\w+:", target):
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = _PAGE_OF.get(file) or (file.startswith("docs/") and file.removeprefix("docs/"))
        if page and not page.endswith((".py", ".json")):
            return f"[{words}]({page}{hash_mark}{anchor})"
        if not repository:
            return words
        return f"[{words}]({repository.rstrip('/')}/blob/HEAD/{file}{hash_mark}{anchor})"

    return outside_code(text, lambda part: LINK.sub(link, part))


_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<(t[hd])([^>]*)>(.*?)</t[hd]>", re.DOTALL)
_MANY = 20  # letters of a row beside its first cell; figures have few


def stacked(html: str) -> str:
    """A page with its tables of much text marked, which a narrow screen shows row by row.

    They have three to five columns, and most rows have many letters. `site.css` puts the cells
    of a row below each other; each has the head of its column in `data-head`.
    """
    return _TABLE.sub(lambda found: _stacked(found[0]), html)


def _stacked(table: str) -> str:
    plain = lambda text: re.sub(r"<[^>]+>", "", text).strip()  # noqa: E731
    first, *rows = _ROW.findall(table)
    heads = [plain(cell[2]) for cell in _CELL.findall(first)]
    cells = ["".join(plain(cell[2]) for cell in _CELL.findall(row)[1:]) for row in rows]
    sizes = [sum(map(str.isalpha, text)) for text in cells]
    if not 3 <= len(heads) <= 5 or not rows or sorted(sizes)[len(sizes) // 2] < _MANY:
        return table

    def with_heads(row: re.Match) -> str:
        of = iter(heads)

        def cell(found: re.Match) -> str:
            head, (kind, attributes, text) = next(of, ""), found.groups()
            named = kind == "td" and head and text.strip() and head != heads[0]
            named = f' data-head="{head}"' if named else ""
            return f"<{kind}{attributes}{named}>{text}</{kind}>"

        return _CELL.sub(cell, row[0])

    return _ROW.sub(with_heads, table).replace("<table>", "<table data-stacked>", 1)


# --- Called by mkdocs -----------------------------------------------------------------------------


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files, *, config):
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, *, page, config, files):
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return relinked(markdown, os.fspath(source), config.repo_url or "")


def on_page_content(html, *, page, config, files):
    return stacked(html)
