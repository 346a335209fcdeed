"""A dry run knows from headers what a conversion does, and finds all that would stop it at once."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

import glm_jax
from glm_jax import configs
from glm_jax.checkpoint import dry_run
from glm_jax.checkpoint.names import canonical_mappings
from tests import published
from tests.checkpoint import quantized_sources as sources

LISTS = Path(__file__).resolve().parents[3] / "shared" / "data"
# Published: bytes of the tensors in the files (Kimi K2's without its 61 rotary tables of 56 bfloat16 values).
PUBLISHED = {
    "deepseek-r1": ("deepseek_r1_tensor_index.json.gz", 91_991, 688_574_839_360),
    "kimi-k2": ("kimi_k2_tensor_index.json.gz", 139_644 - 61, 1_029_173_256_720 - 61 * 56 * 2),
}
TOTALS = {"glm-4.5": 358_337_791_296, "glm-4.5-air": 110_468_824_832}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published.checkpoint(tmp_path / "hf", shards=3)


def written(directory: Path) -> tuple[int, int]:
    """Arrays of a checkpoint, and the files of their chunks."""
    arrays = [path for path in (directory / "default").iterdir() if path.is_dir()]
    return len(arrays), sum(1 for path in (directory / "default").rglob("c*") if path.is_file())


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
def test_the_conversion_does_what_the_plan_said(tmp_path, source, options):
    plan = dry_run(source, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == ["hf"]
    report = glm_jax.convert(source, tmp_path / "out", **options)
    assert plan.problems == () and plan.free and plan.rate and plan.seconds
    assert (plan.tensors, plan.bytes_in) == (report.tensors, report.nbytes)
    assert (plan.arrays, plan.files) == written(tmp_path / "out")
    size = sum(path.stat().st_size - 4 for path in (tmp_path / "out" / "default").rglob("c*") if path.is_file())
    assert plan.bytes_out == size


@pytest.mark.parametrize("quantized", ["keep", "dequantize"])
@pytest.mark.parametrize("kind", ["deepseek-128", "kimi-32"])
def test_quantised_sources(tmp_path, kind, quantized):
    source = sources.checkpoint(sources.KINDS[kind]).write(tmp_path / "hf")
    plan = dry_run(source, quantized=quantized)
    report = glm_jax.convert(source, tmp_path / "out", quantized=quantized)
    assert (plan.tensors, plan.bytes_in) == (report.tensors, report.nbytes)
    assert (plan.arrays, plan.files) == written(tmp_path / "out")


def test_headers_are_enough(source):
    whole = dry_run(source)
    for path in source.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    headers = dry_run(source)
    assert headers.problems == () and headers.bytes_out == whole.bytes_out
    assert any("bytes of the files are not here yet" in note for note in headers.notes)
    with pytest.raises(glm_jax.CheckpointError, match="is truncated"):
        glm_jax.convert(source, source.with_name("out"))


@pytest.mark.parametrize("name", [pytest.param("kimi-k2", marks=pytest.mark.slow), "deepseek-r1"])
def test_the_complete_published_lists(name):
    file, tensors, nbytes = PUBLISHED[name]
    if not (LISTS / file).exists():
        pytest.skip("no lists of published tensors beside the repository")
    kept, plain = (dry_run(LISTS / file, config=name, quantized=how) for how in ("keep", "dequantize"))
    assert kept.problems == plain.problems == ()
    assert (kept.tensors, kept.bytes_in) == (plain.tensors, plain.bytes_in) == (tensors, nbytes)
    assert kept.bytes_out == nbytes
    total = glm_jax.count_parameters(configs.get(name)).total
    assert 2 * total < plain.bytes_out < 2.0001 * total  # bfloat16, and routers' biases in float32


@pytest.mark.parametrize(("name", "compressed"), [("glm-4.5", False), ("glm-4.5-air", True)])
def test_lists_of_every_tensor_of_glm(tmp_path, name, compressed):
    config = configs.get(name)
    listed = {
        tensor: {
            "shape": list(mapping.shape),
            "dtype": "F32" if tensor.endswith(published.BIAS) else "BF16",
            "file": "x",
        }
        for tensor, mapping in canonical_mappings(config).items()
    }
    content = json.dumps(listed).encode()
    path = tmp_path / "list"
    path.write_bytes(gzip.compress(content) if compressed else content)
    plan = dry_run(path, config=name)
    biases = (config.num_moe_layers + 1) * config.moe.num_experts
    assert plan.problems == () and plan.tensors == len(listed)
    assert plan.bytes_in == plan.bytes_out == 2 * TOTALS[name] + 2 * biases


def test_all_that_is_wrong_is_said_at_once(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("x")
    (source / "model-00002-of-00003.safetensors").unlink()
    problems = dry_run(source, tmp_path / "out").problems
    assert len(problems) == 2
    assert "1 of 3 files missing" in problems[0] and "is not empty" in problems[1]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 1}', '{"a": {"shape": [1], "dtype": "BF16"}}', "{", "\x1f\x8b\x08"]
)
def test_lists_that_are_none(tmp_path, content):
    (tmp_path / "list").write_text(content, encoding="latin-1")
    (problem,) = dry_run(tmp_path / "list", config="glm-4.5").problems
    assert "is no list of tensors" in problem


def test_a_list_needs_a_config(tmp_path):
    (tmp_path / "list").write_text("{}")
    assert "needs a config" in dry_run(tmp_path / "list").problems[0]
    assert "no model is called 'glm-9'" in dry_run(tmp_path / "list", config="glm-9").problems[0]
    assert "missing" in dry_run(tmp_path / "list", config="glm-4.5").problems[0]
    assert "is neither a Hugging Face directory nor a list" in dry_run(tmp_path / "none").problems[0]
