"""The arrays of the one layout and the items that they are written in.

A chunk is one layer by one expert, so that any mesh reads whole chunks, and what is larger than `MAX_CHUNK_BYTES` is
divided further by outputs. A work item is all chunks that one set of tensors goes to, so that each tensor is read and
hashed once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from glm_jax.checkpoint.names import LAYER_GROUPS, TensorMapping, canonical_mappings
from glm_jax.checkpoint.orbax_io import ArraySpec
from glm_jax.checkpoint.problems import Problems
from glm_jax.checkpoint.quantize import made_dtype
from glm_jax.checkpoint.quantized import Format, array_suffixes, stored_mappings
from glm_jax.checkpoint.source import HfArrays, HfSource, Index, common_dtype
from glm_jax.model import Transformer
from glm_jax.sharding import Weight, weights_by_name

MAX_CHUNK_BYTES = 32 * 2**20
_MAX_SCALES_BYTES = 16 * 2**20  # all experts of a layer in one chunk up to here, or there would be a file for each


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """Chunks that are written together.

    Attributes:
        array: name of the array; of the weight, if the weight is quantised on the way.
        boxes: the slices of it that are written, in order.
        nbytes: bytes that are written, of all boxes.
        held: bytes of the largest box in memory.
    """

    array: str
    boxes: tuple[Index, ...]
    nbytes: int
    held: int

    @property
    def name(self) -> str:
        """Unique among all items: the array and where the first box begins."""
        return f"{self.array}[{','.join(str(part.start) for part in self.boxes[0])}]"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a conversion writes.

    Attributes:
        source: the source, as the arrays are read from it.
        kept: weights that stay quantised as they are in the source.
        made: weights that are quantised on the way, with their formats and the mapping of one of their matrices.
        arrays: every array.
        items: all the work, in the order of the source's bytes.
    """

    source: HfArrays
    kept: Mapping[str, Format]
    made: Mapping[str, tuple[Format, TensorMapping]]
    arrays: Mapping[str, ArraySpec]
    items: tuple[WorkItem, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(spec.nbytes for spec in self.arrays.values())


def plan_layout(hf: HfSource, *, keep: bool, made: Mapping[str, Format]) -> Layout:
    """Lay out the arrays of a source.

    Args:
        hf: the source.
        keep: leave quantised weights as they are stored.
        made: the weights to quantise on the way.

    Raises:
        CheckpointError: a weight is quantised in part, and cannot be kept.
    """
    kept = kept_weights(hf) if keep else {}
    form = hf.stored() if kept else hf.weights
    # The mapping of one expert's tensor, also where the source has all experts of a layer in one tensor.
    mappings = {mapping.weight: mapping for mapping in canonical_mappings(hf.config).values()} if made else {}
    arrays: dict[str, ArraySpec] = {}
    items: list[WorkItem] = []
    for name, weight in weights_by_name(Transformer(hf.config)).items():
        if name in made:
            specs, own = _quantized(name, weight, mappings[name], made[name], depth=form.depth(name))
        else:
            suffixes = array_suffixes(kept[name]) if name in kept else ("",)
            specs = {name + suffix: _copied(form, name + suffix, weight, suffix) for suffix in suffixes}
            own = [item for array, spec in specs.items() for item in _items(array, spec, form.depth(array))]
        arrays |= specs
        items += own
    places = {item.name: hf.files.tensors[_first_tensor(form, item)] for item in items}
    items.sort(key=lambda item: (places[item.name].file, places[item.name].begin))
    return Layout(form, kept, {name: (layout, mappings[name]) for name, layout in made.items()}, arrays, tuple(items))


def kept_weights(hf: HfSource) -> dict[str, Format]:
    """The weights whose tensors are all quantised, with their formats.

    Raises:
        CheckpointError: a weight is quantised in part.
    """
    kept: dict[str, Format] = {}
    parts: dict[str, list[str]] = defaultdict(list)
    for name, mapping in hf.plan.mappings.items():
        parts[mapping.weight].append(name)
    problems = Problems()
    for weight, names in parts.items():
        layouts = [hf.plan.quantized.get(name) for name in names]
        if layouts[0] is not None and all(layout == layouts[0] for layout in layouts):
            kept[weight] = layouts[0]
        elif any(layouts):
            one, layout = next((n, layout) for n, layout in zip(names, layouts, strict=True) if layout is not None)
            other, another = next((n, x) for n, x in zip(names, layouts, strict=True) if x != layout)
            said = f"{weight} ({one}, not {other})"
            if another is not None:
                said = f"{weight} ({one} is {layout.describe()}, {other} {another.describe()})"
            problems.add("quantised in part, which cannot be kept (dequantize can)", said)
    problems.raise_any(hf.config)
    return kept


def _first_tensor(form: HfArrays, item: WorkItem) -> str:
    name, _ = form.tensors_in(item.array, item.boxes[0])[0]
    return form.stored(name)[0]


def _lead(name: str, weight: Weight) -> int:
    """How many leading dimensions (layers, experts) have one element in a chunk."""
    return int(name.split(".")[0] in LAYER_GROUPS) + ("expert" in weight.axes)


def _copied(form: HfArrays, name: str, weight: Weight, suffix: str) -> ArraySpec:
    """An array of the source's values: the dtype of its tensors."""
    value, mapping = weight.get_raw_value(), form.mapping(name)
    shape = (*value.shape[: len(mapping.index)], *mapping.part_shape)
    dtype = np.dtype(value.dtype) if weight.pinned else common_dtype(form.dtypes(name))
    lead = _lead(name, weight)
    layer = int(name.split(".")[0] in LAYER_GROUPS)
    if suffix in (".scale", ".zero_point") and math.prod(shape[layer:]) * dtype.itemsize <= _MAX_SCALES_BYTES:
        lead = layer
    return ArraySpec(shape, dtype.name, _chunk(shape, lead, dtype.itemsize))


def _chunk(shape: tuple[int, ...], lead: int, itemsize: int) -> tuple[int, ...]:
    """One element of each leading dimension, and of the others as many as `MAX_CHUNK_BYTES` holds, whole inputs."""
    chunk = [1] * lead + list(shape[lead:])
    for dimension in range(lead, len(shape) - 1):
        rest = math.prod(chunk[dimension + 1 :]) * itemsize
        if chunk[dimension] * rest <= MAX_CHUNK_BYTES:
            break
        # Parts of equal size, rather than full ones and a rest.
        pieces = -(-chunk[dimension] // max(1, MAX_CHUNK_BYTES // rest))
        chunk[dimension] = -(-chunk[dimension] // pieces)
    return tuple(chunk)


def _items(array: str, spec: ArraySpec, depth: int) -> Iterator[WorkItem]:
    """The items of an array: all boxes of one place in the first `depth` dimensions, which distinguish its tensors."""
    single = next((i for i, size in enumerate(spec.chunk) if size != 1), len(spec.chunk))
    lead = min(single, depth)
    itemsize = spec.nbytes // math.prod(spec.shape)
    for place in itertools.product(*(range(size) for size in spec.shape[:lead])):
        front = tuple(slice(at, at + 1) for at in place)
        boxes = tuple(front + box for box in _boxes(spec.shape[lead:], spec.chunk[lead:]))
        sizes = [itemsize * math.prod(part.stop - part.start for part in box) for box in boxes]
        yield WorkItem(array, boxes, sum(sizes), max(sizes))


def _boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
    ranges = [range(0, size, part) for size, part in zip(shape, chunk, strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(
            slice(start, min(start + part, size)) for start, part, size in zip(starts, chunk, shape, strict=True)
        )


def _quantized(
    name: str, weight: Weight, mapping: TensorMapping, layout: Format, *, depth: int
) -> tuple[dict[str, ArraySpec], list[WorkItem]]:
    """The arrays of a weight that is quantised on the way, and its items, whose boxes are the weight's.

    Nothing of it is divided by rows: narrow matrices are small enough for one chunk, and a layer's scales are one file.
    The source's tensors are distinguished by the weight's first `depth` dimensions.
    """
    shape = tuple(weight.get_raw_value().shape)
    matrix = len(mapping.index)
    stored = stored_mappings(layout, "", mapping)
    full = {
        part.array: ((*shape[:matrix], *stored[part.suffix].part_shape), made_dtype(layout, part))
        for part in layout.parts
        if part.array is not None
    }
    lead = _lead(name, weight)
    values, dtype = next(iter(full.values()))
    if math.prod(values[lead:]) * dtype.itemsize > MAX_CHUNK_BYTES:
        lead = matrix
    arrays = {
        name + suffix: ArraySpec(size, dtype.name, (1,) * lead + size[lead:]) for suffix, (size, dtype) in full.items()
    }
    held = sum(spec.nbytes for spec in arrays.values()) // math.prod(shape[:lead])
    together = min(lead, depth)
    whole = tuple(slice(0, size) for size in shape[lead:])
    items = []
    for place in itertools.product(*(range(size) for size in shape[:together])):
        front = tuple(slice(at, at + 1) for at in place)
        boxes = tuple(front + box + whole for box in _boxes(shape[together:lead], (1,) * (lead - together)))
        items.append(WorkItem(name, boxes, held * len(boxes), held))
    return arrays, items
