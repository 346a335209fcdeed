"""Formats of other programs: each is told by its tensors and refused in one line that names it and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint import dry_run, foreign
from glm_jax.errors import CheckpointError, ConfigError, Error
from tests import published
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, FP8

MODULE = "model.layers.1.mlp.experts.3.down_proj"  # [64, 32]
E8M0 = ml_dtypes.float8_e8m0fnu
COMING = "is coming, but not read yet: until then take the BF16, FP8 or compressed-tensors repository of the same model"


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.zeros(shape, dtype)


AWQ = {"qweight": zeros((32, 8), np.int32), "qzeros": zeros((2, 8), np.int32), "scales": zeros((2, 64), np.float16)}
GPTQ = {"qweight": zeros((4, 64), np.int32), "qzeros": zeros((2, 8), np.int32), "scales": zeros((2, 64), np.float16)}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {**COMPRESSED, "format": form, "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}


# The tensors of a matrix, what config.json says, and the words of the refusal.
CASES: dict[str, tuple[dict[str, np.ndarray], Any, str]] = {
    "awq": (AWQ, {"quant_method": "awq", "bits": 4, "group_size": 16}, f"AWQ {COMING}"),
    "awq without a config": (AWQ, None, f"AWQ {COMING}"),
    "awq that says it is something else": (AWQ, compressed("pack-quantized", num_bits=4), f"AWQ {COMING}"),
    "gptq": (
        {**GPTQ, "g_idx": zeros((32,), np.int32)},
        {"quant_method": "gptq", "bits": 4, "group_size": 16},
        f"GPTQ {COMING}",
    ),
    "gptq of eight bits": (
        {**GPTQ, "qweight": zeros((8, 64), np.int32), "g_idx": zeros((32,), np.int32)},
        None,
        f"GPTQ {COMING}",
    ),
    "auto-round": (GPTQ, {"quant_method": "auto-round", "bits": 4}, f"AutoRound {COMING}"),
    "auto-round as awq": (AWQ, {"quant_method": "auto-round", "bits": 4}, f"AutoRound {COMING}"),
    "modelopt nvfp4": (
        {
            "weight": zeros((64, 16), np.uint8),
            "weight_scale": zeros((64, 2), FP8),
            "weight_scale_2": zeros((), np.float32),
            "input_scale": zeros((), np.float32),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        f"NVFP4 (ModelOpt's) {COMING}",
    ),
    "modelopt nvfp4 with its config in another file": (
        {"weight": zeros((64, 16), np.uint8), "weight_scale": zeros((64, 2), FP8)},
        None,
        f"NVFP4 (ModelOpt's) {COMING}",
    ),
    "modelopt fp8": (
        {"weight": zeros((64, 32), FP8), "weight_scale": zeros((), np.float32), "input_scale": zeros((), np.float32)},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        f"ModelOpt FP8 {COMING}",
    ),
    "modelopt awq": (
        {
            "weight": zeros((64, 16), np.uint8),
            "weight_scale": zeros((64, 2), BF16),
            "pre_quant_scale": zeros((32,), BF16),
        },
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        "ModelOpt's AWQ and SVDQuant, which scale the inputs besides, is not read: take the BF16",
    ),
    "nvfp4 of compressed-tensors": (
        {
            "weight_packed": zeros((64, 16), np.uint8),
            "weight_scale": zeros((64, 2), FP8),
            "weight_global_scale": zeros((1,), np.float32),
        },
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        f"NVFP4 {COMING}",
    ),
    "mxfp4 of compressed-tensors": (
        {"weight_packed": zeros((64, 16), np.uint8), "weight_scale": zeros((64, 1), np.uint8)},
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        f"MXFP4 {COMING}",
    ),
    "mxfp6 of compressed-tensors": (
        {"weight_packed": zeros((64, 24), np.uint8), "weight_scale": zeros((64, 1), np.uint8)},
        compressed("mxfp6-pack-quantized", num_bits=6, type="float", strategy="group", group_size=32),
        "MXFP6 is not read: take the BF16",
    ),
    "mxfp8 of compressed-tensors": (
        {"weight": zeros((64, 32), FP8), "weight_scale": zeros((64, 1), np.uint8)},
        compressed("mxfp8-quantized", num_bits=8, type="float", group_size=32, scale_dtype="torch.uint8"),
        f"MXFP8 {COMING}",
    ),
    "mxfp8 that looks like fp8": (
        {"weight": zeros((64, 32), FP8), "weight_scale": zeros((64, 1), E8M0)},
        compressed("float-quantized", num_bits=8, type="float", strategy="group", group_size=32),
        f"MXFP8 {COMING}",
    ),
    "quark mxfp4": (
        {"weight": zeros((64, 16), np.uint8), "weight_scale": zeros((64, 1), np.uint8)},
        {"quant_method": "quark", "global_quant_config": {}},
        f"MXFP4 (Quark's) {COMING}",
    ),
    "fp4 of a later model": (
        {"weight": zeros((64, 16), np.int8), "scale": zeros((64, 1), E8M0)},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
        "FP4 with scales of powers of two",
    ),
    "int8 in blocks": (
        {"weight": zeros((64, 32), np.int8), "weight_scale_inv": zeros((1, 1), np.float32)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "int8 with weight_scale_inv is not read",
    ),
    "bitsandbytes": (
        {
            "weight": zeros((1024, 1), np.uint8),
            "weight.absmax": zeros((32,), np.float32),
            "weight.quant_map": zeros((16,), np.float32),
            "weight.quant_state.bitsandbytes__nf4": zeros((8,), np.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes, made at load time for fine-tuning, is not read: take the base model",
    ),
    "bitsandbytes of eight bits": (
        {"weight": zeros((64, 32), np.int8), "SCB": zeros((64,), np.float32)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes, made at load time",
    ),
    "mlx without its key": (
        {
            "weight": zeros((64, 4), np.uint32),
            "scales": zeros((64, 1), BF16),
            "biases": zeros((64, 1), BF16),
        },
        None,
        "MLX, Apple's format, is not read: take the repository that it was made from, in BF16 or FP8",
    ),
    "torchao": (
        {"_weight_qdata": zeros((64, 32), np.int8), "_weight_scale": zeros((64, 1), BF16)},
        {"quant_method": "torchao"},
        "torchao is not read: take the repository that it was made from",
    ),
    "exl2": ({"q_weight": zeros((4, 64), np.int32)}, {"quant_method": "exl2"}, "EXL2 is not read"),
    "exl3": ({"trellis": zeros((4, 4, 16), np.int16)}, {"quant_method": "exl3"}, "EXL3 is not read"),
    "hqq": ({"W_q": zeros((64, 16), np.uint8)}, {"quant_method": "hqq"}, "HQQ is not read"),
    "aqlm": ({"codebooks": zeros((1, 256, 1, 8), BF16)}, {"quant_method": "aqlm"}, "AQLM is not read"),
    "sparsity": (
        {"compressed": zeros((64, 16), BF16), "bitmask": zeros((64, 4), np.uint8)},
        compressed("sparse-24-bitmask", num_bits=8),
        "2:4 sparsity is not read",
    ),
    "another float8": (
        {"weight": zeros((64, 32), ml_dtypes.float8_e4m3fnuz), "weight_scale": zeros((64, 1), np.float32)},
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        "float8 e4m3fnuz, with another bias, is not read",
    ),
}


def refused(source: Path, error: type[Error] = CheckpointError) -> str:
    """The one line with which everything refuses a source."""
    lines = set()
    for action in (lambda: glm_jax.convert(source, source.with_name("out")), lambda: glm_jax.load(source)):
        with pytest.raises(error) as caught:
            action()
        lines.add(str(caught.value))
    if source.is_dir():
        lines.update(dry_run(source).problems)
    assert not source.with_name("out").exists()
    (line,) = lines
    assert "\n" not in line and len(line) < 600
    return line


def directory(place: Path, parts: dict[str, np.ndarray], said: Any) -> Path:
    config = published.config_json(dtype="bfloat16")
    tensors = published.stored(published.tensors(config), "bfloat16")
    del tensors[f"{MODULE}.weight"]
    tensors.update({f"{MODULE}.{suffix}": part for suffix, part in parts.items()})
    return sources.write(place, {**config, **({} if said is None else {"quantization_config": said})}, tensors)


@pytest.mark.parametrize("case", CASES)
def test_tensors_of_another_format(tmp_path, case):
    parts, said, words = CASES[case]
    line = refused(directory(tmp_path / "hf", parts, said))
    assert words in line and line.startswith(f"{MODULE}.")


METHODS = {
    "awq": "AWQ is coming",
    "gptq": "GPTQ is coming",
    "auto-round": "AutoRound is coming",
    "modelopt": "ModelOpt is coming",
    "quark": "Quark (MXFP4) is coming",
    "mxfp4": "MXFP4 is coming",
    "bitsandbytes": "bitsandbytes, made at load time for fine-tuning, is not read: take the base model",
    "torchao": "torchao is not read",
    "hqq": "hqq is not read",
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_whose_tensors_are_not_there(tmp_path, method):
    """Plain or FP8 tensors under the name of another method."""
    made = sources.checkpoint(sources.deepseek())
    for tensors in (made.tensors, made.plain):
        source = sources.write(
            tmp_path / "hf", {**made.config, "quantization_config": {"quant_method": method}}, tensors
        )
        line = refused(source, ConfigError)
        assert f"quant_method is {method!r}; known: fp8, compressed-tensors; {METHODS[method]}" in line


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("nvfp4-pack-quantized", "NVFP4 is coming"),
        ("mxfp4-pack-quantized", "MXFP4 is coming"),
        ("mxfp8-quantized", "MXFP8 is coming"),
        ("marlin-24", "Marlin with 2:4 sparsity is not read"),
        ("sparse-24-bitmask", "2:4 sparsity is not read"),
    ],
)
def test_formats_whose_tensors_are_not_there(tmp_path, form, words):
    made = sources.checkpoint(sources.glm())
    said = {**made.config["quantization_config"], "format": form}
    line = refused(
        sources.write(tmp_path / "hf", {**made.config, "quantization_config": said}, made.tensors), ConfigError
    )
    assert f"format is {form!r}; known for compressed-tensors: " in line and words in line


def test_mlx(tmp_path):
    config = {**published.config_json(), "quantization": {"group_size": 64, "bits": 4}}
    source = sources.write(tmp_path / "hf", config, {"model.norm.weight": zeros((64,), BF16)})
    assert "MLX, Apple's format, is not read: take the repository that it was made from" in refused(source, ConfigError)


def test_gguf(tmp_path):
    words = "GGUF, the format of llama.cpp, is not read: take the repository that it was made from, in BF16 or FP8"
    place = tmp_path / "hf"
    place.mkdir()
    (place / "GLM-Q4_K_M.gguf").write_bytes(b"GGUF")
    line = refused(place)
    assert line == f"{place}: holds GLM-Q4_K_M.gguf and no safetensors; {words}"
    (place / "config.json").write_text(json.dumps(published.config_json()))
    assert refused(place) == line
    assert refused(place / "GLM-Q4_K_M.gguf") == line
    published.checkpoint(place)  # beside which it does not matter
    assert glm_jax.convert(place, tmp_path / "orbax").notes == ()


def test_no_repository_s_name_decides(tmp_path):
    """What is called AWQ is compressed-tensors' more often than not."""
    made = sources.checkpoint(sources.int4(32, asymmetric=True))
    source = made.write(tmp_path / "GLM-4.5-Air-AWQ-4bit")
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    found = sources.read(tmp_path / "back")
    assert all(found[name].tobytes() == array.tobytes() for name, array in made.plain.items())


def test_each_name_has_a_word_and_others_an_advice():
    assert foreign.named_format("awq").startswith("AWQ is coming")
    for name in ("compressed-tensors", None, ["awq"], "of tomorrow"):
        assert foreign.named_format(name) == "take the BF16, FP8 or compressed-tensors repository of the same model"
