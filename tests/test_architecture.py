"""The page on the architecture shows the code as it is."""

import importlib.util
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _drawing():
    spec = importlib.util.spec_from_file_location("drawing", DOCS / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_tables_and_its_picture_are_those_of_the_code():
    drawing = _drawing()
    told = "Run python docs/draw_architecture.py."
    assert drawing.page(drawing.PAGE.read_text()) == drawing.PAGE.read_text(), told
    assert drawing.picture() == (DOCS / "pictures" / "step.svg").read_text(), told


def test_the_files_that_it_names_are_there():
    drawing = _drawing()
    package = drawing.PACKAGE
    for _, _, _, file, _ in drawing.BOXES.values():
        assert (package / f"{file}.py").exists(), file
    head = drawing.PAGE.read_text().partition("## Who may import whom")[0]
    for name in re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", head):
        roots = (package, DOCS.parent)
        assert any((root / name).exists() for root in roots), name


def test_no_file_and_no_function_is_too_long():
    """A file over 450 lines holds two nouns, a function over 70 two verbs; tables may be long."""
    import ast

    for path in sorted(_drawing().PACKAGE.rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not _is_table(node):
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


def _is_table(function) -> bool:
    """Whether it is nothing but assignments, one under the other, as config.options.default."""
    import ast

    plain = (ast.Assign, ast.Expr, ast.Return)
    return all(isinstance(node, plain) for node in function.body)
