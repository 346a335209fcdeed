"""Hugging Face safetensors -> the one Orbax layout, chunk by chunk, by threads and processes, resumable.

Every tensor of the source is matched with a weight before a byte is written. Then each chunk (one layer by one expert)
is read, hashed and written; orientation is the same on both sides, so this is a copy. Quantised matrices become
bfloat16 on the way, or are copied as they are; others are quantised on the way on request. Memory holds a few chunks. A
killed conversion resumes where it stopped, and the target gets its name when it is complete. The output depends on the
content of the source alone, not on its place or on the time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from glm_jax.checkpoint import quantize as quantizing
from glm_jax.checkpoint.atomic import check_target
from glm_jax.checkpoint.conversion import Conversion, gather_records
from glm_jax.checkpoint.files import is_url
from glm_jax.checkpoint.foreign import check_files
from glm_jax.checkpoint.journal import Shard, digest
from glm_jax.checkpoint.layout import Layout, plan_layout
from glm_jax.checkpoint.orbax_io import OrbaxWriter
from glm_jax.checkpoint.orbax_source import LAYOUT_VERSION, TensorRecord
from glm_jax.checkpoint.quantize import Loss
from glm_jax.checkpoint.resume import Progress, default_threads, resumable_directory
from glm_jax.checkpoint.source import HfSource
from glm_jax.checkpoint.verify import check_equal
from glm_jax.configs.places import hub_hint
from glm_jax.errors import CheckpointError, InputError

DEQUANTIZE, KEEP = QUANTIZED = ("dequantize", "keep")
_TIMESTAMP_NS = 0  # fixed, so that the same source gives the same bytes


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion or an export did.

    Attributes:
        tensors: number of Hugging Face tensors read or written.
        nbytes: bytes of these tensors.
        seconds: wall time.
        notes: sentences about decisions that the user should know.
        complete: whether the target is complete; False while other shards are still being converted.
        losses: by weight, what rounding changed in the weights that were quantised on the way.
    """

    tensors: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...]
    complete: bool = True
    losses: Mapping[str, Loss] = dataclasses.field(default_factory=dict)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    quantized: str = DEQUANTIZE,
    quantize: str | None = None,
    allow_unknown: Collection[str] = (),
    shard: str | Shard = Shard(),  # noqa: B008 (a frozen value)
    verified: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a Hugging Face directory to an Orbax directory at `target`.

    Dtypes are kept (the router's bias is stored as float32); the MTP layer and its copies are part of it; the config,
    tokenizer and template files go along. Killed and started again it goes on, and the result has the same bytes.

    Args:
        source: directory with config.json and safetensors, one file or shards with an index; or a URL of one that
            fsspec knows, such as gs://bucket/GLM-4.5 (with the extra `remote`, `gcs` or `s3`).
        target: a directory that does not exist, or is empty.
        quantized: what becomes of quantised matrices (FP8, int4): "dequantize" makes them bfloat16; "keep" copies
            values and scales, so that an export has the source's bytes again.
        quantize: quantise the experts' and the dense projections on the way: "int8", "fp8" (a scale for each output),
            "int4" (groups of 128 inputs) or "fp8-blocks" (128 x 128). Routers, norms, embeddings, biases, the head and
            the MTP layer's projection stay as they are: they are small, and accuracy depends on them.
        allow_unknown: keys of config.json to pass over although they may change what the model computes.
        shard: this process among several that share the conversion: "0/4" to "3/4". The last to end completes it.
        verified: read both sides again and compare them (as `verify`) before the target gets its name.
        threads: items converted at a time; by default what suits the cores.
        progress: called with the bytes done and the bytes in all, which with `verified` are those of both passes.

    Raises:
        CheckpointError: the source is not complete or not consistent, cannot be read, or changed since the conversion
            was begun; the target is taken, inside the source, or cannot be written, or another process works on it; or
            a weight is quantised in part, and cannot be kept.
        ConfigError: the architecture or the quantisation is not supported.
        InputError: an argument has none of its values.
    """
    started = time.monotonic()
    share = Shard.parse(shard) if isinstance(shard, str) else shard
    copying, comparing = _two_passes(progress) if verified else (progress, None)
    hf, layout, notes = _plan(source, target, quantized=quantized, quantize=quantize, allow_unknown=allow_unknown)
    with resumable_directory(target, _identity(hf, layout), share) as work:
        work.check_space(layout.items)
        writer = OrbaxWriter(work.path, layout.arrays, resume=True, timestamp_ns=_TIMESTAMP_NS)
        conversion = Conversion(hf, layout, writer)

        def finish(done: dict[str, Any]) -> None:
            writer.close()
            conversion.complete(work.path, done)
            if verified:
                check_equal(source, work.path, threads=threads, progress=comparing, allow_unknown=allow_unknown)

        work.run(layout.items, conversion.process, threads=threads or default_threads(), progress=copying)
        complete = work.finish(layout.items, finish)
        records, losses = gather_records(hf, work.done.values())
    nbytes = sum(hf.files.tensors[name].nbytes for name in records)
    seconds, all_notes = time.monotonic() - started, (*_notes(hf, records), *notes)
    return Report(len(records), nbytes, seconds, all_notes, complete=complete, losses=losses)


def _two_passes(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """The progress of a conversion and of the comparison after it, as halves of one whole."""
    if progress is None:
        return None, None
    return (lambda done, total: progress(done, 2 * total)), (lambda done, total: progress(total + done, 2 * total))


def _plan(
    source: str | Path, target: str | Path, *, quantized: str, quantize: str | None, allow_unknown: Collection[str]
) -> tuple[HfSource, Layout, list[str]]:
    """Check the arguments of a conversion, open its source and lay out the target; with notes for the user."""
    if quantized not in QUANTIZED:
        raise InputError(f"quantized is {quantized!r}; it is one of {', '.join(map(repr, QUANTIZED))}")
    if quantize is not None and quantized == KEEP:
        raise InputError("quantized='keep' keeps the source's form and quantize makes another; give one of the two")
    method = None if quantize is None else quantizing.method(quantize)
    check_target_beside(source, target)
    if not is_url(source) and not Path(source).is_dir():
        check_files(Path(source).parent, [Path(source).name])
        line = f"{source} is not a directory; the source is a Hugging Face checkpoint directory"
        raise CheckpointError(line + hub_hint(source))
    hf = HfSource(source, allow_unknown=allow_unknown)
    made, notes = ({}, list[str]()) if method is None else quantizing.choose(hf.config, method)
    layout = plan_layout(hf, keep=quantized == KEEP, made=made)
    if quantized == KEEP and not layout.kept:
        notes.append(f"{source} is not quantised: its tensors are copied as they are")
    return hf, layout, notes


def check_target_beside(source: str | Path, target: str | Path) -> None:
    """Raise CheckpointError unless `target` is free and not inside `source`, which is to stay as it is."""
    final = check_target(target)
    if not is_url(source) and final.is_relative_to(Path(source).resolve()):
        raise CheckpointError(f"{target}: lies inside the source {source}; name a directory outside it")


def _identity(hf: HfSource, layout: Layout) -> dict[str, Any]:
    """What identifies a conversion for resuming: the state of its files, and the options that decide the output."""
    files = [(name, opened.file.size, opened.file.version) for name, opened in hf.files.files.items()]
    arrays = {name: (spec.shape, spec.dtype, spec.chunk) for name, spec in layout.arrays.items()}
    formats = {name: form.to_json() for name, form in layout.kept.items()}
    formats |= {name: form.to_json() for name, (form, _) in layout.made.items()}
    return {
        "source": digest([files, hashlib.sha256(hf.config_json).hexdigest()]),
        "layout": digest([LAYOUT_VERSION, sorted(arrays.items())]),
        "quantisation": digest(sorted(formats.items())),
    }


def _notes(hf: HfSource, records: dict[str, TensorRecord]) -> tuple[str, ...]:
    notes = list(hf.notes)
    if hf.plan.ignored:
        notes.append(f"{len(hf.plan.ignored)} superfluous tensors passed over, such as {hf.plan.ignored[0]}")
    if hf.files.unlisted:
        names = ", ".join(Path(place).name for place in hf.files.unlisted)
        notes.append(f"files that the index does not name were not read: {names}")
    by_weight = {mapping.weight: name for name, mapping in hf.plan.mappings.items()}
    for kind in hf.config.mtp_copies:
        copy, main = by_weight[f"mtp.{kind}.weight"], by_weight.get(f"{kind}.weight")
        if main is not None and _sums(hf, copy, records) != _sums(hf, main, records):
            notes.append(f"{copy} differs from {main}; it is kept for export, and the model uses {main} for both")
    return tuple(notes)


def _sums(hf: HfSource, name: str, records: dict[str, TensorRecord]) -> list[str | None]:
    """The checksums of a tensor; None where another shard has not got there yet."""
    return [records[stored].sha256 if stored in records else None for stored in hf.plan.stored(name)]
