"""The Orbax layout -> Hugging Face safetensors, one tensor an expert, with the source's own dtypes and files.

Weights that are stored quantised are written as the tensors of their format; those that were dequantised are bfloat16.
On request, weights are quantised or dequantised on the way; config.json says what was done. Each file is an item of
work: a killed export resumes with the files that it had not finished. Memory holds a chunk for each file being written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint import quantize as quantizing
from glm_jax.checkpoint.compressed_tensors import without_static_scales
from glm_jax.checkpoint.convert import Report, check_target_beside
from glm_jax.checkpoint.journal import Shard, digest
from glm_jax.checkpoint.names import TensorMapping, canonical_mappings, fused_mappings
from glm_jax.checkpoint.orbax_source import ASSETS, MANIFEST, OrbaxSource, is_orbax, leading_ones
from glm_jax.checkpoint.quantization_config import quantization_config, read_quantization
from glm_jax.checkpoint.quantized import DEQUANTIZED, FLOAT_DTYPES, Format, Index, Part, stored_mappings
from glm_jax.checkpoint.resume import Progress, default_threads, resumable_directory
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES, TensorSpec, dtype_name
from glm_jax.checkpoint.safetensors_writer import SafetensorsWriter
from glm_jax.configs import to_hf
from glm_jax.configs.hf import read_config_json, write_config_json
from glm_jax.configs.hf_nested import text_config
from glm_jax.errors import CheckpointError, InputError

MAX_SHARD_BYTES = 5_000_000_000
BFLOAT16 = "bfloat16"
_HELD_BYTES = 64 * 2**20  # of an array: a chunk that several tensors lie in is read once
_SLAB_VALUES = 2**24  # of a weight, dequantised or quantised at a time


def export(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    weights: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the Hugging Face directory of an Orbax checkpoint; tensors get the dtypes that they were converted from.

    Killed and started again it goes on, and the result has the same bytes.

    Args:
        source: directory written by `convert`.
        target: a directory that does not exist, or is empty.
        max_shard_bytes: size at which a new file begins.
        weights: what the experts' and the dense projections' weights are written as: "bfloat16", "fp8-blocks"
            (DeepSeek's 128 x 128), "fp8", "int8" or "int4" (compressed-tensors); by default what they are stored as.
        threads: files written at a time; by default what suits the cores.
        progress: called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: the source is damaged or no Orbax checkpoint, or the target is taken, inside the source, or
            cannot be written; or a weight cannot be quantised.
        InputError: `weights` is none of these.
    """
    started = time.monotonic()
    if weights not in (None, BFLOAT16, *quantizing.METHODS):
        names = ", ".join((BFLOAT16, *quantizing.METHODS))
        raise InputError(f"weights is {weights!r}; it is one of {names}, or not given")
    check_target_beside(source, target)
    directory = Path(source)
    if not is_orbax(directory):
        raise CheckpointError(f"{directory} is no Orbax checkpoint of glm_jax (it has no glm_jax.json)")
    checkpoint = OrbaxSource(directory)
    chosen = _plan(checkpoint, weights)
    plan = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in chosen.tensors.items()]
    manifest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    identity = {"source": manifest, "files": digest([max_shard_bytes, [dataclasses.astuple(spec) for spec in plan]])}
    config = _config(checkpoint, directory / ASSETS, chosen)
    with resumable_directory(target, identity, Shard()) as work:
        writer = SafetensorsWriter(work.path, plan, max_shard_bytes=max_shard_bytes, resume=True)
        items = [_File(name, writer.file_bytes(name), members) for name, members in writer.files.items()]
        for name in work.done:
            writer.take_over(name)
        work.check_space(items)
        copier = _Copier(checkpoint, chosen.tensors, writer)
        work.run(items, copier.process, threads=threads or default_threads(), progress=progress)

        def complete(_: dict[str, Any]) -> None:
            writer.close()
            _copy_assets(directory / ASSETS, work.path, config)

        work.finish(items, complete)
    total = sum(spec.nbytes for spec in plan)
    return Report(len(plan), total, time.monotonic() - started, ())


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor to write.

    Attributes:
        shape: of the tensor.
        dtype: in safetensors' words.
        mapping: the array, or the weight, that it is part of; None for one that repeats a shape.
        weight: whether the mapping is one of a weight, read as the float values that it stands for.
        made: the format and the part of it, of a weight that is quantised on the way.
        constant: the content of a tensor that repeats a shape.
    """

    shape: tuple[int, ...]
    dtype: str
    mapping: TensorMapping | None = None
    weight: bool = False
    made: tuple[Format, Part] | None = None
    constant: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _File:
    """One output file, as an item of work."""

    name: str
    nbytes: int
    tensors: tuple[str, ...]
    held: int = _HELD_BYTES


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is written.

    Attributes:
        tensors: every tensor by name.
        quantized: the format of each weight's tensor that is quantised, by its name if it were not.
        exempt: the names of the matrices that are not.
    """

    tensors: dict[str, _Tensor]
    quantized: dict[str, Format]
    exempt: tuple[str, ...]


def _plan(checkpoint: OrbaxSource, weights: str | None) -> _Plan:
    """Every tensor to write, and in which format the quantised ones are."""
    kept = checkpoint.manifest.kept
    if weights is None:
        chosen = kept
    else:
        chosen = {} if weights == BFLOAT16 else quantizing.choose(checkpoint.config, quantizing.method(weights))[0]
    tensors: dict[str, _Tensor] = {}
    quantized: dict[str, Format] = {}
    exempt = []
    recorded, mappings = _recorded_dtypes(checkpoint), canonical_mappings(checkpoint.config)
    matrices = {mapping.weight for mapping in mappings.values() if len(mapping.shape) == 2}
    for name, mapping in mappings.items():
        layout = chosen.get(mapping.weight)
        if layout is None:
            tensors[name] = _float_tensor(checkpoint, name, mapping, recorded)
            if mapping.weight in matrices:
                exempt.append(name)
            continue
        quantized[name] = layout
        if kept.get(mapping.weight) == layout:
            tensors.update(_stored_tensors(checkpoint, name, mapping, recorded))
        else:
            tensors.update(_made_tensors(name, mapping, layout))
    return _Plan(tensors, quantized, tuple(exempt))


def _recorded_dtypes(checkpoint: OrbaxSource) -> dict[str, str]:
    """The dtypes of the source's tensors, one for each expert where the source had all experts in one."""
    recorded = {name: record.dtype for name, record in checkpoint.manifest.tensors.items()}
    for name, mapping in fused_mappings(checkpoint.config).items():
        if name in recorded:
            recorded.update((single, recorded[name]) for single in mapping.stands_for)
    return recorded


def _float_tensor(checkpoint: OrbaxSource, name: str, mapping: TensorMapping, recorded: dict[str, str]) -> _Tensor:
    """A tensor of float values: as in the source, or bfloat16 of what is or was quantised."""
    if mapping.weight in checkpoint.manifest.kept:
        return _Tensor(mapping.shape, dtype_name(DEQUANTIZED), mapping, weight=True)
    stored = dtype_name(checkpoint.arrays.spec(mapping.weight).dtype)
    dtype = stored if checkpoint.manifest.was_quantized(name) else recorded.get(name, stored)
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{MANIFEST} is damaged: {name} is {dtype}, not {' or '.join(FLOAT_DTYPES)}")
    return _Tensor(mapping.shape, dtype, mapping)


def _stored_tensors(
    checkpoint: OrbaxSource, name: str, mapping: TensorMapping, recorded: dict[str, str]
) -> Iterator[tuple[str, _Tensor]]:
    """The tensors of a weight that is stored in the format it is to be written in."""
    layout = checkpoint.manifest.kept[mapping.weight]
    stored, shapes = stored_mappings(layout, name, mapping), layout.shapes(mapping.shape)
    for part in layout.parts:
        at, full = stored.get(name + part.suffix), name + part.suffix
        unknown = part.dtypes[0] if at is None else dtype_name(checkpoint.arrays.spec(at.weight).dtype)
        dtype = part.dtypes[0] if len(part.dtypes) == 1 else recorded.get(full, unknown)
        if dtype not in part.dtypes:
            raise CheckpointError(f"{MANIFEST} is damaged: {full} is {dtype}, not {' or '.join(part.dtypes)}")
        yield full, _Tensor(shapes[part.suffix], dtype, at, constant=mapping.shape if at is None else ())


def _made_tensors(name: str, mapping: TensorMapping, layout: Format) -> Iterator[tuple[str, _Tensor]]:
    """The tensors of a weight that is quantised on the way."""
    shapes = layout.shapes(mapping.shape)
    for part in layout.parts:
        if part.array is None:
            yield name + part.suffix, _Tensor(shapes[part.suffix], part.dtypes[0], constant=mapping.shape)
        else:
            dtype = dtype_name(quantizing.made_dtype(layout, part))
            yield name + part.suffix, _Tensor(shapes[part.suffix], dtype, mapping, weight=True, made=(layout, part))


class _Copier:
    """Writes files; several threads may call it at a time."""

    def __init__(self, checkpoint: OrbaxSource, tensors: dict[str, _Tensor], writer: SafetensorsWriter) -> None:
        self._checkpoint, self._tensors, self._writer = checkpoint, tensors, writer

    def process(self, file: _File) -> None:
        """Write every tensor of a file; the file is durable when this returns."""
        held = _Held(self._checkpoint)
        for name in file.tensors:
            tensor, dtype = self._tensors[name], NUMPY_DTYPES[self._tensors[name].dtype]
            if tensor.mapping is None:
                self._writer.write(name, np.array(tensor.constant, dtype))
                continue
            rows = self._weight_rows(name, tensor, tensor.mapping) if tensor.weight else held.rows(tensor.mapping)
            for part in rows:
                self._writer.append(name, part.astype(dtype, copy=False))

    def _weight_rows(self, name: str, tensor: _Tensor, mapping: TensorMapping) -> Iterator[np.ndarray]:
        """A tensor made of a weight's values, some rows at a time."""
        front = tuple(slice(at, at + 1) for at in mapping.index)
        for slab, _ in quantizing.slabs(mapping, _SLAB_VALUES):
            index: Index = (*front, slab, *(slice(0, size) for size in mapping.part_shape[1:]))
            values = self._checkpoint.read(mapping.weight, index)
            if tensor.made is None:
                yield values
                continue
            layout, part = tensor.made
            try:
                yield quantizing.quantize(layout, values.reshape(-1, mapping.shape[1]))[part.suffix]
            except ValueError as error:
                raise CheckpointError(f"{name.removesuffix(part.suffix)}: {error}; it cannot be quantised") from None


class _Held:
    """Reads arrays chunk by chunk and keeps the last small chunk, which the next tensor may lie in, too."""

    def __init__(self, checkpoint: OrbaxSource) -> None:
        self._arrays = checkpoint.arrays
        self._key: tuple[str, tuple[int, ...]] | None = None
        self._content = np.empty(0)

    def rows(self, mapping: TensorMapping) -> Iterator[np.ndarray]:
        """The part of an array that a mapping names, some rows at a time."""
        spec, depth = self._arrays.spec(mapping.weight), len(mapping.index)
        lead = leading_ones(spec.chunk[:depth])
        if spec.nbytes // math.prod(spec.shape[:lead]) <= _HELD_BYTES:
            key = (mapping.weight, mapping.index[:lead])
            if key != self._key:
                self._key, self._content = key, self._arrays.read(*key)
            yield self._content[mapping.index[lead:]]
            return
        first, step = spec.shape[depth], spec.chunk[depth]
        for start in range(0, first, step):
            yield self._arrays.read(mapping.weight, (*mapping.index, slice(start, min(start + step, first))))


def _config(checkpoint: OrbaxSource, assets: Path, chosen: _Plan) -> dict[str, Any]:
    """config.json: the source's own, with the `quantization_config` of what is written."""
    part = False
    if (assets / "config.json").exists():
        whole = read_config_json(assets)
        content, part = dict(text_config(whole)), text_config(whole) is not whole
        if content["model_type"] != checkpoint.config.model_type:  # was part of a multimodal model, stands alone now
            dtype = content.get("dtype") or content.get("torch_dtype") or BFLOAT16
            content = to_hf(checkpoint.config, dtype=dtype)
        elif content.get("tie_word_embeddings", False) != checkpoint.config.tie_embeddings:
            content["tie_word_embeddings"] = checkpoint.config.tie_embeddings
    else:
        dtype = next(
            np.dtype(checkpoint.arrays.spec(name).dtype).name
            for name in ("embedding.weight", *checkpoint.arrays.names())
            if name in checkpoint.arrays.names()
        )
        content = to_hf(checkpoint.config, dtype=dtype)
    if not chosen.quantized:
        content.pop("quantization_config", None)
    elif _says(content, chosen, exactly=part):
        # Scales of activations and of the cache were passed over when the source was converted.
        content["quantization_config"] = without_static_scales(content["quantization_config"])
    else:
        modules: dict[Format, list[str]] = defaultdict(list)
        for name, layout in chosen.quantized.items():
            modules[layout].append(name.removesuffix(".weight"))
        ranked = dict(sorted(modules.items(), key=lambda item: -len(item[1])))
        exempt = [name.removesuffix(".weight") for name in chosen.exempt]
        content["quantization_config"] = quantization_config(ranked, exempt)
    return content


def _says(content: Mapping[str, Any], chosen: _Plan, *, exactly: bool) -> bool:
    """Whether a config.json says of each quantised tensor what its format is.

    With `exactly` also of each other one that it is not quantised: names of a multimodal checkpoint may have a prefix
    there that the tensors no longer have.
    """
    said = read_quantization(content)
    if said is None:
        return False
    named = all(layout in said.layouts_of(name) and not said.exempts(name) for name, layout in chosen.quantized.items())
    return named and not (exactly and any(said.layouts_of(name) and not said.exempts(name) for name in chosen.exempt))


def _copy_assets(assets: Path, target: Path, config: dict[str, Any]) -> None:
    """Copy the tokenizer and template files, and config.json byte for byte if nothing in it changes."""
    for path in sorted(assets.iterdir()) if assets.is_dir() else ():
        shutil.copyfile(path, target / path.name)
    if not (target / "config.json").exists() or read_config_json(target) != config:
        write_config_json(target, config)


__all__ = ["MAX_SHARD_BYTES", "export"]
