"""plan --compile and --cache: the compiler's bytes beside the plan's, and what is refused before anything compiles."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.planning.test_warm import kept

CPUS = ("--model=tiny-glm", "--device=cpu", "--count=8", "--weights=float32", "--batch=8", "--length=64")


def test_the_first_mesh_is_compiled_and_compared(call):
    planned = call("plan", *CPUS, "--rules=serve_latency", "--compile", "--json").json
    first, compiled = planned["meshes"][0], planned["compiled"]
    assert planned["ok"] is compiled["fits"] is True
    assert compiled["mesh"] == first["mesh"]
    parts, held = compiled["bytes_per_device"], first["bytes_per_device"]
    assert parts["total"] == parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"]
    assert compiled["planned"] == {"arguments": held["weights"] + held["cache"], "total": held["total"]}
    assert compiled["planned_of_compiled"]["arguments"] == pytest.approx(1, rel=0.1)
    assert {each["kind"] for each in compiled["collectives"]} <= {
        "all-gather", "all-reduce", "all-to-all", "reduce-scatter",
    }  # fmt: skip


def test_people_see_a_chosen_mesh(call):
    out = call("plan", *CPUS, "--compile", "--mesh=expert=8").out
    assert "compiled in" in out and "temporaries" in out and "among 8" in out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--cache=there"], "--cache says nothing without --compile"),
        (["--attached"], "--attached says nothing without --compile"),
        (["--attached", "--compile", "--device=h200"], "--attached needs 8 x h200 here; jax sees 8 x cpu"),
        (["--mesh=expert=8"], "--mesh says nothing without --compile"),
        (["--gpu_target=there", "--compile"], "--gpu_target there is no file"),
        (["--processes=2", "--compile"], "--processes is a number of at least 1, and goes with --cache"),
        (["--cache=x", "--processes=0", "--compile"], "--processes is a number of at least 1, and goes with --cache"),
        (["--job=train", "--compile", "--cache=x"], "--cache keeps the programs of generation; right would be --job"),
        (["--compile", "--mesh=expert=4"], "mesh expert=4 is not of 8 devices; these are: data="),
        (["--compile", "--mesh=pipe=8"], "mesh 'pipe=8': 'pipe=8' is wrong; right would be 'data=1,expert=4,tensor=2'"),
        (
            ["--compile", "--rules=default", "--mesh=tensor=8"],
            "dense.attention.k: kv_heads = 2 does not divide over mesh axis tensor = 8",
        ),
        (["--compile", "--memory=1kB"], "--compile proves the first mesh that fits, and none does"),
        (["--compile", "--cache_dtype=int8"], "--cache_dtype int8 is counted only: no program of this version keeps"),
    ],
)
def test_what_cannot_be_compiled(call, flags, complaint):
    assert call("plan", *CPUS, *flags).complaint.startswith(complaint)


def test_a_cache_that_cannot_be_written(call, tmp_path):
    file = tmp_path / "file"
    file.touch()
    said = call("plan", *CPUS, "--compile", "--json", f"--cache={file}")
    assert said.complaint == f"--cache {file}: Not a directory; right would be a directory to write to"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is here")
def test_the_tpu_compiler_must_be_installed(call):
    complaint = call("plan", "--model=glm-4.5-air", "--device=v5p", "--topology=2x2x4", "--compile").complaint
    assert complaint == "compiling for v5p needs the TPU compiler, which is not installed: pip install 'glm-jax[tpu]'"


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the CUDA compiler is here")
def test_the_cuda_compiler_must_be_installed(call):
    flags = ("--model=glm-4.5-air", "--device=h200", "--count=1", "--weights=fp8", "--compile")
    assert call("plan", *flags).complaint.endswith("which is not installed: pip install 'glm-jax[cuda13]'")


@pytest.mark.slow
def test_a_verb_that_loads_finds_what_plan_kept(call, hf, tmp_path):
    flags = ("--device=cpu", "--count=1", "--weights=float32", "--batch=1", "--length=16", "--compile")
    planned = call("plan", "--model", hf, *flags, "--cache", tmp_path, "--processes=1", "--json").json
    directory = Path(planned["compiled"]["cache"]["directory"])
    before = kept(directory)
    assert len(before) == len(planned["compiled"]["cache"]["programs"]) == 6
    flags = ("--mesh=data=1", "--tokens=1,2,3", "--max_new_tokens=8", "--cache", tmp_path)
    command = [sys.executable, "-m", "glm_jax.cli", "generate", "--model", hf, *flags, "--json"]
    assert processes.run([str(each) for each in command]).returncode == 0
    assert list(tmp_path.iterdir()) == [directory]
    assert kept(directory) == before
