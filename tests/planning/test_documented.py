"""docs/plan.md prints what the plan says."""

from __future__ import annotations

import pytest

from glm_jax import configs
from glm_jax.planning import Job, choose_cluster, make_plan
from glm_jax.planning.kinds import DEVICES
from glm_jax.planning.ranking import SAME_BYTES, SAME_TIME, candidates
from glm_jax.planning.smallest import smallest_cluster
from glm_jax.sharding.presets import name_of
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
    return make_plan(job, choose_cluster(kind, count=int(count)), rules=candidates("decode")).meshes[0]


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
    placed = [mesh, name_of(entry.rules)]
    assert said == [*placed, f"{entry.held.total / 2**30:.1f}", fits[entry.fits], str(entry.largest_batch)]
    count, kind = devices.split()
    if int(count) > 1:
        assert half == fits[first_mesh(model, int(length), f"{int(count) // 2} {kind}").fits]


@pytest.mark.parametrize(("model", "counts"), PUBLISHED.items(), ids=" ".join)
def test_at_short_lengths_the_published_number_is_the_smallest_that_fits(model, counts):
    job = Job(config=configs.get(model[0]), kind="decode", batch=8, length=4096, weights=model[1])
    for kind, count in counts.items():
        found = smallest_cluster(job, DEVICES[kind], rules=candidates("decode"))
        assert found is not None and found.count == count


def test_air_in_fp8_on_two_h200_holds_eight_full_sequences_with_an_eight_bit_cache():
    job = Job(config=configs.get("glm-4.5-air"), kind="decode", batch=8, length=131_072, weights="fp8", cache="fp8")
    assert make_plan(job, choose_cluster("h200", count=2)).meshes[0].fits


def test_the_table_of_devices_is_that_of_the_program():
    lines = TEXT.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| device | GiB usable"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    expected = []
    for device in DEVICES.values():
        speed = device.speed
        assert speed is not None
        figures = (f"{device.memory / 2**30:.2f}", f"{speed.memory / 1e12:.3g}", f"{speed.bfloat16 / 1e12:.4g}")
        joined = "all of a slice" if device.domain is None else str(device.domain)
        expected.append([f"`{device.name}`", *figures, f"{speed.link / 1e9:.4g}", joined, device.source])
    assert rows == expected


def test_the_factors_of_the_ranking_are_those_that_are_told():
    assert f"within a factor of {SAME_TIME}" in TEXT
    assert f"more than {SAME_BYTES - 1:.0%} more" in TEXT
