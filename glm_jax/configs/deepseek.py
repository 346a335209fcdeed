"""DeepSeek-V3, R1 and V3.1 (arXiv 2412.19437, section 4.2, and the published config.json).

V3.1 is V3 trained further, with the same shapes; its FP8 scales are powers of two, which its reader need not know.
"""

from __future__ import annotations

from glm_jax.configs.model_config import MlaConfig, ModelConfig, MoeConfig, RopeConfig, YarnConfig

DEEPSEEK_V3 = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=129_280,
    embed_dim=7168,
    num_layers=61,
    num_dense_layers=3,
    mlp_width=18_432,
    attention=MlaConfig(
        num_heads=128,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        value_dim=128,
        rope=RopeConfig(
            theta=10_000.0,
            rotary_dim=64,
            interleaved=True,
            yarn=YarnConfig(
                factor=40.0,
                original_positions=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
    ),
    moe=MoeConfig(
        num_experts=256,
        num_experts_per_token=8,
        expert_width=2048,
        num_shared_experts=1,
        num_groups=8,
        num_groups_per_token=4,
        normalize_weights=True,
        routed_scaling=2.5,
    ),
    num_mtp_layers=1,
    mtp_copies=("embedding", "head"),
    tie_embeddings=False,
    norm_eps=1e-6,
    max_positions=163_840,
    initializer_range=0.02,
)

PRESETS = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-base": DEEPSEEK_V3,
    "deepseek-v3.1": DEEPSEEK_V3,
    "deepseek-v3.1-base": DEEPSEEK_V3,
    "deepseek-r1": DEEPSEEK_V3,
}
