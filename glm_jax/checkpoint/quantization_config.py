"""The `quantization_config` of a config.json: which format a source's quantised matrices have.

It says how, the tensors say which: a matrix is quantised if its scales are there, and validation holds the two
against each other. What the activations of the source's own runtime are rounded to is of no concern here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.checkpoint.quantized import Format, Fp8, Int8, PackedInt4
from glm_jax.errors import ConfigError

# What compressed-tensors takes for a key that is not there.
_WEIGHT_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a config.json says of its quantised matrices.

    Attributes:
        layout: the tensors that they are stored as.
        exempt: names of modules that are not quantised.
        exempt_patterns: and patterns that match the beginning of such names.
    """

    layout: Format
    exempt: frozenset[str] = frozenset()
    exempt_patterns: tuple[re.Pattern[str], ...] = ()

    def exempts(self, weight: str) -> bool:
        """Whether a weight's module (its name without `.weight`) is not to be quantised."""
        module = weight.removesuffix(".weight")
        return module in self.exempt or any(pattern.match(module) for pattern in self.exempt_patterns)


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The quantisation that the content of a config.json declares; None if it declares none.

    Raises:
        ConfigError: the method, or the format within it, is not known, or a key is missing or wrong.
    """
    content = config.get("quantization_config")
    if content is None:
        return None
    if not isinstance(content, Mapping):
        raise _wrong(f"is {content!r:.200}, not an object")
    method = content.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise _wrong(f"quant_method {_shown(content, 'quant_method')}; known: {', '.join(_METHODS)}")
    return _METHODS[method](content)


def _read_fp8(content: Mapping[str, Any]) -> Quantization:
    """DeepSeek's: blocks, whose size the config says. `scale_fmt` restricts the scales' values, not their storage."""
    _require(content, "fmt", ("e4m3",), default="e4m3")
    _require(content, "activation_scheme", ("dynamic",), default="dynamic")
    block = content.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise _wrong(
            f"weight_block_size {_shown(content, 'weight_block_size')}; two sizes such as [128, 128] are right"
        )
    return Quantization(Fp8(block[0], block[1], "_scale_inv"))


def _read_compressed(content: Mapping[str, Any]) -> Quantization:
    """compressed-tensors: one format for all quantised modules."""
    name = content.get("format")
    if not isinstance(name, str) or name not in _COMPRESSED:
        raise _wrong(f"format {_shown(content, 'format')}; known for compressed-tensors: {', '.join(_COMPRESSED)}")
    _require(content, "kv_cache_scheme", (None,), default=None)
    groups = content.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _wrong(f"config_groups {_shown(content, 'config_groups')}; an object with at least one group is right")
    layouts = set()
    for key, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise _wrong(f"config_groups.{key} has no weights")
        _require(group, "format", (name, None), default=None)
        layouts.add(_COMPRESSED[name]({**_WEIGHT_DEFAULTS, **weights}))
    if len(layouts) > 1:
        raise _wrong(
            f"has groups of different formats ({', '.join(sorted(x.describe() for x in layouts))}); one is right"
        )
    exempt, patterns = _read_ignore(content)
    return Quantization(layouts.pop(), exempt, patterns)


def _read_ignore(content: Mapping[str, Any]) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    ignore = content.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(item, str) for item in ignore):
        raise _wrong(f"ignore {_shown(content, 'ignore')}; a list of names is right")
    names = frozenset(item for item in ignore if not item.startswith("re:"))
    patterns = []
    for item in ignore:
        if item not in names:
            try:
                patterns.append(re.compile(item.removeprefix("re:")))
            except (re.error, RecursionError, OverflowError) as error:
                raise _wrong(f"ignore has {item!r:.200}, which is no regular expression: {error}") from None
    return names, tuple(patterns)


def _channel_fp8(weights: Mapping[str, Any]) -> Format:
    legal = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    for key, value in legal.items():
        _require(weights, key, (value,), where="weights.")
    return Fp8(1, None, "_scale")


def _packed_int4(weights: Mapping[str, Any]) -> Format:
    legal = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    for key, value in legal.items():
        _require(weights, key, (value,), where="weights.")
    _require(weights, "strategy", ("group", None), where="weights.", default=None)
    group = weights.get("group_size")
    if type(group) is not int or group < 1:
        raise _wrong(f"weights.group_size {_shown(weights, 'group_size')}; a size such as 32 is right")
    return PackedInt4(group)


def _channel_int8(weights: Mapping[str, Any]) -> Format:
    legal = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    for key, value in legal.items():
        _require(weights, key, (value,), where="weights.")
    return Int8()


def quantization_config(layout: Format, exempt: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a format, which `read_quantization` reads; `exempt` modules are not quantised."""
    if isinstance(layout, Fp8) and layout.columns is not None:
        block = [layout.rows, layout.columns]
        return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": block} | (
            {"modules_to_not_convert": list(exempt)} if exempt else {}
        )
    common = {"dynamic": False, "symmetric": True}
    if isinstance(layout, PackedInt4):
        name, weights = "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group"}
        weights |= {"group_size": layout.group}
    elif isinstance(layout, Int8):
        name, weights = "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}
    else:
        name, weights = "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": common | weights}},
        "format": name,
        "ignore": list(exempt),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


_METHODS = {"fp8": _read_fp8, "compressed-tensors": _read_compressed}
_COMPRESSED = {"float-quantized": _channel_fp8, "int-quantized": _channel_int8, "pack-quantized": _packed_int4}


def _require(
    content: Mapping[str, Any], key: str, legal: tuple[Any, ...], *, where: str = "", default: Any = ...
) -> None:
    value = content.get(key, default)
    if not any(value is item or (type(value) is type(item) and value == item) for item in legal):
        raise _wrong(f"{where}{key} {_shown(content, key)}; known: {', '.join(repr(item) for item in legal)}")


def _shown(content: Mapping[str, Any], key: str) -> str:
    return f"is {content[key]!r:.200}" if key in content else "is missing"


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config: {what}")
