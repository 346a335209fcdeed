"""config.json of the GLM-4.5 family (`glm4_moe`): grouped-query attention with partial rotation.

`glm4v_moe_text` is the language model of GLM-4.5V and 4.6V, in the `text_config` of its config.json: GLM-4.5-Air's
architecture. Its rotation has a position for each of time, height and width, which are the same for text.
"""

from __future__ import annotations

import math
from typing import Any

from glm_jax.configs.hf_reader import ConfigReader, read_moe, read_rope, read_shape, write_moe, write_rope, write_shape
from glm_jax.configs.model_config import GqaConfig, ModelConfig

ARCHITECTURES = {"glm4_moe": "Glm4MoeForCausalLM", "glm4v_moe_text": "Glm4MoeForCausalLM"}


_WITHIN_VISION = "glm4v_moe_text"


def read(reader: ConfigReader) -> dict[str, Any]:
    """The arguments of `ModelConfig`."""
    text_only = reader.model_type == _WITHIN_VISION
    shape = {**read_shape(reader, dense_layers=None), "model_type": next(iter(ARCHITECTURES))}
    num_heads = reader.take("num_attention_heads", int)
    head_dim = _read_head_dim(reader, shape["embed_dim"], num_heads)
    passed_over = ("mrope_section",) if text_only else ()
    attention = GqaConfig(
        num_heads=num_heads,
        num_kv_heads=reader.take("num_key_value_heads", int),
        head_dim=head_dim,
        rope=read_rope(reader, head_dim=head_dim, interleaved=False, kinds=("default",), passed_over=passed_over),
        qkv_bias=reader.take("attention_bias", bool),
        qk_norm=False if text_only else reader.take("use_qk_norm", bool),
    )
    if text_only:  # a class without these norms: transformers ignores the key
        reader.require("use_qk_norm", reader.take("use_qk_norm", bool, False), False)
    return {**shape, "attention": attention, "moe": read_moe(reader)}


def write(config: ModelConfig, *, nested_rope: bool, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    attention = config.attention
    assert isinstance(attention, GqaConfig)
    factor = _rotary_factor(attention.rope.rotary_dim, attention.head_dim)
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        **write_shape(config, dtype),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm,
        **write_rope(attention.rope, partial=factor, nested=nested_rope),
        **write_moe(config.moe),
    }


def _read_head_dim(reader: ConfigReader, embed_dim: int, num_heads: int) -> int:
    head_dim = reader.take("head_dim", int, None)
    if head_dim is not None:
        return head_dim
    # transformers falls back to hidden_size / heads, which is wrong for both published models; only an exact
    # quotient can be what was meant.
    if num_heads < 1 or embed_dim % num_heads:
        reader.problem(f"head_dim is missing (hidden_size {embed_dim} / num_attention_heads {num_heads} is no integer)")
        return 2
    return embed_dim // num_heads


def _rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """The fraction of the head that is rotated, such that a reader who truncates its product gets `rotary_dim`."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)
