"""Quantised weights on devices: they stand for the source's weights, bit for bit, and the model runs on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glm_jax
from glm_jax.checkpoint import open_source, placing
from glm_jax.checkpoint.load import load_source
from glm_jax.errors import InputError
from glm_jax.kernels import ops_for_platform
from glm_jax.model import transformer
from glm_jax.model.transformer import with_layer_layout
from glm_jax.sharding import QuantizedArray, map_weights, weights_by_name
from glm_jax.training import create_state
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, FP8, KINDS, Matrix
from tests.decoding import teacher_forced


def values_of(model: Any) -> dict[str, Any]:
    return {name: weight.get_raw_value() for name, weight in weights_by_name(model).items()}


def product(leaf: QuantizedArray) -> np.ndarray:
    """The float32 matrix that a leaf stands for, with numpy."""
    values, scale = np.asarray(leaf.values), np.asarray(leaf.scale)
    values = (values.view(FP8) if values.dtype == np.uint8 else values).astype(np.float32)
    outputs = values.shape[: values.ndim - leaf.contracting_dims]
    flat = values.reshape(*outputs, -1)
    spread = np.broadcast_to(scale[..., None], flat.shape) if scale.ndim == len(outputs) else None
    if spread is None:
        spread = np.repeat(scale, flat.shape[-1] // scale.shape[-1], axis=-1)
    return (flat * spread).reshape(values.shape)


def dequantized(model: Any) -> Any:
    """The same model with each leaf as the float32 weight that it stands for."""

    def whole(_: str, weight: Any) -> Any:
        value = weight.get_raw_value()
        return jax.device_put(product(value), value.sharding) if isinstance(value, QuantizedArray) else value

    return map_weights(whole, model)


def same_bits(one: np.ndarray, two: np.ndarray) -> bool:
    """Equal, but for the sign and payload of what is no number."""
    return np.array_equal(one.astype(np.float32), two.astype(np.float32), equal_nan=True)


# --- each leaf ------------------------------------------------------------------------------------------------------

MESHES = [((1, 1, 1), False), ((1, 4, 2), True), ((2, 2, 2), False)]
GROUPED = {"blocks": sources.deepseek((16, 8)), "int4": sources.kimi(8)}
ALL = {**{name: KINDS[name] for name in ("deepseek-128", "deepseek-odd", "glm-bf16", "glm-f32", "kimi-32")}, **GROUPED}


@pytest.mark.parametrize("kind", ALL)
def test_leaves_stand_for_the_weights(tmp_path, mesh_of_sizes, kind):
    made = sources.checkpoint(ALL[kind], seed=4)
    hf, plain = made.write(tmp_path / "hf", shards=2), made.write_plain(tmp_path / "plain")
    glm_jax.convert(hf, tmp_path / "kept", quantized="keep")
    for directory, (sizes, stacked) in zip((hf, hf, tmp_path / "kept"), MESHES, strict=True):
        options: dict[str, Any] = {"mesh": mesh_of_sizes(sizes), "stacked": stacked}
        model = glm_jax.load(directory, **options)
        assert model.dtype == jnp.float32
        expected, leaves = values_of(glm_jax.load(plain, dtype="float32", **options)), 0
        for name, value in values_of(model).items():
            assert value.sharding == expected[name].sharding, name
            if isinstance(value, QuantizedArray):
                leaves += 1
                assert value.scale.dtype == jnp.float32 and value.values.nbytes <= value.size
                assert same_bits(product(value).astype(BF16), np.asarray(expected[name]).astype(BF16)), name
            else:
                assert same_bits(np.asarray(value), np.asarray(expected[name])), name
        assert bool(model.notes) == (kind == "deepseek-odd") == (leaves == 0)


def test_dtypes_and_shapes(tmp_path, one_device):
    """On a CPU; on others the values are what the checkpoint stores."""
    expected = {
        "glm-bf16": ("moe.1.attention.o", jnp.uint8, (64, 8, 16), (64,)),
        "blocks": ("moe.1.attention.q_b", jnp.uint8, (8, 24, 32), (8, 24, 4)),
        "int4": ("moe.0.moe.experts.gate_up", jnp.int8, (8, 2, 32, 64), (8, 2, 32, 8)),
    }
    for kind, (name, dtype, shape, scale) in expected.items():
        leaf = values_of(glm_jax.load(sources.checkpoint(ALL[kind]).write(tmp_path / kind), mesh=one_device))[name]
        assert (leaf.dtype, leaf.shape, leaf.scale.shape) == (dtype, shape, scale)


def test_values_off_a_cpu_are_those_of_the_checkpoint(tmp_path, one_device, monkeypatch):
    """As of a mesh of another platform, on the devices that are here."""
    monkeypatch.setattr(transformer, "ops_for", lambda mesh: ops_for_platform("tpu"))
    for kind, dtype in {"glm-bf16": jnp.float8_e4m3fn, "blocks": jnp.float8_e4m3fn, "int4": jnp.int4}.items():
        made = sources.checkpoint(ALL[kind])
        model = glm_jax.load(made.write(tmp_path / kind), mesh=one_device, stacked=True)
        expected = values_of(glm_jax.load(made.write_plain(tmp_path / f"{kind}-plain"), mesh=one_device, stacked=True))
        leaves = {name: value for name, value in values_of(model).items() if isinstance(value, QuantizedArray)}
        assert leaves and all(leaf.dtype == dtype for leaf in leaves.values())
        for name, leaf in leaves.items():
            assert same_bits(product(leaf).astype(BF16), np.asarray(expected[name]).astype(BF16)), name


def test_words_and_groups_that_devices_share(tmp_path, mesh_of_sizes):
    """Rows of 60 and 36 int4 fill no whole words, and a third of 36 begins within one."""
    shape = {"hidden_size": 60, "moe_intermediate_size": 36, "vocab_size": 126}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 6}
    made = sources.checkpoint(sources.kimi(12), **shape)
    hf, plain = made.write(tmp_path / "hf"), made.write_plain(tmp_path / "plain")
    options = {"mesh": mesh_of_sizes((1, 2, 3)), "stacked": False}
    expected, model = values_of(glm_jax.load(plain, **options)), glm_jax.load(hf, **options)
    found = {name: value for name, value in values_of(model).items() if isinstance(value, QuantizedArray)}
    assert len(found) == 4 and model.notes == ()
    for name, value in found.items():
        assert same_bits(product(value).astype(BF16), np.asarray(expected[name]).astype(BF16)), name


def test_blocks_are_divided_where_devices_need_it_and_dequantised_where_little_is_left(tmp_path, mesh_of_sizes):
    made = sources.checkpoint(sources.deepseek((5, 64)))
    hf, plain = made.write(tmp_path / "hf"), made.write_plain(tmp_path / "plain")
    whole, halves = (glm_jax.load(hf, mesh=mesh_of_sizes(sizes), stacked=True) for sizes in ((1, 1, 1), (1, 1, 2)))
    leaf, expected = values_of(whole)["moe.attention.o"], values_of(glm_jax.load(plain, stacked=True))
    assert leaf.scale.shape == (2, 64, 3)  # 96 inputs in blocks of 64 and 32
    assert same_bits(product(leaf).astype(BF16), np.asarray(expected["moe.attention.o"]).astype(BF16))
    assert whole.notes == ()
    (note,) = halves.notes
    assert note.startswith("dequantised, because groups of 64 do not divide the inputs") and "moe.attention.o" in note
    assert not isinstance(values_of(halves)["moe.attention.o"], QuantizedArray)
    assert isinstance(values_of(halves)["moe.attention.q_b"], QuantizedArray)


def test_matrices_that_are_kept_apart_stay_in_whole_groups(tmp_path, mesh_of_sizes):
    """Two groups of 32 inputs do not divide over four devices: these two of them split."""
    made = sources.checkpoint(sources.deepseek((5, 32)))
    hf, plain = made.write(tmp_path / "hf"), made.write_plain(tmp_path / "plain")
    mesh, rules = mesh_of_sizes((2, 2, 1)), glm_jax.Rules(fsdp=("data", "expert"))
    model = glm_jax.load(hf, mesh=mesh, rules=rules)
    leaf, expected = values_of(model)["moe.0.attention.q_a"], values_of(glm_jax.load(plain, mesh=mesh))
    assert leaf.values.sharding.spec[1] == leaf.scale.sharding.spec[1] in ("data", ("data",))
    assert same_bits(product(leaf).astype(BF16), np.asarray(expected["moe.0.attention.q_a"]).astype(BF16))


def test_what_cannot_be_a_leaf_is_dequantised_with_a_note(tmp_path, one_device):
    """The MTP layer's projection, which has no product for it, and a weight that is quantised in one of its layers."""
    kind = dataclasses.replace(sources.deepseek(), names=sources.PROJECTIONS + r"|.*\.eh_proj\.weight")
    made = sources.checkpoint(kind)
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = {**made.tensors, name: made.plain[name]}
    del tensors[f"{name}_scale_inv"]
    hf, plain = sources.write(tmp_path / "hf", made.config, tensors), made.write_plain(tmp_path / "plain")
    model, expected = glm_jax.load(hf, mesh=one_device), values_of(glm_jax.load(plain, mesh=one_device))
    assert sorted(model.notes) == [
        "dequantised, because not quantised alike in all layers and experts: moe.attention.o",
        "dequantised, because the model has no product for it in quantised form: mtp.projection",
    ]
    found = values_of(model)
    for name in ("moe.0.attention.o", "moe.1.attention.o", "mtp.projection"):
        assert same_bits(np.asarray(found[name]), np.asarray(expected[name]))


# --- the model runs -------------------------------------------------------------------------------------------------


def finite_blocks(rng: np.random.Generator, shape: tuple[int, int]) -> Matrix:
    scale = rng.uniform(0.5, 2, (-(-shape[0] // 16), -(-shape[1] // 8))) * shape[1] ** -0.5 / 60
    return {"": codes(rng, shape), "_scale_inv": scale.astype(np.float32)}, np.zeros(shape, BF16)


def finite_channels(rng: np.random.Generator, shape: tuple[int, int]) -> Matrix:
    scale = rng.uniform(0.5, 2, (shape[0], 1)) * shape[1] ** -0.5 / 60
    return {"": codes(rng, shape), "_scale": scale.astype(BF16)}, np.zeros(shape, BF16)


def finite_int4(rng: np.random.Generator, shape: tuple[int, int]) -> Matrix:
    parts, plain = sources.packed(rng, shape, 8)
    scale = rng.uniform(0.5, 2, parts["_scale"].shape) * shape[1] ** -0.5 / 4
    return {**parts, "_scale": scale.astype(BF16)}, plain


def codes(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.clip(rng.normal(0, 60, shape), -448, 448).astype(FP8)


RUNNING = {
    "glm": dataclasses.replace(sources.glm(), names=sources.PROJECTIONS, quantize=finite_channels),
    "deepseek": dataclasses.replace(sources.deepseek((16, 8)), quantize=finite_blocks),
    "kimi": dataclasses.replace(sources.kimi(8), quantize=finite_int4),
}
RUNNING["glm"].config["ignore"][:] = ["lm_head"]
SMALL = {"num_hidden_layers": 2, "num_key_value_heads": 8, "vocab_size": 32}


@pytest.mark.parametrize("family", RUNNING)
def test_the_model_runs_on_quantised_weights(tmp_path, mesh_of_sizes, family):
    """Forward, decode (absorbed attention), generation and speculation equal those with the weights in float32."""
    kind = RUNNING[family]
    hf = sources.checkpoint(kind, seed=1, **SMALL).write(tmp_path / "hf")
    tokens, lengths = np.random.default_rng(0).integers(0, 32, (4, 12)), np.array([3, 12, 7, 9])
    one = glm_jax.load(hf, mesh=mesh_of_sizes((1, 1, 1)), stacked=False)
    reference, mtp = dequantized(one), one.mtp is not None
    expected, decoded = reference(tokens, mtp=mtp), teacher_forced(reference, tokens, lengths)
    answers = glm_jax.generate(reference, tokens[:2].tolist(), max_new_tokens=6)
    deviation = float(np.std(expected.logits))
    for model in (one, glm_jax.load(hf, mesh=mesh_of_sizes((2, 2, 2)), stacked=True)):
        assert model.notes == () and any(isinstance(value, QuantizedArray) for value in values_of(model).values())
        out = model(tokens, mtp=mtp)
        assert np.abs(out.logits - np.asarray(expected.logits)).max() < 1e-3 * deviation
        assert np.abs(teacher_forced(model, tokens, lengths) - decoded).max() < 1e-3 * deviation
        if mtp:
            assert np.abs(out.mtp_logits - np.asarray(expected.mtp_logits)).max() < 1e-3 * deviation
        assert glm_jax.generate(model, tokens[:2].tolist(), max_new_tokens=6, speculative=int(mtp)) == answers


def test_quantised_weights_are_not_trained(tmp_path, one_device):
    model = glm_jax.load(sources.checkpoint(RUNNING["kimi"]).write(tmp_path / "hf"), mesh=one_device)
    with pytest.raises(InputError, match=r"4 of the model's weights are quantised \(moe\.0\..*quantized='dequantize'"):
        create_state(model, optax.sgd(0.1))


def test_another_word_for_quantized(tmp_path):
    with pytest.raises(InputError, match="quantized is 'fp8'; it is one of 'keep', 'dequantize'"):
        glm_jax.load(tmp_path, quantized="fp8")


# --- what is read ---------------------------------------------------------------------------------------------------


class Counted:
    """A source that notes how many bytes each reading gave."""

    def __init__(self, directory: Path) -> None:
        self._source, self.sizes = open_source(directory), list[int]()
        self.config, self.notes = self._source.config, self._source.notes
        self.mapping, self.quantized_weights = self._source.mapping, self._source.quantized_weights

    def read(self, weight: str, index: Any) -> np.ndarray:
        return self._counted(self._source.read(weight, index))

    def read_stored(self, array: str, index: Any) -> np.ndarray:
        return self._counted(self._source.read_stored(array, index))

    def _counted(self, part: np.ndarray) -> np.ndarray:
        self.sizes.append(part.nbytes)
        return part


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """26 MB in FP8 and bfloat16, of blocks that devices do not cut."""
    shape = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 32, "num_hidden_layers": 2}
    made = sources.checkpoint(sources.deepseek((16, 8)), **shape, num_nextn_predict_layers=0)
    return made.write(tmp_path_factory.mktemp("wide") / "hf", shards=3)


@pytest.mark.parametrize("quantized", ["keep", "dequantize"])
@pytest.mark.parametrize("stacked", [False, True])
def test_each_slice_is_read_once_in_small_pieces(wide, mesh_of_sizes, monkeypatch, quantized, stacked):
    source, whole = Counted(wide), glm_jax.load(wide, mesh=mesh_of_sizes((1, 4, 2)), quantized=quantized)
    most = 2**20
    monkeypatch.setattr(placing, "PIECE_BYTES", most)
    with jax.set_mesh(whole.mesh):  # which must not matter
        model = load_source(source, mesh=whole.mesh, quantized=quantized, stacked=stacked)
    assert max(source.sizes) <= most
    # Scales are stored by block and spread over its 16 rows; what is bfloat16 in the files is float32 here.
    expected = sum(
        value.values.nbytes + value.scale.nbytes / 16 if isinstance(value, QuantizedArray) else value.nbytes / 2
        for value in values_of(model).values()
    )
    assert 0.99 * expected < sum(source.sizes) < 1.01 * expected
    flat, other = (jax.tree.leaves(with_layer_layout(m, stacked=False)) for m in (model, whole))
    for one, two in zip(flat, other, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.float8_e4m3fn, jnp.bfloat16])
@pytest.mark.parametrize("most", [1, 7, 30, 100, 10**6])
def test_pieces_of_any_size_make_the_array(mesh_of_sizes, monkeypatch, dtype, most):
    monkeypatch.setattr(placing, "PIECE_BYTES", most)
    whole = np.random.default_rng(0).integers(-8, 8, (6, 4, 5)).astype(dtype)
    for spec in (("expert", None, None), (None, ("data", "tensor"), None), ()):
        sharding = jax.sharding.NamedSharding(mesh_of_sizes((2, 2, 2)), jax.sharding.PartitionSpec(*spec))
        placed = placing.place(jax.ShapeDtypeStruct(whole.shape, dtype, sharding=sharding), lambda box: whole[box])
        assert placed.sharding == sharding and np.array_equal(np.asarray(placed), whole)
