"""Quantised checkpoints as they are published, and what their weights are: stated here once more, with numpy alone.

Every value is a random code, so all of them occur, those that are no number too. Which matrices are quantised, the
names of the parts and config.json's words are those of DeepSeek-V3, GLM-4.5-FP8 and Kimi K2 Thinking.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.safetensors import TensorSpec, dtype_name
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
from glm_jax.checkpoint.safetensors_writer import SafetensorsWriter
from tests import published

FP8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
Matrix = tuple[dict[str, np.ndarray], np.ndarray]  # the parts by suffix, and the weights that they stand for


def blocks(rng: np.random.Generator, shape: tuple[int, int], block: tuple[int, int]) -> Matrix:
    """DeepSeek's: random codes; a scale for each block, those over the edge too."""
    codes = rng.integers(0, 256, shape, np.uint8).view(FP8)
    scale = rng.lognormal(-5, 2, [-(-size // part) for size, part in zip(shape, block, strict=True)]).astype(np.float32)
    spread = np.repeat(np.repeat(scale, block[0], axis=0), block[1], axis=1)[: shape[0], : shape[1]]
    return {"": codes, "_scale_inv": scale}, (codes.astype(np.float32) * spread).astype(BF16)


def channels(rng: np.random.Generator, shape: tuple[int, int], dtype: Any = BF16) -> Matrix:
    """compressed-tensors': random codes; a scale for each row."""
    codes = rng.integers(0, 256, shape, np.uint8).view(FP8)
    scale = rng.lognormal(-5, 2, (shape[0], 1)).astype(dtype)
    return {"": codes, "_scale": scale}, (codes.astype(np.float32) * scale.astype(np.float32)).astype(BF16)


def packed(rng: np.random.Generator, shape: tuple[int, int], group: int) -> Matrix:
    """compressed-tensors': eight int4 in an int32, the first lowest; a scale for each group of a row."""
    values = rng.integers(-8, 8, shape)
    padded = np.pad(values, ((0, 0), (0, -shape[1] % 8)), constant_values=-8).reshape(shape[0], -1, 8)
    words = sum((padded[:, :, i] + 8).astype(np.uint32) << np.uint32(4 * i) for i in range(8))
    scale = rng.normal(0, 0.1, (shape[0], -(-shape[1] // group))).astype(BF16)
    spread = np.repeat(scale.astype(np.float32), group, axis=1)[:, : shape[1]]
    parts = {"_packed": np.asarray(words).view(np.int32), "_scale": scale, "_shape": np.array(shape, np.int64)}
    return parts, (values.astype(np.float32) * spread).astype(BF16)


def packed_bits(fields: np.ndarray, bits: int, *, spaced: bool = False) -> np.ndarray:
    """Unsigned fields of so many bits, the first lowest, in int32 words along the last axis."""
    if spaced:  # words of whole fields
        each = 32 // bits
        fields = np.pad(fields, ((0, 0), (0, -fields.shape[1] % each))).reshape(fields.shape[0], -1, each)
    single = (fields[..., None] >> np.arange(bits) & 1).astype(np.uint8)
    single = single.reshape(*fields.shape[:-1], -1)
    single = np.pad(single, [(0, 0)] * (single.ndim - 1) + [(0, -single.shape[-1] % 32)])
    words = np.ascontiguousarray(np.packbits(single, axis=-1, bitorder="little")).view("<i4")
    return words.reshape(words.shape[0], -1)


def spread(part: np.ndarray, shape: tuple[int, int], rows: int | None, columns: int | None) -> np.ndarray:
    """The scale, or the zero point, of every value."""
    part = part.astype(np.float32).reshape(-1, part.shape[-1])
    part = np.repeat(part, rows or shape[0], axis=0)[: shape[0]]
    return np.repeat(part, columns or shape[1], axis=1)[:, : shape[1]]


def scale_shape(shape: tuple[int, int], rows: int | None, columns: int | None) -> tuple[int, ...]:
    """One scale for the matrix, or one for each block."""
    return (1,) if rows is None else (-(-shape[0] // rows), 1 if columns is None else -(-shape[1] // columns))


def floats(
    rng: np.random.Generator, shape: tuple[int, int], rows: int | None, columns: int | None, *, dtype: Any = BF16
) -> Matrix:
    """compressed-tensors' float-quantized: random codes, with scales by tensor, channel, group or block."""
    codes = rng.integers(0, 256, shape, np.uint8).view(FP8)
    scale = rng.lognormal(-5, 2, scale_shape(shape, rows, columns)).astype(dtype)
    weight = (codes.astype(np.float32) * spread(scale, shape, rows, columns)).astype(BF16)
    return {"": codes, "_scale": scale}, weight


def bytes_of(
    rng: np.random.Generator,
    shape: tuple[int, int],
    rows: int | None,
    columns: int | None,
    *,
    asymmetric: bool = False,
    bits: int = 8,
    dtype: Any = BF16,
) -> Matrix:
    """compressed-tensors' int-quantized: integers of at most eight bits, each in a byte."""
    low, high = -(1 << bits - 1), 1 << bits - 1
    values = rng.integers(low, high, shape).astype(np.int8)
    scale = rng.normal(0, 0.1, scale_shape(shape, rows, columns)).astype(dtype)
    zero = rng.integers(low, high, scale.shape).astype(np.int8) if asymmetric else np.zeros(scale.shape, np.int8)
    shifted = values.astype(np.float32) - spread(zero, shape, rows, columns)
    weight = (shifted * spread(scale, shape, rows, columns)).astype(BF16)
    return {"": values, "_scale": scale, **({"_zero_point": zero} if asymmetric else {})}, weight


def integers(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int,
    group: int | None,
    *,
    asymmetric: bool = False,
    spaced: bool = False,
    dtype: Any = BF16,
) -> Matrix:
    """compressed-tensors' pack-quantized: integers of `bits` along the input, zero points along the output."""
    half = 1 << bits - 1
    values = rng.integers(-half, half, shape)
    scale = rng.normal(0, 0.1, scale_shape(shape, 1, group)).astype(dtype)
    zero = rng.integers(-half, half, scale.shape) if asymmetric else np.zeros(scale.shape, np.int64)
    shifted = values.astype(np.float32) - spread(zero, shape, 1, group)
    weight = (shifted * spread(scale, shape, 1, group)).astype(BF16)
    parts = {"_packed": packed_bits(values + half, bits, spaced=spaced), "_scale": scale}
    if asymmetric:
        parts["_zero_point"] = np.ascontiguousarray(packed_bits((zero + half).T, bits, spaced=spaced).T)
    return {**parts, "_shape": np.array(shape, np.int64)}, weight


def compressed(form: str, weights: Mapping[str, Any], ignore: list[str]) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    common = {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax", "symmetric": True}
    group = {"input_activations": None, "targets": ["Linear"], "weights": {**common, **weights}}
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family, which of its matrices are quantised, how, and what config.json says of it."""

    model_type: str
    names: str
    quantize: Callable[[np.random.Generator, tuple[int, int]], Matrix]
    config: dict[str, Any]


PROJECTIONS = r".*\.(self_attn|mlp)\..*_proj.*\.weight"


def deepseek(block: tuple[int, int] = (128, 128)) -> Kind:
    """Every projection in blocks."""
    said = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    return Kind("deepseek_v3", PROJECTIONS, lambda rng, shape: blocks(rng, shape, block), said)


def glm(dtype: Any = BF16) -> Kind:
    """Every projection of all but the first layer by channels."""
    ignore = ["lm_head", r"re:model\.layers\.0\..*", "model.layers.3.eh_proj", "model.layers.3.shared_head.head"]
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
    names = r"model\.layers\.[123]\..*_proj\.weight(?<!eh_proj\.weight)"
    said = compressed("float-quantized", weights, ignore)
    return Kind("glm4_moe", names, lambda rng, shape: channels(rng, shape, dtype), said)


def kimi(group: int = 32) -> Kind:
    """The routed experts."""
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    said = compressed("pack-quantized", weights, ignore)
    return Kind("kimi_k2", r".*\.mlp\.experts\..*\.weight", lambda rng, shape: packed(rng, shape, group), said)


KINDS = {
    "deepseek-128": deepseek(),
    "deepseek-odd": deepseek((5, 7)),
    "glm-bf16": glm(),
    "glm-f32": glm(np.float32),
    "kimi-32": kimi(),
    "kimi-odd": kimi(12),
}


def llm_compressor(
    form: str, weights: Mapping[str, Any], quantize: Callable[[np.random.Generator, tuple[int, int]], Matrix]
) -> Kind:
    """Every linear layer but the head and the router; what is read by layers has no MTP layer."""
    said = compressed(form, weights, ["lm_head", "re:.*mlp.gate$"])
    return Kind("glm4_moe", r"model\.layers\.[012]\..*_proj\.weight", quantize, said)


def int4(group: int | None, *, bits: int = 4, asymmetric: bool = False, **more: Any) -> Kind:
    """llm-compressor's W4A16 and its kin."""
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": not asymmetric, **strategy, **more}
    return llm_compressor(
        "pack-quantized", weights, lambda rng, shape: integers(rng, shape, bits, group, asymmetric=asymmetric)
    )


def strategies() -> dict[str, dict[str, Any]]:
    """What values share a scale, in the config's words."""
    return {
        "tensor": {"strategy": "tensor"},
        "channel": {"strategy": "channel"},
        "group": {"strategy": "group", "group_size": 16},
        "block": {"strategy": "block", "block_structure": [16, 16]},
    }


EXTENTS: dict[str, tuple[int | None, int | None]] = {
    "tensor": (None, None),
    "channel": (1, None),
    "group": (1, 16),
    "block": (16, 16),
}


def fp8(strategy: str, form: str = "float-quantized") -> Kind:
    """llm-compressor's FP8, FP8_DYNAMIC and FP8_BLOCK."""
    weights = {"num_bits": 8, "type": "float", **strategies()[strategy]}
    return llm_compressor(form, weights, lambda rng, shape: floats(rng, shape, *EXTENTS[strategy]))


def int8(strategy: str, form: str = "int-quantized", *, asymmetric: bool = False) -> Kind:
    """llm-compressor's W8A8."""
    weights = {"num_bits": 8, "type": "int", "symmetric": not asymmetric, **strategies()[strategy]}
    kind = llm_compressor(
        form, weights, lambda rng, shape: bytes_of(rng, shape, *EXTENTS[strategy], asymmetric=asymmetric)
    )
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    if form == "int-quantized":
        kind.config["config_groups"]["group_0"]["input_activations"] = activations
    return kind


COMPRESSED = {
    "int4": int4(32),
    "int4-static": int4(16, actorder="static"),
    "int4-channel": int4(None),
    "int4-asymmetric": int4(16, asymmetric=True, actorder="weight"),
    "int8-packed": int4(16, bits=8),
    "int8-packed-asymmetric": int4(32, bits=8, asymmetric=True),
    "int3-asymmetric": int4(32, bits=3, asymmetric=True),
    "int6": int4(None, bits=6),
    "fp8-tensor": fp8("tensor"),
    "fp8-channel": fp8("channel", "naive-quantized"),
    "fp8-group": fp8("group"),
    "fp8-block": fp8("block"),
    "int8": int8("channel"),
    "int8-tensor": int8("tensor"),
    "int8-asymmetric": int8("channel", asymmetric=True),
    "int8-group-asymmetric": int8("group", asymmetric=True),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A quantised checkpoint: its config.json, its tensors, and the tensors that it stands for."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]

    def write(self, directory: Path, *, shards: int = 1) -> Path:
        """Write the directory."""
        return write(directory, self.config, self.tensors, shards=shards)

    def write_plain(self, directory: Path) -> Path:
        """Write the directory of the weights that it stands for, in bfloat16."""
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        return write(directory, config, self.plain)


def checkpoint(kind: Kind, *, seed: int = 0, **changes: Any) -> Checkpoint:
    """A random checkpoint of the small shape of a kind's family."""
    config = published.config_json(model_type=kind.model_type, dtype="bfloat16", **changes)
    plain = published.stored(published.tensors(config, seed=seed), "bfloat16")
    tensors, rng = {}, np.random.default_rng(seed)
    for name, array in list(plain.items()):
        if re.fullmatch(kind.names, name):
            parts, plain[name] = kind.quantize(rng, array.shape)
            tensors.update({name + suffix: part for suffix, part in parts.items()})
        else:
            tensors[name] = array
    return Checkpoint({**config, "quantization_config": kind.config}, tensors, plain)


def group(targets: list[str], weights: Mapping[str, Any], form: str | None = None) -> dict[str, Any]:
    return {"targets": targets, "weights": dict(weights), **({} if form is None else {"format": form})}


CHANNEL8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
GROUP4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
BLOCK8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}


def mixed(**changes: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """Attention by channels in int8, experts in int4, shared experts in FP8 blocks, all else plain."""
    base = checkpoint(dataclasses.replace(COMPRESSED["int4"], names="none"))
    rng = np.random.default_rng(5)
    tensors, plain = {}, dict(base.plain)
    for name, array in base.plain.items():
        if not name.startswith(("model.layers.0", "model.layers.1", "model.layers.2")) or "_proj.weight" not in name:
            tensors[name] = array
            continue
        if "self_attn" in name:
            parts, plain[name] = bytes_of(rng, array.shape, 1, None)
        elif ".experts." in name:
            parts, plain[name] = integers(rng, array.shape, 4, 32)
        elif "shared_experts" in name:
            parts, plain[name] = floats(rng, array.shape, 16, 16)
        else:
            parts = {"": array}
        tensors.update({name + suffix: part for suffix, part in parts.items()})
    said = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "attention": group(["re:.*self_attn.*"], CHANNEL8, "int-quantized"),
            "experts": group(["re:.*mlp.experts.*"], GROUP4, "pack-quantized"),
            "shared": group(["re:.*shared_experts.*"], BLOCK8, "float-quantized"),
        },
        "ignore": ["lm_head", r"re:.*layers\.0\.mlp\..*"],
        **changes,
    }
    return Checkpoint({**base.config, "quantization_config": said}, tensors, plain), said


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, shards: int = 1) -> Path:
    """Write a directory; the numpy half of the `safetensors` package does not know FP8."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = [TensorSpec(name, dtype_name(array.dtype), array.shape) for name, array in tensors.items()]
    largest = sum(spec.nbytes for spec in plan) // shards + max(spec.nbytes for spec in plan)
    with SafetensorsWriter(directory, plan, max_shard_bytes=largest) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return directory


def read(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory."""
    with SafetensorsDir(directory) as files:
        return {info.name: array.copy() for info, array in files.stream()}
