"""What a conversion does with one work item, and with all of them in the end: shared by `convert` and `verify`.

`convert` writes the results to disk; `verify` runs the same conversion with a writer that compares them with what is on
disk. The tensors of an item are hashed as they are read, so each byte of the source is read once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.files import Directory, File
from glm_jax.checkpoint.layout import Layout, WorkItem
from glm_jax.checkpoint.names import TensorMapping
from glm_jax.checkpoint.orbax_io import DTYPES
from glm_jax.checkpoint.orbax_source import ASSETS, MANIFEST, Manifest, TensorRecord
from glm_jax.checkpoint.quantize import ArrayWriter, Loss, quantize_item
from glm_jax.checkpoint.quantized import Index
from glm_jax.checkpoint.source import Files, HfArrays, HfSource
from glm_jax.errors import CheckpointError
from glm_jax.version import VERSION

PIECE_BYTES = 16 * 2**20  # hashed or copied at a time
_ASSET_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_MAX_ASSET_BYTES = 256 * 2**20


class Conversion:
    """Converts work items; several threads may call it at a time."""

    def __init__(self, hf: HfSource, layout: Layout, writer: ArrayWriter) -> None:
        self._hf, self._layout, self._writer = hf, layout, writer

    def process(self, item: WorkItem) -> dict[str, Any]:
        """Hash and write the tensors of an item; returns what the journal records of it."""
        reads = _HashedReads(self._hf.files, self._layout.source)
        note: dict[str, Any] = {}
        if item.array in self._layout.made:
            layout, mapping = self._layout.made[item.array]
            lost = Loss(0.0, 0.0)
            for box in item.boxes:
                lost += quantize_item(reads, self._writer, item.array, box, layout=layout, mapping=mapping)
            note |= {"weight": item.array, "loss": [lost.difference, lost.square]}
        else:
            dtype = DTYPES[self._layout.arrays[item.array].dtype]
            for box in item.boxes:
                self._writer.write(item.array, box, reads.read(item.array, box).astype(dtype, copy=False))
                reads.drop(item.array, box)
        return {"tensors": reads.records(), **note}

    def complete(self, partial: Path, done: Mapping[str, Any]) -> None:
        """Write the rest of the checkpoint: the manifest, and the config, tokenizer and template files."""
        records, _ = gather_records(self._hf, done.values())
        kept = {**self._layout.kept, **{name: made for name, (made, _) in self._layout.made.items()}}
        manifest = Manifest(
            self._hf.config,
            records,
            f"glm_jax {VERSION}",
            source_layouts=tuple(dict.fromkeys(self._hf.plan.quantized.values())),
            kept=dict(sorted(kept.items())),
        )
        (partial / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1), encoding="utf-8")
        copy_assets(self._hf.directory, partial / ASSETS)


class _HashedReads:
    """Reads arrays, and hashes their tensors on the way, so that each byte of a file is read once.

    The slices must come in the order of each tensor's bytes and cover all of it.
    """

    def __init__(self, files: Files, arrays: HfArrays) -> None:
        self._files, self._arrays = files, arrays
        self._sums: dict[str, Any] = {}
        self._hashed: dict[str, int] = {}

    def read(self, array: str, index: Index) -> np.ndarray:
        """As `HfArrays.read`."""
        runs = list(self._arrays.runs(array, index))
        for run in runs:
            self._files.prefetch(run.tensor, run[1:])
        for run in runs:
            self._hash(run.tensor, run.stop)
        return self._arrays.read(array, index)

    def tensors_in(self, array: str, index: Index) -> list[tuple[str, TensorMapping]]:
        """As `HfArrays.tensors_in`."""
        return self._arrays.tensors_in(array, index)

    def drop(self, array: str, index: Index) -> None:
        """Release the memory that reading `array[index]` took."""
        for run in self._arrays.runs(array, index):
            self._files.drop(run.tensor, run[1:])

    def records(self) -> dict[str, tuple[str, str]]:
        """Dtype and sha256 of every tensor that was read."""
        for name in self._sums:
            self._hash(name, self._files.tensors[name].size)
        return {name: (self._files.tensors[name].dtype, summed.hexdigest()) for name, summed in self._sums.items()}

    def _hash(self, name: str, stop: int) -> None:
        """Hash a tensor further, up to its element number `stop`."""
        summed, step = self._sums.setdefault(name, hashlib.sha256()), self._files.tensors[name].itemsize
        for start in range(self._hashed.get(name, 0), stop, PIECE_BYTES // step):
            part = self._files.read(name, (start, min(start + PIECE_BYTES // step, stop)))
            summed.update(part.view(np.uint8).data)
        self._hashed[name] = max(stop, self._hashed.get(name, 0))


def sha256_of(tensor: np.ndarray) -> str:
    """The sha256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).hexdigest()


def gather_records(hf: HfSource, notes: Iterable[Mapping[str, Any]]) -> tuple[dict[str, TensorRecord], dict[str, Loss]]:
    """The records of all tensors, in the order of the source's names, and what quantising lost, by weight."""
    found: dict[str, TensorRecord] = {}
    losses: dict[str, Loss] = {}
    for note in notes:
        found.update({name: TensorRecord(*record) for name, record in note["tensors"].items()})
        if "loss" in note:
            losses[note["weight"]] = losses.get(note["weight"], Loss(0.0, 0.0)) + Loss(*note["loss"])
    for name in hf.plan.quantized:  # tensors that only repeat a shape: no array has them
        for stored in hf.plan.stored(name):
            if stored not in found:
                found[stored] = TensorRecord(hf.files.tensors[stored].dtype, sha256_of(hf.repeated[stored]))
    return dict(sorted(found.items())), losses


def assets_of(directory: Directory) -> Iterator[tuple[str, File]]:
    """Config, tokenizer and template files of a source, by their names.

    Raises:
        CheckpointError: one of them cannot be opened.
    """
    wanted = [
        name
        for name in directory.names()
        if os.path.splitext(name)[1] in _ASSET_SUFFIXES and not name.endswith(".safetensors.index.json")
    ]
    for name, file in directory.find(wanted).items():
        if isinstance(file, CheckpointError):
            raise file
        if file.size <= _MAX_ASSET_BYTES:
            yield name, file


def copy_assets(source: Directory, target: Path) -> None:
    """Copy the files beside the tensors, so that the checkpoint stands by itself."""
    target.mkdir(exist_ok=True)
    for name, file in assets_of(source):
        with open(target / name, "wb") as copy:
            for start in range(0, file.size, PIECE_BYTES):
                copy.write(file.fetch(start, min(start + PIECE_BYTES, file.size)))
