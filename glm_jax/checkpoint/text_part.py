"""The text part of a multimodal checkpoint: its tensors under the names that they would have alone.

Such a checkpoint has a language model of a known architecture under `language_model.`, beside towers and projectors
for pictures and sounds, and its config.json has the language model's own under `text_config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from glm_jax.checkpoint.safetensors import SafetensorsFile, TensorInfo
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir

PREFIX = "language_model."
# What stands beside the language models of the known architectures.
_OTHER_PARTS = ("vision_tower.", "mm_projector.", "multi_modal_projector.", "visual.", "audio_tower.")


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
        self._named = {name: name for name in ours if not name.startswith(PREFIX)}
        for name in ours:
            short = name.removeprefix(PREFIX)
            self._named[name if short in self._named else short] = name
        self.left_out = tuple(name for name in files.tensors if name.startswith(_OTHER_PARTS))
        self.tensors: dict[str, TensorInfo] = {
            short: dataclasses.replace(files.tensors[name], name=short) for short, name in self._named.items()
        }

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
    return any(name.startswith(PREFIX) for name in names)


def text_config(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the text part, which is all of it if there is no other; its quantisation may stand outside."""
    inner = content.get("text_config")
    if not isinstance(inner, Mapping):
        return content
    outer = content.get("quantization_config")
    return {**({} if outer is None else {"quantization_config": outer}), **inner}
