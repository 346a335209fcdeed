"""The converter's modes on the command line: plan, compare, share, quantise, and back in another form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import published


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published.checkpoint(tmp_path / "hf")


def test_a_dry_run_prints_the_plan(call, source, tmp_path):
    said = call("convert", f"--source={source}", f"--target={tmp_path / 'out'}", "--dry_run")
    assert said.status == 0 and "tensors" in said.out and "free there" in said.out and " to write" in said.out
    result = call("convert", f"--source={source}", "--dry_run", "--json").json
    assert result["ok"] and result["problems"] == [] and result["bytes_in"] > 0
    assert not (tmp_path / "out").exists()


def test_a_dry_run_with_problems_has_status_1(call, source, tmp_path):
    (source / "config.json").unlink()
    said = call("convert", f"--source={source}", f"--target={source / 'out'}", "--dry_run")
    assert said.status == 1 and said.out.count("problem: ") == 2


def test_converted_and_compared(call, source, tmp_path):
    arguments = (f"--source={source}", f"--target={tmp_path / 'out'}", "--verify")
    assert call("convert", *arguments).status == 0
    said = call("convert", *arguments)
    assert said.status == 0 and "equal on both sides" in said.out
    chunk = tmp_path / "out" / "default" / "final_norm.scale" / "c.0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    said = call("convert", *arguments)
    assert said.status == 1 and "final_norm.scale" in said.out and "1 differences" in said.out
    assert json.loads(call("convert", *arguments, "--json").out)["ok"] is False


def test_shards(call, source, tmp_path):
    said = [call("convert", f"--source={source}", f"--target={tmp_path / 'out'}", f"--shard={i}/2") for i in range(2)]
    assert "shard 0/2 is done" in said[0].out and "is done" not in said[1].out
    assert (tmp_path / "out" / "glm_jax.json").exists()


def test_quantised_and_back(call, source, tmp_path):
    result = call("convert", f"--source={source}", f"--target={tmp_path / 'out'}", "--quantize=int8", "--json").json
    assert result["complete"] and 0 < max(result["relative_errors"].values()) < 0.02
    assert 0 < result["divergence"] < 0.05
    said = call("export", f"--source={tmp_path / 'out'}", f"--target={tmp_path / 'back'}", "--weights=bfloat16")
    assert said.status == 0
    assert published.read(tmp_path / "back").keys() == published.read(source).keys()
    complaint = call("export", f"--source={tmp_path / 'out'}", f"--target={tmp_path / 'b'}", "--weights=x").complaint
    assert "should be one of <bfloat16|fp8-blocks|fp8|int8|int4>" in complaint


def test_a_source_under_a_url(call, source, tmp_path):
    arguments = (f"--source={source.as_uri()}", f"--target={tmp_path / 'out'}", "--verify")
    assert call("convert", *arguments, "--dry_run").status == 0
    assert call("convert", *arguments).status == 0
    said = call("convert", *arguments)
    assert said.status == 0 and "equal on both sides" in said.out
    assert "nosuch://x: fsspec cannot open nosuch://" in call("convert", "--source=nosuch://x", "--target=y").complaint
