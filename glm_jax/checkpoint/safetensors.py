"""The safetensors format on numpy and ml_dtypes: reading one file.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes back to back. The header is
untrusted: it is bounded before it is read and checked before any data is, with the checks of the reference
implementation (https://github.com/huggingface/safetensors, `safetensors/src/tensor.rs`). `files` decides whether the
bytes are mapped or requested over a network; `drop` releases them, so that streaming a checkpoint takes little memory.
Nothing here knows the model. Sub-byte types (F4, F6) pass the checks but cannot be read: neither numpy nor ml_dtypes
can view them packed. Directories of shards are in `safetensors_dir`, writing in `safetensors_writer`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from glm_jax.checkpoint.files import File, Place, quoted
from glm_jax.checkpoint.local_files import MappedFile
from glm_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8  # of the little-endian integer that says how long the header is
_MAX_RANK = 64  # numpy's

# In increasing order of alignment; the reference sorts the tensors of a file by it, the last first.
_BITS_AND_DTYPE: dict[str, tuple[int, Any]] = {
    "BOOL": (8, np.bool_),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, np.uint8),
    "I8": (8, np.int8),
    "F8_E5M2": (8, ml_dtypes.float8_e5m2),
    "F8_E4M3": (8, ml_dtypes.float8_e4m3fn),
    "F8_E8M0": (8, ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, ml_dtypes.float8_e5m2fnuz),
    "I16": (16, "<i2"),
    "U16": (16, "<u2"),
    "F16": (16, "<f2"),
    "BF16": (16, ml_dtypes.bfloat16),
    "I32": (32, "<i4"),
    "U32": (32, "<u4"),
    "F32": (32, "<f4"),
    "C64": (64, "<c8"),
    "F64": (64, "<f8"),
    "I64": (64, "<i8"),
    "U64": (64, "<u8"),
}
DTYPE_ORDER = {name: rank for rank, name in enumerate(_BITS_AND_DTYPE)}
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype) for name, (_, dtype) in _BITS_AND_DTYPE.items() if dtype is not None
}
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def dtype_name(dtype: Any) -> str:
    """The format's name of a numpy or ml_dtypes dtype: `bfloat16` is "BF16". Raises ValueError if it has none."""
    name = _NAMES.get(np.dtype(dtype))
    if name is None:
        raise ValueError(f"safetensors has no dtype for {np.dtype(dtype)}")
    return name


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, format dtype ("BF16") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data in a file."""
        return math.prod(self.shape) * _BITS_AND_DTYPE[self.dtype][0] // 8


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """Where a tensor lies: the bytes [begin, end) of `file`, counted from the start of the file."""

    file: Place
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element, of a dtype that can be read as an array."""
        return NUMPY_DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """One checked safetensors file.

    Attributes:
        path: the path or URL of the file.
        tensors: every tensor by name, in the order of the bytes.
        metadata: the strings under `__metadata__`, empty if there are none.
        missing: bytes that the header describes and the file does not have.

    Args:
        file: its bytes, or the path of a file on a disk.
        complete: the data must be there; False accepts a file that was fetched up to its header, or further.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header breaks the format.
    """

    def __init__(self, file: File | str | os.PathLike[str], *, complete: bool = True) -> None:
        self.file: File = MappedFile(file) if isinstance(file, (str, os.PathLike)) else file
        self.path, self._size = self.file.place, self.file.size
        header, data_begin = _read_header(self.file)
        self.file.drop(0, data_begin)
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            raise CheckpointError(f"{self.path}: __metadata__ must map strings to strings")
        self.metadata: dict[str, str] = dict(metadata or {})
        infos = [self._info(name, entry, data_begin) for name, entry in header.items()]
        infos.sort(key=lambda info: (info.begin, info.end))
        self.missing = max(0, max((info.end for info in infos), default=0) - self._size)
        self._check_layout(infos, data_begin, complete=complete)
        self.tensors = {info.name: info for info in infos}

    def read(self, name: str, span: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor, read-only and maybe unaligned; of a file on a disk a view of the mapped bytes, which is no copy.

        Args:
            name: of the tensor.
            span: only its elements from the first number to before the second, flat.
        """
        info = self._find(name)
        dtype = NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {quoted(name)}: {info.dtype} cannot be read as an array")
        start, stop = (0, math.prod(info.shape)) if span is None else span
        shape = info.shape if span is None else (stop - start,)
        if stop == start:
            return np.empty(shape, dtype)
        begin, end = info.begin + start * dtype.itemsize, info.begin + stop * dtype.itemsize
        return self.file.view(begin, end).view(dtype).reshape(shape)

    def fetch(self, name: str) -> np.ndarray:
        """A small tensor that is read once."""
        info = self._find(name)
        content = self.file.fetch(info.begin, info.end)
        if len(content) != info.nbytes:
            raise CheckpointError(f"{self.path}: ends within tensor {quoted(name)}; fetch it again")
        return np.frombuffer(content, NUMPY_DTYPES[info.dtype]).reshape(info.shape)

    def prefetch(self, name: str, span: tuple[int, int] | None = None) -> None:
        """Announces that a tensor, or a span of its elements, will be read soon."""
        begin, end = self._bytes(name, span)
        if end > begin:
            self.file.prefetch(begin, end)

    def drop(self, name: str, span: tuple[int, int] | None = None) -> None:
        """Releases the memory of a tensor, or of a span of its elements. Views stay valid."""
        begin, end = self._bytes(name, span)
        if end > begin:
            self.file.drop(begin, end)

    def _bytes(self, name: str, span: tuple[int, int] | None) -> tuple[int, int]:
        info = self._find(name)
        if span is None:
            return info.begin, info.end
        return info.begin + span[0] * info.itemsize, info.begin + span[1] * info.itemsize

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[TensorInfo, np.ndarray]]:
        """Yields tensors in the order of the bytes (or of `names`), dropping each one when it moves on."""
        for name in self.tensors if names is None else names:
            yield self._find(name), self.read(name)
            self.drop(name)

    def close(self) -> None:
        """Releases what is cached; views stay valid."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _find(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {quoted(name)}")
        return self.tensors[name]

    def _info(self, name: str, entry: Any, data_begin: int) -> TensorInfo:
        """One header entry, checked on its own."""

        def wrong(what: str) -> CheckpointError:
            return CheckpointError(f"{self.path}: tensor {quoted(name)}: {what}")

        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise wrong("the entry must be an object with dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS_AND_DTYPE:
            raise wrong(f"dtype {quoted(dtype)} is none of {' '.join(_BITS_AND_DTYPE)}")
        if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
            raise wrong(f"shape {quoted(shape)} must be a list of integers from 0 to 2^63-1")
        if len(shape) > _MAX_RANK:
            raise wrong(f"shape has {len(shape)} dimensions, at most {_MAX_RANK} can be held")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
            raise wrong(f"data_offsets {quoted(offsets)} must be two integers from 0 to 2^63-1")
        bits = math.prod(size for size in shape if size) * _BITS_AND_DTYPE[dtype][0]
        if bits // 8 >= 1 << 63:
            raise wrong(f"shape {quoted(shape)} is too large to address")
        bits = 0 if 0 in shape else bits
        begin, end = offsets
        if bits % 8 or bits // 8 != end - begin:
            raise wrong(f"{dtype} {quoted(shape)} takes {bits / 8:.15g} bytes, its data_offsets span {end - begin}")
        return TensorInfo(name, dtype, tuple(shape), self.path, data_begin + begin, data_begin + end)

    def _check_layout(self, infos: list[TensorInfo], data_begin: int, *, complete: bool) -> None:
        """The tensors, sorted by their bytes, must cover the rest of the file exactly once."""
        described = max((info.end for info in infos), default=data_begin)
        if complete and described > self._size:
            raise CheckpointError(
                f"{self.path}: is truncated: its header describes {described} bytes, the file has {self._size}; "
                "fetch it again"
            )
        position = data_begin
        for info in infos:
            if info.begin != position:
                kind = "overlap another tensor's" if info.begin < position else "leave a hole"
                raise CheckpointError(
                    f"{self.path}: tensor {quoted(info.name)}: its bytes {kind}; "
                    f"data_offsets must begin at {position - data_begin}, not {info.begin - data_begin}"
                )
            position = info.end
        if position < self._size:
            raise CheckpointError(
                f"{self.path}: {self._size - position} bytes after the last tensor belong to none; "
                f"the file should end at {position}"
            )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _read_header(file: File) -> tuple[dict[str, Any], int]:
    """The parsed header and the position of the first data byte."""
    path, size = file.place, file.size
    start = file.fetch(0, min(size, LENGTH_BYTES))
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull`")
    if size < LENGTH_BYTES + 2 or length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: is truncated or no safetensors file: {size} bytes cannot hold the header of {length} bytes "
            "that its first 8 bytes announce"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: its header of {length} bytes exceeds the format's limit, {MAX_HEADER_BYTES}")
    content = file.fetch(LENGTH_BYTES, LENGTH_BYTES + length)
    if not content.startswith(b"{"):
        raise CheckpointError(f"{path}: no safetensors file: its header begins with {quoted(content[:8])}, not '{{'")
    return parse_object(content, path), LENGTH_BYTES + length


def parse_object(content: bytes, path: Place) -> dict[str, Any]:
    """The JSON object in `content`, strictly: UTF-8, no key twice, no NaN, no lone surrogates in keys.

    Raises:
        CheckpointError: `content`, which was read from `path`, is anything else.
    """
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull`")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in pairs:
            key.encode()
            if key in result:
                raise ValueError(f"the key {key[:200]!r} occurs twice")
            result[key] = item
        return result

    try:
        value = json.loads(content.decode(), object_pairs_hook=unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else quoted(str(error))
        raise CheckpointError(f"{path}: its JSON is invalid: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its JSON must be an object, not a {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
