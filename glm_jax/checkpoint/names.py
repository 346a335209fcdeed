"""Hugging Face's tensor names <-> the weights of the model: one reversible table a family.

A row says which slice of which weight a tensor is. Orientation is the same on both sides, so every tensor is a plain
copy, reshaped at most (`q_proj` [N * H, D] is `attention.q` [N, H, D]). Names are templates over `{layer}`, the number
of the decoder layer, and `{expert}`. The MTP layer is stored as decoder layer number `num_layers`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from glm_jax.configs import ModelConfig
from glm_jax.errors import ConfigError
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        tensor: template of the name after the layer's prefix, or of the whole name outside the layers.
        weight: name of the weight within the layer, or in the model.
        part: index into the weight behind the layer and the expert (0 gate, 1 up).
        fold: how many of the weight's remaining dimensions each of the tensor's dimensions is the product of.
    """

    tensor: str
    weight: str
    part: tuple[int, ...] = ()
    fold: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """The place of one tensor: `weight[index]`, in the shape that Hugging Face stores it.

    Attributes:
        weight: name of the weight in the stacked model.
        index: leading indices into it.
        part_shape: of that slice of the weight.
        shape: of the tensor as stored in the source, with the same elements in the same order.
        stands_for: for a fused tensor the canonical names that it replaces.
    """

    weight: str
    index: tuple[int, ...]
    part_shape: tuple[int, ...]
    shape: tuple[int, ...]
    stands_for: tuple[str, ...] = ()


HEAD = "lm_head.weight"

_MODEL = (
    Row("model.embed_tokens.weight", "embedding.weight"),
    Row("model.norm.weight", "final_norm.scale"),
    Row(HEAD, "head.weight"),
)

_NORMS = (
    Row("input_layernorm.weight", "attention_norm.scale"),
    Row("post_attention_layernorm.weight", "mlp_norm.scale"),
)

_GQA = (
    Row("self_attn.q_proj.weight", "attention.q", fold=(2, 1)),
    Row("self_attn.q_proj.bias", "attention.q_bias", fold=(2,)),
    Row("self_attn.k_proj.weight", "attention.k", fold=(2, 1)),
    Row("self_attn.k_proj.bias", "attention.k_bias", fold=(2,)),
    Row("self_attn.v_proj.weight", "attention.v", fold=(2, 1)),
    Row("self_attn.v_proj.bias", "attention.v_bias", fold=(2,)),
    Row("self_attn.o_proj.weight", "attention.o", fold=(1, 2)),
    Row("self_attn.q_norm.weight", "attention.q_norm.scale"),
    Row("self_attn.k_norm.weight", "attention.k_norm.scale"),
)

# Rows are in the order of the weights: head by head, in each head the unrotated values before the rotated (q_b_proj)
# or the keys before the values (kv_b_proj).
_MLA = (
    Row("self_attn.q_proj.weight", "attention.q", fold=(2, 1)),
    Row("self_attn.q_a_proj.weight", "attention.q_a"),
    Row("self_attn.q_a_layernorm.weight", "attention.q_norm.scale"),
    Row("self_attn.q_b_proj.weight", "attention.q_b", fold=(2, 1)),
    Row("self_attn.kv_a_proj_with_mqa.weight", "attention.kv_a"),
    Row("self_attn.kv_a_layernorm.weight", "attention.kv_norm.scale"),
    Row("self_attn.kv_b_proj.weight", "attention.kv_b", fold=(2, 1)),
    Row("self_attn.o_proj.weight", "attention.o", fold=(1, 2)),
)

_MLP = (
    Row("mlp.gate_proj.weight", "mlp.gate_up", part=(0,)),
    Row("mlp.up_proj.weight", "mlp.gate_up", part=(1,)),
    Row("mlp.down_proj.weight", "mlp.down"),
    Row("mlp.gate.weight", "moe.router.weight"),
    Row("mlp.gate.e_score_correction_bias", "moe.router.bias"),
    Row("mlp.experts.{expert}.gate_proj.weight", "moe.experts.gate_up", part=(0,)),
    Row("mlp.experts.{expert}.up_proj.weight", "moe.experts.gate_up", part=(1,)),
    Row("mlp.experts.{expert}.down_proj.weight", "moe.experts.down"),
    Row("mlp.shared_experts.gate_proj.weight", "moe.shared.gate_up", part=(0,)),
    Row("mlp.shared_experts.up_proj.weight", "moe.shared.gate_up", part=(1,)),
    Row("mlp.shared_experts.down_proj.weight", "moe.shared.down"),
)

_MTP = (
    Row("enorm.weight", "embed_norm.scale"),
    Row("hnorm.weight", "hidden_norm.scale"),
    Row("eh_proj.weight", "projection"),
    Row("shared_head.norm.weight", "norm.scale"),
    Row("embed_tokens.weight", "embedding.weight"),
    Row("shared_head.head.weight", "head.weight"),
)

# What transformers 5 keeps in memory, and some tools write: all experts of a layer in one tensor, gate before up.
_FUSED = (
    Row("mlp.experts.gate_up_proj", "moe.experts.gate_up", fold=(1, 2, 1)),
    Row("mlp.experts.down_proj", "moe.experts.down", fold=(1, 1, 1)),
)


def _table(attention: tuple[Row, ...]) -> dict[str, tuple[Row, ...]]:
    return {"model": _MODEL, "layer": (*_NORMS, *attention, *_MLP), "mtp": _MTP, "fused": _FUSED}


_TABLES = {
    "glm4_moe": _table(_GQA),
    "deepseek_v3": _table(_MLA),
    "kimi_k2": _table(_MLA),
    "glm4_moe_lite": _table(_MLA),
}

# Layers times experts of a model whose tensors are listed by name; the largest published has 23,424.
MAX_EXPERTS_IN_ALL = 2_000_000

# The groups of the model whose weights have a leading dimension of layers.
LAYER_GROUPS = ("dense", "moe")

# Tensors of published checkpoints that no model needs; those of Kimi K2 do not even have the rotary size.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def is_ignored(name: str) -> bool:
    """Whether a tensor is known to be superfluous: an old rotary table."""
    return bool(_IGNORED.fullmatch(name))


def canonical_mappings(config: ModelConfig) -> dict[str, TensorMapping]:
    """Every tensor of the family's published layout (one for each expert) with its mapping, in checkpoint order."""
    return {name: mapping for name, mapping, fused in _all_mappings(config) if not fused}


def fused_mappings(config: ModelConfig) -> dict[str, TensorMapping]:
    """The tensors that may stand in for the per-expert ones, each with the names it replaces."""
    return {name: mapping for name, mapping, fused in _all_mappings(config) if fused}


def mtp_prefix(config: ModelConfig) -> str:
    """The prefix of the names of the MTP layer's tensors."""
    return f"model.layers.{config.num_layers}."


def mtp_copy_names(config: ModelConfig) -> dict[str, str]:
    """The names of the optional copies, by the main weight that they repeat (`embedding`, `head`)."""
    rows = {row.weight: row.tensor for row in _TABLES[config.model_type]["mtp"]}
    return {kind: mtp_prefix(config) + rows[f"{kind}.weight"] for kind in ("embedding", "head")}


def _all_mappings(config: ModelConfig) -> Iterator[tuple[str, TensorMapping, bool]]:
    table = _TABLES[config.model_type]
    experts = config.moe.num_experts if config.moe is not None else 1
    if config.num_layers * experts > MAX_EXPERTS_IN_ALL:
        raise ConfigError(
            f"{config.num_layers} layers of {experts} experts are more than {MAX_EXPERTS_IN_ALL} experts in all"
        )
    shapes = {name: w.get_raw_value().shape for name, w in weights_by_name(Transformer(config)).items()}

    def expand(
        rows: tuple[Row, ...], prefix: str, group: str, lead: tuple[int, ...]
    ) -> Iterator[tuple[str, TensorMapping]]:
        for row in rows:
            weight = group + row.weight
            if weight not in shapes:
                continue
            if "{expert}" not in row.tensor:
                yield prefix + row.tensor, _mapping(row, weight, shapes[weight], lead + row.part)
                continue
            for expert in range(config.moe.num_experts):
                name = prefix + row.tensor.format(expert=expert)
                yield name, _mapping(row, weight, shapes[weight], (*lead, expert, *row.part))

    def expand_layer(prefix: str, group: str, lead: tuple[int, ...]) -> Iterator[tuple[str, TensorMapping, bool]]:
        single = list(expand(table["layer"], prefix, group, lead))
        yield from ((name, mapping, False) for name, mapping in single)
        for name, mapping in expand(table["fused"], prefix, group, lead):
            replaced = tuple(other for other, s in single if s.weight == mapping.weight)
            yield name, dataclasses.replace(mapping, stands_for=replaced), True

    for name, mapping in expand(table["model"], "", "", ()):
        yield name, mapping, False
    for number in range(config.num_layers):
        dense = number < config.num_dense_layers
        group, position = ("dense.", number) if dense else ("moe.", number - config.num_dense_layers)
        yield from expand_layer(f"model.layers.{number}.", group, (position,))
    if config.num_mtp_layers:
        prefix = mtp_prefix(config)
        yield from expand_layer(prefix, "mtp.layer.", ())
        for name, mapping in expand(table["mtp"], prefix, "mtp.", ()):
            yield name, mapping, False


def _mapping(row: Row, weight: str, shape: tuple[int, ...], index: tuple[int, ...]) -> TensorMapping:
    rest = shape[len(index) :]
    if row.fold is None:
        return TensorMapping(weight, index, rest, rest)
    folded, position = [], 0
    for count in row.fold:
        folded.append(math.prod(rest[position : position + count]))
        position += count
    return TensorMapping(weight, index, rest, tuple(folded))
