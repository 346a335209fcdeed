"""Hugging Face safetensors -> the one Orbax layout, chunk by chunk.

The source is accounted for before a byte is written. Then each chunk (one layer by one expert) is read through the
memory map, hashed and written; orientation is the same on both sides, so this is a copy. Memory stays at one chunk,
and the final name appears only when everything is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from glm_jax.checkpoint.atomic import check_target, new_directory
from glm_jax.checkpoint.names import LAYER_GROUPS
from glm_jax.checkpoint.orbax_io import ArraySpec, OrbaxWriter
from glm_jax.checkpoint.orbax_source import ASSETS, MANIFEST, Manifest, TensorRecord
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES
from glm_jax.checkpoint.source import HfSource, Index, common_dtype
from glm_jax.errors import CheckpointError
from glm_jax.model import Transformer
from glm_jax.sharding import Weight, weights_by_name
from glm_jax.version import VERSION

MAX_CHUNK_BYTES = 256 * 2**20
_ASSET_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_MAX_ASSET_BYTES = 256 * 2**20

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion or an export did.

    Attributes:
        tensors: number of Hugging Face tensors read or written.
        nbytes: bytes of these tensors.
        seconds: wall time.
        notes: sentences about decisions that the user should know.
    """

    tensors: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...]


def convert(source: str | Path, target: str | Path, *, progress: Progress | None = None) -> Report:
    """Convert a Hugging Face directory to an Orbax directory at `target`.

    Dtypes are kept (the router's bias is stored as float32); the MTP layer and its copies are part of it; the config,
    tokenizer and template files go along.

    Args:
        source: directory with config.json and safetensors, one file or shards with an index.
        target: a directory that does not exist, or is empty.
        progress: called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: the source is not complete or not consistent, or the target is taken, inside the source, or
            cannot be written.
        ConfigError: the architecture is not supported.
    """
    started = time.monotonic()
    check_target_beside(source, target)
    if not Path(source).is_dir():
        raise CheckpointError(f"{source} is not a directory; the source is a Hugging Face checkpoint directory")
    hf = HfSource(source)
    weights = weights_by_name(Transformer(hf.config))
    arrays = {name: _array_spec(hf, name, weight) for name, weight in weights.items()}
    total = sum(spec.nbytes for spec in arrays.values())
    with new_directory(target, bytes_needed=total) as partial:
        with OrbaxWriter(partial, arrays) as writer:
            records = _copy(hf, writer, total, progress)
        manifest = Manifest(hf.config, records, f"glm_jax {VERSION}")
        (partial / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1), encoding="utf-8")
        _copy_assets(Path(source), partial / ASSETS)
    nbytes = sum(hf.files.tensors[name].nbytes for name in records)
    return Report(len(records), nbytes, time.monotonic() - started, _notes(hf, records))


def check_target_beside(source: str | Path, target: str | Path) -> None:
    """Raise CheckpointError unless `target` is free and not inside `source`, which is to stay as it is."""
    final = check_target(target)
    if final.is_relative_to(Path(source).resolve()):
        raise CheckpointError(f"{target}: lies inside the source {source}; name a directory outside it")


def _array_spec(hf: HfSource, name: str, weight: Weight) -> ArraySpec:
    """The array of a weight: the dtype of its tensors, one layer by one expert a chunk, large matrices by rows."""
    value = weight.get_raw_value()
    dtype = np.dtype(value.dtype) if weight.pinned else common_dtype(hf.dtypes(name))
    lead = (name.split(".")[0] in LAYER_GROUPS) + ("expert" in weight.axes)
    chunk = [1] * lead + list(value.shape[lead:])
    rows = chunk[lead]
    while math.prod(chunk) * dtype.itemsize > MAX_CHUNK_BYTES and chunk[lead] > 1:
        rows = -(-rows // 2)
        chunk[lead] = rows
    return ArraySpec(tuple(value.shape), dtype.name, tuple(chunk))


def _boxes(spec: ArraySpec) -> Iterator[Index]:
    """The chunks of an array as slices, in order."""
    ranges = [range(0, size, part) for size, part in zip(spec.shape, spec.chunk, strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(
            slice(start, min(start + part, size))
            for start, part, size in zip(starts, spec.chunk, spec.shape, strict=True)
        )


def _copy(hf: HfSource, writer: OrbaxWriter, total: int, progress: Progress | None) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    done = 0
    for weight, spec in writer.arrays.items():
        for box in _boxes(spec):
            for name, _ in hf.tensors_in(weight, box):
                if name not in records:
                    tensor = hf.files.read(name)
                    records[name] = TensorRecord(hf.files.tensors[name].dtype, sha256_of(tensor))
            part = hf.read(weight, box)
            writer.write(weight, box, part.astype(NUMPY_DTYPES_BY_NAME[spec.dtype], copy=False))
            done += part.size * NUMPY_DTYPES_BY_NAME[spec.dtype].itemsize
            if progress is not None:
                progress(done, total)
    return records


NUMPY_DTYPES_BY_NAME = {dtype.name: dtype for dtype in NUMPY_DTYPES.values()}


def sha256_of(tensor: np.ndarray) -> str:
    """The sha256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).hexdigest()


def _copy_assets(source: Path, target: Path) -> None:
    """Copy config, tokenizer and template files, so that the checkpoint stands by itself."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _ASSET_SUFFIXES and not path.name.endswith(".safetensors.index.json")
        if wanted and path.is_file() and path.stat().st_size <= _MAX_ASSET_BYTES:
            shutil.copyfile(path, target / path.name)


def _notes(hf: HfSource, records: dict[str, TensorRecord]) -> tuple[str, ...]:
    notes = list(hf.plan.notes)
    if hf.plan.junk:
        notes.append(f"{len(hf.plan.junk)} superfluous tensors passed over, such as {hf.plan.junk[0]}")
    if hf.files.unlisted:
        names = ", ".join(path.name for path in hf.files.unlisted)
        notes.append(f"files that the index does not name were not read: {names}")
    by_weight = {slot.weight: name for name, slot in hf.plan.slots.items()}
    for kind in hf.config.mtp_copies:
        copy, main = by_weight[f"mtp.{kind}.weight"], by_weight.get(f"{kind}.weight")
        if main is not None and records[copy].sha256 != records[main].sha256:
            notes.append(f"{copy} differs from {main}; it is kept for export, and the model uses {main} for both")
    return tuple(notes)
