"""How large things may get, and what must say what it is: files, functions, parameters, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conventions.tree import PACKAGE, Function, expect_none, modules, write_package

FILE_LINES = 500
FUNCTION_LINES = 60
LOOP_LINES = 100
POSITIONAL = 4

# Functions whose one loop is clearer whole, as "path:qualified name": they may have LOOP_LINES.
LOOPS: frozenset[str] = frozenset()


def functions(tree: ast.Module) -> Iterator[tuple[str, Function, str]]:
    """Yields (qualified name, function, what it stands in: "module", "class" or "function"), the nested ones too."""

    def visit(node: ast.AST, prefix: str, scope: str) -> Iterator[tuple[str, Function, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child, scope
                yield from visit(child, f"{prefix}{child.name}.", "function")
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.", "class")
            else:
                yield from visit(child, prefix, scope)

    return visit(tree, "", "module")


def positional(function: Function, scope: str) -> list[str]:
    """Returns the parameters that may be passed by position, without self and cls."""
    names = [parameter.arg for parameter in (*function.args.posonlyargs, *function.args.args)]
    static = any(isinstance(node, ast.Name) and node.id == "staticmethod" for node in function.decorator_list)
    return names[1:] if scope == "class" and not static else names


def size_faults(package: Path, loops: frozenset[str] = LOOPS) -> list[str]:
    """Returns a line for each file or function that is too long and each function with too many positional parameters.

    Functions inside functions, and kernels whose parameters are all references (`*_ref`), are called by transforms, by
    position: their parameters are not counted.
    """
    faults = []
    for path in sorted(package.rglob("*.py")):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > FILE_LINES:
            faults.append(f"{path.relative_to(package.parent)}: {count} lines, {FILE_LINES} allowed")
    for module, tree in modules(package):
        for name, function, scope in functions(tree):
            where = f"{module}:{function.lineno}: {name}"
            limit = LOOP_LINES if f"{module}:{name}" in loops else FUNCTION_LINES
            count = (function.end_lineno or function.lineno) - function.lineno + 1
            if count > limit:
                faults.append(f"{where} has {count} lines, {limit} allowed")
            parameters = positional(function, scope)
            by_transform = scope == "function" or all(parameter.endswith("_ref") for parameter in parameters)
            if len(parameters) > POSITIONAL and not by_transform:
                faults.append(f"{where} has {len(parameters)} positional parameters, {POSITIONAL} allowed: add '*'")
    return faults


def name_faults(package: Path) -> list[str]:
    """Returns a line for every module or directory named utils."""
    paths = (path for path in sorted(package.rglob("*")) if path.stem == "utils")
    return [f"{path.relative_to(package.parent)}: say what it is for" for path in paths]


def docstring_faults(package: Path) -> list[str]:
    """Returns a line for every module, public function and public class without a docstring."""
    faults = []
    for module, tree in modules(package):
        if ast.get_docstring(tree) is None:
            faults.append(f"{module}: the module has no docstring")
        for node in tree.body:
            public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                faults.append(f"{module}:{node.lineno}: {node.name} has no docstring")
    return faults


def test_files_functions_and_parameters_are_small():
    expect_none(size_faults(PACKAGE))


def test_no_file_is_named_utils():
    expect_none(name_faults(PACKAGE))


def test_what_is_public_is_documented():
    expect_none(docstring_faults(PACKAGE))


def test_listed_loops_exist():
    known = {f"{module}:{name}" for module, tree in modules(PACKAGE) for name, _, _ in functions(tree)}
    assert known >= LOOPS


LONG = "def f():\n" + "    pass\n" * FUNCTION_LINES


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("pass\n" * FILE_LINES, True),
        ("pass\n" * (FILE_LINES + 1), False),
        (LONG, False),
        (LONG.replace("    pass\n", "", 1), True),
        ("class A:\n" + "".join(f"    {line}\n" for line in LONG.splitlines()), False),
        ("def f(a, b, c, d): ...", True),
        ("def f(a, b, c, d, e): ...", False),
        ("def f(a, b, c, d, *, e): ...", True),
        ("def f(a, b, c, /, d, e): ...", False),
        ("class A:\n    def f(self, a, b, c, d): ...", True),
        ("class A:\n    def f(self, a, b, c, d, e): ...", False),
        ("class A:\n    @staticmethod\n    def f(a, b, c, d, e): ...", False),
        ("def f():\n    def body(a, b, c, d, e): ...", True),
        ("def kernel(a_ref, b_ref, c_ref, d_ref, e_ref): ...", True),
    ],
)
def test_size_check_can_fail(tmp_path, source, allowed):
    assert (size_faults(write_package(tmp_path, {"a.py": source})) == []) is allowed


def test_a_listed_loop_may_be_longer(tmp_path):
    package = write_package(tmp_path, {"a.py": LONG})
    assert size_faults(package) != []
    assert size_faults(package, frozenset({"glm_jax/a.py:f"})) == []


@pytest.mark.parametrize("name", ["utils.py", "data/utils.py", "utils/paths.py"])
def test_name_check_can_fail(tmp_path, name):
    assert name_faults(write_package(tmp_path, {name: ""})) != []


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("", False),
        ('"""A."""', True),
        ('"""A."""\ndef f(): ...', False),
        ('"""A."""\ndef _f(): ...', True),
        ('"""A."""\nclass A: ...', False),
        ('"""A."""\ndef f():\n    """B."""', True),
    ],
)
def test_docstring_check_can_fail(tmp_path, source, allowed):
    assert (docstring_faults(write_package(tmp_path, {"a.py": source})) == []) is allowed
