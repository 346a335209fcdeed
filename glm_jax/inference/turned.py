"""The form of a small model for a CPU's passes of a few rows: with its weights turned round.

They are copies, made once for a model and kept beside it: 5 MB for one of 1.4 million parameters. The weights of a
larger model stream from memory, and multiplying by them as they are takes no longer.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from glm_jax.layers.step import Kernels
from glm_jax.model import Transformer
from glm_jax.sharding import TurnedArray, Weight, layer_axis, map_weights, platform, weights_by_name

MAX_PARAMETERS = 2**22  # 16 MiB of float32: they, or most of them, stay in a CPU's cache
MAX_ROWS = 32  # up to here all experts of a layer cost no more than those chosen

Programs = TypeVar("Programs")


class Form(NamedTuple):
    """A model as compiled programs take it: its leaves, and their structure."""

    leaves: list[Any]
    structure: Any


@dataclasses.dataclass(frozen=True)
class _Made:
    """What was made of a model.

    Attributes:
        source: the leaves that it was made of.
        turned: weights by name.
        forms: with the weights of the MTP layer turned round and without.
    """

    source: list[Any]
    turned: dict[str, TurnedArray] = dataclasses.field(default_factory=dict)
    forms: dict[bool, Form] = dataclasses.field(default_factory=dict)

    def is_of(self, leaves: list[Any]) -> bool:
        """Whether the leaves are still those of the model."""
        return len(self.source) == len(leaves) and all(a is b for a, b in zip(self.source, leaves, strict=True))


_MADE: weakref.WeakKeyDictionary[Transformer, _Made] = weakref.WeakKeyDictionary()


def plain_form(model: Transformer) -> Form:
    """The model as it is."""
    return Form(*jax.tree.flatten(model))


def few_rows_form(
    model: Transformer, leaves: list[Any], kernels: Kernels | None = None, *, mtp: bool = False
) -> Form | None:
    """The form of a model of these leaves for passes of a few rows; None where another than its own does not pay.

    It pays for a small model of unrolled layers in float32, on a CPU, on a mesh of one device; unless `kernels` names
    a form of the experts. `mtp` is for batches, in which the MTP layer has more rows than one to draft as well.
    """
    if (kernels and kernels.experts) or not _suits(model):
        return None
    made = _MADE.get(model)
    if made is None or not made.is_of(leaves):
        made = _Made(leaves)
    if mtp not in made.forms:
        weights = _matrices(model)
        if not all(map(_is_plain, weights.values())) or sum(map(_size, weights.values())) > MAX_PARAMETERS:
            return None
        _MADE[model] = made
        chosen = {name: weight for name, weight in weights.items() if mtp or not name.startswith("mtp.")}
        made.turned.update({n: _turned(weight) for n, weight in chosen.items() if n not in made.turned})
        changed = map_weights(
            lambda name, weight: made.turned[name] if name in chosen else weight.get_raw_value(), model
        )
        made.forms[mtp] = Form(*jax.tree.flatten(changed))
    return made.forms[mtp]


class Compiled(NamedTuple, Generic[Programs]):
    """A form of a model: its leaves, and the programs that take them."""

    leaves: list[Any]
    programs: Programs


class Forms(Generic[Programs]):
    """The forms of one model with their programs, each made when a pass first asks for it."""

    def __init__(self, model: Transformer, kernels: Kernels | None, programs: Callable[[Any], Programs]) -> None:
        """`programs` makes those of a structure."""
        self._model, self._kernels, self._programs = model, kernels, programs
        self.plain = self._compiled(plain_form(model))
        self._few: dict[bool, Compiled[Programs]] = {}

    def of(self, rows: int, *, mtp: bool = False) -> Compiled[Programs]:
        """The form for passes of so many rows; `mtp` is that of `few_rows_form`."""
        if not are_few(rows):
            return self.plain
        if mtp not in self._few:
            form = few_rows_form(self._model, self.plain.leaves, self._kernels, mtp=mtp)
            self._few[mtp] = self.plain if form is None else self._compiled(form)
        return self._few[mtp]

    def _compiled(self, form: Form) -> Compiled[Programs]:
        return Compiled(form.leaves, self._programs(form.structure))


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
    """The weights that may be turned round, by their names: all that go through `layers.linear` alone."""
    found = {}
    for name, weight in weights_by_name(model).items():
        # Latent attention multiplies by the matrix from the latent vector head by head as well.
        if name in ("head.weight", "mtp.projection") or (weight.inputs and "latent" not in weight.axes):
            found[name] = weight
    return found


def _suits(model: Transformer) -> bool:
    """Whether the arrays of a model are such as may be turned round; quick to tell, as of most they are not."""
    if not _is_plain(model.embedding.weight):
        return False
    return platform(model.mesh) == "cpu" and model.mesh.size == 1


def _is_plain(weight: Weight) -> bool:
    """Whether a weight is one array in float32, of one layer."""
    value = weight.get_raw_value()
    return isinstance(value, jax.Array) and value.dtype == jnp.float32 and not layer_axis(weight)


def _size(weight: Weight) -> int:
    return math.prod(weight.get_raw_value().shape)
