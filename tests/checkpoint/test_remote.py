"""A checkpoint under a URL is the same checkpoint: whatever answers the requests, and however badly."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint import dry_run, open_source, remote, verify
from glm_jax.checkpoint.directories import open_directory
from glm_jax.checkpoint.files import is_url
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
from glm_jax.sharding import weights_by_name
from tests import processes, published
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.range_server import RangeServer, serving


@pytest.fixture(autouse=True)
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and requests of files that are small, and no pauses."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(remote, "MAX_HELD_BYTES", 100_000)
    monkeypatch.setattr(remote, "_HEAD_BYTES", 1000)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = published.checkpoint(tmp_path_factory.mktemp("remote") / "hf", shards=3)
    (source / "tokenizer.json").write_text("{}" * 3000)
    return source


@pytest.fixture(scope="module")
def expected(local: Path) -> dict[str, bytes]:
    glm_jax.convert(local, local.with_name("expected"))
    return content(local.with_name("expected"))


@pytest.fixture
def server(local: Path) -> Iterator[RangeServer]:
    pytest.importorskip("aiohttp")
    with serving(local) as running:
        yield running


def in_memory(source: Path) -> str:
    """A copy in fsspec's file system of this process's memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in source.iterdir():
        memory.pipe_file(f"/models/{source.name}/{path.name}", path.read_bytes())
    return f"memory://models/{source.name}"


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


PLACES: dict[str, Callable[[Path], str]] = {"memory": in_memory, "file": lambda source: source.as_uri()}


@pytest.mark.parametrize("kind", PLACES)
def test_the_conversion_has_the_same_bytes(tmp_path, local, expected, kind):
    url = PLACES[kind](local)
    report = glm_jax.convert(url, tmp_path / "out")
    assert content(tmp_path / "out") == expected and report.tensors == len(published.read(local))
    assert verify(url, tmp_path / "out").problems == ()


def test_over_http_nothing_is_read_twice(tmp_path, local, expected, server):
    glm_jax.convert(server.url, tmp_path / "out", threads=1)
    assert content(tmp_path / "out") == expected
    read = sum(end - begin for name, begin, end in server.asked if name.endswith(".safetensors"))
    size = sum(path.stat().st_size for path in local.glob("*.safetensors"))
    assert size <= read < 1.3 * size
    assert max(end - begin for _, begin, end in server.asked) <= remote.BLOCK_BYTES


def test_a_server_that_lists_nothing(tmp_path, expected, server):
    server.unlisted = True
    glm_jax.convert(server.url, tmp_path / "out")
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize("options", [{"quantize": "int4"}, {"quantize": "fp8-blocks"}], ids=str)
def test_quantised_on_the_way(tmp_path, local, options):
    glm_jax.convert(local, tmp_path / "local", **options)
    glm_jax.convert(in_memory(local), tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "local")


@pytest.mark.parametrize("quantized", ["keep", "dequantize"])
@pytest.mark.parametrize("kind", ["deepseek-odd", "kimi-32"])
def test_quantised_sources(tmp_path, kind, quantized):
    source = sources.checkpoint(sources.KINDS[kind]).write(tmp_path / "hf", shards=2)
    glm_jax.convert(source, tmp_path / "local", quantized=quantized)
    glm_jax.convert(in_memory(source), tmp_path / "out", quantized=quantized)
    assert content(tmp_path / "out") == content(tmp_path / "local")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_model_is_loaded_from_a_url(tmp_path, local, mesh_of_sizes, sizes):
    """In the one directory are as many tensors as experts, in the other they are one."""
    arrays = published.fused(published.read(local))
    fused = published.write(tmp_path / "fused", published.config_json(), arrays)
    mesh = mesh_of_sizes(sizes)
    ours = weights_by_name(glm_jax.load(local, mesh=mesh))
    for source in (local, fused):
        theirs = weights_by_name(glm_jax.load(in_memory(source), mesh=mesh))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            jax.tree.map(np.testing.assert_array_equal, weight.get_raw_value(), theirs[name].get_raw_value())


def test_a_plan_reads_headers_only(tmp_path, local, server):
    plan, here = dry_run(server.url, tmp_path / "out"), dry_run(local, tmp_path / "out")
    assert plan.problems == () and plan.bytes_in == here.bytes_in and plan.bytes_out == here.bytes_out
    assert plan.rate
    read = sum(end - begin for name, begin, end in server.asked if name.endswith(".safetensors"))
    assert read < sum(path.stat().st_size for path in local.glob("*.safetensors")) / 2


def test_interrupted_and_taken_up_again(tmp_path, local, expected, server):
    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        glm_jax.convert(server.url, tmp_path / "out", progress=stop)
    first: list[int] = []
    glm_jax.convert(server.url, tmp_path / "out", progress=lambda done, total: first.append(done * 3 // total))
    assert first[0] >= 1 and content(tmp_path / "out") == expected


def test_a_source_that_changed_in_between_is_refused(tmp_path, local):
    mine = shutil.copytree(local, tmp_path / "hf")

    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with serving(mine) as server:
        with pytest.raises(KeyboardInterrupt):
            glm_jax.convert(server.url, tmp_path / "out", progress=stop)
        os.utime(next(mine.glob("*.safetensors")), ns=(0, 0))
        with pytest.raises(glm_jax.CheckpointError, match=r"was begun with other input \(source changed"):
            glm_jax.convert(server.url, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- servers that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "failing"])
def test_answers_that_fail_are_asked_for_again(tmp_path, expected, server, fault):
    def fail(done: int, total: int) -> None:
        if done == 0 or done == total:
            setattr(server, fault, 2)

    setattr(server, fault, 2)
    glm_jax.convert(server.url, tmp_path / "out", progress=fail, threads=1)
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize("fault", ["cut", "failing", "shorter"])
def test_answers_that_always_fail_are_one_line(tmp_path, server, fault):
    def fail(done: int, total: int) -> None:
        setattr(server, fault, 10**6)

    with pytest.raises(glm_jax.CheckpointError, match=r"bytes \d+ to \d+ cannot be read, 5 times over: ") as caught:
        glm_jax.convert(server.url, tmp_path / "out", progress=fail)
    assert str(caught.value).startswith(f"{server.url}/model-0") and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    setattr(server, fault, 0)
    glm_jax.convert(server.url, tmp_path / "out")
    assert verify(server.url, tmp_path / "out").problems == ()


def test_a_truncated_file(tmp_path, local):
    mine = shutil.copytree(local, tmp_path / "hf")
    last = sorted(mine.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 100)
    with (
        serving(mine) as server,
        pytest.raises(glm_jax.CheckpointError, match=r"is truncated: .*fetch it again") as caught,
    ):
        glm_jax.convert(server.url, tmp_path / "out")
    assert f"{server.url}/{last.name}" in str(caught.value) and not (tmp_path / "out").exists()


def test_a_server_of_whole_files_is_refused_before_one_is_read(tmp_path, server):
    server.whole = True
    with pytest.raises(glm_jax.Error, match="whole files only, no ranges of bytes; copy the directory"):
        glm_jax.convert(server.url, tmp_path / "out")


def test_a_server_that_is_not_there(tmp_path):
    pytest.importorskip("aiohttp")
    with pytest.raises(glm_jax.Error, match=r"http://127.0.0.1:9/hf: cannot be listed, 5 times over: .*127.0.0.1:9"):
        glm_jax.load("http://127.0.0.1:9/hf")
    with pytest.raises(glm_jax.Error, match=r"http://127.0.0.1:9/hf/config.json: cannot be found, 5 times over"):
        glm_jax.convert("http://127.0.0.1:9/hf", tmp_path / "out")


def test_a_file_that_is_not_there_is_missing_and_one_that_cannot_be_asked_for_is_not(tmp_path, local, server):
    server.failing = 2  # a failure to answer is no answer
    assert open_source(server.url).config == open_source(local).config
    server.absent = "model-00002-of-00003.safetensors"
    with pytest.raises(glm_jax.CheckpointError, match=r"1 of 3 files missing: 'model-00002-of-00003\.safe"):
        open_source(server.url)


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://models/none", "memory://models/none/config.json does not exist"),
        ("nosuch://a/b", r"nosuch://a/b: fsspec cannot open nosuch:// .*not known"),
    ],
)
def test_places_that_are_none(tmp_path, url, words):
    for use in (lambda: glm_jax.convert(url, tmp_path / "out"), lambda: glm_jax.load(url)):
        with pytest.raises(glm_jax.Error, match=words):
            use()
    assert os.listdir(tmp_path) == []


def test_no_error_has_a_password():
    pytest.importorskip("aiohttp")
    with pytest.raises(glm_jax.Error) as caught:
        glm_jax.load("http://user:secret@127.0.0.1:9/x")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [("gs://b/m", "gcsfs", "gcs"), ("s3://b/m", "s3fs", "s3"), ("http://h/m", "aiohttp", "remote")],
)
def test_what_is_not_installed_is_named(url, module, extra):
    """In a process of its own, where a module cannot be imported: file systems, once imported, stay."""
    program = f"""
        import sys
        sys.modules["{module}"] = None
        import glm_jax
        try:
            glm_jax.convert("{url}", "out")
        except glm_jax.CheckpointError as error:
            print(error)
        sys.modules.update(fsspec=None)
        sys.modules.update({{"fsspec.core": None}})
        try:
            glm_jax.convert("{url}", "out")
        except glm_jax.CheckpointError as error:
            print(error)
    """
    lines = processes.said(program).splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{url}: ") for line in lines)
    assert all(line.endswith(f"pip install 'glm_jax[{extra}]'") for line in lines)


def test_what_is_a_url():
    assert all(is_url(text) for text in ("gs://b/m", "s3://b", "hf://a/b", "file:///x", "simplecache::http://h/m"))
    assert not any(is_url(place) for place in ("ckpt/air", "/a/b", "a:b", Path("x"), "C:\\x", "://x"))


def test_an_orbax_directory_must_be_on_a_disk(expected, local):
    with pytest.raises(glm_jax.CheckpointError, match="is an Orbax checkpoint; those are read from a disk"):
        open_source(local.with_name("expected").as_uri())


def test_a_target_must_be_on_a_disk(local):
    with pytest.raises(glm_jax.CheckpointError, match="memory://out: is a URL; checkpoints are written to a disk"):
        glm_jax.convert(local, "memory://out")


@pytest.mark.parametrize("name", ["../x.safetensors", "a?b.safetensors", "a#b", "/etc/passwd", "a%2fb", "a//b"])
def test_an_index_cannot_name_files_outside(local, name):
    url = in_memory(local)
    index = f'{{"weight_map": {{"a": "{name}"}}}}'
    fsspec.filesystem("memory").pipe_file("/models/hf/model.safetensors.index.json", index.encode())
    with pytest.raises(glm_jax.CheckpointError, match="a plain file name under the directory is right"):
        SafetensorsDir(url)


def test_what_is_held_is_bounded(local, monkeypatch):
    """A file of which all blocks are asked for at once, and none is dropped."""
    fsspec.filesystem("memory").pipe_file("/large/x", bytes(4_000_000))
    file = open_directory("memory://large").find(["x"])["x"]
    tracemalloc.start()
    try:
        for start in range(0, 4_000_000, 50_000):
            file.prefetch(start, start + 50_000)
            assert not file.view(start, start + 50_000).any()
        assert tracemalloc.get_traced_memory()[0] < 300_000
    finally:
        tracemalloc.stop()
