"""Findings about a source, by kind: all of them are raised as one error."""

from __future__ import annotations

from typing import Protocol

from glm_jax.configs import ModelConfig
from glm_jax.errors import CheckpointError


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
