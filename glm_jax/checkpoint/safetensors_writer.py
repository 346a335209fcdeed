"""Writing safetensors shards as a stream: the layout is fixed first, then tensors come one at a time in any order.

Since all names and shapes are known first, every byte has its place before the first tensor comes: no shard is ever
held in memory, and the shard count in the file names is right from the start. The order inside a file and the bytes of
its header are those of the reference implementation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from glm_jax.checkpoint.atomic import fsync_directory, reporting_os_errors
from glm_jax.checkpoint.safetensors import DTYPE_ORDER, LENGTH_BYTES, MAX_HEADER_BYTES, NUMPY_DTYPES, TensorSpec
from glm_jax.checkpoint.safetensors_dir import INDEX_NAME, SINGLE_NAME
from glm_jax.errors import CheckpointError

_WRITE_BYTES = 64 * 2**20  # of one system call
_FORMAT_PT = {"format": "pt"}  # transformers refuses a file that does not say it


@dataclass
class _Shard:
    path: Path
    header: bytes
    begin: dict[str, int]  # tensor name -> first byte in the file
    size: int
    unwritten: dict[str, int]  # unfinished tensor -> bytes of it that were written
    descriptor: int | None = field(default=None)


class SafetensorsWriter:
    """Writes `plan` into `directory` as model.safetensors, or as shards with model.safetensors.index.json.

    A shard's file is made when its first tensor comes and made durable when its last one has come. Half-written files
    stay behind on failure: write into `atomic.new_directory`, or, with `resume`, into the directory of an earlier
    writer of the same plan, whose unfinished files are begun anew. Several threads may write, each to its own files.

    Args:
        directory: an existing directory without files of these names.
        plan: every tensor that will be written; consecutive ones share a shard.
        max_shard_bytes: tensor bytes in a shard; one tensor that is larger gets its own.
        metadata: strings for each file's `__metadata__`.
        resume: files that are in the way are this writer's own, of an earlier run.

    Raises:
        CheckpointError: the file system refuses (full, read-only, a file exists), or tensors are missing at `close`.
        ValueError: the plan is empty, names a tensor twice or a dtype without arrays; an array does not fit its plan.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: Iterable[TensorSpec],
        *,
        max_shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] = _FORMAT_PT,
        resume: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self._resume = resume
        specs = list(plan)
        self._specs = {spec.name: spec for spec in specs}
        _check_plan(specs)
        groups = _split(specs, max_shard_bytes)
        names = [SINGLE_NAME] if len(groups) == 1 else [shard_name(i, len(groups)) for i in range(1, len(groups) + 1)]
        self._shards = [
            _lay_out(self.directory / name, group, metadata) for name, group in zip(names, groups, strict=True)
        ]
        self._shard_of = {name: shard for shard in self._shards for name in shard.begin}

    @property
    def total_bytes(self) -> int:
        """Bytes that the files will have together, without the index."""
        return sum(shard.size for shard in self._shards)

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """The names of the files, with the tensors of each in the order of their bytes."""
        return {shard.path.name: tuple(shard.begin) for shard in self._shards}

    def file_bytes(self, file: str) -> int:
        """The size of a file."""
        return next(shard.size for shard in self._shards if shard.path.name == file)

    def take_over(self, file: str) -> None:
        """Count a file as written, which an earlier run completed.

        Raises:
            CheckpointError: it is not there, or of another size.
        """
        shard = next(shard for shard in self._shards if shard.path.name == file)
        with reporting_os_errors(shard.path):
            if shard.path.stat().st_size != shard.size:
                raise CheckpointError(f"{shard.path}: should have {shard.size} bytes; remove the directory it lies in")
        shard.unwritten.clear()

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor at its place; `array` has exactly the planned shape and dtype."""
        spec = self._specs.get(name)
        if spec is None:
            raise ValueError(f"tensor {name!r} is not in the plan")
        shard = self._shard_of[name]
        if name not in shard.unwritten:
            raise ValueError(f"tensor {name!r} was written already")
        if array.shape != spec.shape or array.dtype != NUMPY_DTYPES[spec.dtype]:
            raise ValueError(
                f"tensor {name!r}: planned {spec.dtype} {spec.shape}, got {array.dtype} {array.shape}; cast it first"
            )
        self.append(name, array)

    def append(self, name: str, array: np.ndarray) -> None:
        """Writes the next elements of a tensor, in its order; the last complete it."""
        spec, shard = self._specs[name], self._shard_of[name]
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = shard.unwritten.get(name)
        if there is None or there + len(data) > spec.nbytes or array.dtype != NUMPY_DTYPES[spec.dtype]:
            raise ValueError(f"tensor {name!r}: {len(data)} bytes of {array.dtype} are more than was planned")
        with reporting_os_errors(shard.path, bytes_needed=shard.size):
            if shard.descriptor is None:
                shard.descriptor = _create(shard, resume=self._resume)
            _write_at(shard.descriptor, data.data, shard.begin[name] + there)
            shard.unwritten[name] = there + len(data)
            if there + len(data) == spec.nbytes:
                del shard.unwritten[name]
            if not shard.unwritten:
                os.fsync(shard.descriptor)
                self._release(shard)

    def close(self) -> None:
        """Checks that every planned tensor was written, then writes the index and makes the directory durable."""
        for shard in self._shards:
            self._release(shard)
        unwritten = [name for shard in self._shards for name in shard.begin if name in shard.unwritten]
        if unwritten:
            some = ", ".join(unwritten[:10]) + (" ..." if len(unwritten) > 10 else "")
            raise CheckpointError(
                f"{self.directory}: {len(unwritten)} of {len(self._specs)} tensors were not written: {some}"
            )
        with reporting_os_errors(self.directory):
            if len(self._shards) > 1:
                self._write_index()
            fsync_directory(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            for shard in self._shards:
                self._release(shard)

    def _write_index(self) -> None:
        weight_map = {name: self._shard_of[name].path.name for name in sorted(self._specs)}
        total = sum(spec.nbytes for spec in self._specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with open(self.directory / INDEX_NAME, "w" if self._resume else "x", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _release(self, shard: _Shard) -> None:
        if shard.descriptor is not None:
            os.close(shard.descriptor)
            shard.descriptor = None


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` (from 1) of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _check_plan(specs: list[TensorSpec]) -> None:
    if not specs:
        raise ValueError("the plan names no tensors")
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen or spec.name == "__metadata__":
            raise ValueError(f"tensor name {spec.name!r} is taken")
        seen.add(spec.name)
        if spec.dtype not in NUMPY_DTYPES:
            raise ValueError(f"tensor {spec.name!r}: {spec.dtype!r} is none of {' '.join(NUMPY_DTYPES)}")


def _split(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors together, as many as fit."""
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not groups or spec.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    return groups


def _lay_out(path: Path, specs: list[TensorSpec], metadata: Mapping[str, str]) -> _Shard:
    """The header of one file and the place of each tensor: widest dtype first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin: dict[str, int] = {}
    position = 0
    for spec in sorted(specs, key=lambda spec: (-DTYPE_ORDER[spec.dtype], spec.name.encode())):
        begin[spec.name] = position
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path.name}: a header of {len(text)} bytes exceeds the format's limit; make the shards smaller"
        )
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    begin = {name: len(header) + start for name, start in begin.items()}
    return _Shard(path, header, begin, len(header) + position, dict.fromkeys(begin, 0))


def _create(shard: _Shard, *, resume: bool) -> int:
    if resume:
        shard.path.unlink(missing_ok=True)
    descriptor = os.open(shard.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, shard.size)
        _write_at(descriptor, memoryview(shard.header), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data[:_WRITE_BYTES], position)
        data, position = data[written:], position + written
