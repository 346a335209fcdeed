"""Quantised checkpoints of other programs: told by their tensors' names, dtypes and shapes, and refused in one line.

A repository's name tells nothing, and a config.json little: what is called AWQ is often stored by compressed-tensors.
The line names the format, the tensor that shows it, and what to do. Formats that are to be read later say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from glm_jax.errors import CheckpointError, ConfigError

_TAKE = "take the BF16, FP8 or compressed-tensors repository of the same model"
_ORIGINAL = "take the repository that it was made from, in BF16 or FP8"


class Header(Protocol):
    """What is known of a tensor without its data."""

    @property
    def dtype(self) -> str:
        """The dtype in safetensors' words."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as stored."""
        ...


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A format that is not read.

    Attributes:
        name: for people.
        advice: what to do instead.
        coming: whether it is to be read later.
    """

    name: str
    advice: str = _TAKE
    coming: bool = False

    def __str__(self) -> str:
        return f"{self.name} is {'coming, but not read yet: until then' if self.coming else 'not read:'} {self.advice}"


AWQ, GPTQ = Foreign("AWQ", coming=True), Foreign("GPTQ", coming=True)
AUTO_ROUND = Foreign("AutoRound", coming=True)
MODELOPT = Foreign("ModelOpt", coming=True)
NVFP4, MXFP4, MXFP8 = (Foreign(name, coming=True) for name in ("NVFP4", "MXFP4", "MXFP8"))
QUARK, QUARK_MXFP4 = Foreign("Quark (MXFP4)", coming=True), Foreign("MXFP4 (Quark's)", coming=True)
MODELOPT_FP8, MODELOPT_NVFP4 = Foreign("ModelOpt FP8", coming=True), Foreign("NVFP4 (ModelOpt's)", coming=True)
NVFP4_AWQ = Foreign("ModelOpt's AWQ and SVDQuant, which scale the inputs besides,")
DEEPSEEK_FP4 = Foreign("FP4 with scales of powers of two (DeepSeek-V4's)")
GGUF = Foreign("GGUF, the format of llama.cpp,", _ORIGINAL)
MLX = Foreign("MLX, Apple's format,", _ORIGINAL)
BITSANDBYTES = Foreign("bitsandbytes, made at load time for fine-tuning,", "take the base model")
TORCHAO, QUANTO = Foreign("torchao", _ORIGINAL), Foreign("Quanto", _ORIGINAL)

_METHODS = {
    "awq": AWQ,
    "gptq": GPTQ,
    "auto-round": AUTO_ROUND,
    "auto_round": AUTO_ROUND,
    "intel/auto-round": AUTO_ROUND,
    "modelopt": MODELOPT,
    "modelopt_fp4": MODELOPT,
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
    "quark": QUARK,
    "bitsandbytes": BITSANDBYTES,
    "bitsandbytes_4bit": BITSANDBYTES,
    "bitsandbytes_8bit": BITSANDBYTES,
    "mlx": MLX,
    "gguf": GGUF,
    "torchao": TORCHAO,
    "quanto": QUANTO,
    "nvfp4-pack-quantized": NVFP4,
    "mxfp4-pack-quantized": MXFP4,
    "mxfp8-quantized": MXFP8,
    "mxfp6-pack-quantized": Foreign("MXFP6"),
    "mxfp": Foreign("the MX family (MXFP4, MXFP8)", coming=True),
    "fp4": Foreign("the family of four-bit floats (NVFP4, MXFP4)", coming=True),
    "marlin-24": Foreign("Marlin with 2:4 sparsity"),
    "sparse-24-bitmask": Foreign("2:4 sparsity"),
    "sparse-bitmask": Foreign("sparsity"),
    **{name: Foreign(name) for name in ("aqlm", "bitblas", "bitnet", "eetq", "exl2", "exl3", "fbgemm_fp8", "fp_quant")},
    **{name: Foreign(name) for name in ("gemv", "gptq_marlin", "higgs", "hqq", "llm-awq", "marlin", "spqr", "vptq")},
}


def named_format(name: Any) -> str:
    """What to do about a format of this name."""
    return str(_METHODS[name]) if isinstance(name, str) and name in _METHODS else _TAKE


def check_files(place: Any, names: Iterable[str]) -> None:
    """Refuse a directory whose weights are in GGUF files, or such a file.

    Raises:
        CheckpointError: they are.
    """
    found = sorted(names)
    gguf = [name for name in found if name.endswith(".gguf")]
    if gguf and not any(name.endswith(".safetensors") for name in found):
        raise CheckpointError(f"{place}: holds {gguf[0]} and no safetensors; {GGUF}")


def check_config(content: Mapping[str, Any]) -> None:
    """Refuse a config.json that only one program writes.

    Raises:
        ConfigError: it is MLX's.
    """
    said = content.get("quantization")
    if isinstance(said, Mapping) and {"bits", "group_size"} <= said.keys():
        raise ConfigError(f"config.json: quantization is {dict(said)!r:.200}; {MLX}")


def check_tensors(headers: Mapping[str, Header], quantization: Any = None) -> None:
    """Refuse tensors of another program's format.

    Args:
        headers: every tensor.
        quantization: the quantization_config, which tells apart what is stored alike.

    Raises:
        CheckpointError: there are such tensors; the line names the first.
    """
    for name, header in headers.items():
        module, _, suffix = name.rpartition(".")
        found = _DTYPES.get(header.dtype)
        if found is None and suffix in _SUFFIXES:
            found = _SUFFIXES[suffix](_Tensors(headers, module, name, quantization))
        if found is not None:
            raise CheckpointError(f"{name} is {header.dtype} {list(header.shape)}; {found}")


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """A tensor and those beside it."""

    headers: Mapping[str, Header]
    module: str
    name: str
    quantization: Any

    @property
    def own(self) -> Header:
        return self.headers[self.name]

    def dtype(self, suffix: str) -> str | None:
        """The dtype of a tensor of the same module; None if there is none."""
        header = self.headers.get(f"{self.module}.{suffix}")
        return None if header is None else header.dtype

    def shape(self, suffix: str) -> tuple[int, ...]:
        header = self.headers.get(f"{self.module}.{suffix}")
        return () if header is None else tuple(header.shape)


_POWERS = ("U8", "F8_E8M0")  # of two, as scales


def _qweight(tensors: _Tensors) -> Foreign | None:
    method = tensors.quantization.get("quant_method") if isinstance(tensors.quantization, Mapping) else None
    if isinstance(method, str) and _METHODS.get(method) is AUTO_ROUND:
        return AUTO_ROUND
    own, scales = tensors.own.shape, tensors.shape("scales")
    eight = len(own) == len(scales) == 2 and own[1] * 8 == scales[1]  # outputs in a word: AWQ; inputs: GPTQ
    return AWQ if eight and tensors.dtype("g_idx") is None else GPTQ


def _weight(tensors: _Tensors) -> Foreign | None:
    scale, own = tensors.dtype("weight_scale"), tensors.own.dtype
    if tensors.dtype("weight.absmax") is not None or tensors.dtype("SCB") is not None:
        return BITSANDBYTES
    if tensors.dtype("biases") is not None and tensors.dtype("scales") is not None:
        return MLX
    if own == "U8":
        return MODELOPT_NVFP4 if scale == "F8_E4M3" else QUARK_MXFP4 if scale in _POWERS else None
    if own == "I8" and tensors.dtype("scale") in _POWERS:
        return DEEPSEEK_FP4
    if own == "I8" and tensors.dtype("weight_scale_inv") is not None:
        return Foreign("int8 with weight_scale_inv")
    if own == "F8_E4M3" and scale in _POWERS:
        return MXFP8
    if own == "F8_E4M3" and scale is not None and not tensors.shape("weight_scale"):
        return MODELOPT_FP8
    return None


def _weight_packed(tensors: _Tensors) -> Foreign | None:
    scale = tensors.dtype("weight_scale")
    if tensors.own.dtype != "U8" or scale not in (*_POWERS, "F8_E4M3"):
        return None
    if scale == "F8_E4M3":
        return NVFP4
    bytes_of_group = tensors.own.shape[-1:], tensors.shape("weight_scale")[-1:]
    return _METHODS["mxfp6-pack-quantized"] if bytes_of_group[0] == (24 * (bytes_of_group[1] or (0,))[0],) else MXFP4


def _is(found: Foreign, *dtypes: str) -> Callable[[_Tensors], Foreign | None]:
    """A suffix that shows a format by itself, if its tensor has one of these dtypes."""
    return lambda tensors: found if not dtypes or tensors.own.dtype in dtypes else None


def _suffixes() -> Iterator[tuple[str, Callable[[_Tensors], Foreign | None]]]:
    yield "qweight", _qweight
    yield "weight", _weight
    yield "weight_packed", _weight_packed
    yield from ((name, _is(NVFP4_AWQ)) for name in ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"))
    yield from ((name, _is(MXFP4, "U8")) for name in ("gate_up_proj_blocks", "down_proj_blocks"))
    yield from ((name, _is(BITSANDBYTES)) for name in ("absmax", "quant_map", "nested_absmax", "SCB"))
    yield from ((name, _is(TORCHAO)) for name in ("_weight_qdata", "weight_qdata"))
    yield from ((name, _is(QUANTO)) for name in ("_data",))
    yield from ((name, _is(Foreign("EXL2"))) for name in ("q_weight", "q_invperm"))
    yield from ((name, _is(Foreign("EXL3"))) for name in ("trellis", "suh", "svh"))
    yield "W_q", _is(Foreign("HQQ"))
    yield "codebooks", _is(Foreign("AQLM"))
    yield "centroids", _is(Foreign("VPTQ"))
    yield "B", _is(Foreign("Marlin"), "I32")
    yield from ((name, _is(_METHODS["sparse-24-bitmask"])) for name in ("compressed", "bitmask"))


_SUFFIXES = dict(_suffixes())
_DTYPES = {
    "F8_E5M2": Foreign("float8 e5m2"),
    "F8_E4M3FNUZ": Foreign("float8 e4m3fnuz, with another bias,"),
    "F8_E5M2FNUZ": Foreign("float8 e5m2fnuz, with another bias,"),
    "F4": Foreign("a tensor of four-bit floats"),
    "F6_E2M3": Foreign("a tensor of six-bit floats"),
    "F6_E3M2": Foreign("a tensor of six-bit floats"),
}
