"""Plain Orbax restores what we write slice by slice, and damage is one line that names the array and the chunk."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.checkpoint.orbax_io import DTYPES, ArraySpec, Index, OrbaxReader, OrbaxWriter
from glm_jax.errors import CheckpointError
from tests import processes

SPECS = {
    **{f"moe.experts.{dtype}": ArraySpec((2, 4, 3, 5), dtype, (1, 1, 3, 5)) for dtype in DTYPES},
    "embed": ArraySpec((8, 6), "bfloat16", (4, 6)),
    "cut-at-the-edge": ArraySpec((5, 3), "float32", (2, 3)),
    "scalar": ArraySpec((), "float32", ()),
}


def value(name: str) -> np.ndarray:
    spec = SPECS[name]
    normal = np.random.default_rng(len(name)).standard_normal(spec.shape) * 8
    array = np.asarray(normal).astype(DTYPES[spec.dtype])
    if spec.shape:
        array[: spec.chunk[0]] = 0  # chunks of zeros are on disk like any other
    return array


def same(left: Any, right: np.ndarray) -> bool:
    left = np.asarray(left)
    return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written one chunk at a time, last first."""
    directory = tmp_path_factory.mktemp("orbax") / "ckpt"
    with OrbaxWriter(directory, SPECS) as writer:
        for name, spec in SPECS.items():
            array = value(name)
            if len(spec.shape) == 4:
                for layer, expert in reversed(list(np.ndindex(2, 4))):
                    writer.write(name, (layer, expert), array[layer, expert])
            elif name == "embed":
                writer.write(name, (slice(4, None),), array[4:])
                writer.write(name, (slice(0, 4), slice(None)), array[:4])
            else:
                writer.write(name, (), array)
    return directory


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    subprocess.run(["cp", "-r", str(checkpoint), str(tmp_path / "ckpt")], check=True)
    return tmp_path / "ckpt"


# --- with plain Orbax -----------------------------------------------------------------------------------------------


def restore_v0(directory: Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(directory / "default")


def restore_v0_composite(directory: Path) -> Any:
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(default=ocp.args.PyTreeRestore())
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(directory, args=args)["default"]


def restore_v1(directory: Path) -> Any:
    from orbax.checkpoint.experimental import v1

    return v1.load(directory)


def restore_v1_as_jax(directory: Path) -> Any:
    import jax
    from orbax.checkpoint.experimental import v1

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {name: jax.ShapeDtypeStruct(s.shape, DTYPES[s.dtype], sharding=sharding) for name, s in SPECS.items()}
    restored = v1.load(directory, abstract_state=abstract)
    assert all(isinstance(array, jax.Array) for array in restored.values())
    return restored


@pytest.mark.parametrize("restore", [restore_v0, restore_v0_composite, restore_v1, restore_v1_as_jax])
def test_plain_orbax_restores_a_flat_dict(checkpoint: Path, restore: Callable[[Path], Any]) -> None:
    restored = restore(checkpoint)
    assert restored.keys() == SPECS.keys()
    assert all(same(restored[name], value(name)) for name in SPECS)


def restore_embed_only(directory: Path) -> Any:
    import jax
    import orbax.checkpoint as ocp

    item = {"embed": jax.ShapeDtypeStruct((8, 6), "bfloat16")}
    args = {"embed": ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    restore = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    return ocp.PyTreeCheckpointer().restore(directory / "default", args=restore)


def test_plain_orbax_restores_a_part(checkpoint: Path) -> None:
    restored = restore_embed_only(checkpoint)
    assert restored.keys() == {"embed"} and same(restored["embed"], value("embed"))


def test_plain_orbax_sees_the_damage(broken: Path) -> None:
    flip(broken / "default" / "embed" / "c.1.0")
    # Alone: a failing restore leaves its other reads in flight, and they complain when they end.
    with pytest.raises(Exception, match="error while reading array") as caught:
        restore_embed_only(broken)
    assert "Digest mismatch" in str(caught.value.__cause__)


def test_plain_orbax_restores_onto_eight_devices(checkpoint: Path) -> None:
    program = textwrap.dedent("""
        import sys
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import orbax.checkpoint as ocp
        from orbax.checkpoint.experimental import v1
        from glm_jax.checkpoint.orbax_io import OrbaxReader
        mesh = jax.make_mesh((2, 4, 1), ("data", "expert", "tensor"), axis_types=(AxisType.Explicit,) * 3)
        reader = OrbaxReader(sys.argv[1])
        parts = {"moe.experts.bfloat16": P(None, "expert"), "embed": P("expert", "data")}
        def abstract(name, spec):
            sharding = NamedSharding(mesh, parts.get(name, P()))
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
        target = {name: abstract(name, spec) for name, spec in reader.specs().items()}
        args = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), target)
        new = v1.load(sys.argv[1], abstract_state=target)
        old = ocp.PyTreeCheckpointer().restore(
            sys.argv[1] + "/default", args=ocp.args.PyTreeRestore(item=target, restore_args=args))
        for name in target:
            for tree in (old, new):
                assert tree[name].sharding.is_equivalent_to(target[name].sharding, len(target[name].shape)), name
                assert np.array_equal(np.asarray(tree[name]), reader.read(name)), name
        print(len(new["moe.experts.bfloat16"].addressable_shards), new["embed"].addressable_shards[0].data.shape)
    """)
    devices = "--xla_force_host_platform_device_count=8"
    assert processes.said(program, checkpoint, XLA_FLAGS=devices).split("\n")[0] == "8 (2, 3)"


# --- with our reader ------------------------------------------------------------------------------------------------


def test_specs_and_values_come_back(checkpoint: Path) -> None:
    reader = OrbaxReader(checkpoint)
    assert reader.specs() == SPECS and reader.names() == list(SPECS)
    assert all(same(reader.read(name), value(name)) for name in SPECS)
    assert SPECS["embed"].nbytes == 96


@pytest.mark.parametrize(
    "index",
    [
        (),
        (1,),
        (-1, 2),
        (slice(None), 3),
        (0, slice(1, 3)),
        (slice(0, 1), -1, 2, slice(1, 9)),
        (1, slice(3, 1)),
        (0, 0, 0, 0),
    ],
)
def test_a_slice_is_numpys(checkpoint: Path, index: Index) -> None:
    name = "moe.experts.float8_e4m3fn"
    assert same(OrbaxReader(checkpoint).read(name, index), np.asarray(value(name)[index]))


def test_bad_indices(checkpoint: Path) -> None:
    reader = OrbaxReader(checkpoint)
    for index in [(8,), (-9,), (0, 0, 0)]:
        with pytest.raises(IndexError):
            reader.read("embed", index)
    with pytest.raises(ValueError, match="step 1"):
        reader.read("embed", (slice(0, 8, 2),))
    with pytest.raises(CheckpointError, match="has no array 'nothing'"):
        reader.read("nothing")


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "Digest mismatch": flip,
    "Not enough data": lambda path: os.truncate(path, 11),
    "is missing": os.remove,
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_chunk_is_named_and_the_others_are_read(broken: Path, words: str) -> None:
    name = "moe.experts.bfloat16"
    DAMAGE[words](broken / "default" / name / "c.1.2.0.0")
    reader = OrbaxReader(broken)
    assert same(reader.read(name, (0,)), value(name)[0])
    for index in ((1, 2), ()):
        with pytest.raises(CheckpointError, match=words) as caught:
            reader.read(name, index)
        assert str(caught.value).startswith(f"{broken / 'default' / name}: cannot read [")
        assert "c.1.2.0.0" in str(caught.value) and "\n" not in str(caught.value)


TREES: list[Any] = [
    [],
    {"a": {}},
    {"a": {"key_metadata": [{"key": "a"}, {"key": "b"}], "value_metadata": {"write_shape": [1]}}},
    {"a": {"key_metadata": [{"key": "../a"}], "value_metadata": {"write_shape": [1]}}},
    {"a": {"key_metadata": [{"key": "a"}], "value_metadata": {"write_shape": None}}},
]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"use_ocdbt": true, "use_zarr3": true, "tree_metadata": {}}', b"\xff"]
    + [json.dumps({"use_ocdbt": False, "use_zarr3": True, "tree_metadata": tree}).encode() for tree in TREES],
)
def test_broken_metadata(broken: Path, content: bytes) -> None:
    (broken / "default" / "_METADATA").write_bytes(content)
    with pytest.raises(CheckpointError, match=str(broken)) as caught:
        OrbaxReader(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"x", None])
def test_broken_array_metadata(broken: Path, content: bytes | None) -> None:
    path = broken / "default" / "embed" / "zarr.json"
    os.remove(path)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="default/embed: cannot open the array") as caught:
        OrbaxReader(broken).specs()
    assert "\n" not in str(caught.value) and "tensorstore_spec" not in str(caught.value)


def test_an_array_of_another_shape_than_the_metadata_says(broken: Path) -> None:
    path = broken / "default" / "embed" / "zarr.json"
    path.write_text(path.read_text().replace('"shape":[8,6]', '"shape":[8000000000,6]'))
    with pytest.raises(
        CheckpointError, match=r"default/embed: is bfloat16 \(8000000000, 6\), but _METADATA says \(8, 6\)"
    ):
        OrbaxReader(broken).read("embed")


def test_an_unfinished_or_missing_checkpoint(tmp_path: Path) -> None:
    writer = OrbaxWriter(tmp_path / "ckpt", {"a": ArraySpec((2,), "int8", (1,)), "b": ArraySpec((2,), "int8", (1,))})
    writer.write("a", (), np.ones(2, np.int8))
    writer.write("b", (1,), np.ones((), np.int8))
    with pytest.raises(CheckpointError, match="chunks of 1 arrays were not written: b"):
        writer.close()
    for directory in (tmp_path / "ckpt", tmp_path / "gone"):
        with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
            OrbaxReader(directory)


# --- writing --------------------------------------------------------------------------------------------------------


def test_only_whole_chunks_of_the_right_dtype_are_written(tmp_path: Path) -> None:
    writer = OrbaxWriter(tmp_path, {"a": ArraySpec((5, 4), "float32", (2, 4))})
    ones = np.ones((5, 4), np.float32)
    cases: list[tuple[str, Index, np.ndarray, str]] = [
        ("a", (0,), ones[0], "whole chunks"),
        ("a", (slice(1, 3),), ones[1:3], "whole chunks"),
        ("a", (slice(0, 2), slice(0, 2)), ones[:2, :2], "whole chunks"),
        ("a", (slice(0, 2),), ones, r"planned float32 \(2, 4\)"),
        ("a", (), ones.astype(np.float16), "got float16"),
        ("b", (), ones, "not among"),
    ]
    for name, index, array, words in cases:
        with pytest.raises(ValueError, match=words):
            writer.write(name, index, array)
    writer.write("a", (slice(4, 5),), ones[4:])
    writer.write("a", (slice(0, 4),), np.asfortranarray(ones[:4]))
    writer.close()
    assert same(OrbaxReader(tmp_path).read("a"), ones)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "_METADATA", "a b", "array_metadatas", "ü"])
def test_names_that_are_no_directory_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="array name"):
        OrbaxWriter(tmp_path, {name: ArraySpec((1,), "int8", (1,))})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk"),
    [((2,), "int4", (1,)), ((2,), "int8", (3,)), ((2,), "int8", (0,)), ((2, 2), "int8", (1,)), ((0,), "int8", (1,))],
)
def test_specs_that_cannot_be(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        ArraySpec(shape, dtype, chunk)


def test_a_checkpoint_that_is_there_already_is_kept(broken: Path) -> None:
    with pytest.raises(CheckpointError, match="default: File exists"):
        OrbaxWriter(broken, SPECS)
    assert same(OrbaxReader(broken).read("embed"), value("embed"))


def test_a_refused_write_names_the_array_the_chunk_and_the_reason(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import resource, signal, sys
        import numpy as np
        from glm_jax.checkpoint.orbax_io import ArraySpec, OrbaxWriter
        from glm_jax.errors import CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = OrbaxWriter(sys.argv[1], {"a": ArraySpec((3, 50_000), "int8", (1, 50_000))})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            writer.write("a", (1,), np.ones(50_000, np.int8))
        except CheckpointError as error:
            print(error)
    """)
    line = processes.said(program, tmp_path)
    assert line.startswith(f"{tmp_path / 'default' / 'a'}: the file is larger than"), line
    assert line.endswith("(cannot write [1, 0:50000])\n")
