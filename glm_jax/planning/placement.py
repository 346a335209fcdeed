"""The weights of a job on one mesh, as each device holds them.

Shapes come from the declared weights, their parts from `sharding.shardings`: what is planned here is what loading does,
and a mesh that loading refuses is refused by the same call.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glm_jax.checkpoint.quantized_load import plan_leaves
from glm_jax.checkpoint.source import Source
from glm_jax.kernels import ops_for
from glm_jax.model import Transformer
from glm_jax.model.allocate import cache_part
from glm_jax.planning.job import TRAIN, Job, WeightStorage
from glm_jax.sharding import (
    QuantizedArray,
    Weight,
    map_weights,
    weights_by_name,
    with_dtype,
    with_shardings,
)
from glm_jax.sharding.fsdp import gathering_pays
from glm_jax.sharding.rules import STORED, MeshAxes, as_axes
from glm_jax.sharding.weight import layer_axis
from glm_jax.training.muon import MatrixAxes, matrix_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One device's part of a weight.

    Attributes:
        name: the weight's, in the stacked model.
        weight: its declaration.
        shape: of the whole weight, stacked layers in front.
        local: of the part.
        split: for each dimension, the mesh axes over which it is split.
        nbytes: of the part, its scales included.
        matrix: which dimensions are a matrix; None for norms and biases.
    """

    name: str
    weight: Weight
    shape: tuple[int, ...]
    local: tuple[int, ...]
    split: tuple[MeshAxes, ...]
    nbytes: int
    matrix: MatrixAxes | None

    @property
    def size(self) -> int:
        """Numbers in the part."""
        return math.prod(self.local)

    @property
    def layers(self) -> int:
        """How many layers have this weight."""
        return self.shape[0] if layer_axis(self.weight) else 1

    @property
    def axes(self) -> MeshAxes:
        """The mesh axes that split the weight in any dimension."""
        return tuple(axis for entry in self.split for axis in entry)

    @property
    def outputs(self) -> int:
        """Outputs of the local matrix."""
        assert self.matrix is not None
        return math.prod(self.local[self.matrix.batch : self.matrix.batch + self.matrix.outputs])

    @property
    def inputs(self) -> int:
        """Inputs of the local matrix."""
        assert self.matrix is not None
        return math.prod(self.local[self.matrix.batch + self.matrix.outputs :])

    @property
    def input_axes(self) -> MeshAxes:
        """The mesh axes that split the inputs: products with it are partial sums."""
        assert self.matrix is not None
        return tuple(axis for entry in self.split[self.matrix.batch + self.matrix.outputs :] for axis in entry)

    @property
    def fsdp(self) -> MeshAxes:
        """The axes along which FSDP (`Rules.fsdp`) splits it."""
        entries = dict(zip(self.weight.axes, self.split[len(self.shape) - len(self.weight.axes) :], strict=True))
        return next((entries[axis] for axis in STORED if axis in entries), ())

    @property
    def is_experts(self) -> bool:
        """Whether it is of the routed experts."""
        return "expert" in self.weight.axes

    @property
    def owner(self) -> str:
        """The module that it belongs to: `router` of `moe.moe.router.weight`."""
        return self.name.split(".")[-2]

    def gathered_for(self, tokens: int, token_axes: MeshAxes, placement: Placement) -> bool:
        """Whether so many tokens of a device, split over `token_axes`, gather the matrix rather than move to it."""
        group = placement.devices(self.fsdp)
        if group == 1 or any(axis not in token_axes for axis in self.fsdp):
            return False
        if self.is_experts:
            return True
        if self.owner == "embedding":
            sent = self.inputs * group + 1  # an index there, a row back
        elif set(self.fsdp) <= set(self.input_axes):
            sent = self.inputs * group + self.outputs
        else:
            sent = self.inputs + self.outputs * group
        return gathering_pays(tokens * group, sent=sent, matrix=self.inputs * self.outputs * group)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A job's weights on a mesh: `parts` by name, and in `notes` what loading would say of them."""

    mesh: Mesh
    parts: dict[str, Part]
    notes: tuple[str, ...] = ()

    def devices(self, axes: MeshAxes) -> int:
        """The number of devices of a group over `axes`."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def matrices(self, job: Job) -> list[Part]:
        """The matrices that a step of the job multiplies with; the MTP layer works in training only."""
        used = (part for part in self.parts.values() if job.kind == TRAIN or not part.name.startswith("mtp."))
        idle = () if job.config.tie_embeddings else ("embedding",)
        return [part for part in used if part.matrix is not None and part.owner not in idle]


def abstract_model(job: Job) -> Transformer:
    """The model as a run holds it: without the copies beside the MTP layer, its weights in the dtypes of the job."""
    model = with_dtype(Transformer(dataclasses.replace(job.config, mtp_copies=())), job.dtype)
    if job.storage.narrow is None:
        return model
    return map_weights(lambda _, weight: _quantized(weight, job.storage), model)


def as_stored(model: Transformer, job: Job, mesh: Mesh) -> tuple[Transformer, tuple[str, ...]]:
    """An abstract model as a mesh holds it: of a checkpoint that is loaded as it is stored, what loading keeps so.

    That depends on the mesh, as scales are of groups of inputs that stay together. Also returns loading's notes.

    Raises:
        ShardingError: the mesh does not divide the model.
    """
    if job.stored is None:
        return model, ()
    model = map_weights(lambda _, weight: weight.get_raw_value(), model)  # one of its own, to say how it is placed
    model.rules, model.ops = job.rules, ops_for(mesh)
    leaves, notes = plan_leaves(cast(Source, job.stored), model, mesh)  # it asks for formats only, and reads nothing

    def held(name: str, weight: Weight) -> Any:
        return leaves[name].abstract(weight) if name in leaves else weight.get_raw_value()

    return map_weights(held, model), notes


def place(model: Transformer, job: Job, mesh: Mesh) -> Placement:
    """Return the parts of an abstract model on a mesh.

    Raises:
        ShardingError: the mesh does not divide the model, in the words of `sharding.with_shardings`.
    """
    parts = {}
    model, notes = as_stored(model, job, mesh)
    for name, weight in weights_by_name(with_shardings(model, mesh, job.rules)).items():
        value = weight.get_raw_value()
        leaves = jax.tree.leaves(value)  # of a quantised weight values and scales, in this order
        sharding = leaves[0].sharding
        parts[name] = Part(
            name=name,
            weight=weight,
            shape=value.shape,
            local=sharding.shard_shape(value.shape),
            split=tuple(as_axes(entry) for entry in (*sharding.spec, *[None] * len(value.shape))[: len(value.shape)]),
            nbytes=sum(nbytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves),
            matrix=matrix_axes(weight),
        )
    return Placement(mesh, parts, notes)


def cache_parts(model: Transformer, job: Job, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """One device's part of one layer's cache, as `model.create_cache` lays it out."""

    def local(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
        part = cache_part(shape, axes, mesh=mesh, rules=job.rules, dtype=job.cache_storage.dtype)
        return jax.ShapeDtypeStruct(part.sharding.shard_shape(part.shape), part.dtype)

    layer = model.dense or model.moe
    assert layer is not None  # num_layers is at least 1
    return jax.tree.leaves(layer.attention.empty_cache(local, batch=job.batch, length=job.length))


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes in a device's memory: 4-bit integers lie two to a byte there."""
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize
    return -(-math.prod(shape) * bits // 8)


def _quantized(weight: Weight, storage: WeightStorage) -> Any:
    """The abstract value of a weight in narrow numbers, if its declaration says what its inputs are."""
    value = weight.get_raw_value()
    if not weight.contracting_dims:
        return value
    outputs, inputs = value.shape[: -weight.contracting_dims], math.prod(value.shape[-weight.contracting_dims :])
    # Where the inputs are no whole number of groups, the groups are smaller.
    scales = outputs if storage.group is None else (*outputs, inputs // math.gcd(inputs, storage.group))
    return QuantizedArray(
        jax.ShapeDtypeStruct(value.shape, storage.narrow),
        jax.ShapeDtypeStruct(scales, jnp.float32),
        weight.contracting_dims,
    )
