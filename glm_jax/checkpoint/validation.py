"""Strict validation of a Hugging Face source: every tensor used or known to be superfluous, every weight filled.

Whatever does not add up is collected and raised as one error that names it all: a tensor that a converter silently
drops, or a weight that silently keeps its initial value, is a model that runs and is wrong. A quantised matrix is
several tensors, all of which must be there and fit; that a matrix is quantised without config.json saying so, or that
config.json says so and none is, does not add up either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from glm_jax.checkpoint.names import (
    TensorMapping,
    canonical_mappings,
    fused_mappings,
    is_ignored,
)
from glm_jax.checkpoint.quantization_config import Quantization
from glm_jax.checkpoint.quantized import FLOAT_DTYPES, Format
from glm_jax.checkpoint.settle import settle
from glm_jax.configs import ModelConfig
from glm_jax.errors import CheckpointError

# What only a quantised source has: values, and tensors beside or instead of a weight.
_QUANTIZED_DTYPES = ("F8_E4M3",)
_QUANTIZED_SUFFIXES = ("_scale_inv", "_scale", "_packed", "_shape")


class TensorHeader(Protocol):
    """What validation needs to know of a tensor: no data."""

    @property
    def dtype(self) -> str:
        """The dtype in safetensors' words: BF16, F16, F32, F8_E4M3."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as stored."""
        ...


@dataclasses.dataclass(frozen=True)
class SourcePlan:
    """What becomes of each tensor of a source.

    Attributes:
        config: the source's architecture, with what only its tensors tell (MTP layer present, copies).
        mappings: for each weight's tensor, where it goes. A quantised one stands here under the name that it would have
            if it were not (`X.weight`), whether or not there is a tensor of that name.
        ignored: names of tensors passed over.
        notes: sentences for the user about what was decided.
        quantized: what those of them that are quantised are stored as.
    """

    config: ModelConfig
    mappings: dict[str, TensorMapping]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    quantized: dict[str, Format]

    def stored(self, name: str) -> tuple[str, ...]:
        """The names of the tensors that an entry of `mappings` is stored as."""
        layout = self.quantized.get(name)
        return (name,) if layout is None else tuple(name + part.suffix for part in layout.parts)


def plan_source(
    config: ModelConfig, headers: Mapping[str, TensorHeader], quantization: Quantization | None = None
) -> SourcePlan:
    """Match the tensors of a source with the weights of its configuration.

    Args:
        config: the architecture.
        headers: every tensor of the source.
        quantization: what config.json says of quantised matrices.

    Raises:
        CheckpointError: one error that lists every missing, unknown, doubled, misshapen tensor, every dtype that
            cannot be read, and every quantised matrix whose parts are not complete or do not fit.
    """
    config, notes = settle(config, headers)
    canonical, fused = canonical_mappings(config), fused_mappings(config)
    problems = Problems()
    quantized, claimed = _match_quantized(quantization, canonical, headers, problems=problems)
    mappings, filled = {name: canonical[name] for name in quantized}, set(quantized)
    ignored = [name for name in headers if name not in canonical and name not in fused and is_ignored(name)]
    for name, header in headers.items():
        if name in claimed:
            continue
        mapping = canonical.get(name) or fused.get(name)
        if mapping is None:
            if name not in ignored:
                _note_unknown(name, canonical, fused, quantization=quantization, problems=problems)
            continue
        if tuple(header.shape) != mapping.shape:
            problems.add("of the wrong shape", f"{name} is {list(header.shape)}, should be {list(mapping.shape)}")
        if header.dtype in _QUANTIZED_DTYPES and quantization is None:
            problems.add(_UNDECLARED, f"{name} is {header.dtype}")
        elif header.dtype not in FLOAT_DTYPES:
            problems.add("of a dtype that is not supported", f"{name} is {header.dtype}, not {', '.join(FLOAT_DTYPES)}")
        for target in mapping.stands_for or (name,):
            if target in filled:
                problems.add("stored twice (fused and for each expert)", target)
            filled.add(target)
        mappings[name] = mapping
    for name in canonical:
        if name not in filled:
            problems.add("missing", name)
    problems.raise_any(config)
    return SourcePlan(config, mappings, tuple(ignored), tuple(notes), quantized)


_UNDECLARED = "quantised although config.json has no quantization_config"


def _note_unknown(
    name: str,
    canonical: Mapping[str, TensorMapping],
    fused: Mapping[str, TensorMapping],
    *,
    quantization: Quantization | None,
    problems: Problems,
) -> None:
    if any(name.endswith(suffix) and name.removesuffix(suffix) in fused for suffix in _QUANTIZED_SUFFIXES):
        problems.add("of quantised experts in one tensor, which is not supported; one for each expert is", name)
        return
    part = any(name.endswith(suffix) and name.removesuffix(suffix) in canonical for suffix in _QUANTIZED_SUFFIXES)
    problems.add(_UNDECLARED if part and quantization is None else "not known to this architecture", name)


def _match_quantized(
    quantization: Quantization | None,
    canonical: Mapping[str, TensorMapping],
    headers: Mapping[str, TensorHeader],
    *,
    problems: Problems,
) -> tuple[dict[str, Format], set[str]]:
    """The quantised matrices with what they are stored as, and the names of all their tensors."""
    quantized: dict[str, Format] = {}
    claimed: set[str] = set()
    if quantization is None:
        return quantized, claimed
    parts = quantization.layout.parts
    for name, mapping in canonical.items():
        found = {part.suffix: headers[name + part.suffix] for part in parts if name + part.suffix in headers}
        # Values under the weight's own name are quantised by their dtype; everything else only a quantised one has.
        if not any(suffix or header.dtype in parts[0].dtypes for suffix, header in found.items()):
            continue
        claimed.update(name + suffix for suffix in found)
        if parts[0].suffix in found:
            quantized[name] = quantization.layout
        _check_parts(quantization, name, mapping, found=found, problems=problems)
        if name in headers and name not in claimed:
            problems.add("stored twice (quantised and not)", name)
            claimed.add(name)
    if not quantized and not claimed:
        said = f"quantization_config says {quantization.layout.describe()} but no tensor is quantised"
        problems.add("contradicting config.json", f"{said}; remove it if the weights were dequantised")
    return quantized, claimed


def _check_parts(
    quantization: Quantization,
    name: str,
    mapping: TensorMapping,
    *,
    found: Mapping[str, TensorHeader],
    problems: Problems,
) -> None:
    if len(mapping.shape) != 2:
        problems.add("quantised, which only matrices can be", name)
        return
    if quantization.exempts(name):
        problems.add("quantised although quantization_config exempts it (ignore)", name)
    shapes = quantization.layout.shapes(mapping.shape)
    for part in quantization.layout.parts:
        header = found.get(part.suffix)
        stored = name + part.suffix
        if header is None:
            others = ", ".join(name + suffix for suffix in found)
            problems.add("missing of a quantised matrix", f"{stored} (there is {others})")
            continue
        if tuple(header.shape) != shapes[part.suffix]:
            problems.add(
                "of the wrong shape", f"{stored} is {list(header.shape)}, should be {list(shapes[part.suffix])}"
            )
        if header.dtype not in part.dtypes:
            problems.add("of the wrong dtype for its part", f"{stored} is {header.dtype}, not {', '.join(part.dtypes)}")


class Problems:
    """Findings by kind, each kind shown with its first few and the number of the rest."""

    _SHOWN = 8

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, item: str) -> None:
        """Note that `item` is of a kind of trouble."""
        self._found.setdefault(kind, []).append(item)

    def raise_any(self, config: ModelConfig) -> None:
        """Raise one CheckpointError with all that was noted, if anything was."""
        if not self._found:
            return
        parts = []
        for kind, items in self._found.items():
            rest = f" and {len(items) - self._SHOWN} more" if len(items) > self._SHOWN else ""
            parts.append(f"{len(items)} {kind}: {', '.join(items[: self._SHOWN])}{rest}")
        raise CheckpointError(f"the tensors do not fit the {config.model_type} configuration: " + "; ".join(parts))
