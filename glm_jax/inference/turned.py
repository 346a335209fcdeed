"""The form of a small model for a CPU's passes of a few rows: with its weights turned round.

They are copies, made once for a model and kept beside it: 5 MB for one of 1.4 million parameters. The weights of a
larger model stream from memory, and multiplying by them as they are takes no longer.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.layers.step import Kernels
from glm_jax.model import Transformer
from glm_jax.sharding import TurnedArray, Weight, layer_axis, map_weights, platform, weights_by_name

MAX_PARAMETERS = 2**22  # 16 MiB of float32: they, or most of them, stay in a CPU's cache
MAX_ROWS = 32  # up to here all experts of a layer cost no more than those chosen


class Form(NamedTuple):
    """A model as compiled programs take it: its leaves, and their structure."""

    leaves: list[Any]
    structure: Any


_MADE: weakref.WeakKeyDictionary[Transformer, tuple[list[Any], Form]] = weakref.WeakKeyDictionary()


def forms(model: Transformer, kernels: Kernels | None = None) -> tuple[Form, Form]:
    """The model as it is, and the form of it for passes of a few rows, which is the same where another does not pay.

    Another pays for a small model of unrolled layers in float32, on a CPU, on a mesh of one device; unless `kernels`
    names a form of the experts. The weights of the MTP layer, which drafts one token at a time, stay as they are.
    """
    plain = Form(*jax.tree.flatten(model))
    weights = _matrices(model)
    if (kernels and kernels.experts) or not _pays(model, weights.values()):
        return plain, plain
    source, made = _MADE.get(model, ([], plain))
    if len(source) != len(plain.leaves) or any(a is not b for a, b in zip(source, plain.leaves, strict=True)):
        turned = {name: _turned(weight) for name, weight in weights.items()}
        changed = map_weights(lambda name, weight: turned.get(name, weight.get_raw_value()), model)
        made = Form(*jax.tree.flatten(changed))
        _MADE[model] = plain.leaves, made
    return plain, made


def are_few(rows: int) -> bool:
    """Whether a pass has so few rows, and not one alone, that it is one for the other form."""
    return 1 < rows <= MAX_ROWS


def _turned(weight: Weight) -> TurnedArray:
    """One weight turned round: those of all experts of a layer as one matrix, for products with all of them."""
    array = weight.get_raw_value()
    inputs = tuple(range(array.ndim - max(1, weight.inputs), array.ndim))
    if weight.axes[0] != "expert":
        return TurnedArray.of(array, inputs)
    if weight.axes[1] == "embed":  # down: its product sums over the experts as well
        return TurnedArray.of(array, (0, *inputs))
    return TurnedArray.of(array, inputs, outputs=(1, 0, 2))  # the gates of all experts, then the rest


def _matrices(model: Transformer) -> dict[str, Weight]:
    """The weights that may be turned round, by their names."""
    found = {} if model.head is None else {"head.weight": model.head.weight}
    for group in ("dense", "moe"):
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
