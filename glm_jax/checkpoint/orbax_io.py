"""The one Orbax layout, written and read slice by slice: `<dir>/default/<name>/` is a zarr3 array for each name.

Plain Orbax restores it as a flat dict (name -> array). The names, dots included, are the keys. The caller chooses the
chunks (one layer by one expert, say); each is one uncompressed file with a crc32c, so that a chunk is the unit of
writing, of resuming and of damage. `_METADATA` is written by hand because Orbax itself only saves whole leaves, which
for stacked experts exceed a host's memory; it is a private format of Orbax (0.12), pinned by tests. OCDBT is off: one
file a chunk can be checked, copied and resumed one by one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import tensorstore as ts

from glm_jax.checkpoint.atomic import describe_os_error, fsync_directory, reporting_os_errors
from glm_jax.errors import CheckpointError

ITEM_NAME = "default"
# int4 is left out: on disk it takes a byte. uint4 is left out: tensorstore cannot hold it.
DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
}
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DICT_KEY = 2  # Orbax's KeyType.DICT

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class ArraySpec:
    """An array on disk: its shape, its dtype's name (a key of `DTYPES`), and the shape of a chunk (all sizes >= 1)."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {' '.join(DTYPES)}")
        if len(self.chunk) != len(self.shape) or any(
            not 1 <= part <= size for part, size in zip(self.chunk, self.shape, strict=True)
        ):
            raise ValueError(f"chunk {self.chunk} must have 1 to n elements along each axis of the shape {self.shape}")

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory; on disk each chunk adds 4, and a chunk over the edge is stored whole."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class OrbaxWriter:
    """Writes named arrays chunk by chunk into `directory`, which plain Orbax then restores.

    Memory is that of one slice. `write` may be called from several threads, and with `resume` from several processes,
    for different chunks. Half-written files stay behind on failure: write into `atomic.new_directory`.

    Args:
        directory: a directory without a checkpoint in it; made if it does not exist.
        arrays: every array that will be written. Names are ASCII letters, digits, dots, dashes and underscores.
        resume: go on in a directory that an earlier writer of the same arrays left, or that another one shares.
        timestamp_ns: what the metadata says of when it was written; now, if not given.

    Raises:
        CheckpointError: the file system refuses, there is a checkpoint already, or chunks are missing at `close`.
        ValueError: a name, an index or an array that does not fit `arrays`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        arrays: Mapping[str, ArraySpec],
        *,
        resume: bool = False,
        timestamp_ns: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.arrays = dict(arrays)
        self._timestamp_ns = timestamp_ns
        if not self.arrays:
            raise ValueError("there are no arrays to write")
        for name in self.arrays:
            if not _NAME.fullmatch(name) or name == "array_metadatas":
                raise ValueError(f"array name {name!r} must be letters, digits, dots, dashes and underscores")
        self._item = self.directory / ITEM_NAME
        with reporting_os_errors(self.directory):
            self._item.mkdir(parents=True, exist_ok=resume)
        self._stores = {name: _open(self._item, name, create=spec, resume=resume) for name, spec in self.arrays.items()}

    def write(self, name: str, index: Index, array: np.ndarray) -> None:
        """Writes `array` to `name`[`index`], durably once it returns.

        Args:
            name: one of `arrays`.
            index: ints and slices of step 1, one for each leading axis (the rest is whole), covering whole chunks.
            array: shape of `name`[`index`] (an int drops its axis), and exactly the dtype on disk.
        """
        spec = self.arrays.get(name)
        if spec is None:
            raise ValueError(f"array {name!r} is not among those to write")
        box = _normalize(index, spec.shape)
        for start, stop, part, size in zip(*_bounds(box), spec.chunk, spec.shape, strict=True):
            if start % part or (stop % part and stop != size):
                raise ValueError(f"array {name!r}: {index} cuts through chunks of {spec.chunk}; write whole chunks")
        shape = _shape_of(box)
        if array.shape != shape or array.dtype != DTYPES[spec.dtype]:
            raise ValueError(
                f"array {name!r} at {index}: planned {spec.dtype} {shape}, got {array.dtype} {array.shape}"
            )
        try:
            self._stores[name][box].write(array).result()
        except Exception as error:  # tensorstore raises ValueError for nearly everything
            raise _failure(error, self._item / name, f"cannot write {_chunk(box)}", array.nbytes) from error

    def close(self) -> None:
        """Checks that every chunk was written, then writes the metadata that makes it a checkpoint."""
        unwritten = [name for name, spec in self.arrays.items() if not _complete(self._item / name, spec)]
        if unwritten:
            some = ", ".join(unwritten[:10]) + (" ..." if len(unwritten) > 10 else "")
            raise CheckpointError(f"{self.directory}: chunks of {len(unwritten)} arrays were not written: {some}")
        now = time.time_ns() if self._timestamp_ns is None else self._timestamp_ns
        step = {
            "item_handlers": {ITEM_NAME: _HANDLER},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
        with reporting_os_errors(self.directory):
            _write_json(self._item / "_METADATA", _tree_metadata(self.arrays))
            _write_json(self.directory / "_CHECKPOINT_METADATA", step)
            # What Orbax looks for when the directory lies in an object store, which cannot rename.
            _write_text(self.directory / "commit_success.txt", "Commit was successful\n")
            fsync_directory(self._item)
            fsync_directory(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()


class OrbaxReader:
    """Reads arrays, or slices of them, from a directory that `OrbaxWriter` wrote.

    A chunk that is missing or damaged is an error, never zeros. Opening reads the list of names only.

    Raises:
        CheckpointError: no such checkpoint, another layout of Orbax's, or damage; the line names the array and chunk.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._item = self.directory / ITEM_NAME
        self._shapes = _read_tree_metadata(self.directory, self._item / "_METADATA")
        self._stores: dict[str, Any] = {}

    def names(self) -> list[str]:
        """The arrays' names, as written."""
        return list(self._shapes)

    def specs(self) -> dict[str, ArraySpec]:
        """Shape, dtype and chunk of every array; reads one small file for each."""
        return {name: self.spec(name) for name in self._shapes}

    def spec(self, name: str) -> ArraySpec:
        """Shape, dtype and chunk of one array."""
        store = self._store(name)
        try:
            return ArraySpec(tuple(store.shape), store.dtype.name, tuple(store.chunk_layout.read_chunk.shape or ()))
        except ValueError as error:
            raise CheckpointError(f"{self._item / name}: its zarr.json is damaged: {error}") from None

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """`name`[`index`] as a new array, reading only the chunks that it touches.

        `index` holds ints and slices of step 1, one for each leading axis; the rest is whole. An int drops its axis.
        Raises IndexError if it is out of range.
        """
        store = self._store(name)
        box = _normalize(index, tuple(store.shape))
        try:
            return np.asarray(store[box].read().result())
        except Exception as error:  # tensorstore raises ValueError for nearly everything
            raise _failure(error, self._item / name, f"cannot read {_chunk(box)}") from error

    def _store(self, name: str) -> Any:
        if name not in self._shapes:
            raise CheckpointError(f"{self.directory}: has no array {name!r}")
        if name not in self._stores:
            store = _open(self._item, name)
            if tuple(store.shape) != self._shapes[name] or store.dtype.name not in DTYPES:
                raise CheckpointError(
                    f"{self._item / name}: is {store.dtype.name} {tuple(store.shape)}, but _METADATA says "
                    f"{self._shapes[name]} and the dtypes are {' '.join(DTYPES)}"
                )
            self._stores[name] = store
        return self._stores[name]


def _open(item: Path, name: str, *, create: ArraySpec | None = None, resume: bool = False) -> Any:
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{os.path.abspath(item / name)}/"},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    if create is not None:
        one_byte = DTYPES[create.dtype].itemsize == 1
        to_bytes = {"name": "bytes"} if one_byte else {"name": "bytes", "configuration": {"endian": "little"}}
        spec["metadata"] = {
            "shape": list(create.shape),
            "data_type": create.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(create.chunk)}},
            # With dots an array's chunks lie in one directory; with slashes 15,000 experts take 45,000 directories.
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [to_bytes, {"name": "crc32c"}],
        }
    try:
        return ts.open(spec, open=create is None or resume, create=create is not None).result()
    except Exception as error:  # tensorstore raises ValueError for nearly everything
        raise _failure(error, item / name, f"cannot {'open' if create is None else 'create'} the array") from error


def _failure(error: Exception, path: Path, what: str, bytes_needed: int | None = None) -> CheckpointError:
    """A tensorstore error as one line; the errno that it carries says more than its text."""
    text = str(error)
    code = re.search(r"os_error_code='(\d+)'", text)
    if code:
        cause = OSError(int(code[1]), os.strerror(int(code[1])))
        return CheckpointError(f"{describe_os_error(cause, path, bytes_needed)} ({what})")
    status = text.split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return CheckpointError(f"{path}: {what}: {' '.join(status.split())}")


def _normalize(index: Index, shape: tuple[int, ...]) -> Index:
    """`index` with one entry an axis, negative numbers resolved, slices with explicit bounds."""
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} indices for {len(shape)} axes")
    box: list[int | slice] = []
    for size, entry in itertools.zip_longest(shape, index, fillvalue=slice(None)):
        assert isinstance(size, int)
        if isinstance(entry, slice):
            start, stop, step = entry.indices(size)
            if step != 1:
                raise ValueError(f"slices must have step 1, not {step}")
            box.append(slice(start, max(start, stop)))
        elif -size <= entry < size:
            box.append(entry % size)
        else:
            raise IndexError(f"index {entry} is out of range for an axis of {size}")
    return tuple(box)


def _bounds(box: Index) -> tuple[list[int], list[int]]:
    starts = [entry.start if isinstance(entry, slice) else entry for entry in box]
    stops = [entry.stop if isinstance(entry, slice) else entry + 1 for entry in box]
    return starts, stops


def _shape_of(box: Index) -> tuple[int, ...]:
    return tuple(entry.stop - entry.start for entry in box if isinstance(entry, slice))


def _chunk(box: Index) -> str:
    """`box` as it is written in Python: [3, 0, 0:4096]."""
    parts = (f"{entry.start}:{entry.stop}" if isinstance(entry, slice) else str(entry) for entry in box)
    return f"[{', '.join(parts)}]"


def _complete(path: Path, spec: ArraySpec) -> bool:
    """Whether every chunk of an array is on disk (chunks appear whole: tensorstore renames them into place)."""
    with reporting_os_errors(path):
        present = {entry.name for entry in os.scandir(path)}
    grid = [range(-(-size // part)) for size, part in zip(spec.shape, spec.chunk, strict=True)]
    return all(".".join(["c", *map(str, cell)]) in present for cell in itertools.product(*grid))


def _tree_metadata(arrays: Mapping[str, ArraySpec]) -> dict[str, Any]:
    """What Orbax writes as `_METADATA` for a flat dict of arrays."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": _DICT_KEY}],
            # As jax.Array, Orbax would refuse to restore without shardings from the caller; this way it gives numpy.
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(spec.shape)},
        }
        for name, spec in arrays.items()
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _read_tree_metadata(directory: Path, path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in `_METADATA`."""
    if not path.is_file():
        raise CheckpointError(f"{directory}: is not a complete checkpoint: {ITEM_NAME}/_METADATA is missing")
    with reporting_os_errors(path):
        content = path.read_bytes()
    try:
        metadata = json.loads(content)
        if metadata["use_ocdbt"] or not metadata["use_zarr3"]:
            raise CheckpointError(f"{directory}: has another layout of Orbax's (ocdbt or zarr2); restore it with Orbax")
        shapes = {}
        for entry in metadata["tree_metadata"].values():
            ((name,), shape) = [part["key"] for part in entry["key_metadata"]], entry["value_metadata"]["write_shape"]
            if not _NAME.fullmatch(name):
                raise ValueError(f"array name {name!r}")
            if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
                raise ValueError(f"shape {str(shape)[:100]}")
            shapes[name] = tuple(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = f"{path}: is not the metadata of a flat dict of arrays ({type(error).__name__}: {str(error)[:200]!r})"
        raise CheckpointError(line) from error
    return shapes


def _write_json(path: Path, value: object) -> None:
    _write_text(path, json.dumps(value))


def _write_text(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
