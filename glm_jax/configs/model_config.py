"""The architecture of a model, as frozen dataclasses.

Only architecture stands here: what decides shapes and arithmetic. Dtypes, meshes, kernels and batch sizes belong to
the run. Names are this project's; `hf.py` translates to and from Hugging Face's config.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from glm_jax.configs.notebook import field_rows, html_table
from glm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): rotary frequencies stretched from `original_positions` tokens by `factor`.

    `mscale_all_dim` puts a correction into the softmax scale of latent attention; 0 stands for an absent value, as
    does `mscale`. With both absent the cosines and sines are scaled instead.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def rotation_scale(self) -> float:
        """The factor on cosines and sines."""
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores of latent attention."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over `rotary_dim` values of each head.

    Value i pairs with i + rotary_dim / 2, or, `interleaved`, 2 i with 2 i + 1.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    yarn: YarnConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaConfig:
    """Grouped-query attention: `num_heads` query heads share `num_kv_heads` keys and values of `head_dim` values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool

    @property
    def split_heads(self) -> int:
        """The heads that tensor parallelism divides: of queries, keys and values alike."""
        return math.gcd(self.num_heads, self.num_kv_heads)

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores."""
        return float(self.head_dim**-0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads from one latent vector a token.

    Attributes:
        num_heads: query heads; each has keys and values of its own.
        q_rank: size of the queries' latent vector; None projects them directly.
        kv_rank: size of the latent vector that keys and values are made of, and that is cached.
        nope_dim: values of each query and key that are not rotated.
        value_dim: values of each head's value.
        rope: the rotation of the rest of each query and key, the key's being shared by all heads.
        norm_eps: of the norms of both latent vectors. The published code leaves it at 1e-6, whatever the model's own.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeConfig
    norm_eps: float = 1e-6

    @property
    def split_heads(self) -> int:
        """The heads that tensor parallelism divides."""
        return self.num_heads

    @property
    def qk_dim(self) -> int:
        """Values of each query and key."""
        return self.nope_dim + self.rope.rotary_dim

    @property
    def latent_dim(self) -> int:
        """Values cached for each token: the latent vector and the shared rotated key."""
        return self.kv_rank + self.rope.rotary_dim

    @property
    def softmax_scale(self) -> float:
        """The factor on the scores: from the whole query's size, with YaRN's correction."""
        yarn = self.rope.yarn
        return self.qk_dim**-0.5 * (1.0 if yarn is None else yarn.softmax_scale)


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
    attention: GqaConfig | MlaConfig
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

    def _repr_html_(self) -> str:
        return html_table(f"ModelConfig({self.model_type})", field_rows(self))

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with routed experts, without the MTP layers."""
        return self.num_layers - self.num_dense_layers


def _problems(config: ModelConfig) -> Iterator[str]:
    attention, moe = config.attention, config.moe
    sizes: dict[str, int] = {
        "vocab_size": config.vocab_size,
        "embed_dim": config.embed_dim,
        "num_layers": config.num_layers,
        "mlp_width": config.mlp_width,
        "max_positions": config.max_positions,
    }
    for part in (attention, moe):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        sizes |= {name: value for name, value in fields.items() if type(value) is int and name != "num_shared_experts"}
    invalid = [name for name, value in sizes.items() if value < 1]
    if invalid:
        yield f"{', '.join(invalid)} must be at least 1"
        return
    if not 0 <= config.num_dense_layers <= config.num_layers:
        yield f"num_dense_layers {config.num_dense_layers} is not within 0..{config.num_layers} (num_layers)"
    if config.num_mtp_layers not in (0, 1):
        yield f"num_mtp_layers {config.num_mtp_layers} is not supported: 0 or 1"
    if set(config.mtp_copies) - {"embedding", "head"} or (config.mtp_copies and not config.num_mtp_layers):
        yield f"mtp_copies {config.mtp_copies} must be among 'embedding' and 'head', and needs an MTP layer"
    yield from _attention_problems(attention)
    yield from _moe_problems(moe)


def _attention_problems(attention: GqaConfig | MlaConfig) -> Iterator[str]:
    rope, largest = attention.rope, None
    if isinstance(attention, GqaConfig):
        largest = attention.head_dim
        if attention.num_heads % attention.num_kv_heads:
            yield f"num_heads {attention.num_heads} is not a multiple of num_kv_heads {attention.num_kv_heads}"
    if rope.rotary_dim < 2 or rope.rotary_dim % 2 or rope.rotary_dim > (largest or rope.rotary_dim):
        limit = "of at least 2" if largest is None else f"within 2..{largest} (head_dim)"
        yield f"rotary_dim {rope.rotary_dim} is not an even number {limit}"
    if rope.theta <= 0:
        yield f"the rotary theta {rope.theta} is not positive"
    elif rope.yarn is not None:
        yarn = rope.yarn
        if yarn.factor < 1 or yarn.original_positions < 1 or rope.theta == 1:
            yield f"YaRN needs a factor and original positions of at least 1, and a theta other than 1: {rope}"
        if not yarn.beta_fast >= yarn.beta_slow > 0:
            yield f"YaRN's beta_fast {yarn.beta_fast} and beta_slow {yarn.beta_slow} must fall, and be positive"


def _moe_problems(moe: MoeConfig) -> Iterator[str]:
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
