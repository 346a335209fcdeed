"""Conversion and back: the same names, dtypes and bytes, whatever the source's form."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint.orbax_source import MANIFEST
from glm_jax.sharding import weights_by_name
from tests import published

MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    def key(array: np.ndarray) -> tuple:
        return array.dtype, array.shape, array.tobytes()

    return left.keys() == right.keys() and all(key(left[name]) == key(right[name]) for name in left)


def round_trip(source: Path, **options: int) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tensors after HF -> Orbax -> HF, and the notes of the conversion."""
    orbax, back = source.with_name("orbax"), source.with_name("back")
    report = glm_jax.convert(source, orbax)
    assert report.tensors == len(published.read(source))
    glm_jax.export(orbax, back, **options)
    assert sorted(os.listdir(source.parent)) == sorted(["back", "orbax", source.name])
    return published.read(back), report.notes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [None, 3], ids=["single", "sharded"])
def test_the_same_bytes_come_back(tmp_path, dtype, shards):
    source = published.checkpoint(tmp_path / "hf", dtype=dtype, shards=shards)
    tensors, notes = round_trip(source)
    assert same(tensors, published.read(source)) and notes == ()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == published.config_json(dtype=dtype)


def test_an_export_in_shards_holds_the_same_tensors(tmp_path):
    source = published.checkpoint(tmp_path / "hf")
    tensors, _ = round_trip(source, max_shard_bytes=100_000)
    assert same(tensors, published.read(source))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    "copies", [(), published.COPIES[:1], published.COPIES[1:], published.COPIES], ids=["none", "embed", "head", "both"]
)
def test_the_copies_of_the_mtp_layer_come_back_where_they_were(tmp_path, copies):
    source = published.checkpoint(tmp_path / "hf", copies=copies)
    tensors, notes = round_trip(source)
    assert same(tensors, published.read(source)) and notes == ()


def test_a_copy_that_differs_is_kept_and_noted(tmp_path):
    source = published.checkpoint(tmp_path / "hf")
    arrays = published.read(source)
    arrays["model.layers.3.shared_head.head.weight"] = arrays["lm_head.weight"] * 2
    published.write(source, published.config_json(), arrays)
    tensors, notes = round_trip(source)
    assert same(tensors, arrays)
    assert len(notes) == 1 and "model.layers.3.shared_head.head.weight differs from lm_head.weight" in notes[0]


def test_a_checkpoint_without_its_mtp_layer_is_converted_with_a_note(tmp_path):
    config = published.config_json()
    arrays = published.stored(published.tensors({**config, "num_nextn_predict_layers": 0}), "bfloat16")
    source = published.write(tmp_path / "hf", config, arrays)
    tensors, notes = round_trip(source)
    assert same(tensors, arrays)
    assert len(notes) == 1 and "going on without MTP" in notes[0]
    assert glm_jax.load(tmp_path / "orbax").mtp is None


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3", "glm4_moe_lite"])
def test_an_mtp_layer_that_the_config_does_not_name_is_there(tmp_path, model_type):
    """The class of GLM-4.7-Flash in transformers has no key for it, and other tools lose the key."""
    named = published.checkpoint(tmp_path / "named", model_type=model_type)
    config = json.loads((named / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "num_nextn_predict_layers"}
    if model_type != "glm4_moe_lite":
        config["num_nextn_predict_layers"] = 0
    source = published.write(tmp_path / "hf", config, published.read(named))
    ours, theirs = glm_jax.load(source), glm_jax.load(named)
    assert ours.config == theirs.config and ours.config.num_mtp_layers == 1
    assert any("names no MTP layer but there are tensors model.layers.3.*" in note for note in ours.notes)
    tokens = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(ours(tokens, mtp=True).mtp_logits, theirs(tokens, mtp=True).mtp_logits)


@pytest.mark.parametrize(
    "float32",
    [
        (published.BIAS, published.ROUTER),
        (published.BIAS, "layernorm.weight", "norm.weight"),
        (published.BIAS, "1.up_proj.weight", "0.self_attn.k_proj.weight"),
    ],
    ids=["routers", "norms", "single-parts"],
)
def test_mixed_dtypes_come_back_each_as_it_was(tmp_path, float32):
    config = published.config_json()
    arrays = published.stored(published.tensors(config), "bfloat16", float32=float32)
    assert len({array.dtype for array in arrays.values()}) == 2
    source = published.write(tmp_path / "hf", config, arrays)
    assert same(round_trip(source)[0], arrays)


def test_a_correction_bias_in_bfloat16_comes_back_in_bfloat16_and_runs_in_float32(tmp_path):
    config = published.config_json()
    arrays = published.stored(published.tensors(config), "bfloat16", float32=("none",))
    source = published.write(tmp_path / "hf", config, arrays)
    assert same(round_trip(source)[0], arrays)
    assert glm_jax.load(tmp_path / "orbax", dtype="bfloat16").mtp.layer.moe.router.bias[...].dtype == np.float32


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"first_k_dense_replace": 0}, {"n_shared_experts": 2}]
)
def test_other_shapes_come_back(tmp_path, changes):
    copies = () if changes.get("tie_word_embeddings") else published.COPIES
    source = published.checkpoint(tmp_path / "hf", copies=copies, **changes)
    assert same(round_trip(source)[0], published.read(source))


def test_fused_experts_come_back_one_by_one(tmp_path):
    arrays = published.stored(published.tensors(published.config_json()), "bfloat16")
    source = published.write(tmp_path / "hf", published.config_json(), published.fused(arrays))
    tensors, _ = round_trip(source)
    assert same(tensors, arrays)


def test_bytes_that_are_no_number_survive(tmp_path):
    """NaN payloads, infinities, negative zeros and denormals are bytes like any others."""
    config = published.config_json()
    arrays = published.stored(published.tensors(config), "bfloat16")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    bits = np.random.default_rng(0).integers(0, 2**16, arrays[name].shape, np.uint16)
    arrays[name] = bits.view(arrays[name].dtype)
    source = published.write(tmp_path / "hf", config, arrays)
    assert same(round_trip(source)[0], arrays)


def test_files_beside_the_tensors_go_along(tmp_path):
    source = published.checkpoint(tmp_path / "hf")
    texts = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "generation_config.json": '{"a": 1}'}
    for name, text in texts.items():
        (source / name).write_text(text)
    round_trip(source)
    assert all((tmp_path / "back" / name).read_text() == text for name, text in texts.items())


def test_superfluous_tensors_are_passed_over_with_a_note(tmp_path):
    source = published.checkpoint(tmp_path / "hf")
    arrays = published.read(source)
    ignored = "model.layers.0.self_attn.rotary_emb.inv_freq"
    published.write(source, published.config_json(), {**arrays, ignored: np.ones(4, np.float32)})
    report = glm_jax.convert(source, tmp_path / "orbax")
    assert report.tensors == len(arrays) and ignored in report.notes[0]


def test_progress_counts_bytes_up_to_all(tmp_path):
    seen: list[tuple[int, int]] = []
    source = published.checkpoint(tmp_path / "hf")
    report = glm_jax.convert(source, tmp_path / "orbax", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[-1][0] == seen[-1][1]
    assert report.nbytes == sum(array.nbytes for array in published.read(source).values())


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_loading_from_either_directory_gives_the_same_weights(tmp_path, mesh_of_sizes, sizes, stacked):
    source = published.checkpoint(tmp_path / "hf", shards=2)
    glm_jax.convert(source, tmp_path / "orbax")
    options = {"mesh": mesh_of_sizes(sizes), "dtype": "bfloat16", "stacked": stacked}
    one, two = (weights_by_name(glm_jax.load(d, **options)) for d in (source, tmp_path / "orbax"))
    assert one.keys() == two.keys()
    for name in one:
        # As leaves: a CPU holds the matrices of a bfloat16 model as bits.
        for left, right in zip(jax.tree.leaves(one[name]), jax.tree.leaves(two[name]), strict=True):
            assert left.dtype == right.dtype and left.sharding == right.sharding
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), name


def test_the_weights_are_the_tensors(tmp_path, one_device):
    """A few places by hand, so that conversion and loading are not only equal to each other."""
    source = published.checkpoint(tmp_path / "hf", dtype="float32")
    arrays = published.read(source)
    model = glm_jax.load(source, mesh=one_device, stacked=True)
    layer = "model.layers.2."
    experts = np.asarray(model.moe.moe.experts.gate_up[...])
    assert np.array_equal(experts[1, 5, 0], arrays[f"{layer}mlp.experts.5.gate_proj.weight"])
    assert np.array_equal(experts[1, 5, 1], arrays[f"{layer}mlp.experts.5.up_proj.weight"])
    assert np.array_equal(
        np.asarray(model.moe.moe.experts.down[...])[1, 5], arrays[f"{layer}mlp.experts.5.down_proj.weight"]
    )
    q = arrays[f"{layer}self_attn.q_proj.weight"]
    assert np.array_equal(np.asarray(model.moe.attention.q[...])[1], q.reshape(8, 16, 64))
    o = arrays["model.layers.3.self_attn.o_proj.weight"]
    assert np.array_equal(np.asarray(model.mtp.layer.attention.o[...]), o.reshape(64, 8, 16))
    assert np.array_equal(np.asarray(model.mtp.norm.scale[...]), arrays["model.layers.3.shared_head.norm.weight"])


def test_plain_orbax_restores_the_directory(tmp_path):
    import orbax.checkpoint as ocp

    source = published.checkpoint(tmp_path / "hf")
    glm_jax.convert(source, tmp_path / "orbax")
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax" / "default")
    expected = published.read(source)["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert restored["moe.moe.experts.down"].shape == (2, 8, 64, 32)
    assert np.asarray(restored["moe.moe.experts.down"])[0, 2].tobytes() == expected.tobytes()
    assert restored["moe.moe.router.bias"].dtype == np.float32


def test_the_manifest_has_a_checksum_of_every_tensor(tmp_path):
    import hashlib

    source = published.checkpoint(tmp_path / "hf")
    glm_jax.convert(source, tmp_path / "orbax")
    manifest = json.loads((tmp_path / "orbax" / MANIFEST).read_text())
    expected = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in published.read(source).items()}
    assert {name: record["sha256"] for name, record in manifest["tensors"].items()} == expected
    assert manifest["layout_version"] == 1


def test_an_export_is_a_source_again(tmp_path):
    """What was written runs and converts to the very same Orbax arrays."""
    source = published.checkpoint(tmp_path / "hf", shards=2)
    round_trip(source)
    glm_jax.convert(tmp_path / "back", tmp_path / "again")
    for path in sorted((tmp_path / "orbax" / "default").rglob("c.*")):
        twin = tmp_path / "again" / path.relative_to(tmp_path / "orbax")
        assert twin.read_bytes() == path.read_bytes()


def test_what_transformers_saved_comes_back_and_transformers_loads_it(tmp_path):
    from tests import oracle

    source = oracle.save(tmp_path / "hf", dtype="bfloat16", shard_size="150KB", float32_routers=True)
    tensors, _ = round_trip(source)
    assert same(tensors, published.read(source))
    tokens = np.arange(20)[None] % 128
    before, after = (oracle.logits(oracle.load(tmp_path / name), tokens) for name in ("hf", "back"))
    assert np.array_equal(before, after)


def test_transformers_and_the_tests_spell_the_same_names(tmp_path):
    from tests import oracle

    theirs = published.read(oracle.save(tmp_path / "hf", dtype="bfloat16"))
    ours = published.stored(published.tensors(published.config_json()), "bfloat16")
    assert {n: (a.dtype, a.shape) for n, a in theirs.items()} == {n: (a.dtype, a.shape) for n, a in ours.items()}


def test_a_source_under_a_link_and_a_target_in_new_parents(tmp_path):
    source = published.checkpoint(tmp_path / "hf")
    (tmp_path / "link").symlink_to(source)
    glm_jax.convert(tmp_path / "link", tmp_path / "new" / "parents" / "orbax")
    assert jax.tree.leaves(glm_jax.load(tmp_path / "new" / "parents" / "orbax"))
