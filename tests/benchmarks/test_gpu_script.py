"""The GPU benchmark runs from end to end on a CPU, says so where there is no GPU, and hides no failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import _common as common
from benchmarks import gpu
from glm_jax import configs, count_parameters

SCRIPT = Path(gpu.__file__)


@pytest.fixture(scope="module")
def result() -> dict:
    return gpu.run_all(jax.devices("cpu")[0], tiny=True, budget=400)


@pytest.mark.slow
def test_every_section_has_rows_and_no_failure(result):
    assert list(result["sections"]) == ["machine", "parity", "model", "decodes", "prefills", "generations"]
    assert all(section["rows"] and "error" not in section for section in result["sections"].values())
    assert result["failures"] == 0
    assert json.loads(json.dumps(result))["sections"] == result["sections"]


@pytest.mark.slow
def test_parity_holds_and_speeds_are_fractions(result):
    assert result["parity_within_limits"]
    for name, key in (("decodes", "of_copy_bandwidth"), ("prefills", "of_matmul_rate")):
        assert all(0 < row[key] < 10 and row["least_ms"] <= row["ms"] for row in result["sections"][name]["rows"])


def test_without_a_gpu_it_says_so_and_succeeds():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert (done.returncode, done.stdout) == (0, "no gpu here: nothing was measured\n")


def test_a_failure_is_a_result_and_hides_nothing():
    run = common.Run(60)

    def rows():
        yield {"good": 1}
        raise MemoryError("no room")

    run.section("first", rows)
    run.section("second", lambda: iter([{"good": 2}]))
    row = run.attempt({"batch": 1}, lambda: {"ms": 1 / 0})
    assert run.sections["first"]["rows"] == [{"good": 1}] and run.sections["first"]["error"] == "MemoryError: no room"
    assert run.sections["second"]["rows"] == [{"good": 2}] and run.failures == 1
    assert row == {"batch": 1, "error": "ZeroDivisionError: division by zero"}


def test_nothing_begins_after_the_budget():
    run = common.Run(0)
    run.section("late", lambda: iter([{"good": 1}]))
    assert run.sections["late"] == {"rows": [], "skipped": "0 seconds were over"}


def test_the_model_is_air_cut_to_four_layers():
    config = gpu.sizes(tiny=False).config
    assert (config.num_dense_layers, config.num_moe_layers, config.vocab_size) == (1, 3, 151_552)
    assert count_parameters(config).total == 2 * 620_756_992 + 4 * 109_074_432 + 134_479_872 + 3 * 2_232_418_432 + 4096


@pytest.mark.parametrize(("batch", "distinct"), [(1, 8.0), (8, 51.6), (32, 111.8)])
def test_distinct_experts(batch, distinct):
    assert common.distinct_experts(configs.get("glm-4.5-air"), batch) == pytest.approx(distinct, abs=0.05)


def test_decode_bytes_and_prefill_operations_of_air():
    """At one sequence a step reads the active parameters; a long prefill takes two operations for each and token."""
    air = configs.get("glm-4.5-air")
    active = count_parameters(air).active_without_mtp + 620_756_992
    assert common.decode_bytes(air, 1, 0, 2) == pytest.approx(2 * active, rel=1e-3)
    cache = common.decode_bytes(air, 1, 1000, 2) - common.decode_bytes(air, 1, 0, 2)
    assert cache == pytest.approx(188_416 * 1000)
    assert common.prefill_flops(air, 1, 1) == pytest.approx(2 * active, rel=1e-3)
