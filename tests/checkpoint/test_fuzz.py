"""Whatever happens to a file, reading it gives what is right or one clear line: no traceback, no hang, no flood.

The damage is drawn by seeds; more of them run with `-m slow`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint import dry_run, open_source
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name
from tests import published
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.mutations import mutate

SOURCES = {"glm": None, "deepseek": "deepseek-odd", "kimi": "kimi-32", "zero points": "int4-asymmetric"}
ROUNDS = pytest.mark.parametrize(
    ("first", "rounds"), [(0, 12), pytest.param(1000, 150, marks=pytest.mark.slow)], ids=["few", "many"]
)
MOST_MEGABYTES = 400  # that all the readings may add to this process


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each kind of source its directory, and what it was converted to."""
    root = tmp_path_factory.mktemp("fuzz")
    for name, kind in SOURCES.items():
        if kind is None:
            published.checkpoint(root / name, shards=2)
        else:
            sources.checkpoint((sources.KINDS | sources.COMPRESSED)[kind]).write(root / name, shards=2)
        glm_jax.convert(root / name, root / f"{name}-orbax", quantized="keep")
    return root


def read_all(directory: Path) -> dict[str, np.ndarray]:
    source, arrays = open_source(directory), {}
    for name, weight in weights_by_name(Transformer(source.config)).items():
        shape = weight.get_raw_value().shape
        assert math.prod(shape) < 10**8, f"{name} {shape} was accepted"
        arrays[name] = source.read(name, tuple(slice(0, size) for size in shape))
    return arrays


def outcomes(path: Path, use: Callable[[], object], *, first: int, rounds: int) -> Iterator[object]:
    """Use `path` after each of the rounds of damage: the result or the error of each, held to what all must keep."""
    content, before = path.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for seed in range(first, first + rounds):
            path.write_bytes(mutate(content, random.Random(f"{path.parent.name}/{path.name}/{seed}")))
            try:
                outcome = use()
            except glm_jax.Error as error:
                assert "\n" not in str(error) and len(str(error)) < 20_000
                outcome = error
            yield outcome
    finally:
        path.write_bytes(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEGABYTES * 1024


@ROUNDS
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("name", SOURCES)
def test_sources(place, name, file, first, rounds):
    directory = place / name
    for outcome in outcomes(directory / file, lambda: read_all(directory), first=first, rounds=rounds):
        assert isinstance(outcome, (dict, glm_jax.Error))
    for outcome in outcomes(directory / file, lambda: dry_run(directory), first=first, rounds=rounds):
        assert all("\n" not in problem for problem in outcome.problems)


@ROUNDS
@pytest.mark.parametrize("file", ["glm_jax.json", "default/_METADATA", "*/zarr.json", "*/c.0.1.0*"])
@pytest.mark.parametrize("name", SOURCES)
def test_checkpoints(place, name, file, first, rounds):
    """Arrays that are read at all are those that were written."""
    directory = place / f"{name}-orbax"
    (path, *_) = sorted((directory / "default").glob(f"moe.moe.experts.down{file}")) or [directory / file]
    expected = read_all(directory)
    for outcome in outcomes(path, lambda: read_all(directory), first=first, rounds=rounds):
        if isinstance(outcome, dict):
            same = [outcome[key].tobytes() == array.tobytes() for key, array in expected.items() if key in outcome]
            assert all(same)
        elif path.name.startswith("c."):
            assert str(path.parent) in str(outcome)
        else:
            assert str(directory) in str(outcome)


@ROUNDS
@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_tensors(place, tmp_path, packed, first, rounds):
    tensors = {
        name: {"shape": list(array.shape), "dtype": "BF16", "file": "x"}
        for name, array in published.read(place / "glm").items()
    }
    text = json.dumps(tensors).encode()
    (path := tmp_path / "list").write_bytes(gzip.compress(text) if packed else text)
    for outcome in outcomes(path, lambda: dry_run(path, config=place / "glm"), first=first, rounds=rounds):
        assert all("\n" not in problem for problem in outcome.problems)


def interrupted(source: Path, target: Path) -> Path:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        glm_jax.convert(source, target, progress=stop)
    (partial,) = target.parent.glob(f"{target.name}.partial-*")
    return partial


@pytest.mark.parametrize(("first", "rounds"), [(0, 6), pytest.param(1000, 60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["journal-0-of-1.jsonl", "default/moe.moe.experts.down/zarr.json"])
def test_unfinished_conversions(place, tmp_path, file, first, rounds):
    """What is damaged is done again, or refused; what appears is what an uninterrupted conversion writes."""
    source, target = place / "glm", tmp_path / "out"
    expected = {path.name: path.read_bytes() for path in (place / "glm-orbax").rglob("*") if path.is_file()}
    partial = interrupted(source, target)
    kept = shutil.copytree(partial, tmp_path / "kept")

    def finish() -> dict[str, bytes]:
        glm_jax.convert(source, target)
        return {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()}

    for outcome in outcomes(kept / file, lambda: resume(kept, partial, finish), first=first, rounds=rounds):
        if isinstance(outcome, dict):
            assert outcome == expected
            shutil.rmtree(target)
        else:
            assert not target.exists() and str(tmp_path / "out") in str(outcome)


def resume(kept: Path, partial: Path, finish: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(kept, partial)
    return finish()


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts", "vocab_size", "hidden_size"])
def test_numbers_beyond_all_bounds(place, tmp_path, key):
    """Nothing as large as such a number is made."""
    for name in SOURCES:
        source = shutil.copytree(place / name, tmp_path / name)
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, key: 10**12}))
        for use in (open_source, dry_run):
            with contextlib.suppress(glm_jax.Error):
                assert use(source).problems


def test_a_list_that_unpacks_to_more_than_a_list(tmp_path, monkeypatch):
    monkeypatch.setitem(dry_run.__globals__, "_MAX_LIST_BYTES", 10_000)
    (tmp_path / "list").write_bytes(gzip.compress(b" " * 20_000))
    (problem,) = dry_run(tmp_path / "list", config="glm-4.5-air").problems
    assert "more than 10000 bytes" in problem
