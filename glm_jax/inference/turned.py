"""The form of a small model for a CPU's passes of a few rows: with its weights turned round.

They are copies, made once for a model and kept beside it, of all but the routed experts: 2 MB for a model of 1.4
million parameters. The weights of a larger model stream from memory, and multiplying by them as they are takes no
longer.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from glm_jax.model import Transformer
from glm_jax.sharding import TurnedArray, Weight, layer_axis, map_weights, platform, weights_by_name

MAX_PARAMETERS = 2**22  # 16 MiB of float32: they, or most of them, stay in a CPU's cache
MAX_ROWS = 32  # up to here a product gains a tenth by it and more; beyond, hardly anything

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
        turned: weights by name, those together that are multiplied together.
        forms: with the weights of the MTP layer turned round and without.
    """

    source: list[Any]
    turned: dict[tuple[str, ...], dict[str, TurnedArray]] = dataclasses.field(default_factory=dict)
    forms: dict[bool, Form] = dataclasses.field(default_factory=dict)

    def is_of(self, leaves: list[Any]) -> bool:
        """Whether the leaves are still those of the model."""
        return len(self.source) == len(leaves) and all(map(operator.is_, self.source, leaves))

    def of(self, group: dict[str, Weight]) -> dict[str, TurnedArray]:
        """Weights of one product, turned round."""
        names = tuple(group)
        if names not in self.turned:
            arrays = [weight.get_raw_value() for weight in group.values()]
            inputs = max(1, group[names[0]].inputs)
            self.turned[names] = dict(zip(names, TurnedArray.together(arrays, inputs), strict=True))
        return self.turned[names]


_MADE: weakref.WeakKeyDictionary[Transformer, _Made] = weakref.WeakKeyDictionary()


def plain_form(model: Transformer) -> Form:
    """The model as it is."""
    return Form(*jax.tree.flatten(model))


def few_rows_form(model: Transformer, leaves: list[Any], *, mtp: bool = False) -> Form | None:
    """The form of a model of these leaves for passes of a few rows; None where another than its own does not pay.

    It pays for a small model of unrolled layers in float32, on a CPU, on a mesh of one device. `mtp` is for batches, in
    which the MTP layer has more rows than one to draft as well.
    """
    made = _MADE.get(model)
    if made is None or not made.is_of(leaves):
        made = _Made(leaves)
    if mtp not in made.forms:
        weights = _matrices(model) if _suits(model) else {}
        small = sum(map(_size, weights.values())) <= MAX_PARAMETERS
        if not (weights and small and all(map(_is_plain, weights.values()))):
            return None
        _MADE[model] = made
        chosen = {name: weight for name, weight in weights.items() if mtp or _sees_all_rows(name, weight)}
        turned = {name: array for group in _groups(chosen) for name, array in made.of(group).items()}
        changed = map_weights(lambda name, weight: turned.get(name, weight.get_raw_value()), model)
        made.forms[mtp] = Form(*jax.tree.flatten(changed))
    return made.forms[mtp]


class Compiled(NamedTuple, Generic[Programs]):
    """A form of a model: its leaves, and the programs that take them."""

    leaves: list[Any]
    programs: Programs


class Forms(Generic[Programs]):
    """The forms of one model with their programs, each made when a pass first asks for it."""

    def __init__(self, model: Transformer, programs: Callable[[Any], Programs]) -> None:
        """`programs` makes those of a structure."""
        self._model, self._programs = model, programs
        self.plain = self._compiled(plain_form(model))
        self._few: dict[bool, Compiled[Programs]] = {}

    def of(self, rows: int, *, mtp: bool = False) -> Compiled[Programs]:
        """The form for passes of so many rows; `mtp` is that of `few_rows_form`."""
        if not are_few(rows):
            return self.plain
        if mtp not in self._few:
            form = few_rows_form(self._model, self.plain.leaves, mtp=mtp)
            self._few[mtp] = self.plain if form is None else self._compiled(form)
        return self._few[mtp]

    def _compiled(self, form: Form) -> Compiled[Programs]:
        return Compiled(form.leaves, self._programs(form.structure))


def are_few(rows: int) -> bool:
    """Whether a pass has so few rows, and not one alone, that it is one for the other form."""
    return 1 < rows <= MAX_ROWS


def _groups(weights: dict[str, Weight]) -> list[dict[str, Weight]]:
    """The weights, those together that multiply the same rows: q, k and v of an attention, in this order.

    The MTP layer asks with one row and has keys and values of all.
    """
    groups: dict[str, dict[str, Weight]] = {}
    for name, weight in sorted(weights.items(), key=lambda item: not item[0].endswith(".q")):
        asks = name.endswith(".q") and not name.startswith("mtp.")
        together = asks or weight.axes[0] == "kv_heads"
        groups.setdefault(name.rpartition(".")[0] if together else name, {})[name] = weight
    return list(groups.values())


def _matrices(model: Transformer) -> dict[str, Weight]:
    """The weights that may be turned round, by their names: all that go through `layers.linear` alone.

    Routed experts do not: they are multiplied choice by choice, a row at a time.
    """
    found = {}
    for name, weight in weights_by_name(model).items():
        # Latent attention multiplies by the matrix from the latent vector head by head as well.
        plain = weight.inputs and not {"latent", "expert"} & set(weight.axes)
        if plain or name in ("head.weight", "mtp.projection"):
            found[name] = weight
    return found


def _sees_all_rows(name: str, weight: Weight) -> bool:
    """Whether a pass multiplies all of its rows by a weight, though the MTP layer drafts from one row."""
    return not name.startswith("mtp.") or name == "mtp.projection" or weight.axes[0] == "kv_heads"


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
