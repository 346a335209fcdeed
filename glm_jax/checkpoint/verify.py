"""Checks that a converted checkpoint holds its source, tensor by tensor, without running a model.

The source is converted once more, and every byte is compared with what is stored instead of being written; the
checksums of its tensors are compared with those in the manifest. A byte that changed on either side is found, and the
tensor that has it is named.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.checkpoint.conversion import Conversion, assets_of
from glm_jax.checkpoint.layout import Layout, WorkItem, plan_layout
from glm_jax.checkpoint.orbax_io import ArraySpec
from glm_jax.checkpoint.orbax_source import ASSETS, OrbaxSource, is_orbax
from glm_jax.checkpoint.quantized import Index
from glm_jax.checkpoint.resume import Progress, default_threads, run_items
from glm_jax.checkpoint.source import HfSource
from glm_jax.errors import CheckpointError

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a comparison found.

    Attributes:
        tensors: number of the source's tensors that were read.
        nbytes: bytes that were compared.
        seconds: wall time.
        problems: a sentence for each tensor and chunk that is not as it should be; empty if all are equal.
    """

    tensors: int
    nbytes: int
    seconds: float
    problems: tuple[str, ...]


def verify(
    source: str | Path,
    target: str | Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    allow_unknown: Collection[str] = (),
) -> Verification:
    """Compare a converted checkpoint with the Hugging Face directory that it was made of.

    Args:
        source: the Hugging Face directory, or its URL.
        target: the directory that `convert` made of it.
        threads: items compared at a time; by default what suits the cores.
        progress: called with the bytes done and the bytes in all.
        allow_unknown: keys of the source's config.json that were passed over although they may change what the model
            computes.

    Raises:
        CheckpointError: one of the two does not exist or cannot be read.
        ConfigError: the source's architecture or quantisation is not supported.
    """
    started = time.monotonic()
    if not is_orbax(Path(target)):
        raise CheckpointError(f"{target} is no Orbax checkpoint of glm_jax (it has no glm_jax.json)")
    hf, checkpoint = HfSource(source, allow_unknown=allow_unknown), OrbaxSource(target)
    comparison = _Comparison(hf, checkpoint, Path(target))
    total, done = sum(item.nbytes for item in comparison.layout.items), 0

    def note(items: Any) -> None:
        nonlocal done
        done += sum(item.nbytes for item, _ in items)

    def shown() -> None:
        if progress is not None:
            progress(done, total)

    items = comparison.layout.items
    run_items(items, comparison.process, threads=threads or default_threads(), done=note, step=shown)
    problems = tuple(dict.fromkeys(comparison.problems))
    return Verification(comparison.tensors, total, time.monotonic() - started, problems)


def check_equal(
    source: str | Path,
    target: str | Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    allow_unknown: Collection[str] = (),
) -> None:
    """Raise CheckpointError with the first differences if `verify` finds any."""
    problems = verify(source, target, threads=threads, progress=progress, allow_unknown=allow_unknown).problems
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{target} is not what {source} holds: {'; '.join(problems[:_SHOWN])}{more}")


class _Comparison:
    """The writer of a conversion that compares each slice with the stored one instead of writing it."""

    def __init__(self, hf: HfSource, checkpoint: OrbaxSource, target: Path) -> None:
        self._hf, self._checkpoint, self._target = hf, checkpoint, target
        self.problems: list[str] = []
        self.tensors = 0
        self._lock = threading.Lock()
        kept = checkpoint.manifest.kept
        same = {name: form for name, form in hf.quantized_weights().items() if form and kept.get(name) == form}
        made = {name: form for name, form in kept.items() if name not in same}
        self.layout: Layout = plan_layout(hf, keep=bool(same), made=made)
        self.arrays: dict[str, ArraySpec] = dict(self.layout.arrays)
        self._conversion = Conversion(hf, self.layout, self)
        self._compare_metadata()

    def process(self, item: WorkItem) -> None:
        """Compare everything that an item's tensors go to."""
        note = self._conversion.process(item)
        recorded = self._checkpoint.manifest.tensors
        for name, (dtype, summed) in note["tensors"].items():
            said = recorded.get(name)
            if said is None:
                self._add(f"source tensor {name} is not among those that were converted")
            elif (said.dtype, said.sha256) != (dtype, summed):
                self._add(f"source tensor {name} is not what was converted: its checksum or dtype changed")
        with self._lock:
            self.tensors += len(note["tensors"])

    def write(self, name: str, index: Index, array: np.ndarray) -> None:
        """Compare a slice with the stored one."""
        try:
            stored = self._checkpoint.arrays.read(name, index)
        except CheckpointError as error:
            self._add(str(error))
            return
        if stored.dtype != array.dtype or stored.tobytes() != np.ascontiguousarray(array).tobytes():
            box = ", ".join(f"{part.start}:{part.stop}" for part in index)
            tensors = ", ".join(self._tensors_at(name, index))
            self._add(f"array {name}[{box}] differs from the source ({tensors})")

    def _tensors_at(self, name: str, index: Index) -> list[str]:
        arrays = self.layout.source
        if name not in arrays:  # a part of a weight that is quantised on the way
            return [name.rsplit(".", 1)[0]]
        found = [tensor for tensor, _ in arrays.tensors_in(name, index)]
        return [*found[:3], *(["..."] if len(found) > 3 else [])]

    def _compare_metadata(self) -> None:
        """Compare the configuration, the arrays' shapes and dtypes, and the files beside the tensors."""
        if self._hf.config != self._checkpoint.config:
            self._add("the manifest's configuration is not that of the source")
        found = self._checkpoint.arrays.specs()
        for name in sorted(self.arrays.keys() ^ found.keys()):
            self._add(f"array {name} {'is missing' if name in self.arrays else 'belongs to nothing in the source'}")
        for name, spec in self.arrays.items():
            if name in found and (found[name].shape, found[name].dtype) != (spec.shape, spec.dtype):
                self._add(f"array {name} is {found[name].dtype} {found[name].shape}, not {spec.dtype} {spec.shape}")
        theirs = dict(assets_of(self._hf.directory))
        ours = (self._target / ASSETS).iterdir() if (self._target / ASSETS).is_dir() else ()
        for path in sorted(ours):
            beside = theirs.get(path.name)
            if beside is None or beside.fetch(0, beside.size) != path.read_bytes():
                self._add(f"file {ASSETS}/{path.name} differs from the source's")

    def _add(self, problem: str) -> None:
        with self._lock:
            self.problems.append(problem)
