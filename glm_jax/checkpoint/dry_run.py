"""What a conversion would do, from headers alone, and everything that would stop it.

The source is a Hugging Face directory whose files need only their headers, or a list of tensors: a JSON object (gzipped
or not) that gives each tensor's `shape`, `dtype` and `file`.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.checkpoint import quantize as quantizing
from glm_jax.checkpoint.atomic import check_free_space, free_bytes
from glm_jax.checkpoint.convert import DEQUANTIZE, KEEP, check_target_beside
from glm_jax.checkpoint.directories import open_directory
from glm_jax.checkpoint.files import is_url
from glm_jax.checkpoint.layout import plan_layout
from glm_jax.checkpoint.quantization_config import quantization_config
from glm_jax.checkpoint.quantized import Fp8
from glm_jax.checkpoint.safetensors import TensorInfo
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
from glm_jax.checkpoint.source import Files, HfSource, read_config_bytes
from glm_jax.configs.hf import parse_config_json, read_config_json
from glm_jax.configs.places import hub_hint
from glm_jax.errors import CheckpointError, Error

_PROBE_BYTES = 32 * 2**20
_WRONG_LIST = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_MAX_LIST_BYTES = 256 * 2**20
_BLOCK = 128  # of the published FP8 checkpoints, whose lists of tensors come without a config.json


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a conversion would read and write.

    Attributes:
        tensors: the source's tensors that would be used.
        bytes_in: their bytes.
        bytes_out: bytes of the arrays.
        arrays: number of arrays.
        files: number of chunks, each a file.
        free: bytes free where the target would lie; None if that is not known or no target was named.
        rate: bytes a second that can be read from the source, hashed, and written durably there: whichever is less,
            measured with some megabytes; None if not.
        notes: sentences about decisions.
        problems: everything that would stop it, found in one go; empty if nothing would.
    """

    tensors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    arrays: int = 0
    files: int = 0
    free: int | None = None
    rate: float | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The time it would take at the measured rate."""
        return None if not self.rate else self.bytes_out / self.rate


class TensorList:
    """The tensors of a checkpoint whose files are elsewhere, each with its shape, dtype and file.

    Raises:
        CheckpointError: the file is not such a list.
    """

    unlisted = ()
    missing = 0
    files: Mapping[str, Any] = {}

    def __init__(self, path: Path) -> None:
        try:
            items = json.loads(_content(path))
            self.tensors = {
                str(name): TensorInfo(str(name), entry["dtype"], tuple(entry["shape"]), Path(entry["file"]), 0, 0)
                for name, entry in items.items()
            }
            if not all(type(size) is int and size >= 0 for tensor in self.tensors.values() for size in tensor.shape):
                raise ValueError("a shape is no list of sizes")
            self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        except _WRONG_LIST as error:
            line = f"{path} is no list of tensors with shape, dtype and file: {type(error).__name__}: {error}"
            raise CheckpointError(line) from None


def _content(path: Path) -> bytes:
    """The content of a list, unpacked if it is gzipped, and of bounded length."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        content = file.read(_MAX_LIST_BYTES + 1)
    if len(content) > _MAX_LIST_BYTES:
        raise ValueError(f"more than {_MAX_LIST_BYTES} bytes")
    return content


def dry_run(
    source: str | Path,
    target: str | Path | None = None,
    *,
    config: str | Path | None = None,
    quantized: str = DEQUANTIZE,
    quantize: str | None = None,
    allow_unknown: Collection[str] = (),
) -> DryRun:
    """Plan a conversion and collect what is wrong, without writing it.

    Args:
        source: a Hugging Face directory (a path or a URL), its files whole or only their headers, or a list of tensors.
        target: where it would go.
        config: a known model's name, or a config.json or its directory; by default the source's own.
        quantized: as for `convert`.
        quantize: as for `convert`.
        allow_unknown: as for `convert`.
    """
    problems: list[str] = []
    notes: list[str] = []
    plan, hf = DryRun(), None
    try:
        hf = _source(source, config, allow_unknown)
        made, more = ({}, []) if quantize is None else quantizing.choose(hf.config, quantizing.method(quantize))
        notes += [*hf.notes, *more]
        layout = plan_layout(hf, keep=quantized == KEEP, made=made)
        used = {stored for name in hf.plan.mappings for stored in hf.plan.stored(name)}
        if hf.plan.ignored:
            notes.append(
                f"{len(hf.plan.ignored)} superfluous tensors would be passed over, such as {hf.plan.ignored[0]}"
            )
        if hf.files.missing:
            notes.append(f"{hf.files.missing} bytes of the files are not here yet")
        plan = DryRun(
            tensors=len(used),
            bytes_in=sum(hf.files.tensors[name].nbytes for name in used),
            bytes_out=layout.nbytes,
            arrays=len(layout.arrays),
            files=sum(_chunks(spec.shape, spec.chunk) for spec in layout.arrays.values()),
        )
    except Error as error:
        problems.append(str(error))
    free = rate = None
    if target is not None:
        try:
            check_target_beside(source, target)
            free, rate = free_bytes(target), _measure(Path(target), hf)
            check_free_space(target, plan.bytes_out)
        except Error as error:
            problems.append(str(error))
    return dataclasses.replace(plan, free=free, rate=rate, notes=tuple(notes), problems=tuple(problems))


def _source(place: str | Path, config: str | Path | None, allow_unknown: Collection[str]) -> HfSource:
    source = Path(place)
    if is_url(place) or source.is_dir():
        directory = open_directory(place)
        if config is None:
            content = parse_config_json(read_config_bytes(directory), directory.at("config.json"))
        else:
            content = dict(_config(config))
        return HfSource.of_headers(content, SafetensorsDir(directory, complete=False), allow_unknown=allow_unknown)
    if not source.is_file():
        raise CheckpointError(f"{source} is neither a Hugging Face directory nor a list of tensors{hub_hint(place)}")
    files = TensorList(source)
    if config is None:
        raise CheckpointError(
            f"{source} is a list of tensors, which needs a config beside it: a model's name or a file"
        )
    content = dict(_config(config))
    if "quantization_config" not in content and any(name.endswith("_scale_inv") for name in files.tensors):
        content = {**content, "quantization_config": quantization_config({Fp8(_BLOCK, _BLOCK, "_scale_inv"): []}, [])}
    return HfSource.of_headers(content, files, allow_unknown=allow_unknown)


def _config(config: str | Path) -> Mapping[str, Any]:
    path = Path(config)
    if path.is_dir():
        return read_config_json(path)
    if path.is_file():
        return read_config_json(path.parent) if path.name == "config.json" else json.loads(path.read_text())
    return configs.to_hf(configs.get(str(config)))


def _chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    return math.prod(-(-size // part) for size, part in zip(shape, chunk, strict=True))


def _measure(target: Path, hf: HfSource | None) -> float | None:
    """Bytes a second from the source to near the target; None where that is not possible."""
    written = _write_rate(target)
    read = None if hf is None or hf.files.missing else _read_rate(hf.files)
    return min(written, read) if written is not None and read is not None else written


def _read_rate(files: Files) -> float | None:
    """Bytes a second that are read from the middle of the largest file."""
    file = max((opened.file for opened in files.files.values()), key=lambda file: file.size, default=None)
    if file is None:
        return None
    begin, count = file.size // 2, min(_PROBE_BYTES, file.size // 8)
    if count == 0:
        return None
    started = time.perf_counter()
    file.prefetch(begin, begin + count)
    file.view(begin, begin + count).tobytes()
    file.drop(begin, begin + count)
    return count / (time.perf_counter() - started)


def _write_rate(target: Path) -> float | None:
    """Bytes a second that are hashed and written durably near the target; None where that is not possible."""
    place = target.absolute().parent
    while not place.is_dir() and place != place.parent:
        place = place.parent
    block = os.urandom(2**20) * (_PROBE_BYTES // 2**20)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            started = time.perf_counter()
            hashlib.sha256(block).digest()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return len(block) / (time.perf_counter() - started)
    except OSError:
        return None
