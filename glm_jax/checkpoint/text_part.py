"""The text part of a multimodal checkpoint: its tensors under the names that they would have alone.

Such a checkpoint has a language model of a known architecture under `language_model.` (Kimi K2.5) or
`model.language_model.` (GLM-4.5V, and what transformers saves), beside encoders and projectors for pictures and sounds.
Its config.json has the language model's under `text_config` (`configs.hf_nested`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from glm_jax.checkpoint.safetensors import SafetensorsFile, TensorInfo
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir

PREFIX = "language_model."  # of its modules where config.json names them, such as those that are not quantised
# The prefixes of a language model's tensors, and what stands there if it is alone; the first that fits counts.
_PREFIXES = {
    "language_model.model.blocks.": "model.layers.",  # as transformers 5.23 saves Kimi K2.5
    "language_model.": "",
    "model.language_model.": "model.",
}
# What stands beside the language models of the known architectures, at the top or under `model.`.
_PARTS = ("vision_tower.", "mm_projector.", "multi_modal_projector.", "visual.", "audio_tower.")
_OTHER_PARTS = (*_PARTS, *(f"model.{part}" for part in _PARTS))


class TextPart:
    """The files of a checkpoint, of which the language model's tensors are known, without their prefix.

    Tensors that belong to no known part keep their names, so that validation refuses them.

    Attributes:
        tensors: by name.
        left_out: the names of the other parts' tensors.
    """

    def __init__(self, files: SafetensorsDir) -> None:
        self._files = files
        ours = [name for name in files.tensors if not name.startswith(_OTHER_PARTS)]
        # Of two that would have one name, one keeps its prefix, which validation does not know.
        self._named = {name: name for name in ours if _text_name(name) == name}
        for name in ours:
            short = _text_name(name)
            self._named[name if short in self._named else short] = name
        self.left_out = tuple(name for name in files.tensors if name.startswith(_OTHER_PARTS))
        self.tensors: dict[str, TensorInfo] = {
            short: dataclasses.replace(files.tensors[name], name=short) for short, name in self._named.items()
        }

    @property
    def note(self) -> str:
        """A sentence about what is passed over."""
        counts = collections.Counter(
            next(part for part in _OTHER_PARTS if name.startswith(part)) for name in self.left_out
        )
        parts = ", ".join(f"{count} of {part}*" for part, count in sorted(counts.items()))
        passed_over = f": {len(self.left_out)} tensors are passed over ({parts})" if parts else ""
        return f"a multimodal checkpoint, of which only the language model is taken{passed_over}"

    @property
    def files(self) -> dict[str, SafetensorsFile]:
        """As `SafetensorsDir.files`."""
        return self._files.files

    @property
    def unlisted(self) -> tuple[Any, ...]:
        """As `SafetensorsDir.unlisted`."""
        return self._files.unlisted

    @property
    def missing(self) -> int:
        """As `SafetensorsDir.missing`."""
        return self._files.missing

    def read(self, name: str, span: tuple[int, int] | None = None) -> np.ndarray:
        """As `SafetensorsDir.read`."""
        return self._files.read(self._named[name], span)

    def fetch(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """As `SafetensorsDir.fetch`."""
        chosen = {self._named[name]: name for name in names}
        return {chosen[name]: array for name, array in self._files.fetch(chosen).items()}

    def prefetch(self, name: str, span: tuple[int, int] | None = None) -> None:
        """As `SafetensorsDir.prefetch`."""
        self._files.prefetch(self._named[name], span)

    def drop(self, name: str, span: tuple[int, int] | None = None) -> None:
        """As `SafetensorsDir.drop`."""
        self._files.drop(self._named[name], span)


def has_text_part(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a multimodal checkpoint's."""
    return any(name.startswith(tuple(_PREFIXES)) for name in names)


def _text_name(name: str) -> str:
    """The name that a tensor would have if the language model stood alone."""
    for prefix, short in _PREFIXES.items():
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name
