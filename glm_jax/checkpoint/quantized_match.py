"""Which matrices of a source are quantised and in which format: config.json's formats held against the tensors.

A matrix is quantised if a tensor says so: values in a narrow dtype, or scales beside or instead of the weight. Of the
formats that config.json leaves for it, the first whose tensors are all there and fit is its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from glm_jax.checkpoint.names import TensorMapping
from glm_jax.checkpoint.problems import Problems, TensorHeader
from glm_jax.checkpoint.quantization import Quantization
from glm_jax.checkpoint.quantized import Format

# What only a quantised source has: values, and tensors beside or instead of a weight.
QUANTIZED_DTYPES = ("F8_E4M3", "I8")
QUANTIZED_SUFFIXES = ("_scale_inv", "_scale", "_packed", "_shape", "_zero_point")
# What a source's own runtime quantises besides weights: the cache, and the inputs and outputs of a module.
_CACHE_SCALE = re.compile(r"model\.layers\.\d+\.self_attn\.(\w+\.)?([qkvp]|kv|prob)_(scale|zero_point)")
_ACTIVATION_SCALE = re.compile(r"(.+)\.(input|output)_(scale|zero_point|global_scale)")

Headers = Mapping[str, TensorHeader]


def match_quantized(
    quantization: Quantization | None,
    canonical: Mapping[str, TensorMapping],
    headers: Headers,
    *,
    problems: Problems,
) -> tuple[dict[str, Format], set[str]]:
    """The quantised matrices with what they are stored as, and the names of all their tensors."""
    quantized: dict[str, Format] = {}
    claimed: set[str] = set()
    layouts = () if quantization is None else quantization.layouts
    if quantization is None or not layouts:
        return quantized, claimed
    for name, mapping in canonical.items():
        if not _looks_quantized(name, headers):
            continue
        targeted = quantization.layouts_of(name)
        layout, found, faults = _choose(targeted or layouts, name, mapping, headers=headers)
        if layout is None:
            continue
        claimed.update(name + suffix for suffix in found)
        if layout.parts[0].suffix in found:
            quantized[name] = layout
        if len(mapping.shape) == 2 and quantization.exempts(name):
            problems.add("quantised although quantization_config exempts it (ignore)", name)
        if not targeted:
            problems.add("quantised although no target of quantization_config (config_groups) names it", name)
        for kind, item in faults if targeted else ():
            problems.add(kind, item)
        if name in headers and name not in claimed:
            problems.add("stored twice (quantised and not)", name)
            claimed.add(name)
    if not quantized and not claimed:
        said = f"quantization_config says {quantization.describe()} but no tensor is quantised"
        problems.add("contradicting config.json", f"{said}; remove it if the weights were dequantised")
    return quantized, claimed


def _looks_quantized(name: str, headers: Headers) -> bool:
    """Whether a weight has tensors that only a quantised one has."""
    return (name in headers and headers[name].dtype in QUANTIZED_DTYPES) or any(
        name + suffix in headers for suffix in QUANTIZED_SUFFIXES
    )


def _own_parts(layout: Format, name: str, headers: Headers) -> dict[str, TensorHeader]:
    """The parts of a format that a weight has; none if only a plain tensor of the weight's own name is there."""
    found = {part.suffix: headers[name + part.suffix] for part in layout.parts if name + part.suffix in headers}
    # Values under the weight's own name are quantised by their dtype; everything else only a quantised one has.
    own = any(suffix or header.dtype in layout.parts[0].dtypes for suffix, header in found.items())
    return found if own else {}


def _choose(
    layouts: Collection[Format], name: str, mapping: TensorMapping, *, headers: Headers
) -> tuple[Format | None, dict[str, TensorHeader], list[tuple[str, str]]]:
    """The first format that a weight's tensors fit, or else the first that they are of: with its parts and faults."""
    present = {suffix for suffix in QUANTIZED_SUFFIXES if name + suffix in headers}
    best: tuple[Format | None, dict[str, TensorHeader], list[tuple[str, str]]] = (None, {}, [])
    for layout in layouts:
        found = _own_parts(layout, name, headers)
        if not found:
            continue
        faults = _faults(layout, name, mapping, found=found)
        if not faults and present <= found.keys():
            return layout, found, faults
        if best[0] is None:
            best = layout, found, faults
    return best


def _faults(
    layout: Format, name: str, mapping: TensorMapping, *, found: Mapping[str, TensorHeader]
) -> list[tuple[str, str]]:
    """What is wrong with the tensors of a weight in a format: kinds of trouble, each with the tensor."""
    if len(mapping.shape) != 2:
        return [("quantised, which only matrices can be", name)]
    shapes, faults = layout.shapes(mapping.shape), []
    for part in layout.parts:
        header, stored = found.get(part.suffix), name + part.suffix
        if header is None:
            others = ", ".join(name + suffix for suffix in found)
            faults.append(("missing of a quantised matrix", f"{stored} (there is {others})"))
            continue
        if tuple(header.shape) != shapes[part.suffix]:
            should = f"{stored} is {list(header.shape)}, should be {list(shapes[part.suffix])}"
            faults.append(("of the wrong shape", should + _ragged(layout, mapping, part.suffix)))
        if header.dtype not in part.dtypes:
            should = f"{stored} is {header.dtype}, not {', '.join(part.dtypes)}"
            faults.append(("of the wrong dtype for its part", should))
    return faults


def _ragged(layout: Format, mapping: TensorMapping, suffix: str) -> str:
    """A word about groups that do not divide the inputs, which often are the groups of another matrix."""
    group, inputs = layout.columns, mapping.shape[1]
    if layout.rows != 1 or group is None or not inputs % group or suffix not in ("_scale", "_zero_point"):
        return ""
    return f" (groups of {group} do not divide {inputs} inputs)"


def is_runtime_scale(name: str, canonical: Collection[str], quantization: Quantization | None) -> bool:
    """Whether a tensor scales what a source's own runtime rounds, the cache or activations, and no weight."""
    if _CACHE_SCALE.fullmatch(name):
        return True
    module = _ACTIVATION_SCALE.fullmatch(name)
    return quantization is not None and module is not None and f"{module[1]}.weight" in canonical


def runtime_notes(quantization: Quantization | None, scales: Collection[str]) -> list[str]:
    """Sentences about what is passed over of a quantisation, for it concerns no weight."""
    notes = [] if quantization is None else list(quantization.notes)
    if scales:
        notes.append(
            f"{len(scales)} scales of the cache and of activations passed over, such as {min(scales)}: "
            "both have the dtype of the run"
        )
    return notes
