"""Checkpoints of compressed-tensors in every format: read to the weights that numpy says, kept, and exported again."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint import dry_run, layout, quantized_load
from glm_jax.checkpoint.compressed_tensors import read_compressed
from glm_jax.checkpoint.formats import Fp8, Int8, PackedInt
from glm_jax.checkpoint.orbax_source import OrbaxSource
from glm_jax.checkpoint.source import HfSource
from glm_jax.errors import CheckpointError
from glm_jax.kernels import ops_for_platform
from glm_jax.model import transformer
from glm_jax.sharding import QuantizedArray
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, COMPRESSED, FP8
from tests.checkpoint.test_quantized import same, same_weights
from tests.checkpoint.test_quantized_load import product, same_bits, values_of

DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"  # [64, 32]


@pytest.mark.parametrize("kind", COMPRESSED)
def test_dequantised_and_kept(tmp_path, kind):
    made = sources.checkpoint(COMPRESSED[kind])
    source = made.write(tmp_path / "hf", shards=2)
    report = glm_jax.convert(source, tmp_path / "plain", verified=True)
    assert report.tensors == len(made.tensors) and report.notes == ()
    glm_jax.export(tmp_path / "plain", tmp_path / "plain-back")
    same(sources.read(tmp_path / "plain-back"), made.plain)
    report = glm_jax.convert(source, tmp_path / "kept", quantized="keep", verified=True)
    assert report.tensors == len(made.tensors) and report.notes == ()
    glm_jax.export(tmp_path / "kept", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.tensors)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


MESHES = [((1, 1, 1), False), ((1, 4, 2), True), ((2, 2, 2), False)]
DEQUANTISED = {
    "int8-asymmetric": "values less their zero points take more than eight bits",
    "int8-group-asymmetric": "values less their zero points take more than eight bits",
    "int8-packed-asymmetric": "values less their zero points take more than eight bits",
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_loaded_as_stored_and_dequantised(tmp_path, mesh_of_sizes, kind):
    """From both kinds of directories on several meshes: leaves stand for the weights, and dequantised they are them."""
    made = sources.checkpoint(COMPRESSED[kind], seed=4)
    hf, plain = made.write(tmp_path / "hf", shards=2), made.write_plain(tmp_path / "plain")
    glm_jax.convert(hf, tmp_path / "kept", quantized="keep")
    for directory, (sizes, stacked) in zip((hf, hf, tmp_path / "kept"), MESHES, strict=True):
        options: dict[str, Any] = {"mesh": mesh_of_sizes(sizes), "stacked": stacked}
        expected = glm_jax.load(plain, **options)
        same_weights(glm_jax.load(directory, quantized="dequantize", **options), expected)
        model, leaves = glm_jax.load(directory, **options), 0
        values = values_of(expected)
        for name, value in values_of(model).items():
            if isinstance(value, QuantizedArray):
                leaves += 1
                assert same_bits(product(value).astype(BF16), np.asarray(values[name]).astype(BF16)), name
            else:
                assert same_bits(np.asarray(value), np.asarray(values[name])), name
        if kind in DEQUANTISED:
            assert leaves == 0 and DEQUANTISED[kind] in model.notes[0]
        else:
            assert leaves > 5


def test_what_the_leaves_are_off_a_cpu(tmp_path, one_device, monkeypatch):
    monkeypatch.setattr(transformer, "ops_for", lambda mesh: ops_for_platform("tpu"))
    expected = {
        "int4": jnp.int4,
        "int4-asymmetric": jnp.int8,  # -15 to 15
        "int3-asymmetric": jnp.int4,
        "int6": jnp.int8,
        "int8-packed": jnp.int8,
        "int8-tensor": jnp.int8,
        "fp8-tensor": jnp.float8_e4m3fn,
        "fp8-group": jnp.float8_e4m3fn,
    }
    for kind, dtype in expected.items():
        made = sources.checkpoint(COMPRESSED[kind])
        source = open_source_of(made.write(tmp_path / kind))
        model = transformer.runtime_model(source.config, one_device)
        leaves, notes = quantized_load.plan_leaves(source, model, one_device)
        assert leaves and notes == () and {leaf.dtype for leaf in leaves.values()} == {np.dtype(dtype)}, kind


def open_source_of(directory: Path) -> HfSource:
    return HfSource(directory)


def finite(kind: sources.Kind) -> sources.Kind:
    """The same with values and scales of a model that computes: no codes that are no number, weights about 1/8."""

    def quantize(rng: np.random.Generator, shape: tuple[int, int]) -> sources.Matrix:
        parts, _ = kind.quantize(rng, shape)
        low = parts[""].view(np.uint8) if "" in parts else None
        if low is not None and parts[""].dtype == FP8:
            parts[""] = np.where(low & 0x7F == 0x7F, 0, low).astype(np.uint8).view(FP8)
        largest = 448.0 if low is not None and parts[""].dtype == FP8 else 128.0
        scale = rng.uniform(0.5, 2, parts["_scale"].shape) / largest * shape[1] ** -0.5
        return {**parts, "_scale": scale.astype(BF16)}, np.zeros(shape, BF16)

    return dataclasses.replace(kind, quantize=quantize)


SMALL = {"num_hidden_layers": 2, "num_key_value_heads": 8, "vocab_size": 32}


@pytest.mark.parametrize("kind", ["int4-asymmetric", "int6", "int8-packed", "fp8-tensor", "fp8-group", "int8-tensor"])
def test_the_model_runs_on_what_is_kept(tmp_path, mesh_of_sizes, kind):
    hf = sources.checkpoint(finite(COMPRESSED[kind]), seed=1, **SMALL).write(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 32, (2, 12))
    expected = glm_jax.load(hf, mesh=mesh_of_sizes((1, 1, 1)), quantized="dequantize")(tokens).logits
    for sizes, stacked in (((1, 1, 1), False), ((2, 2, 2), True)):
        model = glm_jax.load(hf, mesh=mesh_of_sizes(sizes), stacked=stacked)
        assert any(isinstance(value, QuantizedArray) for value in values_of(model).values())
        # Dequantised weights are rounded to bfloat16 besides.
        assert np.abs(model(tokens).logits - np.asarray(expected)).max() < 0.03 * float(np.std(expected))


# --- several groups -------------------------------------------------------------------------------------------------


def test_each_module_has_the_format_of_its_group(tmp_path, one_device):
    made, _ = sources.mixed()
    source = made.write(tmp_path / "hf", shards=2)
    found = set(HfSource(source).plan.quantized.values())
    assert found == {Int8(), PackedInt(4, 32), Fp8(16, 16, "_scale")}
    glm_jax.convert(source, tmp_path / "plain")
    glm_jax.export(tmp_path / "plain", tmp_path / "plain-back")
    same(sources.read(tmp_path / "plain-back"), made.plain)
    glm_jax.convert(source, tmp_path / "kept", quantized="keep", verified=True)
    assert set(OrbaxSource(tmp_path / "kept").manifest.source_layouts) == found
    glm_jax.export(tmp_path / "kept", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.tensors)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    expected = glm_jax.load(made.write_plain(tmp_path / "bf16"), mesh=one_device)
    for directory in (source, tmp_path / "kept"):
        same_weights(glm_jax.load(directory, mesh=one_device, quantized="dequantize"), expected)


def test_a_config_that_says_nothing_is_written_anew_with_all_groups(tmp_path):
    made, _ = sources.mixed()
    glm_jax.convert(made.write(tmp_path / "hf"), tmp_path / "kept", quantized="keep")
    (tmp_path / "kept" / "hf" / "config.json").unlink()
    glm_jax.export(tmp_path / "kept", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.tensors)
    before, after = HfSource(tmp_path / "hf").plan.quantized, HfSource(tmp_path / "back").plan.quantized
    assert before == after
    said = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision" and len(said["config_groups"]) == 3


def test_a_format_that_the_group_does_not_name_follows_from_its_arguments(tmp_path):
    made, said = sources.mixed()
    for one in said["config_groups"].values():
        del one["format"]
    assert set(HfSource(made.write(tmp_path / "hf")).plan.quantized.values()) == {
        Int8(),
        PackedInt(4, 32),
        Fp8(16, 16, "_scale"),
    }


def test_int8_in_some_layers_and_int4_in_others(tmp_path, one_device):
    """Dequantised they are one weight; kept apart they cannot be, and one line says so."""
    made = sources.checkpoint(COMPRESSED["int4"])
    rng, tensors = np.random.default_rng(1), dict(made.tensors)
    for name in list(made.plain):
        if name.startswith("model.layers.2.") and name.endswith("down_proj.weight"):
            for suffix in ("_packed", "_scale", "_shape"):
                del tensors[name + suffix]
            parts, made.plain[name] = sources.integers(rng, made.plain[name].shape, 8, None)
            tensors.update({name + suffix: part for suffix, part in parts.items()})
    said = copy.deepcopy(made.config["quantization_config"])
    eight = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    said["config_groups"]["group_1"] = sources.group([r"re:.*layers\.2\..*down_proj$"], eight)
    source = sources.write(tmp_path / "hf", {**made.config, "quantization_config": said}, tensors)
    glm_jax.convert(source, tmp_path / "plain")
    glm_jax.export(tmp_path / "plain", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.plain)
    with pytest.raises(CheckpointError) as caught:
        glm_jax.convert(source, tmp_path / "kept", quantized="keep")
    line = str(caught.value)
    assert "2 quantised in part, which cannot be kept (dequantize can): " in line
    assert "is int4 in groups of 32, model.layers.2." in line and "int8 with a scale for each output channel" in line
    model = glm_jax.load(source, mesh=one_device)
    assert "dequantised, because not quantised alike in all layers and experts: " in model.notes[0]
    plain = sources.Checkpoint(made.config, {}, made.plain).write_plain(tmp_path / "bf16")
    same_weights(glm_jax.load(source, mesh=one_device, quantized="dequantize"), glm_jax.load(plain, mesh=one_device))


def test_of_two_patterns_that_match_the_tensors_choose(tmp_path):
    """Programs rank patterns by the alphabet or by the order of groups; only one format has these tensors."""
    made, said = sources.mixed()
    said["config_groups"] = {
        "wide": sources.group(["re:.*"], {**sources.CHANNEL8, "num_bits": 4}, "pack-quantized"),
        **said["config_groups"],
    }
    source = made.write(tmp_path / "hf")
    found = set(HfSource(source).plan.quantized.values())
    # Of matrices of 32 inputs, groups of 32 and channels are the same.
    assert found == {Int8(), PackedInt(4, 32), PackedInt(4, None), Fp8(16, 16, "_scale")}
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.plain)


def test_zero_points_that_the_config_does_not_announce(tmp_path):
    made = sources.checkpoint(COMPRESSED["int8-asymmetric"])
    said = copy.deepcopy(made.config["quantization_config"])
    said["config_groups"]["group_0"]["weights"]["symmetric"] = True
    source = sources.write(tmp_path / "hf", {**made.config, "quantization_config": said}, made.tensors)
    for quantized, expected in (("dequantize", made.plain), ("keep", made.tensors)):
        glm_jax.convert(source, tmp_path / quantized, quantized=quantized)
        glm_jax.export(tmp_path / quantized, tmp_path / f"{quantized}-back")
        same(sources.read(tmp_path / f"{quantized}-back"), expected)


def test_groups_that_do_not_divide_the_inputs(tmp_path):
    """No program writes such; where the scales are as many as the config's groups, the last group is the shorter."""
    made = sources.checkpoint(sources.int4(24, asymmetric=True))
    source = made.write(tmp_path / "hf")
    glm_jax.convert(source, tmp_path / "plain")
    glm_jax.export(tmp_path / "plain", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.plain)
    tensors = {**made.tensors, f"{DOWN}_scale": np.ones((64, 1), BF16)}
    with pytest.raises(CheckpointError) as caught:
        HfSource(sources.write(tmp_path / "hf", made.config, tensors))
    assert f"{DOWN}_scale is [64, 1], should be [64, 2] (groups of 24 do not divide 32 inputs)" in str(caught.value)


# --- what concerns no weight ----------------------------------------------------------------------------------------

KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
ONE = np.ones(1, np.float32)
CACHE = ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale", "model.layers.1.self_attn.q_scale"]
CACHE += ["model.layers.2.self_attn.k_proj.k_scale", "model.layers.2.self_attn.attn.v_scale"]
ACTIVATIONS = [DOWN.replace("weight", "input_scale"), "model.layers.0.self_attn.k_proj.output_scale"]


def with_scales(kind: str) -> sources.Checkpoint:
    made = sources.checkpoint(COMPRESSED[kind])
    said = copy.deepcopy(made.config["quantization_config"])
    said["kv_cache_scheme"] = KV
    said["config_groups"]["group_0"]["input_activations"] = STATIC
    tensors = {**made.tensors, **dict.fromkeys([*CACHE, *ACTIVATIONS], ONE)}
    return sources.Checkpoint({**made.config, "quantization_config": said}, tensors, made.plain)


@pytest.mark.parametrize("quantized", ["dequantize", "keep"])
def test_scales_of_the_cache_and_of_activations_are_passed_over_with_a_note(tmp_path, quantized):
    made = with_scales("fp8-tensor")
    report = glm_jax.convert(made.write(tmp_path / "hf"), tmp_path / "orbax", quantized=quantized)
    assert report.notes == (
        "kv_cache_scheme is passed over: the cache has the dtype of the run",
        "7 scales of the cache and of activations passed over, such as model.layers.0.self_attn.k_proj.output_scale: "
        "both have the dtype of the run",
    )
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    kept = {name: part for name, part in made.tensors.items() if name not in (*CACHE, *ACTIVATIONS)}
    same(sources.read(tmp_path / "back"), made.plain if quantized == "dequantize" else kept)
    said = json.loads((tmp_path / "back" / "config.json").read_text()).get("quantization_config")
    if quantized == "keep":  # no scale is promised that is not there
        assert said["kv_cache_scheme"] is None and said["config_groups"]["group_0"]["input_activations"] is None
        assert (
            said["config_groups"]["group_0"]["weights"]
            == made.config["quantization_config"]["config_groups"]["group_0"]["weights"]
        )
    else:
        assert said is None


def test_dynamic_activations_stay_in_the_config(tmp_path):
    made = sources.checkpoint(COMPRESSED["int8"])
    glm_jax.convert(made.write(tmp_path / "hf"), tmp_path / "kept", quantized="keep")
    glm_jax.export(tmp_path / "kept", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == made.config


def test_a_cache_that_is_quantised_beside_plain_weights(tmp_path):
    plain = sources.checkpoint(COMPRESSED["int4"])
    said = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": KV}
    tensors = {**plain.plain, **dict.fromkeys(CACHE, ONE)}
    source = sources.write(tmp_path / "hf", {**plain.config, "quantization_config": said}, tensors)
    report = glm_jax.convert(source, tmp_path / "orbax")
    assert len(report.notes) == 2 and report.notes[1].startswith("5 scales of the cache and of activations passed over")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    same(sources.read(tmp_path / "back"), plain.plain)
    attention = {"targets": ["Glm4MoeAttention"], "weights": None, "input_activations": KV}
    said = {**said, "config_groups": {"a": attention}}
    assert read_compressed(said).layouts == ()


def test_the_dry_run_has_the_notes(tmp_path):
    planned = dry_run(with_scales("int4").write(tmp_path / "hf"))
    assert planned.problems == () and any("kv_cache_scheme" in note for note in planned.notes)


def multimodal(directory: Path, changes: dict[str, Any]) -> tuple[Path, sources.Checkpoint]:
    """A checkpoint that is the language model of a multimodal one, with other words in its quantization_config."""
    made = sources.checkpoint(COMPRESSED["int4-asymmetric"])
    said = copy.deepcopy(made.config["quantization_config"])
    said["config_groups"]["group_0"] |= {key: value for key, value in changes.items() if key == "targets"}
    said["ignore"] = ["language_model.lm_head", "re:.*mlp.gate$", "model.language_model.layers.3.eh_proj"]
    tensors = {f"language_model.{name}": part for name, part in made.tensors.items()}
    tensors["vision_tower.patch.weight"] = np.zeros((4, 4), BF16)
    inner = {key: value for key, value in made.config.items() if key != "quantization_config"}
    config = {"model_type": "kimi_k25", "text_config": {**inner, "quantization_config": said}}
    return sources.write(directory, config, tensors), made


@pytest.mark.parametrize(
    "targets",
    [["Linear"], ["re:language_model.model.layers.*"], ["re:model.language_model.*"], ["re:model.layers.*"]],
    ids=str,
)
def test_names_in_the_config_of_a_multimodal_checkpoint_may_have_its_prefix(tmp_path, targets):
    source, made = multimodal(tmp_path / "hf", {"targets": targets})
    glm_jax.convert(source, tmp_path / "plain")
    glm_jax.export(tmp_path / "plain", tmp_path / "plain-back")
    same(sources.read(tmp_path / "plain-back"), made.plain)
    glm_jax.convert(source, tmp_path / "kept", quantized="keep")
    glm_jax.export(tmp_path / "kept", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.tensors)
    # The export has the names without the prefix, in its config, too.
    said = read_compressed(json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"])
    quantized = HfSource(tmp_path / "back").plan.quantized
    assert all(said.layouts_of(name)[0] == layout for name, layout in quantized.items())
    assert said.exempts("lm_head.weight") and said.exempts("model.layers.3.eh_proj.weight")


# --- conversion in pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [700, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["int4-asymmetric", "int3-asymmetric", "int8-group-asymmetric", "fp8-tensor", "fp8-block"]
)
def test_chunks_of_any_rows_are_the_same_weights(tmp_path, monkeypatch, kind, most):
    """Chunks that begin within a word of zero points, and within a block."""
    monkeypatch.setattr(layout, "MAX_CHUNK_BYTES", most)
    made = sources.checkpoint(COMPRESSED[kind])
    source = made.write(tmp_path / "hf")
    for quantized, expected in (("dequantize", made.plain), ("keep", made.tensors)):
        glm_jax.convert(source, tmp_path / quantized, quantized=quantized, verified=True)
        glm_jax.export(tmp_path / quantized, tmp_path / f"{quantized}-back")
        same(sources.read(tmp_path / f"{quantized}-back"), expected)
    assert len(list((tmp_path / "dequantize" / "default" / "moe.moe.experts.down").glob("c*"))) > 2 * 8 * 64 * 64 / most
