"""What a model is, in a few rows: for its repr, which would otherwise be a line for each weight, and for notebooks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from glm_jax.configs import GqaConfig, ModelConfig
from glm_jax.kernels import Ops
from glm_jax.sharding import describe, weights_by_name


def summary_rows(model: nnx.Module, config: ModelConfig, ops: Ops) -> list[tuple[str, str]]:
    """Name and value of each row; of weights without values, or being traced, what is known of them."""
    values = [weight.get_raw_value() for weight in weights_by_name(model).values()]
    sizes: Counter[str] = Counter()
    for value in values:
        sizes[value.dtype.name] += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
    total = sum(value.size for value in values)
    dtypes = ", ".join(f"{dtype} {size / 1e6:,.1f} MB" for dtype, size in sizes.most_common())
    moe = config.moe
    return [
        ("layers", f"{config.num_dense_layers} dense, {config.num_moe_layers} of experts, {config.num_mtp_layers} MTP"),
        ("width", f"{config.embed_dim}, dense {config.mlp_width}, expert {moe.expert_width}"),
        ("attention", _attention(config)),
        ("experts", f"{moe.num_experts}, {moe.num_experts_per_token} a token, {moe.num_shared_experts} shared"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("positions", f"{config.max_positions:,}"),
        ("parameters", f"{total:,}"),
        ("weights", f"{dtypes} on {_place(jax.tree.leaves(values))}"),
        ("operations", ", ".join(f"{name} {chosen}" for name, chosen in ops.to_json().items())),
    ]


def _attention(config: ModelConfig) -> str:
    attention = config.attention
    if isinstance(attention, GqaConfig):
        return f"{attention.num_heads} heads of {attention.head_dim}, {attention.num_kv_heads} of keys and values"
    return f"{attention.num_heads} heads, latent vector of {attention.kv_rank}"


def _place(leaves: list[Any]) -> str:
    mesh = getattr(getattr(leaves[0], "sharding", None), "mesh", None)
    if isinstance(leaves[0], jax.ShapeDtypeStruct) or not isinstance(mesh, (Mesh, AbstractMesh)) or mesh.empty:
        return "no device: without values"
    return f"mesh {describe(mesh)}"  # type: ignore[arg-type]
