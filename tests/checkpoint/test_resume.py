"""A conversion that is killed goes on where it stopped, is shared by processes, and gives the same bytes each time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import glm_jax
from glm_jax.checkpoint.journal import Journal, Shard
from tests import processes, published

# Converts as often as the lines on stdin say, each line (target, shard, item to be killed at, microseconds after it).
CONVERTER = """
    import os, signal, sys, threading, time
    import glm_jax
    source, target, shard, verb, items, delay = sys.argv[1:]
    seen = 0
    def progress(done, total):
        global seen
        seen += 1
        if seen == int(items):
            def end():
                time.sleep(int(delay) / 1e6)
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=end).start()
    options = {} if verb == "export" else {"shard": shard}
    report = getattr(glm_jax, verb)(source, target, progress=progress, **options)
    print("complete" if report.complete else "incomplete")
"""
NEVER = 10**9


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.checkpoint(tmp_path_factory.mktemp("resume") / "hf", shards=3)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    """What an uninterrupted conversion writes."""
    glm_jax.convert(source, source.with_name("expected"))
    return content(source.with_name("expected"))


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def start(source: Path, target: Path, *, shard: str = "0/1", verb: str = "convert", kill: tuple[int, int] = (NEVER, 0)):
    return processes.started(processes.command(CONVERTER, source, target, shard, verb, *kill))


def kill_until_complete(source: Path, target: Path, kills: int, *, seed: int, verb: str = "convert") -> int:
    """Start again after each kill; returns how many there were."""
    chance, killed = random.Random(seed), 0
    while True:
        kill = (chance.randint(1, 12), chance.randint(0, 4000)) if killed < kills else (NEVER, 0)
        with start(source, target, verb=verb, kill=kill) as process:
            _, complaint = process.communicate(timeout=processes.GIVE_UP)
        if process.returncode == 0:
            return killed
        assert process.returncode == -signal.SIGKILL, complaint
        assert not target.exists()
        killed += 1


def test_killed_and_resumed_twice(tmp_path, source, expected):
    assert kill_until_complete(source, tmp_path / "out", 2, seed=0) == 2
    assert content(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_twenty_times_in_all(tmp_path, source, expected, seed):
    assert kill_until_complete(source, tmp_path / "out", 5, seed=seed) == 5
    assert content(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]


def test_an_export_that_is_killed_goes_on(tmp_path, source):
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "expected")
    kill_until_complete(tmp_path / "orbax", tmp_path / "out", 1, seed=1, verb="export")
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_processes_share_a_conversion(tmp_path, source, expected):
    with contextlib.ExitStack() as stack:
        shares = [stack.enter_context(start(source, tmp_path / "out", shard=f"{i}/3")) for i in range(3)]
        said = [share.communicate(timeout=processes.GIVE_UP)[0].strip() for share in shares]
    assert [share.returncode for share in shares] == [0, 0, 0]
    assert "complete" in said
    assert content(tmp_path / "out") == expected


def test_shards_one_after_the_other(tmp_path, source, expected):
    reports = [glm_jax.convert(source, tmp_path / "out", shard=f"{i}/3") for i in (2, 0, 1)]
    assert [report.complete for report in reports] == [False, False, True]
    assert content(tmp_path / "out") == expected
    assert reports[-1].tensors == len(published.read(source))


def test_one_process_takes_over_from_several(tmp_path, source, expected):
    assert not glm_jax.convert(source, tmp_path / "out", shard="1/4").complete
    assert glm_jax.convert(source, tmp_path / "out").complete
    assert content(tmp_path / "out") == expected


def test_a_second_start_of_the_same_share_is_refused(tmp_path, source, expected):
    """While one works, another says so; the first is not disturbed."""
    refused = []

    def progress(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(glm_jax.CheckpointError, match=r"another process works on shard 0/1 there") as caught:
                glm_jax.convert(source, tmp_path / "out")
            refused.append(caught)

    glm_jax.convert(source, tmp_path / "out", progress=progress)
    assert refused and content(tmp_path / "out") == expected


def interrupted(source: Path, target: Path, **options: Any) -> Path:
    """A conversion that fails midway; returns the unfinished directory."""

    def progress(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        glm_jax.convert(source, target, progress=progress, **options)
    (partial,) = target.parent.glob(f"{target.name}.partial-*")
    return partial


def test_what_is_done_is_not_done_again(tmp_path, source, expected):
    interrupted(source, tmp_path / "out")
    first: list[int] = []
    glm_jax.convert(source, tmp_path / "out", progress=lambda done, total: first.append(done * 3 // total))
    assert first[0] >= 1 and content(tmp_path / "out") == expected


@pytest.mark.parametrize("change", ["touched", "another option", "config"])
def test_a_changed_source_is_refused(tmp_path, source, change):
    mine = shutil.copytree(source, tmp_path / "hf")
    partial = interrupted(mine, tmp_path / "out")
    before = content(partial)
    options = {}
    if change == "touched":
        file = next(mine.glob("*.safetensors"))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    elif change == "config":
        (mine / "config.json").write_text((mine / "config.json").read_text() + "\n")
    else:
        options = {"quantize": "int8"}
    with pytest.raises(glm_jax.CheckpointError, match=r"was begun with other input \((source|layout|quantisation)"):
        glm_jax.convert(mine, tmp_path / "out", **options)
    assert content(partial) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_journal_that_a_crash_cut_short(tmp_path, source, expected, cut):
    partial = interrupted(source, tmp_path / "out")
    (journal,) = partial.glob("journal-*")
    journal.write_bytes(journal.read_bytes()[:-cut])
    glm_jax.convert(source, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_a_failure_before_anything_is_done_leaves_nothing(tmp_path, source):
    with pytest.raises(glm_jax.InputError, match="shard 'x'; right is INDEX/COUNT"):
        glm_jax.convert(source, tmp_path / "out", shard="x")
    with pytest.raises(glm_jax.InputError, match="shard '3/3'"):
        glm_jax.convert(source, tmp_path / "out", shard="3/3")
    assert os.listdir(tmp_path) == []


def test_a_journal_holds_what_was_appended(tmp_path):
    journal = Journal(tmp_path, {"work": 1}, Shard())
    journal.append([("a", {"x": [1, 2]}), ("b", None)])
    journal.close()
    file = tmp_path / "journal-0-of-1.jsonl"
    file.write_bytes(file.read_bytes() + b'{"unit": "c", "no')
    again = Journal(tmp_path, {"work": 1}, Shard())
    assert again.done() == {"a": {"x": [1, 2]}, "b": None}
    again.append([("c", 3)])
    again.close()
    first, *items = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(line.pop("crc32") for line in (first, *items))
    assert first == {"identity": {"work": 1}}
    assert items == [{"unit": "a", "note": {"x": [1, 2]}}, {"unit": "b", "note": None}, {"unit": "c", "note": 3}]
    other = Journal(tmp_path, {"work": 2}, Shard(1, 2))
    with pytest.raises(glm_jax.CheckpointError, match=r"other input \(work changed"):
        other.done()
    other.close()
