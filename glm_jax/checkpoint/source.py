"""`Source`: slices of a checkpoint's weights, stacked by layer; and its implementation for a Hugging Face directory.

A loader asks for the slices that its devices need, never for more. `orbax_source` is the other implementation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from glm_jax.checkpoint.directories import open_directory
from glm_jax.checkpoint.files import Directory, read_small
from glm_jax.checkpoint.foreign import check_config, check_files, check_tensors
from glm_jax.checkpoint.names import TensorMapping
from glm_jax.checkpoint.problems import Problems
from glm_jax.checkpoint.quantization_config import read_quantization
from glm_jax.checkpoint.quantized import DEQUANTIZED, Format, Index, rows_and_columns, stored_mappings
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
from glm_jax.checkpoint.text_part import PREFIX, TextPart, has_text_part
from glm_jax.checkpoint.validation import plan_source
from glm_jax.configs import ModelConfig
from glm_jax.configs.hf import HfConfig, parse_config_json, read_hf
from glm_jax.configs.hf_nested import text_config
from glm_jax.errors import CheckpointError, ConfigError

_MAX_CONFIG_BYTES = 16 * 2**20
_AHEAD_BYTES = 32 * 2**20  # of tensors that are asked for before they are read


class Source(Protocol):
    """A checkpoint, as the weights of the stacked model."""

    config: ModelConfig
    notes: tuple[str, ...]  # for the user, about what was decided and passed over

    def read(self, weight: str, index: Index) -> np.ndarray:
        """The slice `weight[index]`, with a start and stop for each dimension, in the stored dtype."""
        ...

    def quantized_weights(self) -> dict[str, Format | None]:
        """The format of each weight with quantised matrices; None where some of its matrices are not quantised."""
        ...

    def mapping(self, weight: str) -> TensorMapping:
        """The mapping of one of the matrices of a quantised weight."""
        ...

    def read_stored(self, array: str, index: Index) -> np.ndarray:
        """As `read`, of one of the arrays that a quantised weight is stored as (`quantized.stored_mappings`)."""
        ...


Files = SafetensorsDir | TextPart


class Run(NamedTuple):
    """Consecutive elements of a tensor: those from number `start` to before `stop`."""

    tensor: str
    start: int
    stop: int


class HfArrays:
    """Arrays assembled from the tensors of a Hugging Face directory.

    A source has two views of this kind: of its weights, dequantised, and of its tensors as they are stored.

    Args:
        files: the safetensors of the directory.
        mappings: where each tensor goes.
        quantized: the stored formats of those names in `mappings` that are dequantised when read; the other names are
            names of tensors.
    """

    def __init__(self, files: Files, mappings: Mapping[str, TensorMapping], quantized: Mapping[str, Format]) -> None:
        self._files, self._quantized = files, quantized
        self._at: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
        self._mappings: dict[str, dict[str, TensorMapping]] = defaultdict(dict)
        # A tensor for each expert has another depth than one with all experts of a layer.
        self._depths: dict[str, set[int]] = defaultdict(set)
        for name, mapping in mappings.items():
            self._at[mapping.weight][mapping.index] = name
            self._depths[mapping.weight].add(len(mapping.index))
            self._mappings[mapping.weight][name] = mapping

    def __contains__(self, array: str) -> bool:
        return array in self._mappings

    def mapping(self, array: str) -> TensorMapping:
        """The mapping of one of the tensors of an array."""
        return next(iter(self._mappings[array].values()))

    def depth(self, array: str) -> int:
        """How many of an array's leading dimensions (layer, expert, gate or up) tell its tensors apart."""
        return min(self._depths[array])

    def tensors_in(self, array: str, index: Index) -> list[tuple[str, TensorMapping]]:
        """The names and mappings that `array[index]` is made of."""
        at, mappings, found = self._at[array], self._mappings[array], []
        for depth in sorted(self._depths[array]):
            places = itertools.product(*(range(part.start, part.stop) for part in index[:depth]))
            found += [(at[place], mappings[at[place]]) for place in places if place in at]
        return found

    def stored(self, name: str) -> tuple[str, ...]:
        """The tensors that a name is read from."""
        layout = self._quantized.get(name)
        return (name,) if layout is None else tuple(name + part.suffix for part in layout.parts)

    def dtype(self, name: str) -> np.dtype:
        """The dtype that a name reads as."""
        return DEQUANTIZED if name in self._quantized else NUMPY_DTYPES[self._files.tensors[name].dtype]

    def dtypes(self, array: str) -> list[np.dtype]:
        """The dtypes of all that an array is made of."""
        return [self.dtype(name) for name in self._mappings[array]]

    def runs(self, array: str, index: Index) -> Iterator[Run]:
        """What is read for `array[index]`: one run of each tensor, in the order of reading.

        A run holds whole rows, from the first to the last that is asked for, also where `index` takes only some inputs.
        """
        for name, mapping in self.tensors_in(array, index):
            yield from self._runs(name, mapping, index[len(mapping.index) :])

    def read(self, array: str, index: Index) -> np.ndarray:
        """Assemble `array[index]` from the tensors that lie in it."""
        parts = self.tensors_in(array, index)
        name, mapping = parts[0]
        if not mapping.index and name not in self._quantized:
            return self._read(name, mapping.part_shape, index)
        result = np.empty([part.stop - part.start for part in index], common_dtype([self.dtype(n) for n, _ in parts]))
        ahead, asked = self.runs(array, index), 0
        for name, mapping in parts:
            while asked <= _AHEAD_BYTES and (run := next(ahead, None)) is not None:
                self._files.prefetch(run.tensor, run[1:])
                asked += (run.stop - run.start) * self._files.tensors[run.tensor].itemsize
            at = tuple(i - part.start for i, part in zip(mapping.index, index, strict=False))
            asked -= self._fill(result[at], name, mapping, index=index[len(at) :])
        return result

    def _fill(self, out: np.ndarray, name: str, mapping: TensorMapping, *, index: Index) -> int:
        """Write `index` into one mapping's part of the array to `out`; returns the bytes that were read for it."""
        layout, runs = self._quantized.get(name), list(self._runs(name, mapping, index))
        if layout is None:
            out[...] = self._read(name, mapping.part_shape, index)
        else:
            rows, columns = rows_and_columns(mapping, index)
            first = layout.first_row(int(rows[0]))
            stored = {}
            for part, run in zip((part for part in layout.parts if part.array is not None), runs, strict=True):
                inner = self._files.tensors[run.tensor].shape[1:]
                stored[part.suffix] = self._files.read(run.tensor, run[1:]).reshape(-1, *inner)
            layout.dequantize(stored, rows - first, columns, out=out.reshape(len(rows), len(columns)))
        for run in runs:
            self._files.drop(run.tensor, run[1:])
        return sum((run.stop - run.start) * self._files.tensors[run.tensor].itemsize for run in runs)

    def _runs(self, name: str, mapping: TensorMapping, index: Index) -> Iterator[Run]:
        """The runs that `index` into one mapping's part of an array is made of."""
        layout = self._quantized.get(name)
        if layout is None:
            yield Run(name, *_window(mapping.part_shape, index))
            return
        rows, _ = rows_and_columns(mapping, index)
        first, last = layout.first_row(int(rows[0])), int(rows[-1]) + 1
        shapes = layout.shapes(mapping.shape)
        for part in layout.parts:
            if part.array is not None:
                start, stop = layout.part_rows(part.suffix, first, last)
                across = math.prod(shapes[part.suffix][1:])
                yield Run(name + part.suffix, start * across, stop * across)

    def _read(self, name: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
        """A tensor's elements seen in `shape`, indexed."""
        start, stop = _window(shape, index)
        flat = self._files.read(name, (start, stop))
        depth = _single(shape, index)
        if depth == len(shape):
            return flat.reshape([1] * depth)
        row = math.prod(shape[depth + 1 :])
        rows = flat.reshape(*[1] * depth, (stop - start) // row if row else 0, *shape[depth + 1 :])
        return rows[(*[slice(0, 1)] * depth, slice(None), *index[depth + 1 :])]


def _single(shape: tuple[int, ...], index: Index) -> int:
    """How many of the first dimensions have one element in `index`."""
    return next((at for at, part in enumerate(index) if part.stop - part.start != 1), len(shape))


def _window(shape: tuple[int, ...], index: Index) -> tuple[int, int]:
    """Where the rows that `index` touches begin and end, counted in elements."""
    depth = _single(shape, index)
    start, rest = 0, math.prod(shape)
    for size, part in zip(shape[:depth], index, strict=False):
        rest //= size
        start += part.start * rest
    if depth == len(shape):
        return start, start + 1
    rest //= max(1, shape[depth])
    return start + index[depth].start * rest, start + index[depth].stop * rest


class HfSource:
    """A Hugging Face directory of safetensors, on a disk or under a URL, with a weight for every tensor.

    Of a multimodal checkpoint it has the language model only.

    Attributes:
        directory: the open directory.
        config_json: the bytes of its config.json.
        files: the safetensors of the directory.
        plan: what becomes of each tensor.
        notes: sentences for the user about what was decided and passed over.
        config: the architecture, with what only the tensors tell.
        weights: the weights, quantised ones as bfloat16 values.

    Args:
        directory: its path or URL.
        allow_unknown: keys of config.json to pass over although they may change what the model computes.

    Raises:
        ConfigError: config.json is not of a supported architecture, or of an unknown quantisation.
        CheckpointError: the tensors are not complete, or do not fit the configuration.
    """

    def __init__(self, directory: str | os.PathLike[str], *, allow_unknown: Collection[str] = ()) -> None:
        self.directory = open_directory(directory)
        self.config_json = read_config_bytes(self.directory)
        content = parse_config_json(self.config_json, self.directory.at("config.json"))
        check_config(content)
        read = read_hf(content, allow_unknown=allow_unknown)  # before the files: a wrong config is reported first
        self._account(read, content, SafetensorsDir(self.directory))
        self._check_repeated_shapes()

    def __repr__(self) -> str:
        return f"HfSource({self.config.model_type}, {len(self.files.tensors)} tensors)"

    @classmethod
    def of_headers(cls, content: Mapping[str, Any], files: Any, *, allow_unknown: Collection[str] = ()) -> HfSource:
        """The source with a config.json's content and `files`, which need `tensors` but no data: for plans."""
        check_config(content)
        source = cls.__new__(cls)
        source._account(read_hf(content, allow_unknown=allow_unknown), content, files)
        return source

    def _account(self, read: HfConfig, content: Mapping[str, Any], files: SafetensorsDir) -> None:
        self.files: Files = TextPart(files) if has_text_part(files.tensors) else files
        notes = (*read.notes, *([self.files.note] if isinstance(self.files, TextPart) else []))
        own = text_config(content)
        check_tensors(self.files.tensors, own.get("quantization_config"))
        said = read_quantization(own)
        if said is not None and isinstance(self.files, TextPart):
            said = dataclasses.replace(said, prefix=PREFIX)
        try:
            self.plan = plan_source(read.config, self.files.tensors, said)
        except CheckpointError as error:  # perhaps because a key that was left out has another value than the default
            raise CheckpointError("; ".join([str(error), *read.notes])) from None
        self.notes = (*notes, *self.plan.notes)
        self.config = self.plan.config
        self.weights = HfArrays(self.files, self.plan.mappings, self.plan.quantized)

    def dtypes(self, weight: str) -> list[np.dtype]:
        """The dtypes of all tensors of a weight."""
        return self.weights.dtypes(weight)

    def read(self, weight: str, index: Index) -> np.ndarray:
        """Assemble `weight[index]` from the tensors that lie in it."""
        return self.weights.read(weight, index)

    def quantized_weights(self) -> dict[str, Format | None]:
        """The weights with quantised matrices and what these are stored as; None where some are and others not."""
        found: dict[str, set[Format | None]] = defaultdict(set)
        for name, mapping in self.plan.mappings.items():
            found[mapping.weight].add(self.plan.quantized.get(name))
        return {
            weight: next(iter(layouts)) if len(layouts) == 1 else None
            for weight, layouts in found.items()
            if layouts != {None}
        }

    def mapping(self, weight: str) -> TensorMapping:
        """The mapping of one of the matrices of a weight."""
        return self.weights.mapping(weight)

    def read_stored(self, array: str, index: Index) -> np.ndarray:
        """As `read`, of one of the arrays that `stored` shows."""
        return self._stored.read(array, index)

    @functools.cached_property
    def _stored(self) -> HfArrays:
        return self.stored()

    def stored(self) -> HfArrays:
        """The tensors as they are stored, the parts of quantised matrices side by side (`stored_mappings`)."""
        mappings: dict[str, TensorMapping] = {}
        for name, mapping in self.plan.mappings.items():
            layout = self.plan.quantized.get(name)
            mappings.update({name: mapping} if layout is None else stored_mappings(layout, name, mapping))
        return HfArrays(self.files, mappings, {})

    def _check_repeated_shapes(self) -> None:
        """Read the tensors that repeat the shape of a quantised matrix, and compare them with that shape."""
        problems = Problems()
        expected = {
            name + part.suffix: list(self.plan.mappings[name].shape)
            for name, layout in self.plan.quantized.items()
            for part in layout.parts
            if part.array is None
        }
        self.repeated = self.files.fetch(expected)
        for stored, shape in expected.items():
            said = self.repeated[stored].tolist()
            if said != shape:
                problems.add("of the wrong content", f"{stored} holds {said}, should hold {shape}")
        problems.raise_any(self.plan.config)


def read_config_bytes(directory: Directory) -> bytes:
    """The config.json of a directory.

    Raises:
        ConfigError: it is absent, or cannot be read.
        CheckpointError: it is absent, and the weights are in files of another program.
    """
    place = directory.at("config.json")
    try:
        content = read_small(directory, "config.json", _MAX_CONFIG_BYTES)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if content is None:
        check_files(directory.place, directory.names())
        raise ConfigError(f"{place} does not exist; a Hugging Face checkpoint directory has one")
    return content


def common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The smallest float dtype that holds all of the given ones exactly: their own, or float32 for a mixture."""
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)
