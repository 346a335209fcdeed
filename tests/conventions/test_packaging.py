"""The constraints pin what pyproject.toml asks for, exactly, on both Pythons."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conventions.tree import PACKAGE, ROOT, expect_none

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGE_DATA = PYPROJECT["tool"]["setuptools"]["package-data"]["glm_jax"]
PYTHONS = ("3.11", "3.12")


def pins(python: str) -> dict[str, Requirement]:
    """Returns canonical name -> requirement for the constraints of a Python version."""
    path = ROOT / "constraints" / f"py{python.replace('.', '')}.txt"
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


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_the_core_and_the_dev_extra(python):
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    expect_none(pin_faults(pins(python), wanted, python))


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
