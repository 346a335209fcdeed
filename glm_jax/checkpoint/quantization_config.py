"""The `quantization_config` of a config.json: reading those of the known methods, and writing one.

What the activations of the source's own runtime are rounded to is of no concern here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.checkpoint.compressed_tensors import FLOAT, INTEGER, MIXED, PACKED, read_compressed
from glm_jax.checkpoint.foreign import named_format
from glm_jax.checkpoint.quantization import Group, Quantization, require, shown, wrong
from glm_jax.checkpoint.quantized import Format, Fp8, Int8, PackedInt


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The quantisation that the content of a config.json declares; None if it declares none.

    Raises:
        ConfigError: the method, or the format within it, is not known, or a key is missing or wrong.
    """
    content = config.get("quantization_config")
    if content is None:
        return None
    if not isinstance(content, Mapping):
        raise wrong(f"is {content!r:.200}, not an object")
    method = content.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        known = ", ".join(_METHODS)
        raise wrong(f"quant_method {shown(content, 'quant_method')}; known: {known}; {named_format(method)}")
    return _METHODS[method](content)


def _read_fp8(content: Mapping[str, Any]) -> Quantization:
    """DeepSeek's: blocks, whose size the config says. `scale_fmt` restricts the scales' values, not their storage."""
    require(content, "fmt", ("e4m3",), default="e4m3")
    require(content, "activation_scheme", ("dynamic",), default="dynamic")
    block = content.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise wrong(f"weight_block_size {shown(content, 'weight_block_size')}; two sizes such as [128, 128] are right")
    return Quantization((Group("all", (Fp8(block[0], block[1], "_scale_inv"),)),))


_METHODS = {"fp8": _read_fp8, "compressed-tensors": read_compressed}


def quantization_config(modules: Mapping[Format, Sequence[str]], exempt: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of formats, which `read_quantization` reads.

    Args:
        modules: the modules of each format; those of the first are the linear ones that no other format has.
        exempt: modules that are not quantised.
    """
    first = next(iter(modules))
    if isinstance(first, Fp8) and first.scale_suffix == "_scale_inv":
        assert len(modules) == 1, "DeepSeek's blocks have one size"
        content = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        block = {"weight_block_size": [first.rows, first.columns]}
        return {**content, **block, **({"modules_to_not_convert": list(exempt)} if exempt else {})}
    groups: dict[str, dict[str, Any]] = {}
    forms = []
    for number, (layout, names) in enumerate(modules.items()):
        form, weights = _arguments(layout)
        groups[f"group_{number}"] = {"targets": ["Linear"] if number == 0 else list(names), "weights": weights}
        forms.append(form)
    if len(set(forms)) > 1:
        for group, form in zip(groups.values(), forms, strict=True):
            group["format"] = form
    return {
        "config_groups": groups,
        "format": forms[0] if len(set(forms)) == 1 else MIXED,
        "ignore": list(exempt),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _arguments(layout: Format) -> tuple[str, dict[str, Any]]:
    """The format and the arguments of a group of weights, in the words of compressed-tensors."""
    match layout:
        case PackedInt():
            form, bits, kind, symmetric = PACKED, layout.bits, "int", not layout.asymmetric
        case Int8():
            form, bits, kind, symmetric = INTEGER, 8, "int", not layout.asymmetric
        case Fp8():
            form, bits, kind, symmetric = FLOAT, 8, "float", True
    weights = {"dynamic": False, "num_bits": bits, "symmetric": symmetric, "type": kind}
    if layout.rows is None:
        return form, {**weights, "strategy": "tensor"}
    if layout.columns is None:
        return form, {**weights, "strategy": "channel"}
    if layout.rows == 1:
        return form, {**weights, "strategy": "group", "group_size": layout.columns}
    return form, {**weights, "strategy": "block", "block_structure": [layout.rows, layout.columns]}
