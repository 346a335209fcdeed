"""Groups of equal layers, stacked under a scan or unrolled; nothing else knows which.

A group is one `DecoderLayer` whose weights have a leading layer dimension (stacked), or an `nnx.List` of layers
(unrolled). TPU decode and training want the scan, where the compiler fuses each layer's slice into its products. GPU
and CPU decode want the unrolled form: there a slice of a stacked weight is a copy, gigabytes a step. The cache is
carried through the scan and written in place; as scanned input and output it would be rewritten whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import SequenceKey

from glm_jax.layers.context import ForwardContext
from glm_jax.model.decoder_layer import DecoderLayer
from glm_jax.sharding import Weight, map_weights
from glm_jax.sharding.weight import is_weight, weight_name

Group = Any  # a DecoderLayer (stacked) or an nnx.List of them
GroupCache = Any  # a LayerCache (stacked), a tuple of them, or None


def stack_abstract(layer: DecoderLayer, count: int) -> DecoderLayer:
    """The stacked abstract group of `count` layers like the given abstract one."""

    def lead(_, weight):
        value = weight.get_raw_value()
        return jax.ShapeDtypeStruct((count, *value.shape), value.dtype)

    return map_weights(lead, layer)


def depth(group: Group) -> int:
    """The number of layers of a group."""
    if isinstance(group, nnx.List):
        return len(group)
    return jax.tree.leaves(group)[0].shape[0]


def is_stacked(group: Group) -> bool:
    """Whether the group is one layer with a leading dimension."""
    return not isinstance(group, nnx.List)


def unroll(group: Group) -> nnx.List:
    """The group as a list of layers. Works on arrays and on abstract values; call it under jit for sharded arrays."""
    if not is_stacked(group):
        return group
    return nnx.List([jax.tree.map(lambda a, i=i: _index(a, i), group) for i in range(depth(group))])


def stack(group: Group) -> DecoderLayer:
    """The group as one stacked layer, the inverse of `unroll`."""
    if is_stacked(group):
        return group

    def join(*leaves):
        if isinstance(leaves[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
        return jnp.stack(leaves)

    return jax.tree.map(join, *group)


def map_layer_weights(function: Callable[[str, int | None, Weight], Any], model: Any) -> Any:
    """Return a whole `model`, its groups in either form, with the value of every weight replaced.

    The new value is `function(name, layer, weight)`: the weight's name in the stacked model, and the layer of its group
    that it belongs to, None if the group is stacked or if the weight belongs to no group.
    """

    def replace(path, weight):
        indices = [key for key in path if isinstance(key, SequenceKey)]  # an unrolled group alone is a sequence
        name = weight_name(tuple(key for key in path if key not in indices))
        return weight.replace(function(name, indices[0].idx if indices else None, weight))

    return jax.tree_util.tree_map_with_path(replace, model, is_leaf=is_weight)


def layers(group: Group | None) -> Iterator[DecoderLayer]:
    """The layers of a group of arrays one after the other; of a stacked group one copy at a time."""
    if group is None:
        return
    if not is_stacked(group):
        yield from group
        return
    for i in range(depth(group)):
        yield _take(group, jnp.int32(i))


@jax.jit
def _take(group: DecoderLayer, i: jax.Array) -> DecoderLayer:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), group)


def _index(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[i]


def run(
    group: Group, x: jax.Array, context: ForwardContext, cache: GroupCache
) -> tuple[jax.Array, GroupCache, jax.Array | None]:
    """Run all layers of a group over x [B, T, D].

    The cache has the group's own layout, stacked or unrolled. Returns x, the cache with this pass's tokens, and of MoE
    layers the experts chosen, int32 [L, B, T, K]; what a caller does not use is not computed.
    """
    if is_stacked(group):
        return _run_scan(group, x, context, cache)
    caches = (None,) * len(group) if cache is None else cache
    written, chosen = [], []
    one_layer = _one_layer(context)
    for layer, layer_cache in zip(group, caches, strict=True):
        x, layer_cache, ids = one_layer(layer, x, layer_cache, None)
        written.append(layer_cache)
        chosen.append(ids)
    return x, None if cache is None else tuple(written), None if chosen[0] is None else jnp.stack(chosen)


def _one_layer(context: ForwardContext) -> Any:
    """One layer of a pass, as a function of the layer, x, its cache and its index."""

    def run(
        layer: DecoderLayer, x: jax.Array, cache: Any, index: jax.Array | None
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        return layer(x, context, cache, index)

    return jax.checkpoint(run) if context.remat else run


def _run_scan(
    group: DecoderLayer, x: jax.Array, context: ForwardContext, cache: GroupCache
) -> tuple[jax.Array, GroupCache, jax.Array | None]:
    one_layer = _one_layer(context)

    def body(carry, index_and_layer):
        x, cache = carry
        index, layer = index_and_layer
        x, cache, ids = one_layer(layer, x, cache, index)
        return (x, cache), ids

    (x, cache), ids = jax.lax.scan(body, (x, cache), (jnp.arange(depth(group)), group))
    return x, cache, ids
