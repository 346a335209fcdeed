"""Strict accounting of a Hugging Face source: every tensor used or known junk, every weight filled.

Whatever does not add up is collected and raised as one error that names it all: a tensor that a converter silently
drops, or a weight that silently keeps its initial value, is a model that runs and is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

from glm_jax.checkpoint.names import (
    Slot,
    canonical_slots,
    fused_slots,
    is_junk,
    mtp_copy_names,
    mtp_prefix,
)
from glm_jax.configs import ModelConfig
from glm_jax.errors import CheckpointError

FLOAT_DTYPES = ("BF16", "F16", "F32")


class TensorHeader(Protocol):
    """What accounting needs to know of a tensor: no data."""

    @property
    def dtype(self) -> str:
        """The dtype in safetensors' words: BF16, F16, F32."""
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
        slots: for each tensor used, where it goes.
        junk: names of tensors passed over.
        notes: sentences for the user about what was decided.
    """

    config: ModelConfig
    slots: dict[str, Slot]
    junk: tuple[str, ...]
    notes: tuple[str, ...]


def plan_source(config: ModelConfig, headers: Mapping[str, TensorHeader]) -> SourcePlan:
    """Match the tensors of a source with the weights of its configuration.

    Raises:
        CheckpointError: one error that lists every missing, unknown, doubled, misshapen tensor and every dtype that
            cannot be read.
    """
    config, notes = _settle_mtp(config, headers)
    canonical, fused = canonical_slots(config), fused_slots(config)
    slots, filled, problems = {}, set(), _Problems()
    junk = [name for name in headers if name not in canonical and name not in fused and is_junk(name, config)]
    for name, header in headers.items():
        slot = canonical.get(name) or fused.get(name)
        if slot is None:
            if name not in junk:
                problems.add("not known to this architecture", name)
            continue
        if tuple(header.shape) != slot.shape:
            problems.add("of the wrong shape", f"{name} is {list(header.shape)}, should be {list(slot.shape)}")
        if header.dtype not in FLOAT_DTYPES:
            problems.add("of a dtype that is not supported", f"{name} is {header.dtype}, not {', '.join(FLOAT_DTYPES)}")
        for target in slot.stands_for or (name,):
            if target in filled:
                problems.add("stored twice (fused and for each expert)", target)
            filled.add(target)
        slots[name] = slot
    for name in canonical:
        if name not in filled:
            problems.add("missing", name)
    problems.raise_any(config)
    return SourcePlan(config, slots, tuple(junk), tuple(notes))


def _settle_mtp(config: ModelConfig, headers: Iterable[str]) -> tuple[ModelConfig, list[str]]:
    names = set(headers)
    if not config.num_mtp_layers:
        return config, []
    prefix = mtp_prefix(config)
    if not any(name.startswith(prefix) for name in names):
        note = f"the config names an MTP layer but there is no tensor {prefix}*: going on without MTP"
        return dataclasses.replace(config, num_mtp_layers=0, mtp_copies=()), [note]
    copies = tuple(kind for kind, name in mtp_copy_names(config).items() if name in names)
    return dataclasses.replace(config, mtp_copies=copies), []


class _Problems:
    """Findings by kind, each kind shown with its first few and the number of the rest."""

    _SHOWN = 8

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, item: str) -> None:
        self._found.setdefault(kind, []).append(item)

    def raise_any(self, config: ModelConfig) -> None:
        if not self._found:
            return
        parts = []
        for kind, items in self._found.items():
            rest = f" and {len(items) - self._SHOWN} more" if len(items) > self._SHOWN else ""
            parts.append(f"{len(items)} {kind}: {', '.join(items[: self._SHOWN])}{rest}")
        raise CheckpointError(f"the tensors do not fit the {config.model_type} configuration: " + "; ".join(parts))
