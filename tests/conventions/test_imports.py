"""What may import what: the direction between the parts, and where jax and the mesh's axis names may not appear."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.conventions.tree import PACKAGE, expect_none, modules, write_package

# Part -> the parts that it stands on; it may also import what those may. "cli" and the modules at the package's top
# (glm_jax/__init__.py and the conveniences beside it) may import everything.
# Everything may import glm_jax.errors and glm_jax.version.
STANDS_ON = {
    "configs": (),
    "runtime": ("configs",),
    "sharding": ("configs",),
    "kernels": ("sharding",),
    "layers": ("kernels",),
    "model": ("layers",),
    "checkpoint": ("model",),
    "text": ("configs",),
    "data": ("text",),
    "inference": ("model",),
    "serving": ("inference", "text"),
    "training": ("model", "data"),
    "planning": ("training", "inference", "runtime", "checkpoint"),
    "posttrain": ("training", "inference", "text", "data"),
    "evaluation": ("inference", "model"),
    "research": ("inference", "model"),
}
UNBOUND = "cli"
WITHOUT_JAX = ("configs", "text", "data")
JAX_AND_WHAT_IMPORTS_IT = {"jax", "jaxlib", "flax", "optax", "orbax"}
MESH_AXES = {"data", "expert", "tensor"}
COLLECTIVES = {
    "all_gather", "all_to_all", "axis_index", "axis_size", "pbroadcast", "pcast", "pmax", "pmean", "pmin", "ppermute",
    "pshuffle", "psum", "psum_scatter", "pvary",
}  # fmt: skip


def reachable(part: str) -> set[str]:
    """Returns the parts that `part` may import, itself included."""
    found = {part}
    for below in STANDS_ON[part]:
        found |= reachable(below)
    return found


def imported_names(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) for each import in `module` (a path), inside functions too, relative ones resolved."""
    package = module.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def direction_faults(package: Path) -> list[str]:
    """Returns a line for every import against the direction."""
    faults = []
    for module, tree in modules(package):
        parts = module.split("/")
        if len(parts) == 2 or parts[1] == UNBOUND:
            continue
        if parts[1] not in STANDS_ON:
            faults.append(f"{module}: '{parts[1]}' is no part of the plan; give it a place in STANDS_ON")
            continue
        allowed = reachable(parts[1]) | {"errors", "version"}
        for line, name in imported_names(module, tree):
            target = name.split(".")
            if target[0] == "glm_jax" and (len(target) == 1 or target[1] not in allowed):
                faults.append(f"{module}:{line}: '{parts[1]}' may not import {name}; only {', '.join(sorted(allowed))}")
    return faults


def module_graph(package: Path) -> dict[str, set[str]]:
    """Returns module -> the modules of the package that it imports.

    Imports inside functions count: a cycle that runs through one is hidden, not broken. Imports under TYPE_CHECKING
    count too: two files that name each other's types cannot be read, or moved, one without the other. `from package
    import name` imports the submodule of that name if there is one, and else the package's `__init__`.
    """
    trees = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): (path, tree)
        for path, tree in modules(package)
    }
    graph: dict[str, set[str]] = {}
    for module, (path, tree) in trees.items():
        names = (name for _, name in imported_names(path, tree))
        targets = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & trees.keys()) - {module}
    return graph


def cycle_faults(graph: dict[str, set[str]]) -> list[str]:
    """Returns a line for each cycle among modules; of cycles that share imports perhaps only one."""
    graph, faults = {module: set(imported) for module, imported in graph.items()}, []
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            cycle = error.args[1]  # each module is imported by the next
            faults.append(f"import cycle: {' <- '.join(cycle)}")
            graph[cycle[1]].discard(cycle[0])
        else:
            return faults


def run_at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yields the statements that run when the module is imported: all but function bodies and TYPE_CHECKING blocks."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.stmt):
            yield node
        pending.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))


def jax_faults(package: Path) -> list[str]:
    """Returns a line for every import of jax, or of what imports it, at the top of a module that must do without."""
    faults = []
    for module, tree in modules(package):
        if module.split("/")[1] not in WITHOUT_JAX:
            continue
        for statement in run_at_import(tree):
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            for line, name in imported_names(module, statement):
                if name.split(".")[0] in JAX_AND_WHAT_IMPORTS_IT:
                    faults.append(f"{module}:{line}: imports {name} at the top, not in the function that needs it")
    return faults


def original_names(tree: ast.AST) -> dict[str, str]:
    """Returns local name -> imported name for `from x import name as local`."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.asname: alias.name for node in nodes for alias in node.names if alias.asname}


def strings_in(nodes: list[ast.expr]) -> list[str]:
    """Returns the string constants anywhere below `nodes`."""
    walked = (child for node in nodes for child in ast.walk(node))
    return [child.value for child in walked if isinstance(child, ast.Constant) and isinstance(child.value, str)]


def axes_in_call(call: ast.Call, originals: dict[str, str]) -> list[str]:
    """Returns the mesh axes that a call names: any string of a PartitionSpec or Mesh, a mesh axis in a collective."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    called = originals.get(called, called)
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if called in ("PartitionSpec", "P", "Mesh", "make_mesh"):
        return strings_in(arguments)
    if called in COLLECTIVES:
        return [text for text in strings_in(arguments) if text in MESH_AXES]
    if called == "shard_map":
        return strings_in([keyword.value for keyword in call.keywords if keyword.arg == "axis_names"])
    return []


def axis_faults(package: Path) -> list[str]:
    """Returns a line for each mesh axis named outside sharding/: in a PartitionSpec, a collective or mesh.shape.

    Layers name logical axes, some of which are spelled like a mesh axis; so it is the use that counts, not the string.
    """
    faults = []
    for module, tree in modules(package):
        if module.split("/")[1] == "sharding":
            continue
        originals = original_names(tree)
        for node in ast.walk(tree):
            used: list[str] = []
            if isinstance(node, ast.Call):
                used = axes_in_call(node, originals)
            elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "shape":
                used = [text for text in strings_in([node.slice]) if text in MESH_AXES]
            faults.extend(f"{module}:{node.lineno}: names the mesh axis '{text}' outside sharding/" for text in used)
    return faults


def test_imports_follow_the_direction():
    expect_none(direction_faults(PACKAGE))


def test_no_modules_import_each_other_in_a_circle():
    expect_none(cycle_faults(module_graph(PACKAGE)))


def test_configs_text_and_data_import_no_jax_at_the_top():
    expect_none(jax_faults(PACKAGE))


def test_mesh_axes_are_named_only_in_sharding():
    expect_none(axis_faults(PACKAGE))


@pytest.mark.parametrize("name", ["glm_jax", *(f"glm_jax.{part}" for part in WITHOUT_JAX)])
def test_import_takes_no_jax(name):
    if not (PACKAGE.parent / name.replace(".", "/") / "__init__.py").exists():
        pytest.skip(f"{name} is not written yet")
    program = (
        "import importlib, sys\n"
        f"importlib.import_module({name!r})\n"
        "import glm_jax\n"
        "getattr(glm_jax, 'configs', None)\n"
        "print(sorted({'jax', 'flax', 'orbax', 'torch'} & set(sys.modules)))\n"
    )
    assert processes.said(program) == "[]\n"


def test_the_plan_has_no_circle():
    assert not [part for part, below in STANDS_ON.items() if any(part in reachable(other) for other in below)]


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("layers/moe.py", "from glm_jax.sharding import rules", True),
        ("layers/moe.py", "from glm_jax.configs.base import ModelConfig", True),
        ("layers/moe.py", "from glm_jax import errors", True),
        ("layers/moe.py", "from glm_jax.kernels import ops", True),
        ("kernels/cpu.py", "from glm_jax.layers import linear", False),
        ("kernels/cpu.py", "from glm_jax.sharding import rules", True),
        ("layers/moe.py", "from glm_jax.model import cache", False),
        ("layers/moe.py", "from glm_jax import load", False),
        ("layers/moe.py", "import glm_jax", False),
        ("layers/moe.py", "from ..model import cache", False),
        ("layers/moe.py", "from . import norm", True),
        ("layers/moe.py", "def f():\n    import glm_jax.training.loop", False),
        ("inference/engine.py", "from glm_jax.text import tokenizer", False),
        ("inference/engine.py", "from glm_jax.layers import rope", True),
        ("serving/chat.py", "from glm_jax.text import tokenizer", True),
        ("checkpoint/convert.py", "from glm_jax.inference import engine", False),
        ("text/tokenizer.py", "from glm_jax.layers import rope", False),
        ("configs/base.py", "from glm_jax.sharding import rules", False),
        ("cli/chat.py", "from glm_jax.training import loop", True),
        ("api.py", "from glm_jax.training import loop", True),
        ("helpers/misc.py", "import os", False),
    ],
)
def test_direction_check_can_fail(tmp_path, module, source, allowed):
    package = write_package(tmp_path, {module: source})
    assert (direction_faults(package) == []) is allowed


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("from glm_jax.checkpoint.b import f", False),
        ("from glm_jax.checkpoint import b", False),
        ("from . import b", False),
        ("import glm_jax.checkpoint.b", False),
        ("def f():\n    from glm_jax.checkpoint.b import g", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from glm_jax.checkpoint.b import B", False),
        ("from glm_jax.checkpoint.c import b", True),
        ("from glm_jax.checkpoint.d import g", False),
        ("import b", True),
    ],
)
def test_cycle_check_can_fail(tmp_path, source, allowed):
    files = {"a.py": source, "b.py": "from glm_jax.checkpoint.a import h", "c.py": "", "d.py": "from . import b"}
    package = write_package(
        tmp_path, {"__init__.py": "", **{f"checkpoint/{name}": text for name, text in files.items()}}
    )
    assert (cycle_faults(module_graph(package)) == []) is allowed


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("configs/base.py", "import jax.numpy as jnp", False),
        ("text/tokenizer.py", "try:\n    from flax import nnx\nexcept ImportError:\n    pass", False),
        ("data/loader.py", "def put(x):\n    import jax\n    return jax.device_put(x)", True),
        ("data/loader.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax", True),
        ("layers/norm.py", "import jax", True),
    ],
)
def test_jax_check_can_fail(tmp_path, module, source, allowed):
    assert (jax_faults(write_package(tmp_path, {module: source})) == []) is allowed


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("SPEC = P(None, 'tensor')", False),
        ("from jax.sharding import PartitionSpec as Spec\nSPEC = Spec(('data', 'expert'))", False),
        ("y = jax.lax.psum(x, axis_name=('expert', 'tensor'))", False),
        ("i = axis_index('expert')", False),
        ("n = mesh.shape['tensor']", False),
        ("f = shard_map(g, axis_names={'expert'})", False),
        ("WEIGHT = declare((E, F), axes=('expert', 'mlp'))", True),
        ("SPEC = rules.spec('expert', 'mlp')", True),
        ("n = x.shape[0]", True),
    ],
)
def test_axis_check_can_fail(tmp_path, source, allowed):
    assert (axis_faults(write_package(tmp_path, {"layers/moe.py": source})) == []) is allowed
    assert axis_faults(write_package(tmp_path / "other", {"sharding/rules.py": source})) == []
