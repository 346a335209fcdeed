"""Small models of the same architecture, for tests and for trying things on a laptop."""

from __future__ import annotations

from glm_jax.configs.model_config import GqaConfig, ModelConfig, MoeConfig, RopeConfig

TINY_GLM = ModelConfig(
    model_type="glm4_moe",
    vocab_size=512,
    embed_dim=64,
    num_layers=4,
    num_dense_layers=1,
    mlp_width=128,
    attention=GqaConfig(
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        rope=RopeConfig(theta=10_000.0, rotary_dim=8),
        qkv_bias=True,
        qk_norm=True,
    ),
    moe=MoeConfig(
        num_experts=8,
        num_experts_per_token=2,
        expert_width=32,
        num_shared_experts=1,
        num_groups=1,
        num_groups_per_token=1,
        normalize_weights=True,
        routed_scaling=2.5,
    ),
    num_mtp_layers=1,
    mtp_copies=(),
    tie_embeddings=False,
    norm_eps=1e-5,
    max_positions=1024,
    initializer_range=0.02,
)

PRESETS = {"tiny-glm": TINY_GLM}
