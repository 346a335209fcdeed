"""What a key that a config.json leaves out stands for: the defaults of transformers' class of each model type, as data.

Published files have nearly all of these keys. transformers leaves out of a file whatever equals its default, and other
tools do likewise. A test compares every value with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROPE_THETA = 10_000.0  # of every class

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}

_GLM: dict[str, Any] = {
    **_COMMON,
    "first_k_dense_replace": 1,
    "hidden_size": 4096,
    "intermediate_size": 10_944,
    "max_position_embeddings": 131_072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151_552,
}

_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129_280,
}

_GLM_LITE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 2048,
    "intermediate_size": 10_240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202_752,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 0,  # the class does not know the MTP layer
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "v_head_dim": 256,
    "vocab_size": 154_880,
}

_GLM_VISION_TEXT: dict[str, Any] = {
    **_GLM,
    "attention_bias": True,
    "max_position_embeddings": 65_536,
    "num_nextn_predict_layers": 0,  # the class does not know the MTP layer
    "vocab_size": 151_424,
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "glm4_moe": _GLM,
    "glm4v_moe_text": _GLM_VISION_TEXT,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,  # transformers reads this model type by the class of DeepSeek-V3
    "glm4_moe_lite": _GLM_LITE,
}

# Keys that published files leave out: their defaults need no note.
OFTEN_LEFT_OUT = frozenset({"rope_interleave", "initializer_range", "tie_word_embeddings", "hidden_act"})
