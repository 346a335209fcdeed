"""plan: what the verb takes, prints and refuses."""

from __future__ import annotations

import shutil

import pytest

import glm_jax
from glm_jax.cli.plan import parse_memory
from glm_jax.cli.plan_figures import parse_rate
from glm_jax.model import Transformer
from glm_jax.sharding import with_shardings

GIB = 2**30
PARTS = {"weights", "cache", "gradients", "optimizer", "activations", "collectives", "total"}


def sizes(entry) -> tuple[int, ...]:
    return tuple(entry["mesh"].values())


def test_the_object_that_scripts_read(call):
    flags = "--device v5p --topology 4x4x4 --job decode --batch 64 --length 4096 --weights bfloat16 --json"
    planned = call("plan", "--model", "glm-4.5", *flags.split()).json
    first = planned["meshes"][0]
    assert list(first["mesh"]) == ["data", "expert", "tensor"]
    assert set(first["bytes_per_device"]) == PARTS
    for entry in planned["meshes"]:
        parts = dict(entry["bytes_per_device"])
        assert parts.pop("total") == sum(parts.values())
        assert entry["fits"] is (entry["bytes_per_device"]["total"] <= planned["device"]["memory_bytes"])
        seconds = entry["seconds"]
        assert entry["bound_by"] == max(seconds, key=seconds.get)
        assert entry["step_seconds"] == max(seconds["compute"], seconds["memory"]) + seconds["communication"]
        assert entry["tokens_per_second"] == pytest.approx(64 / entry["step_seconds"])
    assert planned["job"] == {
        "kind": "decode",
        "batch": 64,
        "length": 4096,
        "weights": "bfloat16",
        "cache_dtype": "bfloat16",
    }
    assert (planned["device"]["count"], planned["device"]["topology"]) == (64, "4x4x4")
    assert {sizes(entry) for entry in planned["meshes"]}.isdisjoint(sizes(entry) for entry in planned["refused"])


def test_refusals_are_the_sentences_of_loading(call):
    planned = call("plan", "--model=tiny-glm", "--device=h200", "--count=8", "--rules=default", "--json").json
    config = glm_jax.configs.get("tiny-glm")
    # two kv heads: tensor 4 and 8 are refused
    assert {sizes(entry) for entry in planned["refused"]} == {(1, 1, 8), (1, 2, 4), (2, 1, 4)}
    for entry in planned["refused"]:
        with pytest.raises(glm_jax.ShardingError) as refusal:
            with_shardings(Transformer(config), glm_jax.make_mesh(**entry["mesh"]))
        assert entry["reason"] == str(refusal.value)


def test_memory_alone_gives_bytes_and_no_times(call):
    flags = ["--model=glm-4.5-air", "--memory=80GiB", "--count=8", "--batch=8", "--length=32768"]
    planned = call("plan", *flags, "--rules=default", "--json").json
    assert planned["device"] == {"kind": "any", "count": 8, "topology": None, "memory_bytes": 80 * GIB, "speed": None}
    fitting = {sizes(entry) for entry in planned["meshes"] if entry["fits"]}
    assert (1, 8, 1) in fitting and (8, 1, 1) not in fitting
    for entry in planned["meshes"]:
        assert entry["step_seconds"] is entry["bound_by"] is entry["seconds"] is None
        # 32,768 tokens of 46 layers, keys and values of 8 heads of 128 in two bytes, for one sequence a device
        assert entry["bytes_per_device"]["cache"] == 32_768 * 46 * 2 * 8 * 128 * 2


def test_the_table_for_people(call):
    flags = ["--model=glm-4.5", "--device=h200", "--count=8", "--batch=64", "--weights=fp8", "--rules=default"]
    first = call("plan", *flags, "--json").json["meshes"][0]
    said = call("plan", *flags)
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0] == "glm-4.5: decode of 64 x 4096 tokens, weights fp8, cache bfloat16"
    assert lines[1] == "8 x h200, 133.38 GiB each"
    written = ",".join(f"{axis}={size}" for axis, size in first["mesh"].items())
    row = lines[4].split()
    assert row[0] == written and row[3] == "fits"
    assert row[1] == f"{first['bytes_per_device']['total'] / GIB:.2f}"
    assert row[4:6] == [str(first["largest_batch"]), str(first["largest_length"])]
    assert f"the first: {written}" in lines


def test_what_does_not_fit_and_what_cannot_be(call):
    flags = ("--model=glm-4.5", "--device=h100", "--count=16", "--weights=float32", "--rules=default")
    out = call("plan", *flags).out
    assert "does not fit" in out and "none fits; the smallest: data=1,expert=2,tensor=8" in out
    assert "1 meshes cannot hold the model:" in out
    assert "kv_heads = 8 does not divide over mesh axis tensor = 16" in out
    out = call("plan", "--model=kimi-k2", "--device=v5p", "--count=512", "--batch=3", "--rules=default").out
    assert "more (--json has all)" in out
    assert "batch 3 does not divide over mesh axis" in out


def test_training_counts_gradients_and_optimizer(call):
    planned = call("plan", "--model=tiny-glm", "--device=cpu", "--count=1", "--job=train", "--json").json
    parts = planned["meshes"][0]["bytes_per_device"]
    assert parts["gradients"] == parts["weights"]
    assert parts["weights"] < parts["optimizer"] < 2 * parts["weights"]  # a momentum; two moments of some
    assert parts["cache"] == 0
    assert planned["job"]["cache_dtype"] is None


def test_checkpoints_of_both_kinds_and_a_bare_config(call, hf, orbax, tmp_path):
    flags = ["--device=cpu", "--count=1", "--weights=float32", "--json"]
    totals = [call("plan", f"--model={where}", *flags).json["meshes"] for where in (hf, orbax)]
    assert totals[0] == totals[1]
    shutil.copy(hf / "config.json", tmp_path)
    assert call("plan", f"--model={tmp_path}", *flags).json["meshes"] == totals[0]


ONE_OF_EACH_FAMILY = ("glm-4.5", "deepseek-v3", "kimi-k2", "glm-4.7-flash")
PRESETS = [
    pytest.param(name, marks=() if name in ONE_OF_EACH_FAMILY else pytest.mark.slow) for name in glm_jax.configs.names()
]


@pytest.mark.parametrize("model", PRESETS)
def test_every_preset_is_planned(call, model):
    flags = ["--device=v5p", "--count=512", "--batch=512", "--json"]
    assert call("plan", f"--model={model}", *flags).json["meshes"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80B", 80),
        ("85899345920", 80 * GIB),
        ("80GiB", 80 * GIB),
        ("80gib", 80 * GIB),
        ("80 GB", 80 * 10**9),
        ("0.5kB", 500),
        ("1.5MiB", 1536 * 1024),
        ("2TB", 2 * 10**12),
    ],
)
def test_memory_has_units(text, size):
    assert parse_memory(text) == size
    assert parse_rate(text, "bandwidth") == parse_rate(f"{text}/s" if text[-1] in "bB" else text, "bandwidth") == size


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--device=h300"], "no device is called 'h300'; known: h100, h200, b200, b300, gb200, a100, "),
        (["--device=v5p", "--topology=4x4"], "v5p has no topology '4x4'; those of up to 256 chips: 2x2x1, 2x2x2, "),
        (["--device=v5p", "--topology=4x4x4"], "--topology 4x4x4 has 64 chips, --count says 8; one of them is enough"),
        (["--device=h200", "--count=0"], "--count must be at least 1, not 0"),
        (["--device=h200", "--count=1000000000000"], "--count must be at most 100000, not 1000000000000"),
        (["--device=h200", "--batch=0"], "--batch must be at least 1 and at most 1000000000, not 0"),
        (
            ["--device=h200", "--batch=99999999999999999999"],
            "--batch must be at least 1 and at most 1000000000, not 99",
        ),
        (["--device=h200", "--length=2000"], "--length 2000 exceeds the model's 1024 positions"),
        (["--device=h200", "--weights=int3"], "--weights 'int3' is not known; right would be one of bfloat16, "),
        (["--device=h200", "--job=dance"], "--job 'dance' is not known; right would be one of decode, prefill, train"),
        (["--device=h200", "--model=glm-9"], "glm-9 is neither a directory nor a known model; known models: glm-4.5,"),
        ([], "--device or --memory must be given; devices: h100, h200,"),
        (["--memory=80XB"], "--memory '80XB' is no size; right would be bytes, or a number with a unit: 80GB, 76GiB"),
        (["--memory=nan"], "--memory 'nan' is no size; right would be bytes"),
        (["--memory=-1"], "--memory '-1' is no size"),
        (["--memory=0"], "--memory must be at least 1 byte and at most"),
        (["--memory=99999999TB"], "--memory must be at least 1 byte and at most"),
    ],
)
def test_impossible_requests(call, flags, complaint):
    assert call("plan", "--model=tiny-glm", "--count=8", *flags).complaint.startswith(complaint)
