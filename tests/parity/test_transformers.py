"""The model against transformers on torch, both reading the directory that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glm_jax
from glm_jax import configs
from glm_jax.sharding import PackedBfloat16
from tests import decoding, oracle, published

LIMIT = 1e-4  # largest difference of the logits, in standard deviations of the reference's
AIR = {"use_qk_norm": False, "routed_scaling_factor": 1.0}
SHAPES: dict[str, dict[str, Any]] = {
    "glm": {},
    "air": AIR,
    "three-dense": {"first_k_dense_replace": 3, "num_hidden_layers": 5},
    "no-dense": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "only-dense": {"first_k_dense_replace": 2, "num_hidden_layers": 2},
    "two-groups": {"n_group": 2, "topk_group": 1, "n_routed_experts": 12, "num_experts_per_tok": 3},
    "four-groups": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 4, **AIR},
    "two-shared": {"n_shared_experts": 2},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 8},
    "no-bias": {"attention_bias": False},
    "wide-heads": {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 40, "partial_rotary_factor": 0.2},
    "whole-rotary": {"partial_rotary_factor": 1.0, "rope_theta": 1e6},
    "raw-weights": {"norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True},
    "one-expert": {"num_experts_per_tok": 1, "rms_norm_eps": 1e-6},
    "every-expert": {"num_experts_per_tok": 8},
}


def ratio(ours: Any, reference: np.ndarray) -> float:
    """The largest absolute difference in standard deviations of the reference."""
    ours = np.asarray(ours)
    assert ours.dtype == np.float32 and ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / reference.std())


def check(directory: Path, mesh: Any, tokens: np.ndarray, *, stacked: bool = True) -> None:
    reference = oracle.load(directory)
    model = glm_jax.load(directory, mesh=mesh, stacked=stacked)
    out = model(tokens, mtp=True)
    assert ratio(out.logits, oracle.logits(reference, tokens)) <= LIMIT
    assert ratio(out.mtp_logits, oracle.mtp_logits(reference, tokens)) <= LIMIT


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_mtp_logits(tmp_path, one_device, shape):
    for seed in range(2):
        directory = oracle.save(tmp_path / str(seed), seed=seed, **shape)
        check(directory, one_device, published.tokens(3, 20, seed))


@pytest.mark.parametrize("shape", [{}, AIR], ids=["glm", "air"])
def test_logits_over_many_seeds(tmp_path, one_device, shape):
    for seed in range(10, 16):
        directory = oracle.save(tmp_path / str(seed), seed=seed, **shape)
        check(directory, one_device, published.tokens(3, 20, seed))


def test_unrolled_layers_give_the_same_logits(tmp_path, one_device):
    shape = SHAPES["three-dense"]
    check(oracle.save(tmp_path / "hf", seed=7, **shape), one_device, published.tokens(3, 20), stacked=False)


def test_the_correction_bias_decides(tmp_path, one_device):
    """Biases of a few units reverse the router's own order; without them the logits are others."""
    directory = oracle.save(tmp_path / "hf")
    arrays = published.read(directory)
    for name in arrays:
        if name.endswith(published.BIAS):
            arrays[name] = np.linspace(-4, -1, arrays[name].size, dtype=np.float32)
    content = json.loads((directory / "config.json").read_text())
    biased = published.write(tmp_path / "biased", content, arrays)
    tokens = published.tokens(2, 12)
    check(biased, one_device, tokens)
    plain, moved = (np.asarray(glm_jax.load(d, mesh=one_device)(tokens).logits) for d in (directory, biased))
    assert np.abs(plain - moved).max() > 0.1


def test_prompts_longer_than_a_block_of_queries(tmp_path, one_device):
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2048}
    directory = oracle.save(tmp_path / "hf", seed=3, rope_theta=1e6, **shape)
    check(directory, one_device, published.tokens(1, 1100))


@pytest.mark.parametrize("shape", ["glm", "air", "three-dense"])
def test_greedy_tokens_equal_those_of_generate(tmp_path, one_device, shape):
    directory = oracle.save(tmp_path / "hf", seed=5, **SHAPES[shape])
    prompts = [published.tokens(1, length, length)[0].tolist() for length in (1, 3, 9, 17, 30)]
    model = glm_jax.load(directory, mesh=one_device)
    ours = glm_jax.generate(model, prompts, max_new_tokens=64)
    assert ours == oracle.greedy(oracle.load(directory), prompts, 64)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_prefill_and_decode_equal_the_whole_pass(tmp_path, one_device, stacked):
    directory = oracle.save(tmp_path / "hf", seed=9, **SHAPES["three-dense"])
    tokens = published.tokens(4, 24)
    model = glm_jax.load(directory, mesh=one_device, stacked=stacked)
    reference = oracle.logits(oracle.load(directory), tokens)
    assert ratio(model(tokens).logits, reference) <= LIMIT
    assert ratio(decoding.teacher_forced(model, tokens, np.array([1, 5, 12, 23])), reference) <= LIMIT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_source_runs_in_float32_as_transformers_upcasts_it(tmp_path, one_device, dtype):
    check(oracle.save(tmp_path / "hf", seed=11, dtype=dtype, shard_size="150KB"), one_device, published.tokens(3, 20))
    assert (tmp_path / "hf" / oracle.INDEX).exists()


def test_float32_routers_in_a_bfloat16_source(tmp_path, one_device):
    check(oracle.save(tmp_path / "hf", dtype="bfloat16", float32_routers=True), one_device, published.tokens(3, 20))


def test_the_correction_bias_stays_float32_in_a_bfloat16_run(tmp_path, one_device):
    directory = oracle.save(tmp_path / "hf", dtype="bfloat16")
    arrays = published.read(directory)
    model = glm_jax.load(directory, mesh=one_device, dtype="bfloat16")
    tokens = published.tokens(1, 4)
    assert model(tokens).logits.dtype == np.float32
    for group, numbers in ((model.moe, (1, 2)), ([model.mtp.layer], (3,))):
        for layer, number in zip(group, numbers, strict=True):
            bias = np.asarray(layer.moe.router.bias[...])
            assert bias.dtype == np.float32
            np.testing.assert_array_equal(bias, arrays[f"model.layers.{number}.{published.BIAS}"])
            assert isinstance(layer.attention.q[...], PackedBfloat16)  # as a CPU holds bfloat16


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tmp_path, one_device):
    directory = oracle.save(tmp_path / "hf", dtype="bfloat16")
    tokens = published.tokens(4, 32)
    exact = oracle.logits(oracle.load(directory), tokens)
    theirs = np.abs(oracle.logits(oracle.load(directory, "bfloat16"), tokens) - exact)
    ours = np.abs(np.asarray(glm_jax.load(directory, mesh=one_device, dtype="bfloat16")(tokens).logits) - exact)
    assert np.median(ours) <= 1.25 * np.median(theirs)


def test_both_layouts_of_config_json_are_one_configuration(tmp_path, one_device):
    nested, beside = (oracle.save(tmp_path / str(flag), beside=flag) for flag in (False, True))
    assert "rope_parameters" in json.loads((nested / "config.json").read_text())
    assert "rope_theta" in json.loads((beside / "config.json").read_text())
    assert configs.from_hf(nested) == configs.from_hf(beside)
    check(beside, one_device, published.tokens(2, 10))


def random_shape(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 1, 2, 4]))
    kept = int(rng.integers(1, groups + 1))
    experts = groups * int(rng.integers(2, 7))
    layers, kv_heads = int(rng.integers(1, 7)), int(rng.choice([1, 2, 3, 4]))
    return {
        "hidden_size": int(rng.choice([32, 48, 72, 128])),
        "num_attention_heads": kv_heads * int(rng.integers(1, 5)),
        "num_key_value_heads": kv_heads,
        "head_dim": int(rng.choice([8, 16, 32])),
        "partial_rotary_factor": float(rng.choice([0.25, 0.5, 1.0])),
        "rope_theta": float(rng.choice([1e4, 1e6])),
        "num_hidden_layers": layers,
        "first_k_dense_replace": int(rng.integers(0, min(3, layers) + 1)),
        "intermediate_size": int(rng.integers(8, 200)),
        "moe_intermediate_size": int(rng.integers(8, 90)),
        "n_group": groups,
        "topk_group": kept,
        "n_routed_experts": experts,
        "num_experts_per_tok": int(rng.integers(1, experts // groups * kept + 1)),
        "n_shared_experts": int(rng.integers(1, 4)),
        "norm_topk_prob": bool(rng.integers(2)),
        "routed_scaling_factor": float(rng.choice([1.0, 2.5])),
        "attention_bias": bool(rng.integers(2)),
        "use_qk_norm": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
        "vocab_size": int(rng.integers(40, 300)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(tmp_path, one_device, seed):
    shape = random_shape(seed)
    directory = oracle.save(tmp_path / "hf", seed=seed, **shape)
    tokens = published.tokens(3, 33, seed, vocab=shape["vocab_size"])
    check(directory, one_device, tokens, stacked=bool(seed % 2))
    model, prompts = (
        glm_jax.load(directory, mesh=one_device),
        [row[: 2 + 7 * i].tolist() for i, row in enumerate(tokens)],
    )
    assert glm_jax.generate(model, prompts, max_new_tokens=64) == oracle.greedy(oracle.load(directory), prompts, 64)
