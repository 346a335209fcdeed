"""Strict validation of a Hugging Face source: every tensor used or known to be superfluous, every weight filled.

Whatever does not add up is collected and raised as one error that names it all: a tensor that a converter silently
drops, or a weight that silently keeps its initial value, is a model that runs and is wrong. A quantised matrix is
several tensors, all of which must be there and fit; that a matrix is quantised without config.json saying so, or that
config.json says so and none is, does not add up either. Which of several formats a matrix has, its tensors say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from glm_jax.checkpoint.names import (
    TensorMapping,
    canonical_mappings,
    fused_mappings,
    is_ignored,
)
from glm_jax.checkpoint.problems import Problems, TensorHeader
from glm_jax.checkpoint.quantization import Quantization
from glm_jax.checkpoint.quantized import FLOAT_DTYPES, Format
from glm_jax.checkpoint.quantized_match import (
    QUANTIZED_DTYPES,
    QUANTIZED_SUFFIXES,
    is_runtime_scale,
    match_quantized,
    runtime_notes,
)
from glm_jax.checkpoint.settle import settle
from glm_jax.configs import ModelConfig


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
    problems, declared = Problems(), quantization is not None and bool(quantization.layouts)
    quantized, claimed = match_quantized(quantization, canonical, headers, problems=problems)
    mappings, filled = {name: canonical[name] for name in quantized}, set(quantized)
    known = canonical.keys() | fused.keys()
    ignored = [name for name in headers if name not in known and is_ignored(name)]
    scales = {name for name in headers if name not in known and is_runtime_scale(name, canonical, quantization)}
    for name, header in headers.items():
        if name in claimed or name in scales:
            continue
        mapping = canonical.get(name) or fused.get(name)
        if mapping is None:
            if name not in ignored:
                _note_unknown(name, canonical, fused, declared=declared, problems=problems)
            continue
        if tuple(header.shape) != mapping.shape:
            problems.add("of the wrong shape", f"{name} is {list(header.shape)}, should be {list(mapping.shape)}")
        if header.dtype in QUANTIZED_DTYPES and not declared:
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
    notes += runtime_notes(quantization, scales)
    return SourcePlan(config, mappings, tuple(ignored), tuple(notes), quantized)


_UNDECLARED = "quantised although config.json has no quantization_config"


def _note_unknown(
    name: str,
    canonical: Mapping[str, TensorMapping],
    fused: Mapping[str, TensorMapping],
    *,
    declared: bool,
    problems: Problems,
) -> None:
    if any(name.endswith(suffix) and name.removesuffix(suffix) in fused for suffix in QUANTIZED_SUFFIXES):
        problems.add("of quantised experts in one tensor, which is not supported; one for each expert is", name)
        return
    part = any(name.endswith(suffix) and name.removesuffix(suffix) in canonical for suffix in QUANTIZED_SUFFIXES)
    problems.add(_UNDECLARED if part and not declared else "not known to this architecture", name)
