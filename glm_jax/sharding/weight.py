"""A weight, declared once: shape, logical axes, initializer, dtype.

Abstract construction, shardings, checkpoint targets, Muon's matrix axes and parameter counts all derive from the one
line that declares it. Until it is given a value it holds a `jax.ShapeDtypeStruct`, so that building the 355B model
takes milliseconds and no memory.

The axes named are those of one layer. A weight of a stacked group has one dimension more, in front, which no layer
knows about: `layer_axis` tells.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from glm_jax.sharding.quantized import PackedBfloat16

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal distribution of mean 0 and standard deviation `std`."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draw in float32 and round, so that one key gives the same weights in every dtype."""
        return (self.std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Fill; the key is not used."""
        del key
        return jnp.full(shape, self.value, dtype)


class Weight(nnx.Param):
    """A parameter with its declaration.

    Attributes:
        axes: the logical axis of each dimension.
        initializer: of its first value.
        pinned: whether its dtype is not the run's to choose.
        contracting_dims: the trailing dimensions that its product sums over, of a weight that may be quantised; else 0.
        packable: a CPU may hold it as packed bfloat16: every matrix but those of the routers.
    """

    axes: tuple[str | None, ...]
    initializer: Initializer
    pinned: bool
    contracting_dims: int
    packable: bool


def declare(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    initializer: Initializer,
    dtype: Any = None,
    contracting_dims: int = 0,
    packable: bool | None = None,
) -> Weight:
    """Declare a weight of `shape` whose dimensions are the logical `axes`.

    Without a `dtype` it takes the run's (bfloat16 until `with_dtype` says otherwise); with one it keeps it always. A
    matrix that may be quantised says how many of its last dimensions a product sums over (`contracting_dims`); another
    one that goes through `layers.linear` or `layers.embedding` only says that it is `packable`.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} has {len(shape)} dimensions, axes {axes} name {len(axes)}")
    abstract = jax.ShapeDtypeStruct(shape, jnp.bfloat16 if dtype is None else dtype)
    return Weight(
        abstract,
        axes=axes,
        initializer=initializer,
        pinned=dtype is not None,
        contracting_dims=contracting_dims,
        packable=bool(contracting_dims or packable),
    )


def is_weight(node: Any) -> bool:
    """Whether a node of a model's tree is a declared weight."""
    return isinstance(node, Weight)


def map_weights(function: Callable[[str, Weight], Any], model: Any) -> Any:
    """Return `model` with the value of every weight replaced by `function(name, weight)`.

    The name is the dotted path of the weight in the model: `moe.experts.gate_up`.
    """

    def replace(path, weight):
        return weight.replace(function(weight_name(path), weight))

    return jax.tree_util.tree_map_with_path(replace, model, is_leaf=is_weight)


def weights_by_name(model: Any) -> dict[str, Weight]:
    """The weights of a model (abstract or not) by their dotted names, in the order of the tree."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)
    return {weight_name(path): weight for path, weight in pairs}


def weight_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a path in a model's tree."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)


def layer_axis(weight: Weight) -> bool:
    """Whether the value has a leading dimension of stacked layers in front of the declared axes."""
    return len(weight.get_raw_value().shape) == len(weight.axes) + 1


def with_dtype(model: Any, dtype: Any) -> Any:
    """Return the abstract `model` with every weight in `dtype`, except those whose dtype is pinned."""

    def cast(_, weight):
        value = weight.get_raw_value()
        return value if weight.pinned else jax.ShapeDtypeStruct(value.shape, dtype)

    return map_weights(cast, model)


def initial_value(name: str, weight: Weight, key: jax.Array) -> jax.Array | PackedBfloat16:
    """Draw the first value of a weight whose type has its sharding; each name has a random stream of its own."""
    value = weight.get_raw_value()
    packed = isinstance(value, PackedBfloat16)
    dtype = jnp.dtype(jnp.bfloat16 if packed else value.dtype)
    draw = _compiled_draw(weight.initializer, value.shape, dtype, value.sharding)
    drawn = draw(jax.random.fold_in(key, zlib.crc32(name.encode())))
    return PackedBfloat16(_bits_of(drawn)) if packed else drawn


@jax.jit
def _bits_of(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, jnp.uint16)


@functools.lru_cache(maxsize=1024)
def _compiled_draw(initializer: Initializer, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """The compiled initializer: many weights share a shape, and a random draw takes long to compile.

    A draw depends on the linear index of each value only, so it is made in as few dimensions as the layout allows:
    over five of them XLA takes seconds to compile it.
    """
    merged: list[int] = []
    for size, axes in itertools.zip_longest(shape, sharding.spec[: len(shape)]):
        devices = math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        if merged and devices == 1:
            merged[-1] *= size
        else:
            merged.append(size)
    return jax.jit(lambda key: initializer(key, tuple(merged), dtype).reshape(shape), out_shardings=sharding)
