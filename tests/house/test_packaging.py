"""The constraints pin what pyproject.toml asks for, exactly, on both Pythons."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.tree import ROOT, expect_none

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
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
