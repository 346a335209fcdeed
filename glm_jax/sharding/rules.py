"""Which mesh axes each logical axis is split over, and the shardings of a whole model that follow from it.

Layers name logical axes; this file alone turns them into mesh axes. A user's own placement is a `Rules` with other
values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.errors import ShardingError
from glm_jax.sharding.mesh import DATA, EXPERT, TENSOR, describe
from glm_jax.sharding.quantized import PackedBfloat16, QuantizedArray
from glm_jax.sharding.weight import Weight, layer_axis, map_weights, weights_by_name

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axes of each logical axis; an empty tuple replicates. `sharding.presets` has some with names.

    Attributes:
        batch: sequences of tokens and their cache. Where the batch does not divide, trailing axes are left out.
        length: tokens of a sequence, in its cache, too (sequence parallelism). Of these, axes that split the
            batch already are left out, and trailing ones where the length does not divide.
        heads: query heads and the output projection's input.
        kv_heads: key and value heads and their cache. They must divide: fewer kv heads than `tensor` devices are
            refused. The cache of latent attention has no heads: it is split by batch and length only, and replicated
            over the axes that split the query heads.
        expert: routed experts.
        mlp: width of the dense MLP, of each expert and of the shared experts.
        vocab: rows of the output head (the embedding is replicated over it: looking up a row must stay local).
        fsdp: axes that split matrices further, along the model's width, with their gradients and the optimizer's
            state. Of these, axes that split a weight already are left out, and trailing ones where it does not divide.
            A pass over many tokens gathers each matrix where it is used; one over few moves the tokens instead, and no
            weight. Norms, routers and the products with latent attention's cache stay whole.
        dispatch: how tokens get to their experts, one of `layers.dispatch.DISPATCHES`; None lets the tokens decide.
    """

    batch: MeshAxes = (DATA, EXPERT)
    length: MeshAxes = ()
    heads: MeshAxes = (TENSOR,)
    kv_heads: MeshAxes = (TENSOR,)
    expert: MeshAxes = (EXPERT,)
    mlp: MeshAxes = (TENSOR,)
    vocab: MeshAxes = (TENSOR,)
    fsdp: MeshAxes = ()
    dispatch: str | None = None

    def mesh_axes(self, logical: str | None) -> MeshAxes:
        """The mesh axes that a logical axis is split over (none for those that no rule names)."""
        return getattr(self, logical) if logical in LOGICAL else ()


LOGICAL = ("batch", "length", "heads", "kv_heads", "expert", "mlp", "vocab")
STORED = ("embed", "rank")  # the logical axis along which `fsdp` splits a matrix: the first of these that it has


def weight_spec(name: str, weight: Weight, *, mesh: Mesh, rules: Rules) -> PartitionSpec:
    """Return the layout of one weight on a mesh.

    Raises:
        ShardingError: a dimension does not divide (the message names the weight, the axis and the legal sizes), or two
            dimensions of the weight would be split over the same mesh axis.
    """
    shape = weight.get_raw_value().shape[1 if layer_axis(weight) else 0 :]
    entries: list[MeshAxes | None] = []
    for size, logical in zip(shape, weight.axes, strict=True):
        axes = rules.mesh_axes(logical)
        split = math.prod(mesh.shape[axis] for axis in axes)
        if size % split:
            legal = [str(n) for n in range(1, split + 1) if size % n == 0]
            raise ShardingError(
                f"{name}: {logical} = {size} does not divide over mesh axis {'x'.join(axes)} = {split} "
                f"(mesh {describe(mesh)}); sizes that do: {', '.join(legal)}"
            )
        taken = [axis for entry in entries if entry for axis in entry if axis in axes]
        if taken:
            raise ShardingError(
                f"{name}: mesh axis {taken[0]} would split two of its axes {weight.axes}; change the rules"
            )
        entries.append(axes or None)
    _split_for_fsdp(entries, weight, mesh=mesh, rules=rules)
    if layer_axis(weight):
        entries.insert(0, None)
    return PartitionSpec(*entries)


def _split_for_fsdp(entries: list[MeshAxes | None], weight: Weight, *, mesh: Mesh, rules: Rules) -> None:
    """Split a matrix further over the axes of the `fsdp` rule, in place."""
    along = next((weight.axes.index(axis) for axis in STORED if axis in weight.axes), None)
    if along is None or len(weight.axes) < 2:
        return
    value = weight.get_raw_value()
    size = value.shape[along - len(weight.axes)]
    if isinstance(value, QuantizedArray) and value.grouped and along == len(weight.axes) - value.contracting_dims:
        size = value.scale.shape[-1]  # whole groups of inputs that share a scale stay together
    taken = {axis for entry in entries if entry for axis in entry}
    axes = tuple(axis for axis in rules.fsdp if axis not in taken)
    entries[along] = longest_that_divides(size, axes, mesh) or None


def longest_that_divides(size: int, axes: MeshAxes, mesh: Mesh) -> MeshAxes:
    """The axes without the trailing ones for which a dimension of this size does not divide."""
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def shardings(model: Any, mesh: Mesh, rules: Rules | None = None) -> dict[str, NamedSharding]:
    """Return the sharding of every weight of an (abstract) model by name.

    Raises:
        ShardingError: all weights that do not fit the mesh, in one message.
    """
    rules = rules or Rules()
    found, problems = {}, []
    for name, weight in weights_by_name(model).items():
        try:
            found[name] = NamedSharding(mesh, weight_spec(name, weight, mesh=mesh, rules=rules))
        except ShardingError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more weights)" if len(problems) > 1 else ""
        raise ShardingError(problems[0] + more)
    return found


def with_shardings(model: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Return the abstract model with its sharding in the type of every weight."""
    placed = shardings(model, mesh, rules)

    def annotate(name, weight):
        value = weight.get_raw_value()

        def values(array):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed[name])

        if isinstance(value, PackedBfloat16):
            return value.map(values)
        if not isinstance(value, QuantizedArray):
            return values(value)

        def scale(array):
            spec = NamedSharding(mesh, _scale_spec(name, value, placed[name]))
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=spec)

        return value.map(values, scale)

    return map_weights(annotate, model)


def _scale_spec(name: str, value: QuantizedArray, placed: NamedSharding) -> PartitionSpec:
    """The layout of a weight's scales: of its outputs, and with groups of the first of its input dimensions."""
    outputs = value.ndim - value.contracting_dims
    entries = [*placed.spec, *(None,) * value.ndim]
    if not value.grouped:
        return PartitionSpec(*entries[:outputs])
    axes, groups = as_axes(entries[outputs]), value.scale.shape[-1]
    split = math.prod(placed.mesh.shape[axis] for axis in axes)
    if groups % split:
        legal = [str(n) for n in range(1, split + 1) if groups % n == 0]
        raise ShardingError(
            f"{name}: its {groups} groups of {value.group_size} inputs that share a scale do not divide over mesh axis "
            f"{'x'.join(axes)} = {split}; sizes that do: {', '.join(legal)}"
        )
    return PartitionSpec(*entries[: outputs + 1])


def batch_axes(batch: int, mesh: Mesh, rules: Rules | None = None) -> MeshAxes:
    """The mesh axes over which a batch of this size is split: the longest prefix of the rule that divides it."""
    return longest_that_divides(batch, (rules or Rules()).batch, mesh)


def length_axes(batch: int, length: int, mesh: Mesh, rules: Rules | None = None) -> MeshAxes:
    """The mesh axes over which the tokens of each sequence, in its cache, too, are split."""
    rules = rules or Rules()
    taken = batch_axes(batch, mesh, rules)
    return longest_that_divides(length, tuple(axis for axis in rules.length if axis not in taken), mesh)


def batch_sharding(batch: int, mesh: Mesh, rules: Rules | None = None, *, length: int | None = None) -> NamedSharding:
    """The sharding of an array whose first dimension is the batch; with `length`, of tokens [B, length, ...]."""
    axes: list[MeshAxes | None] = [batch_axes(batch, mesh, rules) or None]
    if length is not None:
        axes.append(length_axes(batch, length, mesh, rules) or None)
    return NamedSharding(mesh, PartitionSpec(*axes))


def spec_of(*axes: MeshAxes | str | None) -> PartitionSpec:
    """A partition spec from mesh axes that were read off other arrays."""
    return PartitionSpec(*(axis or None for axis in axes))


def mesh_of(model: Any) -> Mesh:
    """The mesh that a model's weights lie on.

    Raises:
        ShardingError: the weights are abstract or not on a mesh.
    """
    for weight in weights_by_name(model).values():
        sharding = getattr(weight.get_raw_value(), "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
        break
    raise ShardingError("the model's weights lie on no mesh; create it with glm_jax.load or Transformer.create")


def as_axes(entry: Sequence[str] | str | None) -> MeshAxes:
    """One entry of a partition spec as a tuple of mesh axes."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
