"""The quantization_config of compressed-tensors, as llm-compressor writes it: groups of modules and their formats.

Read are the formats that store weights as integers or as float8 with float scales: `pack-quantized`, `int-quantized`,
`float-quantized`, `naive-quantized`, each for itself or several as `mixed-precision`. What the activations and the
cache of the source's own runtime are rounded to is of no concern here, and passed over.

Keys and defaults are those of compressed-tensors 0.20 (`quantization/quant_args.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_jax.checkpoint.foreign import named_format
from glm_jax.checkpoint.quantization import Group, Quantization, names_of, require, shown, wrong
from glm_jax.checkpoint.quantized import Format, Fp8, Int8, PackedInt

PACKED, INTEGER, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
FORMATS = (FLOAT, INTEGER, NAIVE, PACKED)
MIXED = "mixed-precision"  # each group names its own
_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
# That change nothing of what is stored, and those that are read.
_HARMLESS = {"observer", "observer_kwargs", "zp_dtype", "scale_dtype"}
_READ = {"num_bits", "type", "symmetric", "dynamic", "strategy", "group_size", "block_structure", "actorder"}
_STRATEGIES = ("tensor", "channel", "group", "block")
_ACTIVATIONS = ("input_activations", "output_activations")


def read_compressed(content: Mapping[str, Any]) -> Quantization:
    """What a quantization_config of compressed-tensors says.

    Raises:
        ConfigError: a format is not known, a key is missing or wrong, or groups contradict each other.
    """
    for key in ("transform_config", "sparsity_config"):
        said = content.get(key) or {}
        if not isinstance(said, Mapping) or said.get("format", "dense") != "dense" or said.get("config_groups"):
            raise wrong(f"{key} {shown(content, key)}, which changes the weights; an empty one is right")
    groups = content.get("config_groups")
    cache = content.get("kv_cache_scheme")
    if not isinstance(groups, Mapping) or not (groups or cache):
        raise wrong(f"config_groups {shown(content, 'config_groups')}; an object with at least one group is right")
    read = tuple(_group(content, str(key), group) for key, group in groups.items())
    _check_targets(read)
    notes = () if not cache else ("kv_cache_scheme is passed over: the cache has the dtype of the run",)
    return Quantization(read, names_of(content, "ignore"), notes)


def without_static_scales(content: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config of the same weights, without the scales of activations and of the cache beside them."""
    result = dict(content)
    if result.get("kv_cache_scheme"):
        result["kv_cache_scheme"] = None
    groups = result.get("config_groups")
    if isinstance(groups, Mapping):
        result["config_groups"] = {
            key: {k: None if k in _ACTIVATIONS and _static(v) else v for k, v in group.items()}
            for key, group in groups.items()
            if isinstance(group, Mapping)
        }
    return result


def _static(scheme: Any) -> bool:
    return isinstance(scheme, Mapping) and scheme.get("dynamic", False) is not True


def _group(content: Mapping[str, Any], key: str, group: Any) -> Group:
    where = f"config_groups.{key}"
    if not isinstance(group, Mapping) or not (group.get("weights") or any(group.get(key) for key in _ACTIVATIONS)):
        raise wrong(f"{where} has no weights")
    targets = names_of(group, "targets", where=f"{where}.")
    weights = group.get("weights")
    if weights is None:
        return Group(key, (), targets)
    if not isinstance(weights, Mapping):
        raise wrong(f"{where} has no weights")
    if not targets:
        raise wrong(f"{where}.targets {shown(group, 'targets')}; a list such as ['Linear'] is right")
    said = group if group.get("format") is not None else content
    form = said.get("format")
    if form != MIXED and form not in FORMATS:
        known = ", ".join((*FORMATS, MIXED))
        raise wrong(f"format {shown(said, 'format')}; known for compressed-tensors: {known}; {named_format(form)}")
    return Group(key, _layouts(str(form), {**_DEFAULTS, **weights}, f"{where}.weights."), targets)


def _layouts(form: str, weights: Mapping[str, Any], where: str) -> tuple[Format, ...]:
    """The formats that tensors may have under a group's arguments, that of its name first."""
    _check_arguments(weights, where)
    bits, kind = weights["num_bits"], require(weights, "type", ("int", "float"), where=where)
    symmetric = require(weights, "symmetric", (True, False), where=where)
    if kind == "float":
        if bits in (4, 6):
            raise wrong(f"{where}num_bits {shown(weights, 'num_bits')} of the type 'float'; {named_format('fp4')}")
        require(weights, "num_bits", (8,), where=where)
        require(weights, "symmetric", (True,), where=where)
        if form in (PACKED, INTEGER):
            raise wrong(f"{where}type is 'float' in the format {form!r}; known: 'int'")
        return (Fp8(*_block(weights, where), "_scale"),)
    if form == FLOAT:
        raise wrong(f"{where}type is 'int' in the format {form!r}; known: 'float'")
    require(weights, "num_bits", tuple(range(1, 9)), where=where)
    rows, columns = _block(weights, where)
    # The library subtracts zero points in bytes wherever they are stored, of symmetric values, too.
    plain: list[Format] = [Int8(rows, columns, asymmetric=zero) for zero in ((False, True) if symmetric else (True,))]
    packed: list[Format] = []
    if rows == 1:
        # Of inputs that are a multiple of 32 the two packings take different numbers of words.
        packings = (False, True) if 32 % bits else (False,)
        packed = [PackedInt(bits, columns, not symmetric, spaced) for spaced in packings]
    elif form == PACKED:
        raise wrong(f"{where}strategy {shown(weights, 'strategy')} in the format {form!r}; known: 'channel', 'group'")
    return tuple(packed + plain if form in (PACKED, MIXED) else plain + packed)


def _check_arguments(weights: Mapping[str, Any], where: str) -> None:
    """Refuse what changes what is stored and is not read."""
    unknown = [key for key, value in weights.items() if key not in _READ | _HARMLESS and value is not None]
    if unknown:
        raise wrong(f"{where}{unknown[0]} {shown(weights, unknown[0])}, which is not known")
    require(weights, "dynamic", (False,), where=where)
    # "weight" orders the columns while quantising, and they are stored in their own order; "static" is its other name.
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static"):
        raise wrong(
            f"{where}actorder {shown(weights, 'actorder')}; known: None, 'weight', 'static': inputs in an order of "
            "their own (weight_g_idx) are not read, and compressed-tensors has dropped them"
        )
    if weights.get("scale_dtype") in ("torch.uint8", "uint8"):
        raise wrong(f"{where}scale_dtype {shown(weights, 'scale_dtype')}; {named_format('mxfp')}")


def _block(weights: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """Rows and columns that share a scale."""
    group, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    if strategy is None:  # as compressed-tensors takes it
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if isinstance(strategy, str) and strategy.lower() in _STRATEGIES:
        strategy = strategy.lower()
    else:
        require(weights, "strategy", _STRATEGIES, where=where)
    if strategy == "block":
        if isinstance(structure, str):
            structure = [int(size) if size.isdecimal() else size for size in structure.split("x")]
        if not isinstance(structure, list) or len(structure) != 2 or any(not _is_size(size) for size in structure):
            raise wrong(f"{where}block_structure {shown(weights, 'block_structure')}; two sizes such as [128, 128]")
        return structure[0], structure[1]
    if structure is not None:
        raise wrong(f"{where}block_structure {shown(weights, 'block_structure')} with the strategy {strategy!r}")
    if strategy == "group":
        if not _is_size(group):
            raise wrong(f"{where}group_size {shown(weights, 'group_size')}; a size such as 32 is right")
        return 1, group
    if group not in (None, -1, 0):
        raise wrong(f"{where}group_size {shown(weights, 'group_size')} with the strategy {strategy!r}")
    return (1, None) if strategy == "channel" else (None, None)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _check_targets(groups: tuple[Group, ...]) -> None:
    """Refuse two groups that give one target different formats."""
    seen: dict[str, Group] = {}
    for group in groups:
        for target in group.targets:
            other = seen.setdefault(target, group)
            if other.layouts != group.layouts:
                names = sorted(g.layouts[0].describe() if g.layouts else "none" for g in (other, group))
                raise wrong(
                    f"has groups of different formats ({', '.join(names)}) for the target {target!r:.200}, "
                    f"{other.name} and {group.name}; one is right"
                )
