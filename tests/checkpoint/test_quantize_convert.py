"""Quantising while converting and while exporting: what is written, how large it is, and what it reads as."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint import quantize
from glm_jax.checkpoint.names import canonical_mappings
from glm_jax.checkpoint.orbax_source import OrbaxSource
from glm_jax.checkpoint.quantized import PackedInt
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
from glm_jax.checkpoint.source import HfSource
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name
from tests import published

METHODS = ["int8", "fp8", "int4", "fp8-blocks"]
# Inputs of 128 and more, so that groups of 128 are filled by some weights and not by others.
SHAPES = {
    "glm4_moe": {"hidden_size": 128, "moe_intermediate_size": 160, "num_hidden_layers": 2, "intermediate_size": 256},
    "deepseek_v3": {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "q_lora_rank": 64},
}
BYTES = {"int8": 1, "fp8": 1, "fp8-blocks": 1, "int4": 0.5}


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "hf"
    return published.checkpoint(directory, model_type=request.param, **SHAPES[request.param])


@pytest.fixture(scope="module")
def converted(source: Path):
    """A function from a method to the checkpoint that it makes."""

    def directory(method: str) -> Path:
        target = source.with_name(method)
        if not target.exists():
            glm_jax.convert(source, target, quantize=method)
        return target

    return directory


def expected_weights(source: Path, method: str) -> dict[str, np.ndarray]:
    """Each tensor as it should read: quantised and back by itself, or as it is."""
    hf, arrays = HfSource(source), published.read(source)
    formats, _ = quantize.choose(hf.config, quantize.method(method))
    found = {}
    for name, mapping in canonical_mappings(hf.config).items():
        layout = formats.get(mapping.weight)
        if layout is None:
            found[name] = arrays[name]
            continue
        rows, columns = (np.arange(size) for size in mapping.shape)
        found[name] = np.empty(mapping.shape, ml_dtypes.bfloat16)
        parts = quantize.quantize(layout, arrays[name])
        layout.dequantize(parts, rows, columns, out=found[name])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_matrix_is_quantised_by_itself(source, converted, method):
    checkpoint = OrbaxSource(converted(method))
    for name, expected in expected_weights(source, method).items():
        mapping = canonical_mappings(checkpoint.config)[name]
        box = (*(slice(at, at + 1) for at in mapping.index), *(slice(0, size) for size in mapping.part_shape))
        np.testing.assert_array_equal(
            checkpoint.read(mapping.weight, box).reshape(mapping.shape), expected, err_msg=name
        )


@pytest.mark.parametrize("method", METHODS)
def test_what_is_quantised_and_its_size(source, converted, method):
    """Experts and dense projections; not routers, norms, embeddings, biases, the head or the MTP layer's projection."""
    checkpoint = OrbaxSource(converted(method))
    kept, specs = checkpoint.manifest.kept, checkpoint.arrays.specs()
    weights = weights_by_name(Transformer(checkpoint.config))
    spared = ("router", "norm", "embedding", "head.weight", "bias", "projection")
    for name, weight in weights.items():
        size = math.prod(weight.get_raw_value().shape)
        if name not in kept:
            assert any(word in name for word in spared) or method == "int4", name
            assert specs[name].nbytes == size * (4 if name.endswith("router.bias") else 2)
            continue
        assert not any(word in name.replace("attention.q_b", "") for word in spared), name
        values = specs[name + ".packed"] if isinstance(kept[name], PackedInt) else specs[name]
        assert values.nbytes == size * BYTES[method]
        assert specs[name + ".scale"].nbytes <= size / 5


def test_groups_are_smaller_where_128_inputs_are_not_filled(source, converted):
    kept = OrbaxSource(converted("int4")).manifest.kept
    weights = weights_by_name(Transformer(HfSource(source).config))
    for name, layout in kept.items():
        inputs = math.prod(weights[name].get_raw_value().shape[-weights[name].contracting_dims :])
        assert layout.group == math.gcd(128, inputs) >= 32, name
    assert {layout.group for layout in kept.values()} >= {128, 32}


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_the_report_says_what_was_lost(source, tmp_path, method):
    report = glm_jax.convert(source, tmp_path / "out", quantize=method)
    assert report.losses.keys() == OrbaxSource(tmp_path / "out").manifest.kept.keys()
    arrays, expected = published.read(source), expected_weights(source, method)
    for weight, lost in report.losses.items():
        names = [
            name for name, mapping in canonical_mappings(HfSource(source).config).items() if mapping.weight == weight
        ]
        difference = sum(np.sum((expected[n].astype(np.float64) - arrays[n].astype(np.float64)) ** 2) for n in names)
        square = sum(np.sum(arrays[n].astype(np.float64) ** 2) for n in names)
        assert lost.relative == pytest.approx((difference / square) ** 0.5, rel=1e-3), weight


@pytest.mark.parametrize("method", METHODS)
def test_exported_as_stored_and_read_again(source, converted, tmp_path, method):
    glm_jax.export(converted(method), tmp_path / "back")
    again, expected = HfSource(tmp_path / "back"), expected_weights(source, method)
    stored = set(again.files.tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert any(name.endswith(("_scale", "_scale_inv")) for name in stored)
    for name, mapping in canonical_mappings(again.config).items():
        box = (*(slice(at, at + 1) for at in mapping.index), *(slice(0, size) for size in mapping.part_shape))
        np.testing.assert_array_equal(
            again.read(mapping.weight, box).reshape(mapping.shape), expected[name], err_msg=name
        )


@pytest.mark.parametrize("method", METHODS)
def test_quantised_on_the_way_back(source, tmp_path, method):
    """A plain checkpoint exported in a format has the tensors that converting to it would have stored."""
    glm_jax.convert(source, tmp_path / "plain")
    glm_jax.export(tmp_path / "plain", tmp_path / "back", weights=method)
    arrays, back = published.read(source), SafetensorsDir(tmp_path / "back")
    found = {name: back.read(name) for name in back.tensors}
    config, made = HfSource(source).config, 0
    formats, mappings = quantize.choose(config, quantize.method(method))[0], canonical_mappings(config)
    for name, array in arrays.items():
        if name in found and found[name].dtype == array.dtype:
            np.testing.assert_array_equal(found[name], array)
            continue
        for suffix, part in quantize.quantize(formats[mappings[name].weight], array).items():
            np.testing.assert_array_equal(found[name + suffix], part, err_msg=name + suffix)
        made += 1
    assert made > 20
    assert glm_jax.configs.from_hf(tmp_path / "back") == glm_jax.configs.from_hf(source)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_dequantised_on_the_way_back(source, converted, tmp_path, method):
    glm_jax.export(converted(method), tmp_path / "back", weights="bfloat16")
    found, expected = published.read(tmp_path / "back"), expected_weights(source, method)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_source_with_all_experts_in_one_tensor(source, converted, tmp_path):
    config, arrays = json.loads((source / "config.json").read_text()), published.read(source)
    fused = published.write(tmp_path / "hf", config, published.fused(arrays))
    glm_jax.convert(fused, tmp_path / "orbax", quantize="int8")
    left, right = OrbaxSource(tmp_path / "orbax").arrays, OrbaxSource(converted("int8")).arrays
    assert left.specs() == right.specs()
    for name in left.names():
        np.testing.assert_array_equal(left.read(name), right.read(name), err_msg=name)


def test_values_that_are_not_finite_are_named(tmp_path):
    config = published.config_json(dtype="bfloat16")
    arrays = published.stored(published.tensors(config), "bfloat16")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    arrays[name][2, 1] = np.inf
    source = published.write(tmp_path / "hf", config, arrays)
    with pytest.raises(glm_jax.CheckpointError, match=f"{name}: has values that are not finite"):
        glm_jax.convert(source, tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()
    glm_jax.convert(source, tmp_path / "plain")
    with pytest.raises(glm_jax.CheckpointError, match=f"{name}: has values that are not finite"):
        glm_jax.export(tmp_path / "plain", tmp_path / "back", weights="fp8")


def test_arguments_that_do_not_go_together(tmp_path, source):
    with pytest.raises(glm_jax.InputError, match="'int3'; it is one of int8, fp8, int4"):
        glm_jax.convert(source, tmp_path / "out", quantize="int3")
    with pytest.raises(glm_jax.InputError, match="give one of the two"):
        glm_jax.convert(source, tmp_path / "out", quantize="int8", quantized="keep")
    with pytest.raises(glm_jax.InputError, match="'float64'; it is one of bfloat16, int8"):
        glm_jax.export(source, tmp_path / "out", weights="float64")
