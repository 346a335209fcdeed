"""An Orbax directory of this project: the arrays, and the manifest `glm_jax.json` beside them.

The manifest holds the layout's version, the configuration, and for each tensor of the source its dtype and sha256: what
an export needs to write the same bytes again. It says how the source was quantised and which weights are kept so: those
are arrays of values and of scales, and are read as the bfloat16 weights that they stand for.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.names import TensorMapping, canonical_mappings, fused_mappings
from glm_jax.checkpoint.orbax_io import OrbaxReader
from glm_jax.checkpoint.quantized import (
    DEQUANTIZED,
    FLOAT_DTYPES,
    Format,
    Index,
    format_from_json,
    rows_and_columns,
    stored_mappings,
)
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES
from glm_jax.checkpoint.source import common_dtype
from glm_jax.configs import ModelConfig, from_hf, to_hf
from glm_jax.errors import CheckpointError, ConfigError
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name

MANIFEST = "glm_jax.json"
ASSETS = "hf"  # config.json, tokenizer and template files, verbatim from the source
LAYOUT_VERSION = 1
_MAX_MANIFEST_BYTES = 256 * 2**20
_RECORDED_DTYPES = (*FLOAT_DTYPES, "F8_E4M3", "I8", "I32", "I64")


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor of the source: its dtype in safetensors' words and the sha256 of its bytes."""

    dtype: str
    sha256: str

    def __post_init__(self) -> None:
        if self.dtype not in _RECORDED_DTYPES or not isinstance(self.sha256, str):
            raise ValueError(f"a tensor of dtype {self.dtype!r} with sha256 {self.sha256!r}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `glm_jax.json` says.

    Attributes:
        config: the architecture.
        tensors: every tensor of the source by its Hugging Face name.
        producer: what wrote the checkpoint, with its version.
        source_layouts: what the source's quantised matrices were stored as; none if there were none.
        kept: the weights that are kept quantised, with what their arrays are.
    """

    config: ModelConfig
    tensors: dict[str, TensorRecord]
    producer: str
    source_layouts: tuple[Format, ...] = ()
    kept: dict[str, Format] = dataclasses.field(default_factory=dict)

    def was_quantized(self, name: str) -> bool:
        """Whether a weight's tensor was quantised in the source."""
        firsts = (layout.parts[0] for layout in self.source_layouts)
        stored = ((first, self.tensors.get(name + first.suffix)) for first in firsts)
        return any(record is not None and record.dtype in first.dtypes for first, record in stored)

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        sources = [layout.to_json() for layout in self.source_layouts]
        quantization = {
            "source": sources if len(sources) > 1 else next(iter(sources), None),
            "kept": {name: layout.to_json() for name, layout in self.kept.items()},
        }
        return {
            **({"quantization": quantization} if self.source_layouts or self.kept else {}),
            "layout_version": LAYOUT_VERSION,
            "producer": self.producer,
            "config": {**to_hf(self.config), "mtp_copies": list(self.config.mtp_copies)},
            "tensors": {name: dataclasses.asdict(record) for name, record in self.tensors.items()},
        }


def is_orbax(directory: Path) -> bool:
    """Whether a directory is an Orbax checkpoint of this project."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another version of the layout.
    """
    path = directory / MANIFEST
    try:
        with open(path, "rb") as file:
            read = file.read(_MAX_MANIFEST_BYTES + 1)
        if len(read) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {_MAX_MANIFEST_BYTES} bytes")
        content = json.loads(read.decode())
        version = content["layout_version"]
        if version != LAYOUT_VERSION:
            raise CheckpointError(f"{path}: layout_version {version!r}; this program reads {LAYOUT_VERSION}")
        described = dict(content["config"])
        copies = tuple(described.pop("mtp_copies"))
        config = dataclasses.replace(from_hf(described), mtp_copies=copies)
        tensors = {name: TensorRecord(**record) for name, record in content["tensors"].items()}
        said = content.get("quantization", {"source": None, "kept": {}})
        found = said["source"] if isinstance(said["source"], list) else [said["source"]]
        layouts = tuple(format_from_json(item) for item in found if item is not None)
        kept = {name: format_from_json(item) for name, item in said["kept"].items()}
        return Manifest(config, tensors, content["producer"], source_layouts=layouts, kept=kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged or missing: {type(error).__name__}: {error}") from None


class OrbaxSource:
    """A checkpoint written by `convert`.

    Attributes:
        manifest: what `glm_jax.json` says.
        config: the architecture.
        notes: none; those of the source were given when it was converted.

    Raises:
        CheckpointError: the manifest or the array metadata is missing or damaged, or they do not fit each other.
    """

    def __init__(self, directory: str | Path) -> None:
        self.manifest = read_manifest(Path(directory))
        self.config = self.manifest.config
        self.notes: tuple[str, ...] = ()
        self.arrays = OrbaxReader(directory)
        self._mappings = _one_mapping_each(self.config) if self.manifest.kept else {}
        self._check_arrays(Path(directory))

    def __repr__(self) -> str:
        return f"OrbaxSource({self.config.model_type}, {len(self.arrays.specs())} arrays)"

    def read(self, weight: str, index: Index) -> np.ndarray:
        """The slice `weight[index]` from the chunks that it touches; bfloat16 of a weight that is kept quantised."""
        layout = self.manifest.kept.get(weight)
        return self.arrays.read(weight, index) if layout is None else self._dequantize(weight, index, layout)

    def quantized_weights(self) -> dict[str, Format | None]:
        """The weights that are kept quantised and what they are stored as."""
        return dict(self.manifest.kept)

    def mapping(self, weight: str) -> TensorMapping:
        """The mapping of one of the matrices of a weight that is kept quantised."""
        return self._mappings[weight]

    def read_stored(self, array: str, index: Index) -> np.ndarray:
        """The slice `array[index]` of an array as it is, from the chunks that it touches."""
        return self.arrays.read(array, index)

    def _dequantize(self, weight: str, index: Index, layout: Format) -> np.ndarray:
        """Matrix by matrix; of each array one chunk's layer and expert is held at a time."""
        mapping = self._mappings[weight]
        depth = len(mapping.index)
        rows, columns = rows_and_columns(mapping, index[depth:])
        arrays = {part.suffix: weight + part.array for part in layout.parts if part.array is not None}
        held = {suffix: _HeldChunk(self.arrays, name, depth) for suffix, name in arrays.items()}
        shapes = layout.shapes(mapping.shape)
        result = np.empty([part.stop - part.start for part in index], DEQUANTIZED)
        for at in np.ndindex(*result.shape[:depth]):
            lead = tuple(part.start + i for part, i in zip(index, at, strict=False))
            stored = {suffix: chunk.matrix(lead).reshape(shapes[suffix]) for suffix, chunk in held.items()}
            layout.dequantize(stored, rows, columns, out=result[at].reshape(len(rows), len(columns)))
        return result

    def _check_arrays(self, directory: Path) -> None:
        """Hold the arrays against the configuration: a slice of a larger array would load, and be wrong."""
        declared = weights_by_name(Transformer(self.config))
        weights = {name: weight.get_raw_value().shape for name, weight in declared.items()}
        unknown = [name for name in self.manifest.kept if name not in weights or len(self._mappings[name].shape) != 2]
        if unknown:
            raise CheckpointError(f"{directory / MANIFEST} is damaged: it has {unknown[0]!r} as a quantised matrix")
        expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        all_recorded = self._recorded_dtypes()
        for name, shape in weights.items():
            layout = self.manifest.kept.get(name)
            recorded = all_recorded.get(name, [])
            chosen = np.dtype(declared[name].get_raw_value().dtype) if declared[name].pinned else common_dtype(recorded)
            own = {name: (shape, (chosen.name,) if recorded else ())}
            expected.update(own if layout is None else self._expected_parts(name, shape, layout))
        found = self.arrays.specs()
        problems = [f"{name} is missing" for name in expected if name not in found]
        problems += [f"{name} is not known" for name in found if name not in expected]
        for name, (shape, dtypes) in expected.items():
            if name in found and found[name].shape != shape:
                problems.append(f"{name} is {list(found[name].shape)}, should be {list(shape)}")
            elif name in found and dtypes and found[name].dtype not in dtypes:
                problems.append(f"{name} is {found[name].dtype}, should be {' or '.join(dtypes)}")
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise CheckpointError(
                f"{directory}: arrays that do not fit its {MANIFEST}: {', '.join(problems[:8])}{more}"
            )

    def _recorded_dtypes(self) -> dict[str, list[np.dtype]]:
        """The dtypes of the tensors that each weight was made of, as far as the manifest has them."""
        tensors = self.manifest.tensors
        found: dict[str, list[np.dtype]] = defaultdict(list)
        for name, mapping in (canonical_mappings(self.config) | fused_mappings(self.config)).items():
            if self.manifest.was_quantized(name):
                found[mapping.weight].append(DEQUANTIZED)
            elif name in tensors:
                found[mapping.weight].append(NUMPY_DTYPES[tensors[name].dtype])
        return found

    def _expected_parts(
        self, name: str, shape: tuple[int, ...], layout: Format
    ) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Shape and legal dtypes of each array of a weight that is kept quantised."""
        mapping = self._mappings[name]
        stored = stored_mappings(layout, "", mapping)
        return {
            stored[part.suffix].weight: (
                (*shape[: len(mapping.index)], *stored[part.suffix].part_shape),
                tuple(NUMPY_DTYPES[dtype].name for dtype in part.dtypes),
            )
            for part in layout.parts
            if part.array is not None
        }


class _HeldChunk:
    """The last layer and expert read of an array, as its chunks divide it: neighbouring matrices share one read."""

    def __init__(self, arrays: OrbaxReader, name: str, depth: int) -> None:
        self._arrays, self._name = arrays, name
        self._lead = leading_ones(arrays.spec(name).chunk[:depth])
        self._at: tuple[int, ...] | None = None
        self._content = np.empty(0)

    def matrix(self, at: tuple[int, ...]) -> np.ndarray:
        """The elements behind leading indices."""
        lead, inner = at[: self._lead], at[self._lead :]
        if lead != self._at:
            self._at, self._content = lead, self._arrays.read(self._name, lead)
        return self._content[inner]


def leading_ones(chunk: tuple[int, ...]) -> int:
    """In how many of its first dimensions a chunk has one element."""
    return next((i for i, size in enumerate(chunk) if size != 1), len(chunk))


def _one_mapping_each(config: ModelConfig) -> dict[str, TensorMapping]:
    """For each weight the mapping of one of its tensors."""
    return {mapping.weight: mapping for mapping in canonical_mappings(config).values()}
