"""A directory of safetensors files as one checkpoint: which files belong to it, and whether they agree.

Everything that is wrong with a directory is collected and raised once, so that fetching the rest takes one more try and
not one for each file. File names in an index are untrusted: none may leave the directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from glm_jax.checkpoint.directories import open_directory
from glm_jax.checkpoint.files import Directory, Place, quoted, read_small
from glm_jax.checkpoint.foreign import check_files
from glm_jax.checkpoint.safetensors import MAX_HEADER_BYTES, SafetensorsFile, TensorInfo, parse_object
from glm_jax.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_FILES = 10_000
_OPENED_TOGETHER = 32  # files, whose headers are then parsed one by one
_FETCHES = 16  # of small tensors at a time
_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5,})-of-(?P<count>[0-9]{5,})\.safetensors")


class SafetensorsDir:
    """The safetensors checkpoint of a directory, as Hugging Face lays it out, on a disk or under a URL.

    Either the shards that `model.safetensors.index.json` names, or without an index the one *.safetensors file, or one
    complete set `NAME-00001-of-0000N.safetensors`.

    Attributes:
        directory: its path or URL.
        tensors: every tensor by name, in the order of the files and of their bytes.
        unlisted: *.safetensors files of the directory that the index does not name, and that are not read.

    Args:
        directory: its path, its URL, or the open directory.
        complete: the files' data must be there; False for plans, which need the headers only.

    Raises:
        CheckpointError: one line with everything that is missing, doubled, truncated or contradictory.
    """

    def __init__(self, directory: str | os.PathLike[str] | Directory, *, complete: bool = True) -> None:
        self._source = open_directory(directory) if isinstance(directory, (str, os.PathLike)) else directory
        self.directory, self._complete = self._source.place, complete
        names = self._source.names()
        present = [name for name in names if name.endswith(".safetensors")]
        index = read_index(self._source) if INDEX_NAME in names else None
        if not present:
            check_files(self.directory, names)
        if index is None:
            chosen, problems = _choose_files(present)
        else:
            chosen, problems = sorted(set(index.values())), _check_single_beside(present, index)
        self._files: dict[str, SafetensorsFile] = {}  # by their names in the directory
        self._names: dict[Place, str] = {}
        self.unlisted = tuple(self._source.at(name) for name in present if name not in set(chosen))
        problems += self._open(chosen)
        self.tensors, twice = self._merge()
        problems += twice
        if index is not None:
            problems += self._compare(index)
        if problems:
            raise CheckpointError(f"{self.directory}: {'; '.join(problems)}")

    @property
    def files(self) -> dict[str, SafetensorsFile]:
        """The files that are read, by their names in the directory, sorted."""
        return dict(sorted(self._files.items()))

    @property
    def missing(self) -> int:
        """Bytes that the files' headers describe and the files do not have."""
        return sum(file.missing for file in self._files.values())

    def infos(self) -> list[TensorInfo]:
        """Every tensor, in the order of the files and of their bytes: the order to stream in."""
        return list(self.tensors.values())

    def read(self, name: str, span: tuple[int, int] | None = None) -> np.ndarray:
        """A tensor or a span of its elements, as `SafetensorsFile.read`."""
        return self._file_of(name).read(name, span)

    def fetch(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Small tensors that are read once, several at a time."""
        chosen = list(names)
        with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch") as pool:
            return dict(zip(chosen, pool.map(lambda name: self._file_of(name).fetch(name), chosen), strict=True))

    def prefetch(self, name: str, span: tuple[int, int] | None = None) -> None:
        """Announces that a tensor, or a span of its elements, will be read soon."""
        self._file_of(name).prefetch(name, span)

    def drop(self, name: str, span: tuple[int, int] | None = None) -> None:
        """Releases the memory of a tensor, or of a span of its elements."""
        self._file_of(name).drop(name, span)

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[TensorInfo, np.ndarray]]:
        """Yields tensors in the order of the bytes (or of `names`), dropping each one when it moves on."""
        for name in self.tensors if names is None else names:
            yield from self._file_of(name).stream([name])

    def close(self) -> None:
        """Releases what is cached; views stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _file_of(self, name: str) -> SafetensorsFile:
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: has no tensor {quoted(name)}")
        return self._files[self._names[self.tensors[name].file]]

    def _open(self, chosen: list[str]) -> list[str]:
        refused = {name: outside for name in chosen if (outside := self._source.refused(name)) is not None}
        problems, inside = list(refused.values()), [name for name in chosen if name not in refused]
        missing = []
        for start in range(0, len(inside), _OPENED_TOGETHER):
            names = inside[start : start + _OPENED_TOGETHER]
            found = self._source.find(names)
            for name in names:
                file = found.get(name)
                if file is None:
                    missing.append(name)
                elif isinstance(file, CheckpointError):
                    problems.append(str(file))
                else:
                    try:
                        self._files[name] = SafetensorsFile(file, complete=self._complete)
                        self._names[file.place] = name
                    except CheckpointError as error:
                        problems.append(str(error))
        if missing:
            problems.append(
                f"{len(missing)} of {len(chosen)} files missing: {_some([quoted(name) for name in missing], 1000)}"
            )
        return problems

    def _merge(self) -> tuple[dict[str, TensorInfo], list[str]]:
        tensors: dict[str, TensorInfo] = {}
        twice = []
        for file in self._files.values():
            for name, info in file.tensors.items():
                if name in tensors:
                    places = self._names[tensors[name].file], self._names[info.file]
                    twice.append(f"{quoted(name)} in {places[0]} and {places[1]}")
                tensors[name] = info
        return tensors, [f"tensors that occur twice: {_some(twice)}"] if twice else []

    def _compare(self, index: dict[str, str]) -> list[str]:
        problems = []
        lacking = [
            f"{quoted(name)} ({place})"
            for name, place in index.items()
            if place in self._files and name not in self._files[place].tensors
        ]
        if lacking:
            problems.append(f"tensors that the index names and their file lacks: {_some(lacking)}")
        extra = [
            f"{quoted(name)} ({self._names[info.file]})" for name, info in self.tensors.items() if name not in index
        ]
        if extra:
            problems.append(f"tensors that the index does not name: {_some(extra)}")
        return problems


def read_index(directory: Directory) -> dict[str, str]:
    """The weight map of `model.safetensors.index.json`: tensor name to file name, as written there.

    Raises:
        CheckpointError: the index is not readable, not JSON, or not an object with a `weight_map` of strings.
    """
    path = directory.at(INDEX_NAME)
    outside = directory.refused(INDEX_NAME)
    if outside is not None:
        raise CheckpointError(f"{directory.place}: {outside}")
    content = read_small(directory, INDEX_NAME, MAX_HEADER_BYTES)
    if content is None:
        raise CheckpointError(f"{path}: is listed and cannot be opened")
    index = parse_object(content, path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: needs a weight_map that gives a file name for every tensor")
    if not weight_map:
        raise CheckpointError(f"{path}: its weight_map names no tensors")
    return weight_map


def _some(items: list[str], most: int = 10) -> str:
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def _check_single_beside(present: list[str], index: dict[str, str]) -> list[str]:
    if SINGLE_NAME in present and SINGLE_NAME not in index.values():
        return [f"holds both {SINGLE_NAME} and an index that does not name it; keep one of the two"]
    return []


def _choose_files(present: list[str]) -> tuple[list[str], list[str]]:
    """The files of a directory without an index, and what is wrong with them."""
    if not present:
        return [], [f"no *.safetensors file and no {INDEX_NAME} here"]
    shards = [_SHARD_NAME.fullmatch(name) for name in present]
    sets = {(shard["stem"], shard["count"]) for shard in shards if shard}
    if len(sets) == 1 and all(shards):
        ((stem, count),) = sets
        if not 0 < int(count) <= _MAX_FILES:
            return [], [f"{quoted(present[0])} claims to be one of {int(count)} files"]
        width = len(count)
        return [f"{stem}-{number:0{width}d}-of-{count}.safetensors" for number in range(1, int(count) + 1)], []
    if len(present) == 1:
        return present, []
    return [], [f"{len(present)} safetensors files and no index: {_some(present)}; keep one set, or add {INDEX_NAME}"]
