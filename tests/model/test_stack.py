"""A group of layers stacked or unrolled: the same weights, the same results."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from glm_jax import Transformer
from glm_jax.model import stack
from glm_jax.model.transformer import with_layer_layout
from tests.model.conftest import small

FAMILIES = ["tiny-glm", "tiny-deepseek"]


def check_same(one, other) -> None:
    """The same tree with the same leaves."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", FAMILIES)
def test_unrolled_layers_are_slices_and_stack_again(created, name):
    group = created(name, stacked=True).moe
    unrolled = stack.unroll(group)
    assert (stack.is_stacked(group), stack.is_stacked(unrolled)) == (True, False)
    assert stack.depth(group) == stack.depth(unrolled) == len(unrolled) == 2
    for i, layer in enumerate(unrolled):
        check_same(layer, jax.tree.map(lambda leaf, i=i: leaf[i], group))
    check_same(stack.stack(unrolled), group)
    for each in (group, unrolled):
        for layer, expected in zip(stack.layers(each), unrolled, strict=True):
            check_same(layer, expected)
    assert stack.stack(group) is group and stack.unroll(unrolled) is unrolled
    assert list(stack.layers(None)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_abstract_groups_turn_likewise(name):
    group = Transformer(small(name)).moe
    unrolled = stack.unroll(group)
    assert [stack.depth(each) for each in (group, unrolled)] == [2, 2]
    assert jax.tree.leaves(stack.stack(unrolled)) == jax.tree.leaves(group)
    assert jax.tree.leaves(stack.stack_abstract(unrolled[0], 2)) == jax.tree.leaves(group)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_model_turns_and_keeps_its_placement(created, sizes):
    """The weights lie as if they had been made in the other form, and the first model is what it was."""
    stacked, unrolled = (created("tiny-glm", stacked=form, sizes=sizes) for form in (True, False))
    turned = with_layer_layout(stacked, stacked=False)
    check_same(turned, unrolled)
    check_same(with_layer_layout(turned, stacked=True), stacked)
    for ours, theirs in zip(jax.tree.leaves(turned), jax.tree.leaves(unrolled), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_run_the_same(created, name):
    tokens = np.random.default_rng(0).integers(0, 512, (2, 7))
    one, other = (created(name, stacked=form)(tokens, mtp=True) for form in (True, False))
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
    np.testing.assert_allclose(one.mtp_logits, other.mtp_logits, atol=1e-5)
