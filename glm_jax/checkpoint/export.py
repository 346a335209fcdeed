"""The Orbax layout -> Hugging Face safetensors, one tensor an expert, with the source's own dtypes and files."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from glm_jax.checkpoint.atomic import new_directory
from glm_jax.checkpoint.convert import Progress, Report, check_target_beside
from glm_jax.checkpoint.names import Slot, canonical_slots, fused_slots
from glm_jax.checkpoint.orbax_source import ASSETS, OrbaxSource, is_orbax
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES, TensorSpec, dtype_name
from glm_jax.checkpoint.safetensors_writer import SafetensorsWriter
from glm_jax.configs import to_hf
from glm_jax.configs.hf import write_config_json
from glm_jax.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000


def export(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Write the Hugging Face directory of an Orbax checkpoint; tensors get the dtypes that they were converted from.

    Args:
        source: directory written by `convert`.
        target: a directory that does not exist, or is empty.
        max_shard_bytes: size at which a new file begins.
        progress: called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: the source is damaged or no Orbax checkpoint, or the target is taken, inside the source, or
            cannot be written.
    """
    started = time.monotonic()
    check_target_beside(source, target)
    directory = Path(source)
    if not is_orbax(directory):
        raise CheckpointError(f"{directory} is no Orbax checkpoint of glm_jax (it has no glm_jax.json)")
    checkpoint = OrbaxSource(directory)
    slots = canonical_slots(checkpoint.config)
    dtypes = _dtypes(checkpoint, slots)
    plan = [TensorSpec(name, dtypes[name], slot.shape) for name, slot in slots.items()]
    total = sum(spec.nbytes for spec in plan)
    with new_directory(target, bytes_needed=total) as partial:
        with SafetensorsWriter(partial, plan, max_shard_bytes=max_shard_bytes) as writer:
            _copy(checkpoint, slots, dtypes, writer=writer, progress=progress)
        _copy_assets(checkpoint, directory / ASSETS, partial)
    return Report(len(plan), total, time.monotonic() - started, ())


def _dtypes(checkpoint: OrbaxSource, slots: dict[str, Slot]) -> dict[str, str]:
    """The dtype of each tensor: the source's, or that of the array where the source had another form of it."""
    recorded = {name: record.dtype for name, record in checkpoint.manifest.tensors.items()}
    for name, slot in fused_slots(checkpoint.config).items():
        if name in recorded:
            recorded.update((single, recorded[name]) for single in slot.stands_for)
    specs = checkpoint.arrays.specs()
    return {name: recorded.get(name) or dtype_name(specs[slot.weight].dtype) for name, slot in slots.items()}


def _copy(
    checkpoint: OrbaxSource,
    slots: dict[str, Slot],
    dtypes: dict[str, str],
    *,
    writer: SafetensorsWriter,
    progress: Progress | None,
) -> None:
    """Write every tensor; those that share a chunk (gate and up of one expert) come from one read of it."""
    by_chunk: dict[tuple, list[tuple[str, Slot]]] = defaultdict(list)
    specs = checkpoint.arrays.specs()
    for name, slot in slots.items():
        lead = sum(size == 1 for size in specs[slot.weight].chunk[: len(slot.index)])
        by_chunk[slot.weight, slot.index[:lead]].append((name, slot))
    done, total = 0, sum(spec.nbytes for spec in specs.values())
    for (weight, lead), members in by_chunk.items():
        chunk = checkpoint.arrays.read(weight, lead)
        for name, slot in members:
            part = chunk[slot.index[len(lead) :]]
            writer.write(name, part.reshape(slot.shape).astype(NUMPY_DTYPES[dtypes[name]], copy=False))
        done += chunk.nbytes
        if progress is not None:
            progress(done, total)


def _copy_assets(checkpoint: OrbaxSource, assets: Path, target: Path) -> None:
    if assets.is_dir():
        for path in sorted(assets.iterdir()):
            shutil.copyfile(path, target / path.name)
    if not (target / "config.json").exists():
        dtype = np.dtype(checkpoint.arrays.spec("embedding.weight").dtype).name
        write_config_json(target, to_hf(checkpoint.config, dtype=dtype))
