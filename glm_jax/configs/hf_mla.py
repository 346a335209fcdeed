"""config.json of the families with latent attention: DeepSeek-V3, Kimi K2 and GLM-4.7-Flash.

Kimi's `kimi_k2` is DeepSeek-V3's architecture under another name. `glm4_moe_lite` names its dense layers one by one.
"""

from __future__ import annotations

from typing import Any

from glm_jax.configs.hf_reader import ConfigReader, read_moe, read_rope, read_shape, write_moe, write_rope, write_shape
from glm_jax.configs.model_config import MlaConfig, ModelConfig

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}


_LAYERS_BY_NAME = "glm4_moe_lite"


def read(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of `ModelConfig`."""
    dense_layers = _read_layer_types(reader)
    shape = read_shape(reader, dense_layers=dense_layers)
    num_heads = reader.take("num_attention_heads", int)
    kv_heads = reader.take("num_key_value_heads", int, None)
    reader.require("num_key_value_heads", num_heads if kv_heads is None else kv_heads, num_heads)
    reader.require("attention_bias", reader.take("attention_bias", bool), False)
    rotary_dim, nope_dim = reader.take("qk_rope_head_dim", int), reader.take("qk_nope_head_dim", int)
    # What transformers writes although it follows from the others.
    reader.require("head_dim", reader.take("head_dim", int, rotary_dim), rotary_dim)
    reader.require("qk_head_dim", reader.take("qk_head_dim", int, nope_dim + rotary_dim), nope_dim + rotary_dim)
    interleaved = reader.take("rope_interleave", bool)
    rope = read_rope(reader, head_dim=rotary_dim, interleaved=interleaved, kinds=("default", "yarn"))
    if rope.rotary_dim != rotary_dim:
        reader.problem("partial_rotary_factor is not 1.0, the only one supported beside qk_rope_head_dim")
    attention = MlaConfig(
        num_heads=num_heads,
        q_rank=reader.take("q_lora_rank", int, nullable=True),
        kv_rank=reader.take("kv_lora_rank", int),
        nope_dim=nope_dim,
        value_dim=reader.take("v_head_dim", int),
        rope=rope,
    )
    return {**shape, "attention": attention, "moe": read_moe(reader)}


def write(config: ModelConfig, *, nested_rope: bool, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    attention = config.attention
    assert isinstance(attention, MlaConfig)
    shape = write_shape(config, dtype)
    if config.model_type == "glm4_moe_lite":
        shape["mlp_layer_types"] = ["dense"] * config.num_dense_layers + ["sparse"] * config.num_moe_layers
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        **shape,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "attention_bias": False,
        "q_lora_rank": attention.q_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope.rotary_dim,
        "v_head_dim": attention.value_dim,
        "rope_interleave": attention.rope.interleaved,
        **write_rope(attention.rope, partial=None, nested=nested_rope),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        **write_moe(config.moe),
    }


def _read_layer_types(reader: ConfigReader) -> int | None:
    """The number of dense layers of `glm4_moe_lite`, whose layers are named one by one; None for other model types.

    Without names the first layer is dense. transformers ignores `first_k_dense_replace` there: it must say the same.
    """
    types = reader.take("mlp_layer_types", list, None)
    if reader.model_type != _LAYERS_BY_NAME and types is None:
        return None
    num_layers = reader.peek("num_hidden_layers")
    dense = 1 if types is None else types.count("dense")
    if types is not None and types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        reader.problem(f"mlp_layer_types is {types!r:.200}; supported: 'dense' layers followed by 'sparse' ones")
    elif types is not None and len(types) != num_layers:
        reader.problem(f"mlp_layer_types has {len(types)} layers but num_hidden_layers is {num_layers}")
    reader.require("first_k_dense_replace", reader.take("first_k_dense_replace", int, dense), dense)
    return dense
