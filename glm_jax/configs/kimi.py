"""Kimi K2 (arXiv 2507.20534 and the published config.json): DeepSeek-V3's architecture without groups and MTP.

K2-Thinking has the shapes of the release of September 2025 (0905) and an epsilon of 1e-5; its experts are published in
int4. Its config.json was not at hand: YaRN's `beta_fast`, which is 1 in 0905 and 32 in K2.5, is taken from 0905. A
checkpoint is read by its own config.json, never by a preset.
"""

from __future__ import annotations

import dataclasses

from glm_jax.configs.model_config import MlaConfig, ModelConfig, MoeConfig, RopeConfig, YarnConfig


def _attention(factor: float) -> MlaConfig:
    yarn = YarnConfig(
        factor=factor, original_positions=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
    )
    return MlaConfig(
        num_heads=64,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        value_dim=128,
        rope=RopeConfig(theta=50_000.0, rotary_dim=64, interleaved=True, yarn=yarn),
    )


KIMI_K2 = ModelConfig(
    model_type="kimi_k2",
    vocab_size=163_840,
    embed_dim=7168,
    num_layers=61,
    num_dense_layers=1,
    mlp_width=18_432,
    attention=_attention(32.0),
    moe=MoeConfig(
        num_experts=384,
        num_experts_per_token=8,
        expert_width=2048,
        num_shared_experts=1,
        num_groups=1,
        num_groups_per_token=1,
        normalize_weights=True,
        routed_scaling=2.827,
    ),
    num_mtp_layers=0,
    mtp_copies=(),
    tie_embeddings=False,
    norm_eps=1e-6,
    max_positions=131_072,
    initializer_range=0.02,
)
KIMI_K2_0905 = dataclasses.replace(KIMI_K2, attention=_attention(64.0), max_positions=262_144)
KIMI_K2_THINKING = dataclasses.replace(KIMI_K2_0905, norm_eps=1e-5)

PRESETS = {
    "kimi-k2": KIMI_K2,
    "kimi-k2-base": KIMI_K2,
    "kimi-k2-0905": KIMI_K2_0905,
    "kimi-k2-thinking": KIMI_K2_THINKING,
}
