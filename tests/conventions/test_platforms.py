"""Platforms are known in kernels/ and sharding/ alone; layers know neither them nor the storage of a weight."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conventions.tree import PACKAGE, expect_none, modules, write_package

KNOW_PLATFORMS = ("kernels", "sharding")
# What these parts do is about platforms: they describe devices to plan and compile for, start processes on clusters,
# and tell users which platform jax has found. None of them computes.
SPEAK_OF_PLATFORMS = ("planning", "runtime", "cli")
NAMES = {"cpu", "gpu", "tpu", "cuda", "rocm"}
ASKING = {"platform", "default_backend", "__version_info__", "device_kind"}
BARRIER = {"layers/dispatch.py"}  # results are finished before they are sent


def platform_faults(package: Path) -> list[str]:
    """What asks for a platform, a version or a storage where it should not, with its place."""
    faults = []
    for path, tree in modules(package):
        module = path.partition("/")[2]
        part = module.split("/")[0]
        if part in KNOW_PLATFORMS:
            continue
        for node in ast.walk(tree):
            found = _barrier(node) if module not in BARRIER else None
            if part not in SPEAK_OF_PLATFORMS:
                found = found or _asks(node)
            if part == "layers":
                found = found or _storage(node)
            if found:
                faults.append(f"{path}:{node.lineno}: {found}")  # type: ignore[attr-defined]
    return faults


def _asks(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and node.value in NAMES:
        return f"names the platform {node.value!r}"
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
    return f"asks for {name}" if name in ASKING else None


def _barrier(node: ast.AST) -> str | None:
    is_barrier = isinstance(node, ast.Attribute) and node.attr == "optimization_barrier"
    return "holds the compiler back (optimization_barrier)" if is_barrier else None


def _storage(node: ast.AST) -> str | None:
    """A weight's storage asked for by its class."""
    names = ("QuantizedArray", "PackedBfloat16")
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
        return None
    found = [each.id for each in ast.walk(node) if isinstance(each, ast.Name) and each.id in names]
    return f"asks whether a weight is a {found[0]}" if found else None


def test_platforms_are_known_in_kernels_and_sharding_alone():
    expect_none(platform_faults(PACKAGE))


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("layers/moe.py", "if platform() == 'abc':\n    pass", False),
        ("layers/moe.py", "fast = mesh.devices.flat[0].platform", False),
        ("inference/runner.py", "STEPS = {'tpu': 16}", False),
        ("model/cache.py", "new = jax.__version_info__ >= (0, 11)", False),
        ("training/step.py", "x = jax.lax.optimization_barrier(x)", False),
        ("cli/plan.py", "x = lax.optimization_barrier(x)", False),
        ("layers/linear.py", "a = isinstance(w, QuantizedArray)", False),
        ("layers/linear.py", "a = isinstance(w, jax.Array | PackedBfloat16)", False),
        ("training/step.py", "a = isinstance(w, QuantizedArray)", True),
        ("layers/dispatch.py", "x = lax.optimization_barrier(x)", True),
        ("planning/devices.py", "PLATFORM = 'tpu'", True),
        ("kernels/cpu.py", "x = lax.optimization_barrier(x) if platform() == 'cpu' else x", True),
        ("layers/norm.py", '"""A TPU rounds this otherwise."""', True),
    ],
)
def test_the_check_can_fail(tmp_path, module, source, allowed):
    assert (platform_faults(write_package(tmp_path, {module: source})) == []) is allowed
