"""The architecture of a model, as frozen dataclasses.

Only architecture stands here: what decides shapes and arithmetic. Dtypes, meshes, kernels and batch sizes belong to
the run. Names are this project's; `hf.py` translates to and from Hugging Face's config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from glm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the first `rotary_dim` values of each head, pairing i with i + rotary_dim / 2."""

    theta: float
    rotary_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaConfig:
    """Grouped-query attention: `num_heads` query heads share `num_kv_heads` keys and values of `head_dim` values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed experts of width `expert_width` and shared experts that see every token.

    `num_groups` and `num_groups_per_token` limit the choice to the best groups of experts (1 and 1: no limit).
    """

    num_experts: int
    num_experts_per_token: int
    expert_width: int
    num_shared_experts: int
    num_groups: int
    num_groups_per_token: int
    normalize_weights: bool
    routed_scaling: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder: `num_dense_layers` layers with a dense MLP, the rest of `num_layers` with experts, then MTP layers.

    Attributes:
        model_type: the family, in Hugging Face's word; selects the table of tensor names.
        num_layers: decoder layers, without the MTP layers.
        mtp_copies: which of `embedding` and `head` the checkpoint stores a second time beside the MTP layer. The
            model shares the main ones either way.
        tie_embeddings: the output head is the embedding.
        max_positions: the longest sequence, in tokens.

    Raises:
        ConfigError: the values contradict each other; the message names the field.
    """

    model_type: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_dense_layers: int
    mlp_width: int
    attention: GqaConfig
    moe: MoeConfig
    num_mtp_layers: int
    mtp_copies: tuple[str, ...]
    tie_embeddings: bool
    norm_eps: float
    max_positions: int
    initializer_range: float

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("the model configuration is not possible: " + "; ".join(problems))

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with routed experts, without the MTP layers."""
        return self.num_layers - self.num_dense_layers


def _problems(config: ModelConfig) -> Iterator[str]:
    attention, moe = config.attention, config.moe
    positive = {
        "vocab_size": config.vocab_size,
        "embed_dim": config.embed_dim,
        "num_layers": config.num_layers,
        "mlp_width": config.mlp_width,
        "max_positions": config.max_positions,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_token": moe.num_experts_per_token,
        "expert_width": moe.expert_width,
        "num_groups": moe.num_groups,
        "num_groups_per_token": moe.num_groups_per_token,
    }
    invalid = [name for name, value in positive.items() if value < 1]
    if invalid:
        yield f"{', '.join(invalid)} must be at least 1"
        return
    if not 0 <= config.num_dense_layers <= config.num_layers:
        yield f"num_dense_layers {config.num_dense_layers} is not within 0..{config.num_layers} (num_layers)"
    if config.num_mtp_layers not in (0, 1):
        yield f"num_mtp_layers {config.num_mtp_layers} is not supported: 0 or 1"
    if set(config.mtp_copies) - {"embedding", "head"} or (config.mtp_copies and not config.num_mtp_layers):
        yield f"mtp_copies {config.mtp_copies} must be among 'embedding' and 'head', and needs an MTP layer"
    if attention.num_heads % attention.num_kv_heads:
        yield f"num_heads {attention.num_heads} is not a multiple of num_kv_heads {attention.num_kv_heads}"
    rotary_dim = attention.rope.rotary_dim
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > attention.head_dim:
        yield f"rotary_dim {rotary_dim} is not an even number within 2..{attention.head_dim} (head_dim)"
    if moe.num_experts_per_token > moe.num_experts:
        yield f"num_experts_per_token {moe.num_experts_per_token} exceeds num_experts {moe.num_experts}"
    if moe.num_experts % moe.num_groups:
        yield f"num_groups {moe.num_groups} does not divide num_experts {moe.num_experts}"
    elif moe.num_groups > 1 and moe.num_experts // moe.num_groups < 2:
        yield f"num_groups {moe.num_groups} leaves fewer than 2 experts a group, which the group score needs"
    if moe.num_groups_per_token > moe.num_groups:
        yield f"num_groups_per_token {moe.num_groups_per_token} exceeds num_groups {moe.num_groups}"
    elif moe.num_experts_per_token > moe.num_experts // moe.num_groups * moe.num_groups_per_token:
        yield f"num_experts_per_token {moe.num_experts_per_token} exceeds the experts of num_groups_per_token groups"
    if moe.num_shared_experts < 0:
        yield f"num_shared_experts {moe.num_shared_experts} is negative"
