"""The families with latent attention (DeepSeek-V3, Kimi K2, GLM-4.7-Flash) against transformers on torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import glm_jax
from glm_jax.model import create_cache
from tests import decoding, oracle, published

LIMIT = 1e-4  # largest difference of the logits, in standard deviations of the reference's
YARN = published.FAMILIES["deepseek_v3"]["rope_scaling"]
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek": {"model_type": "deepseek_v3"},
    "deepseek-three-dense": {"model_type": "deepseek_v3", "first_k_dense_replace": 3, "num_hidden_layers": 4},
    "deepseek-eight-groups": {
        "model_type": "deepseek_v3",
        "n_group": 8,
        "topk_group": 4,
        "n_routed_experts": 32,
        "num_experts_per_tok": 8,
    },
    "deepseek-two-groups": {"model_type": "deepseek_v3", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
    "deepseek-full-queries": {"model_type": "deepseek_v3", "q_lora_rank": None},
    "deepseek-plain-rope": {"model_type": "deepseek_v3", "rope_scaling": None},
    "deepseek-half-split": {"model_type": "deepseek_v3", "rope_interleave": False},
    "deepseek-yarn-without-mscale": {
        "model_type": "deepseek_v3",
        "rope_scaling": {key: value for key, value in YARN.items() if not key.startswith("mscale")},
    },
    "deepseek-yarn-unequal-mscale": {"model_type": "deepseek_v3", "rope_scaling": {**YARN, "mscale": 0.7}},
    "deepseek-published-heads": {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 4096},
    },
    "kimi": {"model_type": "kimi_k2"},
    "flash": {"model_type": "glm4_moe_lite"},
    "flash-wide-values": {"model_type": "glm4_moe_lite", "v_head_dim": 32, "rms_norm_eps": 1e-2},
}
FAMILIES = ("deepseek", "kimi", "flash")


def ratio(ours: Any, reference: np.ndarray) -> float:
    """The largest absolute difference in standard deviations of the reference."""
    return float(np.abs(np.asarray(ours) - reference).max() / reference.std())


def check(directory: Path, mesh: Any, tokens: np.ndarray, *, stacked: bool = True) -> None:
    reference, model = oracle.load(directory), glm_jax.load(directory, mesh=mesh, stacked=stacked)
    out = model(tokens, mtp=model.mtp is not None)
    assert ratio(out.logits, oracle.logits(reference, tokens)) <= LIMIT
    if model.mtp is not None:
        assert ratio(out.mtp_logits, oracle.mtp_logits(reference, tokens)) <= LIMIT


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_before_and_past_the_original_positions(tmp_path, one_device, shape):
    """YaRN's original maximum is 16 tokens here, the sequences have 40: the frequencies hold at every length."""
    for seed in range(2):
        directory = oracle.save(tmp_path / str(seed), seed=seed, beside=bool(seed), **shape)
        check(directory, one_device, published.tokens(2, 10 + 30 * seed, seed), stacked=bool(seed))


@pytest.mark.parametrize("shape", FAMILIES)
def test_greedy_tokens_through_the_latent_cache(tmp_path, one_device, shape):
    directory = oracle.save(tmp_path / "hf", seed=5, **SHAPES[shape])
    prompts = [published.tokens(1, length, length)[0].tolist() for length in (1, 3, 9, 17, 30)]
    ours = glm_jax.generate(glm_jax.load(directory, mesh=one_device), prompts, max_new_tokens=64)
    assert ours == oracle.greedy(oracle.load(directory), prompts, 64)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("shape", FAMILIES)
def test_prefill_and_absorbed_decode_equal_the_whole_pass(tmp_path, one_device, shape, stacked):
    directory = oracle.save(tmp_path / "hf", seed=9, **SHAPES[shape])
    tokens, model = published.tokens(4, 24), glm_jax.load(directory, mesh=one_device, stacked=stacked)
    reference = oracle.logits(oracle.load(directory), tokens)
    assert ratio(decoding.teacher_forced(model, tokens, np.array([1, 5, 12, 23])), reference) <= LIMIT


def test_the_cache_holds_576_values_a_token_and_layer(one_device):
    """DeepSeek-V3's heads and latent sizes, from the bytes that are there."""
    shape = {key: value for key, value in SHAPES["deepseek-published-heads"].items() if key != "model_type"}
    config = glm_jax.configs.from_hf(published.config_json(model_type="deepseek_v3", **shape))
    model = glm_jax.Transformer.create(config, mesh=one_device)
    cache = create_cache(model, 2, 32, dtype="bfloat16", mtp=True)
    layers = config.num_layers + 1
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 2 * 32 * layers * 576 * 2
