"""The weights of a small model turned round, for the passes of a CPU that have more than one row.

They are copies, made once for a model and kept beside it: 5 MB for one of 1.4 million parameters. The weights of a
larger model stream from memory, and multiplying by them as they are takes no longer.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection

import jax
import jax.numpy as jnp

from glm_jax.layers.step import Kernels
from glm_jax.model import Transformer
from glm_jax.sharding import TurnedArray, Weight, layer_axis, map_weights, platform, weights_by_name

MAX_PARAMETERS = 2**22  # 16 MiB of float32: they, or most of them, stay in a CPU's cache
MAX_ROWS = 32  # up to here all experts of a layer cost no more than those chosen

Turned = dict[str, TurnedArray]
_MADE: weakref.WeakKeyDictionary[Transformer, tuple[list[jax.Array], Turned]] = weakref.WeakKeyDictionary()


def turned_weights(model: Transformer, kernels: Kernels | None = None) -> Turned:
    """The matrices of a model's layers and its head by name, turned round; none where that does not pay.

    It pays for a small model of unrolled layers in float32, on a CPU, on a mesh of one device. The weights of the MTP
    layer, which drafts one token at a time, stay as they are. So do all where `kernels` names a form of the experts.
    """
    weights = _matrices(model)
    if (kernels and kernels.experts) or not _pays(model, weights.values()):
        return {}
    sources = [weight.get_raw_value() for weight in weights.values()]
    kept = _MADE.get(model)
    if kept is None or len(kept[0]) != len(sources) or any(a is not b for a, b in zip(kept[0], sources, strict=True)):
        kept = sources, {name: _turned(weight) for name, weight in weights.items()}
        _MADE[model] = kept
    return kept[1]


def _turned(weight: Weight) -> TurnedArray:
    """One weight turned round: those of all experts of a layer as one matrix, for products with all of them."""
    array = weight.get_raw_value()
    inputs = tuple(range(array.ndim - max(1, weight.inputs), array.ndim))
    if weight.axes[0] != "expert":
        return TurnedArray.of(array, inputs)
    if weight.axes[1] == "embed":  # down: its product sums over the experts as well
        return TurnedArray.of(array, (0, *inputs))
    return TurnedArray.of(array, inputs, groups=len(array))


def few_rows_form(model: Transformer, turned: Turned, *, rows: int) -> Transformer:
    """The model for a pass of so many rows: with its weights turned round if there are such, and more rows than one."""
    if not turned or not 1 < rows <= MAX_ROWS:
        return model
    return map_weights(lambda name, weight: turned.get(name, weight.get_raw_value()), model)


def _matrices(model: Transformer) -> dict[str, Weight]:
    """The weights that may be turned round, by their names."""
    groups, head = ("dense", "moe"), model.head
    found = {} if head is None else {"head.weight": head.weight}
    for group in groups:
        for name, weight in weights_by_name(getattr(model, group)).items():
            # Latent attention multiplies by the matrix from the latent vector head by head as well.
            if weight.inputs and "latent" not in weight.axes:
                found[f"{group}.{name}"] = weight
    return found


def _pays(model: Transformer, weights: Collection[Weight]) -> bool:
    """Whether a model is one whose weights are worth turning round."""
    arrays = [weight.get_raw_value() for weight in weights]
    if any(map(layer_axis, weights)) or not all(isinstance(a, jax.Array) and a.dtype == jnp.float32 for a in arrays):
        return False
    mesh = model.mesh
    return platform(mesh) == "cpu" and mesh.size == 1 and sum(a.size for a in arrays) <= MAX_PARAMETERS
