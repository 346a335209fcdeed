"""What the tests of the conventions read: the checkout, the package and its parsed modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "glm_jax"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yields every module below `package` as (path from the package's parent, parsed source), in order."""
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).as_posix()
        yield name, ast.parse(path.read_text(encoding="utf-8"), filename=name)


def expect_none(faults: list[str]) -> None:
    """Fails with every fault on a line of its own."""
    assert not faults, "\n" + "\n".join(faults)


def write_package(directory: Path, files: dict[str, str]) -> Path:
    """Writes a package `glm_jax` of `files` (path in it -> source) below `directory`, to show that a check can fail."""
    package = directory / "glm_jax"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package
