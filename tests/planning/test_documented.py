"""docs/plan.md prints what the plan says."""

from __future__ import annotations

import pytest

from glm_jax import configs
from glm_jax.planning import Job, choose_cluster, make_plan
from tests.conventions.tree import ROOT

TEXT = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("| glm-4.5")]
# Of GLM-4.5's README: model, weights, devices for inference; twice as many of each for all positions
PUBLISHED = {
    ("glm-4.5", "bfloat16"): {"h100": 16, "h200": 8},
    ("glm-4.5", "fp8"): {"h100": 8, "h200": 4},
    ("glm-4.5-air", "bfloat16"): {"h100": 4, "h200": 2},
    ("glm-4.5-air", "fp8"): {"h100": 2, "h200": 1},
}


def first_mesh(model: str, length: int, devices: str):
    (name, weights), (count, kind) = model.split(), devices.split()
    job = Job(config=configs.get(name), kind="decode", batch=8, length=length, weights=weights)
    return make_plan(job, choose_cluster(kind, count=int(count))).meshes[0]


def test_the_published_requirements_are_all_there():
    expected = {
        (f"{name} {weights}", str(length), f"{count * times} {kind}")
        for (name, weights), counts in PUBLISHED.items()
        for kind, count in counts.items()
        for length, times in ((4096, 1), (131_072, 2))
    }
    assert {tuple(row[:3]) for row in ROWS} == expected


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_table_of_published_requirements(row):
    model, length, devices, *said, half = row
    entry = first_mesh(model, int(length), devices)
    mesh = ",".join(f"{axis}={size}" for axis, size in entry.mesh.shape.items())
    fits = ("does not fit", "fits")
    assert said == [mesh, f"{entry.held.total / 2**30:.1f}", fits[entry.fits], str(entry.largest_batch)]
    count, kind = devices.split()
    if int(count) > 1:
        assert half == fits[first_mesh(model, int(length), f"{int(count) // 2} {kind}").fits]


def test_at_short_lengths_the_published_number_is_the_smallest_that_fits():
    for row in ROWS:
        if row[1] == "4096":
            assert row[5] == "fits" and row[7] in ("does not fit", "-")


def test_air_in_fp8_on_two_h200_holds_eight_full_sequences_with_an_eight_bit_cache():
    job = Job(config=configs.get("glm-4.5-air"), kind="decode", batch=8, length=131_072, weights="fp8", cache="fp8")
    assert make_plan(job, choose_cluster("h200", count=2)).meshes[0].fits
