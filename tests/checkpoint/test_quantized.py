"""Quantised sources: the weights are what numpy says, bit for bit, in whichever form and slice they are read."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint.names import TensorMapping
from glm_jax.checkpoint.orbax_io import OrbaxReader
from glm_jax.checkpoint.orbax_source import MANIFEST, OrbaxSource
from glm_jax.checkpoint.quantized import Fp8, Int8, PackedInt, format_from_json, rows_and_columns
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES
from glm_jax.checkpoint.source import HfSource
from glm_jax.errors import InputError
from glm_jax.sharding import weights_by_name
from tests import published
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, FP8, KINDS

MATRICES = [
    (Fp8(128, 128, "_scale_inv"), lambda rng: sources.blocks(rng, (576, 300), (128, 128))),
    (Fp8(128, 128, "_scale_inv"), lambda rng: sources.blocks(rng, (64, 7), (128, 128))),
    (Fp8(3, 50, "_scale_inv"), lambda rng: sources.blocks(rng, (100, 129), (3, 50))),
    (Fp8(1, 1, "_scale_inv"), lambda rng: sources.blocks(rng, (10, 9), (1, 1))),
    (Fp8(1, None, "_scale"), lambda rng: sources.channels(rng, (77, 130))),
    (Fp8(1, None, "_scale"), lambda rng: sources.channels(rng, (77, 130), np.float32)),
    (PackedInt(4, 32), lambda rng: sources.packed(rng, (65, 128), 32)),
    (PackedInt(4, 20), lambda rng: sources.packed(rng, (33, 101), 20)),
]


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        assert array.tobytes() == right[name].tobytes(), name


def same_weights(one: glm_jax.Transformer, two: glm_jax.Transformer) -> None:
    left, right = weights_by_name(one), weights_by_name(two)
    assert left.keys() == right.keys()
    for name, weight in left.items():
        for one, two in zip(*(jax.tree.leaves(w[...]) for w in (weight, right[name])), strict=True):
            assert (one.dtype, one.sharding) == (two.dtype, two.sharding), name
            assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), name


def every(size: int) -> slice:
    return slice(0, size)


# --- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "make"), MATRICES, ids=lambda item: item.describe() if hasattr(item, "parts") else ""
)
@pytest.mark.parametrize("seed", range(2))
def test_every_slice_of_a_matrix_is_what_numpy_says(layout, make, seed):
    rng = np.random.default_rng(seed)
    parts, expected = make(rng)
    shape = expected.shape
    assert {suffix: part.shape for suffix, part in parts.items()} == layout.shapes(shape)
    mapping = TensorMapping("w", (), shape, shape)
    cuts = [tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False))) for size in shape) for _ in range(10)]
    for index in [tuple(map(every, shape)), *cuts]:
        rows, columns = rows_and_columns(mapping, index)
        for dtype in (BF16, np.float32):
            out = np.empty((len(rows), len(columns)), dtype)
            layout.dequantize(parts, rows, columns, out=out)
            assert out.tobytes() == expected[index].astype(dtype).tobytes()
    assert format_from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_the_256_codes_are_e4m3():
    """From the definition: a sign, four bits of exponent with bias 7, three of fraction, and 0x7F no number."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    sizes = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    expected = np.where(codes & 127 == 127, np.nan, np.where(codes < 128, sizes, -sizes))
    out = np.empty((1, 256), np.float32)
    stored = {"": codes.astype(np.uint8).view(FP8)[None], "_scale": np.ones((1, 1), np.float32)}
    Fp8(1, None, "_scale").dequantize(stored, np.arange(1), codes, out=out)
    np.testing.assert_array_equal(out[0], expected)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.5, 0.0, -0.0, 3e38, 1e-45], ids=str)
def test_strange_scales_are_what_they_are(scale):
    codes = np.arange(256, dtype=np.uint8).view(FP8).reshape(16, 16)
    out = np.empty((16, 16), BF16)
    stored = {"": codes, "_scale_inv": np.full((1, 1), scale, np.float32)}
    Fp8(128, 128, "_scale_inv").dequantize(stored, np.arange(16), np.arange(16), out=out)
    with np.errstate(all="ignore"):
        expected = (codes.astype(np.float32) * np.float32(scale)).astype(BF16)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("part_shape", "shape"), [((4, 6, 10), (24, 10)), ((10, 4, 6), (10, 24)), ((1, 1, 5), (1, 5)), ((5, 1, 1), (5, 1))]
)
def test_rows_and_columns_of_folded_weights(part_shape, shape):
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for index in [tuple(map(every, part_shape)), tuple(slice(size // 2, size) for size in part_shape)]:
        rows, columns = rows_and_columns(TensorMapping("w", (), part_shape, shape), index)
        assert np.array_equal(numbers[np.ix_(rows, columns)].ravel(), numbers.reshape(part_shape)[index].ravel())


# --- whole checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_on_conversion(tmp_path, kind):
    made = sources.checkpoint(KINDS[kind])
    source = made.write(tmp_path / "hf", shards=2)
    report = glm_jax.convert(source, tmp_path / "orbax")
    assert report.tensors == len(made.tensors) and report.notes == ()
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.plain)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {key: value for key, value in made.config.items() if key != "quantization_config"}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_and_exported_again(tmp_path, kind):
    made = sources.checkpoint(KINDS[kind])
    source = made.write(tmp_path / "hf", shards=2)
    report = glm_jax.convert(source, tmp_path / "orbax", quantized="keep")
    assert report.tensors == len(made.tensors) and report.notes == ()
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.tensors)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_scales_by_channel_keep_their_dtype(tmp_path):
    for dtype in (BF16, np.float32):
        place = tmp_path / np.dtype(dtype).name
        glm_jax.convert(sources.checkpoint(sources.glm(dtype)).write(place / "hf"), place / "orbax", quantized="keep")
        scales = OrbaxReader(place / "orbax").spec("moe.attention.q.scale")
        assert (scales.shape, scales.dtype) == ((2, 128, 1), np.dtype(dtype).name)


def test_what_is_kept_and_where(tmp_path):
    made = sources.checkpoint(sources.deepseek((16, 24)))
    glm_jax.convert(made.write(tmp_path / "hf"), tmp_path / "orbax", quantized="keep")
    specs = OrbaxReader(tmp_path / "orbax").specs()
    found = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
    assert found["moe.moe.experts.gate_up"] == ((2, 8, 2, 32, 64), "float8_e4m3fn")
    assert found["moe.moe.experts.gate_up.scale"] == ((2, 8, 2, 2, 3), "float32")
    assert found["moe.attention.q_b"] == ((2, 8, 24, 32), "float8_e4m3fn")
    assert found["moe.attention.q_b.scale"] == ((2, 12, 2), "float32")
    assert found["mtp.layer.attention.kv_a.scale"] == ((2, 3), "float32")
    assert found["moe.moe.router.weight"] == ((2, 8, 64), "bfloat16")
    assert "embedding.weight.scale" not in found and "moe.moe.router.bias" in found
    scales = OrbaxReader(tmp_path / "orbax").read("moe.moe.experts.gate_up.scale", (1, 5))
    layer = "model.layers.2.mlp.experts.5."
    assert np.array_equal(scales[0], made.tensors[f"{layer}gate_proj.weight_scale_inv"])
    assert np.array_equal(scales[1], made.tensors[f"{layer}up_proj.weight_scale_inv"])
    said = json.loads((tmp_path / "orbax" / MANIFEST).read_text())["quantization"]
    assert said["source"] == {"kind": "fp8", "rows": 16, "columns": 24, "scale_suffix": "_scale_inv"}
    assert said["kept"].keys() == {name.removesuffix(".scale") for name in found if name + ".scale" in found}


def test_packed_values_are_kept_packed(tmp_path):
    made = sources.checkpoint(sources.kimi())
    glm_jax.convert(made.write(tmp_path / "hf"), tmp_path / "orbax", quantized="keep")
    specs = OrbaxReader(tmp_path / "orbax").specs()
    assert "moe.moe.experts.down" not in specs
    assert (specs["moe.moe.experts.down.packed"].shape, specs["moe.moe.experts.down.packed"].dtype) == (
        (2, 8, 64, 4),
        "int32",
    )
    assert specs["moe.moe.experts.down.scale"].shape == (2, 8, 64, 1)
    assert specs["moe.attention.q_b"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "sizes", "stacked"),
    [
        ("deepseek-128", (1, 1, 1), True),
        ("deepseek-odd", (2, 2, 2), True),
        ("deepseek-odd", (1, 4, 2), False),
        ("glm-bf16", (1, 4, 2), True),
        ("glm-f32", (1, 2, 2), False),
        ("kimi-32", (1, 2, 4), True),
        ("kimi-odd", (2, 1, 2), False),
    ],
)
def test_loading_from_every_form_gives_the_same_weights(tmp_path, mesh_of_sizes, kind, sizes, stacked):
    made = sources.checkpoint(KINDS[kind], seed=3)
    hf, plain = made.write(tmp_path / "hf", shards=3), made.write_plain(tmp_path / "plain")
    glm_jax.convert(hf, tmp_path / "kept", quantized="keep")
    options = {"mesh": mesh_of_sizes(sizes), "stacked": stacked, "quantized": "dequantize"}
    for dtype in ("bfloat16", "float32"):
        expected = glm_jax.load(plain, dtype=dtype, **options)
        for directory in (hf, tmp_path / "kept"):
            same_weights(glm_jax.load(directory, dtype=dtype, **options), expected)


def test_plain_orbax_restores_what_is_kept(tmp_path):
    import orbax.checkpoint as ocp

    made = sources.checkpoint(sources.deepseek((16, 24)))
    glm_jax.convert(made.write(tmp_path / "hf"), tmp_path / "orbax", quantized="keep")
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax" / "default")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    values, scale = restored["moe.moe.experts.down"][0, 2], restored["moe.moe.experts.down.scale"][0, 2]
    assert values.dtype == ml_dtypes.float8_e4m3fn and values.tobytes() == made.tensors[name].tobytes()
    assert scale.tobytes() == made.tensors[f"{name}_scale_inv"].tobytes()


def test_a_weight_that_is_quantised_in_some_layers_only(tmp_path):
    """It can be dequantised. To be kept it would need arrays of both kinds: one line that says so."""
    made = sources.checkpoint(sources.deepseek())
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = {**made.tensors, name: made.plain[name]}
    del tensors[f"{name}_scale_inv"]
    source = sources.write(tmp_path / "hf", made.config, tensors)
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    same(sources.read(tmp_path / "back"), made.plain)
    with pytest.raises(
        glm_jax.CheckpointError, match=r"1 quantised in part, which cannot be kept .*moe\.attention\.o "
    ) as e:
        glm_jax.convert(source, tmp_path / "kept", quantized="keep")
    assert name in str(e.value) and not (tmp_path / "kept").exists()


def test_keeping_what_is_not_quantised_is_a_plain_copy_with_a_note(tmp_path):
    source = published.checkpoint(tmp_path / "hf")
    report = glm_jax.convert(source, tmp_path / "orbax", quantized="keep")
    assert len(report.notes) == 1 and "is not quantised" in report.notes[0]
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    same(published.read(tmp_path / "back"), published.read(source))


def test_another_word_for_quantized(tmp_path):
    with pytest.raises(InputError, match="quantized is 'fp8'; it is one of 'dequantize', 'keep'"):
        glm_jax.convert(tmp_path, tmp_path / "out", quantized="fp8")


# --- what is read, and how much of it is held -----------------------------------------------------------------------


def test_a_slice_reads_the_tensors_that_it_lies_in(tmp_path, monkeypatch):
    made = sources.checkpoint(sources.kimi())
    source = HfSource(made.write(tmp_path / "hf"))
    seen: list[str] = []
    read = source.files.read
    monkeypatch.setattr(source.files, "read", lambda name, *part: seen.append(name) or read(name, *part))
    part = source.read("moe.moe.experts.gate_up", (slice(1, 2), slice(4, 6), slice(1, 2), slice(8, 24), slice(3, 50)))
    names = [f"model.layers.2.mlp.experts.{expert}.up_proj.weight" for expert in (4, 5)]
    assert np.array_equal(part[0, :, 0], np.stack([made.plain[name][8:24, 3:50] for name in names]))
    assert {name.rsplit("_", 1)[0] for name in seen} == set(names)


HELD = [
    *(Fp8(rows, columns, "_scale") for rows, columns in [(128, 128), (1, None), (None, None), (1, 128)]),
    *(PackedInt(bits, 128, asymmetric) for bits in (3, 4, 8) for asymmetric in (False, True)),
    *(Int8(rows, None, asymmetric=True) for rows in (1, None)),
]


@pytest.mark.parametrize("layout", HELD, ids=lambda layout: layout.describe().replace(" ", "-"))
def test_dequantising_holds_little_beside_its_result(layout):
    """A float32 copy of the matrix would be twice the result."""
    shape = (4096, 2048)
    dtypes = {part.suffix: NUMPY_DTYPES[part.dtypes[0]] for part in layout.parts}
    parts = {suffix: np.zeros(size, dtypes[suffix]) for suffix, size in layout.shapes(shape).items()}
    rows, columns, out = np.arange(shape[0]), np.arange(shape[1]), np.empty(shape, BF16)
    tracemalloc.start()
    try:
        layout.dequantize(parts, rows, columns, out=out)
        assert tracemalloc.get_traced_memory()[1] < out.nbytes
    finally:
        tracemalloc.stop()


def wide() -> sources.Checkpoint:
    return sources.checkpoint(sources.deepseek(), num_hidden_layers=2, hidden_size=256, moe_intermediate_size=512)


TWO_ROWS = (slice(0, 1), slice(0, 8), slice(0, 2), slice(10, 12), slice(0, 256))


def two_rows(made: sources.Checkpoint) -> np.ndarray:
    """What `TWO_ROWS` of the experts' gate and up are."""
    name = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    return np.array([[[made.plain[name.format(e, part)][10:12] for part in ("gate", "up")] for e in range(8)]])


def test_a_few_rows_from_hugging_face_cost_no_more_than_themselves(tmp_path):
    made = wide()
    source = HfSource(made.write(tmp_path / "hf"))
    part = source.read("moe.moe.experts.gate_up", TWO_ROWS)
    tracemalloc.start()
    try:
        source.read("moe.moe.experts.gate_up", TWO_ROWS)
        assert tracemalloc.get_traced_memory()[1] < 512 * 256 / 4  # a quarter of one matrix in FP8
    finally:
        tracemalloc.stop()
    assert part.tobytes() == two_rows(made).tobytes()


def test_a_few_rows_of_what_is_kept_cost_one_expert_at_a_time(tmp_path, monkeypatch):
    made = wide()
    glm_jax.convert(made.write(tmp_path / "hf"), tmp_path / "kept", quantized="keep")
    source = OrbaxSource(tmp_path / "kept")
    sizes: dict[str, list[int]] = {}
    read = source.arrays.read

    def watched(name: str, index: tuple) -> np.ndarray:
        part = read(name, index)
        sizes.setdefault(name, []).append(part.nbytes)
        return part

    monkeypatch.setattr(source.arrays, "read", watched)
    assert source.read("moe.moe.experts.gate_up", TWO_ROWS).tobytes() == two_rows(made).tobytes()
    assert sizes == {
        "moe.moe.experts.gate_up": [2 * 512 * 256] * 8,
        "moe.moe.experts.gate_up.scale": [8 * 2 * 4 * 2 * 4],
    }


def test_unaligned_tensors_are_read(tmp_path):
    """A file whose header has an odd length: mapped float32 and int32 then lie at odd addresses."""
    for kind in ("deepseek-odd", "kimi-32"):
        made = sources.checkpoint(KINDS[kind])
        path = made.write(tmp_path / kind) / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
        source, name = HfSource(Path(tmp_path / kind)), "model.layers.1.mlp.experts.0.down_proj.weight"
        part = source.read("moe.moe.experts.down", tuple(map(every, (1, 1, 64, 32))))
        assert part.tobytes() == made.plain[name].tobytes()
