"""The constraints pin what pyproject.toml asks for, exactly, on every Python; all documents name the same Pythons."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conventions.tree import PACKAGE, ROOT, expect_none

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGE_DATA = PYPROJECT["tool"]["setuptools"]["package-data"]["glm_jax"]
# The constraints of each Python; those of the newest serve the one before, too, in make test-newest.
CONSTRAINTS = [("py311.txt", "3.11"), ("py312.txt", "3.12"), ("newest.txt", "3.12"), ("newest.txt", "3.13")]
PYTHONS = sorted({python for _, python in CONSTRAINTS})


def pins(constraints: str) -> dict[str, Requirement]:
    """Returns canonical name -> requirement for a file of constraints."""
    path = ROOT / "constraints" / constraints
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(found.name): found for found in map(Requirement, filter(None, lines))}


def pin_faults(pinned: dict[str, Requirement], wanted: list[str], python: str) -> list[str]:
    """Returns a line for every pin that is not exact and every requirement that is not pinned inside its range."""
    faults = [f"{pin} is not exact" for pin in pinned.values() if [s.operator for s in pin.specifier] != ["=="]]
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        pin = pinned.get(canonicalize_name(requirement.name))
        if pin is None:
            faults.append(f"{requirement.name} is not pinned")
        elif not requirement.specifier.contains(next(iter(pin.specifier)).version):
            faults.append(f"{pin} is outside of {requirement}")
    return faults


@pytest.mark.parametrize(("constraints", "python"), CONSTRAINTS)
def test_constraints_pin_the_core_and_the_dev_extra(constraints, python):
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    expect_none(pin_faults(pins(constraints), wanted, python))


def test_every_file_of_constraints_is_of_a_python():
    assert {path.name for path in (ROOT / "constraints").iterdir()} == {name for name, _ in CONSTRAINTS}


def test_supported_pythons_are_the_same_everywhere():
    """Those before are refused by pip; those after are not refused."""
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name] == PYTHONS
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert f"Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}, make and bash" in text
    rows = re.findall(r"^\| CPU, .*?\| (\S+), jax (\S+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    newest = {python: next(iter(pins(name)["jax"].specifier)).version for name, python in CONSTRAINTS}
    newest["3.12"] = next(iter(pins("py312.txt")["jax"].specifier)).version
    assert dict(rows) == newest


def test_pin_check_can_fail():
    pinned = {"jax": Requirement("jax==0.10.2"), "rich": Requirement("rich>=13")}
    assert pin_faults({"jax": pinned["jax"]}, ["jax>=0.10.2,<0.13", "torch; python_version < '3.12'"], "3.12") == []
    assert pin_faults({"jax": pinned["jax"]}, ["jax>=0.11"], "3.11") != []
    assert pin_faults(pinned, ["rich>=13"], "3.11") != []
    assert pin_faults({}, ["torch; python_version < '3.12'"], "3.11") != []


def data_faults(package: Path, patterns: list[str]) -> list[str]:
    """Returns a line for every file beside the modules that an installed package would lack, and every idle pattern."""
    found = {pattern: set(package.glob(pattern)) for pattern in patterns}
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    beside = {path for path in files if path.suffix != ".py"}
    faults = [f"{path} is in no pattern of package-data" for path in sorted(beside - set().union(*found.values()))]
    return faults + [f"package-data: nothing is like {pattern}" for pattern, paths in found.items() if not paths]


def test_every_file_of_the_package_is_installed():
    expect_none(data_faults(PACKAGE, PACKAGE_DATA))


def test_data_check_can_fail(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jinja").write_text("")
    (tmp_path / "text" / "a.py").write_text("")
    assert data_faults(tmp_path, ["text/*.jinja"]) == []
    assert len(data_faults(tmp_path, ["*.jinja"])) == 2
    assert len(data_faults(tmp_path, [])) == 1
