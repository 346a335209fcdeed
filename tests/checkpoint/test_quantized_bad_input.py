"""Quantised sources that do not add up: one line with everything that is wrong, before anything is written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glm_jax
from glm_jax import configs
from glm_jax.checkpoint.orbax_source import MANIFEST, OrbaxSource
from glm_jax.checkpoint.quantization_config import read_quantization
from glm_jax.checkpoint.source import HfSource
from glm_jax.errors import CheckpointError, ConfigError, Error
from tests import published
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, FP8

DEEPSEEK, GLM, KIMI = sources.deepseek((16, 24)), sources.glm(), sources.kimi()
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"  # [64, 32]
ROUTER = "model.layers.1.mlp.gate.weight"


def refused(source: Path, error: type[Error] = CheckpointError) -> str:
    """The one line with which conversion, in both ways, and loading refuse a source."""
    before = sorted(os.listdir(source.parent))
    lines = set()
    for action in (
        lambda: glm_jax.convert(source, source.with_name("out")),
        lambda: glm_jax.convert(source, source.with_name("out"), quantized="keep"),
        lambda: glm_jax.load(source),
    ):
        with pytest.raises(error) as caught:
            action()
        lines.add(str(caught.value))
    assert sorted(os.listdir(source.parent)) == before
    (line,) = lines
    assert "\n" not in line and len(line) < 2500
    return line


def broken(directory: Path, kind: sources.Kind, change: Callable[[dict[str, np.ndarray]], Any], **config: Any) -> Path:
    made = sources.checkpoint(kind)
    tensors = dict(made.tensors)
    change(tensors)
    return sources.write(directory / "hf", {**made.config, **config}, tensors)


TENSORS: dict[str, tuple[sources.Kind, Callable[[dict[str, np.ndarray]], Any], str]] = {
    "no scale": (
        DEEPSEEK,
        lambda t: t.pop(f"{DOWN}_scale_inv"),
        f"1 missing of a quantised matrix: {DOWN}_scale_inv (there is {DOWN})",
    ),
    "no weight": (
        DEEPSEEK,
        lambda t: t.pop(DOWN),
        f"1 missing of a quantised matrix: {DOWN} (there is {DOWN}_scale_inv); 1 missing: {DOWN}",
    ),
    "neither": (DEEPSEEK, lambda t: [t.pop(DOWN), t.pop(f"{DOWN}_scale_inv")], f"1 missing: {DOWN}"),
    "a scale of nothing": (
        DEEPSEEK,
        lambda t: t.update({"model.extra.weight_scale_inv": np.ones((1, 1), np.float32)}),
        "1 not known to this architecture: model.extra.weight_scale_inv",
    ),
    "a scale beside a plain weight": (
        DEEPSEEK,
        lambda t: t.update({f"{ROUTER}_scale_inv": np.ones((1, 3), np.float32)}),
        f"1 of the wrong dtype for its part: {ROUTER} is BF16, not F8_E4M3",
    ),
    "a transposed scale": (
        DEEPSEEK,
        lambda t: t.update({f"{DOWN}_scale_inv": t[f"{DOWN}_scale_inv"].T.copy()}),
        f"1 of the wrong shape: {DOWN}_scale_inv is [2, 4], should be [4, 2]",
    ),
    "a scale without the block over the edge": (
        DEEPSEEK,
        lambda t: t.update({f"{DOWN}_scale_inv": t[f"{DOWN}_scale_inv"][:, :1].copy()}),
        f"1 of the wrong shape: {DOWN}_scale_inv is [4, 1], should be [4, 2]",
    ),
    "a scale of integers": (
        DEEPSEEK,
        lambda t: t.update({f"{DOWN}_scale_inv": np.ones((4, 2), np.int32)}),
        f"1 of the wrong dtype for its part: {DOWN}_scale_inv is I32, not BF16, F16, F32",
    ),
    "a transposed weight": (
        DEEPSEEK,
        lambda t: t.update({DOWN: t[DOWN].T.copy()}),
        f"1 of the wrong shape: {DOWN} is [32, 64], should be [64, 32]",
    ),
    "another float8": (
        DEEPSEEK,
        lambda t: t.update({DOWN: t[DOWN].view(np.uint8).view("float8_e5m2")}),
        f"{DOWN} is F8_E5M2 [64, 32]; float8 e5m2 is not read: take the BF16, FP8 or compressed-tensors repository",
    ),
    "a quantised vector": (
        DEEPSEEK,
        lambda t: t.update({"model.norm.weight": np.ones(64, FP8)}),
        "1 quantised, which only matrices can be: model.norm.weight",
    ),
    "scales under the other method's name": (
        DEEPSEEK,
        lambda t: t.update({f"{DOWN}_scale": t.pop(f"{DOWN}_scale_inv")}),
        f"1 not known to this architecture: {DOWN}_scale",
    ),
    "scales of activations of nothing": (
        GLM,
        lambda t: t.update({"model.layers.1.mlp.experts.9.down_proj.input_scale": np.ones(1, np.float32)}),
        "1 not known to this architecture: model.layers.1.mlp.experts.9.down_proj.input_scale",
    ),
    "a scale for the whole matrix": (
        GLM,
        lambda t: t.update({f"{DOWN}_scale": np.ones((1, 1), np.float32)}),
        f"1 of the wrong shape: {DOWN}_scale is [1, 1], should be [64, 1]",
    ),
    "scales of one dimension": (
        GLM,
        lambda t: t.update({f"{DOWN}_scale": np.ones(64, np.float32)}),
        f"1 of the wrong shape: {DOWN}_scale is [64], should be [64, 1]",
    ),
    "quantised though exempt": (
        GLM,
        lambda t: t.update(
            {"lm_head.weight": np.ones((128, 64), FP8), "lm_head.weight_scale": np.ones((128, 1), BF16)}
        ),
        "1 quantised although quantization_config exempts it (ignore): lm_head.weight",
    ),
    "a fused tensor": (
        GLM,
        lambda t: t.update({"model.layers.1.mlp.experts.down_proj": np.ones((8, 64, 32), FP8)}),
        "1 of a dtype that is not supported: model.layers.1.mlp.experts.down_proj is F8_E4M3",
    ),
    "packed too wide": (
        KIMI,
        lambda t: t.update({f"{DOWN}_packed": np.zeros((64, 32), np.int32)}),
        f"1 of the wrong shape: {DOWN}_packed is [64, 32], should be [64, 4]",
    ),
    "packed in bytes": (
        KIMI,
        lambda t: t.update({f"{DOWN}_packed": np.zeros((64, 4), np.uint8)}),
        f"1 of the wrong dtype for its part: {DOWN}_packed is U8, not I32",
    ),
    "no packed values": (
        KIMI,
        lambda t: t.pop(f"{DOWN}_packed"),
        f"1 missing of a quantised matrix: {DOWN}_packed (there is {DOWN}_scale, {DOWN}_shape); 1 missing: {DOWN}",
    ),
    "no shape": (
        KIMI,
        lambda t: t.pop(f"{DOWN}_shape"),
        f"1 missing of a quantised matrix: {DOWN}_shape",
    ),
    "another shape": (
        KIMI,
        lambda t: t.update({f"{DOWN}_shape": np.array([32, 64])}),
        f"1 of the wrong content: {DOWN}_shape holds [32, 64], should hold [64, 32]",
    ),
    "packed and plain": (
        KIMI,
        lambda t: t.update({DOWN: np.zeros((64, 32), BF16)}),
        f"1 stored twice (quantised and not): {DOWN}",
    ),
    "FP8 among int4": (
        KIMI,
        lambda t: t.update({ROUTER: np.zeros((8, 64), FP8)}),
        f"1 of a dtype that is not supported: {ROUTER} is F8_E4M3",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(tmp_path, case):
    kind, change, words = TENSORS[case]
    assert words in refused(broken(tmp_path, kind, change))


def test_all_that_is_wrong_is_in_one_line(tmp_path):
    layer = "model.layers.2.self_attn."

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{DOWN}_scale_inv"], tensors["model.norm.weight"]
        tensors[f"{layer}o_proj.weight_scale_inv"] = np.ones((1, 1), np.float32)
        tensors[f"{layer}extra.weight_scale_inv"] = np.ones((1, 1), np.float32)

    line = refused(broken(tmp_path, DEEPSEEK, change))
    assert f"{DOWN}_scale_inv" in line and f"{layer}o_proj.weight_scale_inv is [1, 1]" in line
    assert f"{layer}extra" in line and "missing: model.norm.weight" in line


def test_quantised_tensors_without_a_word_in_the_config(tmp_path):
    for kind in (DEEPSEEK, GLM, KIMI):
        made = sources.checkpoint(kind)
        count = sum(name not in made.plain or array.dtype == FP8 for name, array in made.tensors.items())
        source = broken(tmp_path, kind, lambda tensors: None, quantization_config=None)
        assert f"{count} quantised although config.json has no quantization_config: " in refused(source)


def test_a_quantisation_that_no_tensor_has(tmp_path):
    made = sources.checkpoint(DEEPSEEK)
    line = refused(sources.write(tmp_path / "hf", made.config, made.plain))
    assert "quantization_config says fp8 in blocks of 16 x 24 but no tensor is quantised; remove it" in line


@pytest.mark.parametrize("block", [[8, 24], [16, 12], [128, 128]])
def test_blocks_of_another_size_than_the_config_says(tmp_path, block):
    said = {**DEEPSEEK.config, "weight_block_size": block}
    assert "of the wrong shape: " in refused(broken(tmp_path, DEEPSEEK, lambda tensors: None, quantization_config=said))


# --- config.json ----------------------------------------------------------------------------------------------------

KNOWN = "known: fp8, compressed-tensors"
CONFIGS: list[tuple[sources.Kind, dict[str, Any], str]] = [
    (DEEPSEEK, {"quant_method": "gptq"}, f"quant_method is 'gptq'; {KNOWN}"),
    (DEEPSEEK, {"quant_method": None}, f"quant_method is None; {KNOWN}"),
    (DEEPSEEK, {"quant_method": ["fp8"]}, f"quant_method is ['fp8']; {KNOWN}"),
    (DEEPSEEK, {"weight_block_size": None}, "weight_block_size is None; two sizes such as [128, 128]"),
    (DEEPSEEK, {"weight_block_size": [128]}, "weight_block_size is [128]"),
    (DEEPSEEK, {"weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
    (DEEPSEEK, {"weight_block_size": [128.0, 128]}, "weight_block_size is [128.0, 128]"),
    (DEEPSEEK, {"fmt": "e5m2"}, "fmt is 'e5m2'; known: 'e4m3'"),
    (DEEPSEEK, {"activation_scheme": "static"}, "activation_scheme is 'static'; known: 'dynamic'"),
    (
        GLM,
        {"format": "marlin-24"},
        "format is 'marlin-24'; known for compressed-tensors: float-quantized, int-quantized",
    ),
    (GLM, {"format": None}, "format is None; known"),
    (GLM, {"config_groups": {}}, "config_groups is {}"),
    (GLM, {"config_groups": {"a": {}}}, "config_groups.a has no weights"),
    (GLM, {"ignore": "lm_head"}, "ignore is 'lm_head'; a list of names"),
    (GLM, {"ignore": ["re:("]}, "ignore has 're:(', which is no regular expression"),
    (GLM, {"weights.strategy": "token"}, "weights.strategy is 'token'; known: 'tensor', 'channel', 'group', 'block'"),
    (GLM, {"weights.strategy": "block"}, "weights.block_structure is None; two sizes such as [128, 128]"),
    (GLM, {"weights.block_structure": [8, 8]}, "weights.block_structure is [8, 8] with the strategy 'channel'"),
    (GLM, {"weights.group_size": 8}, "weights.group_size is 8 with the strategy 'channel'"),
    (GLM, {"weights.num_bits": 4}, "weights.num_bits is 4 of the type 'float'; the family of four-bit floats (NVFP4,"),
    (GLM, {"weights.num_bits": 16}, "weights.num_bits is 16; known: 8"),
    (GLM, {"weights.type": "int"}, "weights.type is 'int' in the format 'float-quantized'; known: 'float'"),
    (GLM, {"weights.dynamic": True}, "weights.dynamic is True; known: False"),
    (GLM, {"weights.rotation": "hadamard"}, "weights.rotation is 'hadamard', which is not known"),
    (GLM, {"weights.scale_dtype": "torch.uint8"}, "weights.scale_dtype is 'torch.uint8'; the MX family (MXFP4, MXFP8)"),
    (
        GLM,
        {"transform_config": {"config_groups": {"a": {}}}},
        "transform_config is {'config_groups': {'a': {}}}, which",
    ),
    (GLM, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is {'format': 'sparse-24-bitmask'}"),
    (GLM, {"weights.symmetric": False}, "weights.symmetric is False; known: True"),
    (KIMI, {"weights.num_bits": 9}, "weights.num_bits is 9; known: 1, 2, 3, 4, 5, 6, 7, 8"),
    (KIMI, {"weights.type": "float", "weights.num_bits": 8}, "weights.type is 'float' in the format 'pack-quantized'"),
    (KIMI, {"weights.strategy": "tensor", "weights.group_size": None}, "weights.strategy is 'tensor' in the format"),
    (KIMI, {"weights.group_size": None}, "weights.group_size is None; a size such as 32"),
    (KIMI, {"weights.group_size": -1}, "weights.group_size is -1"),
    (KIMI, {"weights.actorder": "group"}, "weights.actorder is 'group'; known: None, 'weight', 'static'"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), CONFIGS, ids=[f"{c[0].model_type}-{c[1]}"[:60] for c in CONFIGS])
def test_a_quantisation_that_is_not_known(tmp_path, kind, changes, words):
    said = copy.deepcopy(kind.config)
    for key, value in changes.items():
        *group, key = key.split(".")
        (said["config_groups"]["group_0"]["weights"] if group else said)[key] = value
    line = refused(broken(tmp_path, kind, lambda tensors: None, quantization_config=said), ConfigError)
    assert line.startswith("config.json: quantization_config: ") and words in line


def test_groups_of_different_formats(tmp_path):
    said = copy.deepcopy(KIMI.config)
    said["config_groups"]["group_1"] = copy.deepcopy(said["config_groups"]["group_0"])
    source = broken(tmp_path, KIMI, lambda tensors: None, quantization_config=said)
    glm_jax.convert(source, tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax")
    said["config_groups"]["group_1"]["weights"]["group_size"] = 16
    source = broken(tmp_path, KIMI, lambda tensors: None, quantization_config=said)
    line = refused(source, ConfigError)
    assert (
        "has groups of different formats (int4 in groups of 16, int4 in groups of 32) for the target 'Linear'" in line
    )
    assert "group_0 and group_1; one is right" in line


@pytest.mark.parametrize("said", [[], "fp8", 8, True])
def test_a_quantisation_that_is_no_object(tmp_path, said):
    assert "not an object" in refused(broken(tmp_path, GLM, lambda t: None, quantization_config=said), ConfigError)


@pytest.mark.parametrize("kind", [DEEPSEEK, GLM, KIMI], ids=["deepseek", "glm", "kimi"])
def test_quantisation_is_no_architecture(kind):
    config = published.config_json(model_type=kind.model_type)
    assert configs.from_hf({**config, "quantization_config": kind.config}) == configs.from_hf(config)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DEEPSEEK, GLM, KIMI], ids=["deepseek", "glm", "kimi"])
@pytest.mark.parametrize("keep", [7, 3000, -1])
def test_a_truncated_shard(tmp_path, kind, keep):
    path = sources.checkpoint(kind).write(tmp_path / "hf", shards=2) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refused(tmp_path / "hf")


@pytest.fixture(scope="module", params=["deepseek", "kimi"])
def converted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    kind, place = {"deepseek": DEEPSEEK, "kimi": KIMI}[request.param], tmp_path_factory.mktemp("kept")
    glm_jax.convert(sources.checkpoint(kind).write(place / "hf"), place / "kept", quantized="keep")
    return place / "kept"


@pytest.fixture
def kept(tmp_path: Path, converted: Path) -> Path:
    """A checkpoint that is kept quantised, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "kept"))


def refused_kept(kept: Path) -> str:
    """The line with which export refuses a kept checkpoint; loading refuses it too."""
    before = sorted(os.listdir(kept.parent))
    with pytest.raises(CheckpointError):
        glm_jax.load(kept)
    with pytest.raises(Error) as caught:
        glm_jax.export(kept, kept.with_name("back"))
    assert sorted(os.listdir(kept.parent)) == before and "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(kept: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((kept / MANIFEST).read_text())
    change(content)
    (kept / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("change", ["flip", "cut", "drop"])
def test_a_damaged_chunk_of_scales(kept, change):
    path = next((kept / "default" / "moe.moe.experts.down.scale").glob("c.1.*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if change == "drop" else path.write_bytes(data if change == "flip" else data[:-3])
    assert "moe.moe.experts.down.scale" in refused_kept(kept)


def test_scales_that_are_not_there(kept):
    shutil.rmtree(kept / "default" / "moe.moe.experts.down.scale")
    assert "moe.moe.experts.down.scale" in refused_kept(kept)


def test_a_weight_that_the_manifest_no_longer_calls_quantised(kept):
    edit_manifest(kept, lambda content: content["quantization"]["kept"].pop("moe.moe.experts.down"))
    assert "moe.moe.experts.down.scale is not known" in refused_kept(kept)


def test_a_weight_that_the_manifest_calls_quantised_and_is_not(kept):
    said = json.loads((kept / MANIFEST).read_text())["quantization"]["source"]
    edit_manifest(kept, lambda content: content["quantization"]["kept"].update({"embedding.weight": said}))
    assert "embedding.weight.scale is missing" in refused_kept(kept)


@pytest.mark.parametrize("weight", ["other.weight", "final_norm.scale"])
def test_a_quantised_weight_that_the_model_cannot_have(kept, weight):
    said = json.loads((kept / MANIFEST).read_text())["quantization"]["source"]
    edit_manifest(kept, lambda content: content["quantization"]["kept"].update({weight: said}))
    assert f"{MANIFEST} is damaged: it has '{weight}' as a quantised matrix" in refused_kept(kept)


@pytest.mark.parametrize(
    "said",
    [
        [],
        {},
        {"source": None},
        {"source": {"kind": "fp4"}, "kept": {}},
        {"source": {"kind": "int4", "group": 0}, "kept": {}},
        {"source": {"kind": "int4", "group": "32"}, "kept": {}},
        {"source": {"kind": "fp8", "rows": 16, "columns": True, "scale_suffix": "_scale"}, "kept": {}},
        {"source": {"kind": "fp8", "rows": 16, "columns": 16, "scale_suffix": "../x"}, "kept": {}},
        {"source": None, "kept": {"head.weight": None}},
    ],
)
def test_a_manifest_with_a_broken_quantisation(kept, said):
    edit_manifest(kept, lambda content: content.update(quantization=said))
    assert MANIFEST in refused_kept(kept)


def test_an_export_says_what_the_arrays_are_whatever_the_config_said(kept):
    path, layout = kept / "hf" / "config.json", next(iter(OrbaxSource(kept).manifest.kept.values()))
    content = json.loads(path.read_text())
    for number, said in enumerate((None, {"quant_method": "fp8", "weight_block_size": [2, 2]}, "no file")):
        path.write_text(json.dumps({**content, "quantization_config": said}))
        if said == "no file":
            path.unlink()
        back = kept.with_name(f"back{number}")
        glm_jax.export(kept, back)
        quantization = read_quantization(json.loads((back / "config.json").read_text()))
        assert quantization is not None and quantization.layouts[0] == layout
        assert HfSource(back).plan.quantized
