"""Each family with latent attention through files: HF -> Orbax -> HF, and loading from either."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import glm_jax
from glm_jax import configs
from tests import oracle, published

FAMILIES = ["deepseek_v3", "kimi_k2", "glm4_moe_lite"]


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        assert array.tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("shards", [None, 3], ids=["single", "sharded"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_bytes_come_back(tmp_path, model_type, shards):
    source = published.checkpoint(tmp_path / "hf", model_type=model_type, shards=shards)
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    assert_same(published.read(tmp_path / "back"), published.read(source))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_transformers_saved_comes_back(tmp_path, model_type):
    """In bfloat16 with float32 biases, and transformers loads the export and computes the same with it."""
    source = oracle.save(tmp_path / "hf", model_type=model_type, dtype="bfloat16")
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    assert_same(published.read(tmp_path / "back"), published.read(source))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    logits = [oracle.logits(oracle.load(tmp_path / name, "float32"), tokens) for name in ("hf", "back")]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("changes", [{"q_lora_rank": None}, {"rope_interleave": False}, {"rope_scaling": None}])
def test_other_shapes_come_back(tmp_path, changes):
    source = published.checkpoint(tmp_path / "hf", model_type="deepseek_v3", **changes)
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    assert_same(published.read(tmp_path / "back"), published.read(source))
    assert configs.from_hf(tmp_path / "back") == configs.from_hf(source)


def test_fused_experts_come_back_one_by_one(tmp_path):
    config = published.config_json(model_type="deepseek_v3", dtype="bfloat16")
    arrays = published.stored(published.tensors(config), "bfloat16")
    source = published.write(tmp_path / "hf", config, published.fused(arrays))
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    assert_same(published.read(tmp_path / "back"), arrays)


def test_kimis_rotary_tables_are_passed_over_with_a_note(tmp_path):
    config = published.config_json(model_type="kimi_k2", dtype="bfloat16")
    arrays = published.stored(published.tensors(config), "bfloat16")
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    ignored = {name: np.ones(7, arrays["model.norm.weight"].dtype) for name in names}
    source = published.write(tmp_path / "hf", config, {**arrays, **ignored})
    report = glm_jax.convert(source, tmp_path / "orbax")
    assert any("3 superfluous tensors" in note and names[0] in note for note in report.notes)
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    assert_same(published.read(tmp_path / "back"), arrays)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=["1x1x1", "2x2x2"])
def test_loading_from_either_directory_gives_the_same_weights(tmp_path, mesh_of_sizes, model_type, sizes):
    source = published.checkpoint(tmp_path / "hf", model_type=model_type)
    glm_jax.convert(source, tmp_path / "orbax")
    left, right = (glm_jax.load(tmp_path / name, mesh=mesh_of_sizes(sizes)) for name in ("hf", "orbax"))
    assert left.config == right.config
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.sharding == two.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
