"""The sources of the user's modules at a run's start, for workers that start later.

A reward module may be edited during a run. A new worker must not compute other rewards than the old
ones. So it gets the sources that the trainer imported, and imports modules from them.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import linecache
import os
import sys
import sysconfig
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of a module."""

    file: str
    is_package: bool
    text: bytes


def held() -> dict[str, Source]:
    """The sources of imported modules by module name, without installed packages.

    Modules that were not imported from a file are left out too.
    """
    found = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if type(getattr(spec, "loader", None)) is not SourceFileLoader or spec.name != name:
            continue
        file = os.path.abspath(spec.origin)
        if _is_installed(file):
            continue
        try:
            with open(file, "rb") as source:
                text = source.read()
        except OSError:  # the file is gone
            continue
        found[name] = Source(file, spec.submodule_search_locations is not None, text)
    return found


def _is_installed(file: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    if {"site-packages", "dist-packages"} & set(file.split(os.sep)):
        return True
    return os.path.realpath(file).startswith(_STANDARD)


_STANDARD = tuple(
    os.path.join(os.path.realpath(sysconfig.get_path(name)), "")
    for name in ("stdlib", "platstdlib")
)


class Finder:
    """Imports modules from these sources: the first entry of a worker's `sys.meta_path`."""

    def __init__(self, sources: dict[str, Source]):
        self._sources = sources

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        source = self._sources.get(name)
        if source is None:
            return None
        # Tracebacks then show lines of the text that runs, not of the current file.
        lines = source.text.decode("utf-8", "replace").splitlines(keepends=True)
        linecache.cache[source.file] = (len(source.text), None, lines, source.file)
        return importlib.util.spec_from_file_location(
            name,
            source.file,
            loader=_Loader(name, source),
            submodule_search_locations=[os.path.dirname(source.file)]
            if source.is_package
            else None,
        )


class _Loader(SourceFileLoader):
    """Loads a module from the saved text of its file."""

    def __init__(self, name: str, source: Source):
        super().__init__(name, source.file)
        self._text = source.text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._text, self.path)
