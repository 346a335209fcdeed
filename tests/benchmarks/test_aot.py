"""The rows that are compiled ahead of time: each fits where it is planned to; and the bounds, where a compiler is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _aot_document as document
from benchmarks import aot
from benchmarks._aot_rows import ROWS
from glm_jax.planning.compile import Estimate
from glm_jax.planning.memory import Optimizer, measure
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.planning.placement import abstract_model, place
from tests import processes

GIB = 2**30
SCRIPT = Path(aot.__file__)
DECODES = [row for row in ROWS if row.kind == "decode"]


def planned(row) -> Estimate:
    job = row.job()
    model = abstract_model(job)
    optimizer = Optimizer.of(model) if row.kind == "train" else None
    mesh = abstract_mesh(row.mesh, row.cluster().device.platform)
    return Estimate.of(measure(model, job, place(model, job, mesh), optimizer))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_planned_to_fit(row):
    assert row.mesh[0] * row.mesh[1] * row.mesh[2] == row.cluster().count
    assert planned(row).total <= row.cluster().device.memory


def test_names_are_files_of_their_own():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {path.stem for path in aot.RESULTS.glob("*.json")} <= {row.name for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_kept_results_are_within_the_bounds(row):
    result = aot.results().get(row.name)
    if result is None:
        pytest.skip("not compiled yet")
    assert "error" not in result
    if row.gib is not None:
        assert document.total(result["report"]) <= row.gib * GIB
    check_memory(result)


def check_memory(result) -> None:
    """A decode step has hardly any temporaries, and moves no array of the size of a layer's cache or experts."""
    report, row = result["report"], result["row"]
    if row["kind"] != "decode":
        return
    assert report["temporaries"] < 0.1 * result["plan"]["cache"]
    smallest = min(size for size in (report["layer_cache"], report["layer_experts"]) if size)
    assert [each for each in report["moved"] if each["nbytes"] >= smallest] == []


def test_the_document_holds_the_kept_results():
    text = document.DOCUMENT.read_text(encoding="utf-8")
    for name, result in aot.results().items():
        assert f"| {name} |" in text
        if "error" not in result:
            assert f"{document.total(result['report']) / GIB:.2f}" in text


def run(*arguments, **environment) -> subprocess.CompletedProcess[str]:
    return processes.run([sys.executable, str(SCRIPT), *arguments], **environment)


def test_rows_are_chosen_by_name():
    assert run("--list", "--rows", "air-v5p-decode*,kimi-k2-v5p-decode-fp8").stdout.split() == [
        "air-v5p-decode", "air-v5p-decode-int8", "air-v5p-decode-fp8", "kimi-k2-v5p-decode-fp8",
    ]  # fmt: skip
    unknown = run("--rows", "glm-9")
    assert unknown.returncode == 2 and "no row is called glm-9; the rows are air-v5p-decode" in unknown.stderr


@pytest.mark.slow
@pytest.mark.parametrize("row", DECODES, ids=lambda row: row.name)
def test_compiled_now_it_is_as_asked(row):
    if aot.compiler_of(row) is None:
        pytest.skip(f"no compiler for {row.device} is installed here")
    done = run("--one", row.name, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    result = {"row": row.to_json(), **json.loads(done.stdout)}
    report, plan = result["report"], result["plan"]
    if row.gib is not None:
        assert document.total(report) <= row.gib * GIB
    assert plan["arguments"] == pytest.approx(report["arguments"], rel=0.1)
    assert plan["total"] == pytest.approx(document.total(report), rel=0.25)
    check_memory(result)
