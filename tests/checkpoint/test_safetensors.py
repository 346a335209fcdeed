"""Our safetensors files are the reference's, byte for byte; broken ones are one clear line and never more than that."""

from __future__ import annotations

import json
import os
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_jax.checkpoint.safetensors import NUMPY_DTYPES, SafetensorsFile, TensorSpec, dtype_name
from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
from glm_jax.checkpoint.safetensors_writer import SafetensorsWriter
from glm_jax.errors import CheckpointError
from tests import processes

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bit patterns of a format dtype (bools are 0 or 1)."""
    dtype = NUMPY_DTYPES[name]
    high = 2 if name == "BOOL" else 256
    count = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, high, count, np.uint8).view(dtype).reshape(shape)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def write(directory: Path, arrays: dict[str, np.ndarray], **options: Any) -> None:
    plan = [TensorSpec(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items()]
    with SafetensorsWriter(directory, plan, **options) as writer:
        for name in reversed(arrays):
            writer.write(name, arrays[name])


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- against the reference ------------------------------------------------------------------------------------------


def every_dtype() -> dict[str, np.ndarray]:
    arrays = {f"t.{name}": values(name, (3, 5), seed) for seed, name in enumerate(NUMPY_DTYPES)}
    arrays |= {
        "scalar": np.asarray(3, np.float32),
        "empty": np.empty((0, 4), np.float16),
        'odd "ü/\n': values("I8", (3,)),
    }
    return arrays


def test_the_file_is_the_references_byte_for_byte(tmp_path: Path) -> None:
    torch, reference = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    arrays = every_dtype()
    tensors = {}
    for name, array in arrays.items():
        flat = torch.frombuffer(bytearray(array.tobytes()) or bytearray(8), dtype=getattr(torch, array.dtype.name))
        tensors[name] = flat[: array.size].reshape(array.shape)
    write(tmp_path, arrays)
    assert (tmp_path / "model.safetensors").read_bytes() == reference.save(tensors, metadata={"format": "pt"})


def test_the_reference_reads_what_we_write(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    arrays = {name: array for name, array in every_dtype().items() if not name.startswith(("t.F8", "t.C64"))}
    write(tmp_path, arrays)
    loaded = reference.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == arrays.keys()
    assert all(same(loaded[name], array) for name, array in arrays.items())


def test_we_read_what_the_reference_writes(tmp_path: Path) -> None:
    torch, reference = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    tensors = {"w": torch.arange(12).reshape(3, 4).to(torch.bfloat16), "f8": torch.arange(7).to(torch.float8_e4m3fn)}
    reference.save_file(tensors, tmp_path / "x.safetensors", {"a": "b"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"a": "b"}
        assert same(file.read("w"), np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16))
        assert same(file.read("f8"), np.arange(7).astype(ml_dtypes.float8_e4m3fn))


def test_transformers_loads_our_shards(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    write(tmp_path, state, max_shard_bytes=6000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("max_shard_bytes", [1, 40, 100, 10**9])
def test_round_trip_through_shards(tmp_path: Path, max_shard_bytes: int) -> None:
    arrays = every_dtype()
    write(tmp_path, arrays, max_shard_bytes=max_shard_bytes)
    with SafetensorsDir(tmp_path) as directory:
        assert directory.tensors.keys() == arrays.keys()
        assert all(same(directory.read(name), array) for name, array in arrays.items())
        assert [info.name for info, _ in directory.stream()] == [info.name for info in directory.infos()]
        assert all(info.end - info.begin == info.nbytes for info in directory.infos())
    largest = max(array.nbytes for array in arrays.values())
    for shard in tmp_path.glob("*.safetensors"):
        assert sum(info.nbytes for info in SafetensorsFile(shard).tensors.values()) <= max(max_shard_bytes, largest)


# --- reading --------------------------------------------------------------------------------------------------------


def test_views_are_read_only_and_outlive_drop_and_close(tmp_path: Path) -> None:
    array = values("BF16", (100, 1000))
    write(tmp_path, {"w": array})
    file = SafetensorsFile(tmp_path / "model.safetensors")
    view = file.read("w")
    assert not view.flags.writeable and not view.flags.owndata
    file.drop("w")
    file.close()
    assert same(view, array) and same(file.read("w"), array)


def test_tensors_without_alignment_are_read(tmp_path: Path) -> None:
    header = {"a": entry([1], 0, 1), "b": entry([2], 1, 9, "F32")}
    path = raw_file(tmp_path / "x.safetensors", header, b"\1" + np.array([1.5, 2.5], np.float32).tobytes())
    assert SafetensorsFile(path).read("b").tolist() == [1.5, 2.5]


def test_packed_four_bit_tensors_are_listed_but_not_read(tmp_path: Path) -> None:
    file = SafetensorsFile(raw_file(tmp_path / "x.safetensors", {"a": entry([4], 0, 2, "F4")}, b"ab"))
    assert file.tensors["a"].nbytes == 2
    with pytest.raises(CheckpointError, match="F4 cannot be read"):
        file.read("a")


def test_a_file_that_changed_its_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"w": values("F32", (8,))})
    file = SafetensorsFile(tmp_path / "model.safetensors")
    os.truncate(file.path, 100)
    with pytest.raises(CheckpointError, match="changed its size"):
        file.read("w")


def test_streaming_stays_small_in_memory(tmp_path: Path) -> None:
    header = {f"t{i}": entry([10_000_000], i * 10_000_000, (i + 1) * 10_000_000) for i in range(30)}
    path = raw_file(tmp_path / "x.safetensors", header)
    os.truncate(path, path.stat().st_size + 300_000_000)
    program = textwrap.dedent("""
        import resource, sys
        from glm_jax.checkpoint.safetensors import SafetensorsFile
        file = SafetensorsFile(sys.argv[1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        total = sum(int(array.max()) for _, array in file.stream())
        print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    total, grown_kib = map(int, processes.said(program, path).split())
    assert total == 0 and grown_kib < 40_000


# --- broken headers -------------------------------------------------------------------------------------------------

BROKEN = {
    "overlap": ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, b"x" * 6, r"'b'.*overlap.*begin at 4, not 2"),
    "hole": ({"a": entry([4], 0, 4), "b": entry([2], 6, 8)}, b"x" * 8, r"'b'.*hole.*begin at 4, not 6"),
    "hole at start": ({"a": entry([4], 2, 6)}, b"x" * 6, r"'a'.*begin at 0"),
    "bytes left over": ({"a": entry([4], 0, 4)}, b"x" * 6, r"2 bytes after the last tensor"),
    "truncated": ({"a": entry([4], 0, 4)}, b"x", r"truncated.*fetch it again"),
    "size": ({"a": entry([3], 0, 4)}, b"x" * 4, r"'a'.*takes 3 bytes.*span 4"),
    "half a byte": ({"a": entry([3], 0, 1, "F4")}, b"x", r"takes 1.5 bytes"),
    "backwards": ({"a": entry([0], 4, 0)}, b"x" * 4, r"'a'.*takes 0 bytes.*span -4"),
    "dtype": ({"a": entry([4], 0, 4, "FP8")}, b"x" * 4, r"'a'.*dtype 'FP8' is none of BOOL"),
    "dtype type": ({"a": entry([4], 0, 4, ["U8"])}, b"x" * 4, r"is none of"),
    "negative": ({"a": entry([-1, -4], 0, 4)}, b"x" * 4, r"shape \[-1, -4\] must be"),
    "bool size": ({"a": entry([True], 0, 1)}, b"x", r"shape \[True\] must be"),
    "float size": ({"a": entry([4.0], 0, 4)}, b"x" * 4, r"must be a list of integers"),
    "float offset": ({"a": entry([4], 0, 4.0)}, b"x" * 4, r"data_offsets"),
    "huge": ({"a": entry([2**62, 2**62], 0, 4)}, b"x" * 4, r"too large"),
    "huge but empty": ({"a": entry([2**62, 2**62, 0], 0, 0)}, b"", r"too large"),
    "huge offset": ({"a": entry([4], 2**70, 2**70 + 4)}, b"x" * 4, r"data_offsets"),
    "rank": ({"a": entry([1] * 65, 0, 1)}, b"x", r"65 dimensions"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"x" * 4, r"must be an object with"),
    "entry type": ({"a": [1]}, b"", r"must be an object with"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", r"__metadata__ must map strings"),
    "metadata type": ({"__metadata__": "x"}, b"", r"__metadata__ must map strings"),
    "array": (b"[1]", b"", r"header begins with"),
    "leading space": (b" {}", b"", r"header begins with"),
    "json": (b'{"a":}', b"", r"JSON is invalid"),
    "after json": (b"{} x", b"", r"JSON is invalid"),
    "nan": (b'{"__metadata__":{"a":NaN}}', b"", r"NaN is not JSON"),
    "not utf-8": (b'{"\xff":1}', b"", r"JSON is invalid"),
    "surrogate": (b'{"\\ud800":1}', b"", r"JSON is invalid"),
    "twice": (b'{"a":1,"a":2}', b"", r"'a' occurs twice"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", r"nested too deeply|JSON is invalid"),
    "many digits": (b'{"a":' + b"1" * 10_000 + b"}", b"", r"JSON is invalid"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_one_line_that_names_the_file(tmp_path: Path, case: str) -> None:
    header, data, words = BROKEN[case]
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"\2\0\0\0\0\0\0\0{")
    (tmp_path / "lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    cases = {"pipe": "not a regular file", "empty": "truncated", "short": "truncated", "lfs": "git lfs pull"}
    for name, words in (cases | {"gone": "No such file", ".": "not a regular file"}).items():
        with pytest.raises(CheckpointError, match=words):
            SafetensorsFile(tmp_path / name)


def test_a_declared_size_allocates_nothing(tmp_path: Path) -> None:
    announced = raw_file(tmp_path / "a.safetensors", b"{}", length=4 * 2**30)
    sparse = raw_file(tmp_path / "b.safetensors", b"{}", length=4 * 2**30)
    os.truncate(sparse, 5 * 2**30)
    shapes = raw_file(tmp_path / "c.safetensors", {"a": entry([2**30, 2**30], 0, 2**60)}, b"x")
    tracemalloc.start()
    try:
        for path, words in ((announced, "truncated"), (sparse, "exceeds the format's limit"), (shapes, "truncated")):
            with pytest.raises(CheckpointError, match=words):
                SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def open_and_read_all(path: Path) -> None:
    """Either everything can be read, or the one error says why not."""
    try:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert file.read(name).shape == info.shape
    except CheckpointError as error:
        assert "\n" not in str(error)


@FUZZ
@given(content=st.binary(max_size=200), framed=st.booleans())
def test_fuzz_random_bytes(tmp_path: Path, content: bytes, framed: bool) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
    open_and_read_all(path)


@FUZZ
@given(data=st.data())
def test_fuzz_mutated_files(tmp_path: Path, data: st.DataObject) -> None:
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
    header += b'"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}}'
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(22))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"0", b"9", b"-", b"[", b"{", b'"', b"e9", b",", b"\x80", b"null", b"\0"])
        )
        content[place : place + data.draw(st.integers(0, 3))] = piece
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    open_and_read_all(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(sorted(NUMPY_DTYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {}, optional={"dtype": JSON, "shape": JSON, "data_offsets": st.lists(st.integers(-1, 9)) | JSON}
)


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRY | JSON, max_size=3), data=st.binary()
)
def test_fuzz_headers_of_the_wrong_form(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    open_and_read_all(raw_file(tmp_path / "x.safetensors", header, data))


# --- directories ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of one tensor each: a, b, c."""
    write(tmp_path, {name: values("F32", (4,), seed) for seed, name in enumerate("abc")}, max_shard_bytes=16)
    return tmp_path


def edit_index(directory: Path, **changes: str | None) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, file in changes.items():
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsDir(directory)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(directory))
    return str(caught.value)


def test_everything_wrong_is_said_at_once(shards: Path) -> None:
    os.remove(shards / "model-00001-of-00003.safetensors")
    os.truncate(shards / "model-00002-of-00003.safetensors", 70)
    edit_index(shards, c=None, d="model-00003-of-00003.safetensors", e="gone.safetensors")
    line = refusal(shards)
    assert "2 of 4 files missing: 'gone.safetensors', 'model-00001-of-00003.safetensors'" in line
    assert "model-00002-of-00003.safetensors: is truncated" in line
    assert "tensors that the index names and their file lacks: 'd' (model-00003-of-00003.safetensors)" in line
    assert "tensors that the index does not name: 'c' (model-00003-of-00003.safetensors)" in line


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "", ".", "a\0b", "./x", "\ud800", "x" * 5000]
)
def test_an_index_cannot_name_files_outside(shards: Path, name: str) -> None:
    edit_index(shards, d=name)
    assert "a plain file name under the directory is right" in refusal(shards) or len(name) > 1000


@pytest.mark.parametrize("inside", [True, False])
def test_links_may_not_leave_the_directory(tmp_path: Path, inside: bool) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    place = model / "sub" if inside else tmp_path
    write(place, {"a": values("F32", (4,))})
    (model / "model.safetensors").symlink_to(place / "model.safetensors")
    if inside:
        assert list(SafetensorsDir(model).tensors) == ["a"]
    else:
        assert "is a link that leaves the directory" in refusal(model)


def test_the_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "rev", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(snapshot, {name: values("F32", (4,)) for name in "ab"}, max_shard_bytes=16)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert list(SafetensorsDir(snapshot).tensors) == ["a", "b"]
    os.remove(blobs / "0")
    assert "1 of 2 files missing: 'model-00001-of-00002.safetensors'" in refusal(snapshot)


def test_a_tensor_in_two_files(shards: Path) -> None:
    (shards / "model-00003-of-00003.safetensors").write_bytes(
        (shards / "model-00001-of-00003.safetensors").read_bytes()
    )
    edit_index(shards, c=None, a="model-00003-of-00003.safetensors")
    edit_index(shards, x="model-00001-of-00003.safetensors")
    assert "occur twice: 'a' in model-00001-of-00003.safetensors and model-00003-of-00003.safetensors" in refusal(
        shards
    )


def test_without_an_index_one_complete_set_will_do(shards: Path) -> None:
    os.remove(shards / "model.safetensors.index.json")
    assert list(SafetensorsDir(shards).tensors) == ["a", "b", "c"]
    os.remove(shards / "model-00002-of-00003.safetensors")
    assert "1 of 3 files missing: 'model-00002-of-00003.safetensors'" in refusal(shards)
    (shards / "other.safetensors").write_bytes((shards / "model-00001-of-00003.safetensors").read_bytes())
    assert "3 safetensors files and no index" in refusal(shards)


def test_files_beside_the_index(shards: Path) -> None:
    single = (shards / "model-00001-of-00003.safetensors").read_bytes()
    (shards / "adapter.safetensors").write_bytes(single)
    assert SafetensorsDir(shards).unlisted == (shards / "adapter.safetensors",)
    (shards / "model.safetensors").write_bytes(single)
    assert "holds both model.safetensors and an index" in refusal(shards)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map":[]}', b'{"weight_map":{}}', b'{"weight_map":{"a":1}}', b"\xff", b"{"]
)
def test_a_broken_index(shards: Path, content: bytes) -> None:
    (shards / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json" in refusal(shards)


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    assert "no *.safetensors file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "gone")
    write(tmp_path, {"a": values("F32", (4,))})
    with pytest.raises(CheckpointError, match="has no tensor 'b'"):
        SafetensorsDir(tmp_path).read("b")


# --- writing --------------------------------------------------------------------------------------------------------


def test_what_was_not_written_is_named(tmp_path: Path) -> None:
    plan = [TensorSpec(name, "F32", (4,)) for name in "abc"]
    writer = SafetensorsWriter(tmp_path, plan, max_shard_bytes=16)
    writer.write("b", values("F32", (4,)))
    with pytest.raises(CheckpointError, match="2 of 3 tensors were not written: a, c"):
        writer.close()


def test_a_plan_is_kept_to_the_letter(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, [TensorSpec("a", "F32", (4,)), TensorSpec("b", "F32", (4,))])
    for name, array in {"a": values("F32", (2, 2)), "b": values("F16", (4,)), "c": values("F32", (4,))}.items():
        with pytest.raises(ValueError, match=f"tensor '{name}'"):
            writer.write(name, array)
    writer.write("a", values("F32", (4,)))
    with pytest.raises(ValueError, match="written already"):
        writer.write("a", values("F32", (4,)))
    for plan in (
        [],
        [TensorSpec("a", "F4", (2,))],
        [TensorSpec("a", "F32", ())] * 2,
        [TensorSpec("__metadata__", "U8", ())],
    ):
        with pytest.raises(ValueError):
            SafetensorsWriter(tmp_path, plan)


def test_slices_and_transposes_are_written_in_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    write(tmp_path, {"a": array.T, "b": array[::2, 1:3]})
    directory = SafetensorsDir(tmp_path)
    assert same(directory.read("a"), array.T.copy()) and same(directory.read("b"), array[::2, 1:3].copy())


def test_files_that_are_there_already_are_kept(tmp_path: Path) -> None:
    write(tmp_path, {"a": values("F32", (4,))})
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"model.safetensors: File exists"):
        write(tmp_path, {"a": values("F32", (5,))})
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_disk_that_fills_up_and_writes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.pwrite, [1000]

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        written = real(descriptor, data[: min(room[0], 100)], position)
        room[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    (tmp_path / "small").mkdir()
    write(tmp_path / "small", {"a": values("F32", (100,))})
    assert same(SafetensorsDir(tmp_path / "small").read("a"), values("F32", (100,)))
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: no space left on the device \(4.1 kB needed, .* free\)"
    ):
        write(tmp_path, {"a": values("F32", (1000,))})
