"""The cache of a model: its shapes, its placement, and that it gives what the whole pass gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glm_jax import Transformer
from glm_jax.model import abstract_cache, create_cache
from glm_jax.model.allocate import cache_part
from glm_jax.model.transformer import runtime_model, with_layer_layout
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.sharding import Rules, rules_named, with_shardings
from tests import decoding
from tests.model.conftest import small

BATCH, LENGTH = 4, 24
# Of one layer: keys and values of two heads; latent vectors of 24 numbers and a shared key of 8.
LAYER = {"tiny-glm": [(BATCH, 2, LENGTH, 16)] * 2, "tiny-deepseek": [(BATCH, 1, LENGTH, 32)]}


def placed(name: str, mesh, *, stacked: bool = False, rules: Rules | None = None) -> Transformer:
    """An abstract model on a mesh."""
    model = with_layer_layout(runtime_model(small(name), mesh, dtype=jnp.float32, rules=rules), stacked=stacked)
    return with_shardings(model, mesh, model.rules)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("name", LAYER)
def test_shapes(one_device, name, stacked):
    cache = abstract_cache(placed(name, one_device, stacked=stacked), BATCH, LENGTH, mtp=True)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(part)] for part in (cache.dense, cache.moe, cache.mtp)]
    one = LAYER[name]
    groups = [[(layers, *shape) for shape in one] if stacked else one * layers for layers in (1, 2)]
    assert shapes == [*groups, one]
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", LAYER)
def test_what_is_made_is_what_was_described(mesh_of_sizes, name):
    model = placed(name, mesh_of_sizes((2, 2, 2)))
    options = {"dtype": jnp.bfloat16, "mtp": True}
    made, described = create_cache(model, BATCH, LENGTH, **options), abstract_cache(model, BATCH, LENGTH, **options)
    assert jax.tree.structure(made) == jax.tree.structure(described)
    for array, abstract in zip(jax.tree.leaves(made), jax.tree.leaves(described), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (abstract.shape, jnp.bfloat16, abstract.sharding)
        assert not np.asarray(array, np.float32).any()


def test_only_what_there_is_is_cached(one_device):
    assert abstract_cache(placed("tiny-glm", one_device), BATCH, LENGTH).mtp is None
    assert abstract_cache(placed("tiny-kimi", one_device), BATCH, LENGTH, mtp=True).mtp is None


@pytest.mark.parametrize(
    ("name", "batch", "rules", "spec"),
    [
        ("tiny-glm", 8, "default", P(("data", "expert"), "tensor", None, None)),
        ("tiny-glm", 2, "default", P("data", "tensor", None, None)),
        ("tiny-glm", 1, "default", P(None, "tensor", None, None)),
        ("tiny-deepseek", 8, "default", P(("data", "expert"), None, None, None)),
        ("tiny-glm", 2, "long_context", P("data", "tensor", "expert", None)),
        ("tiny-deepseek", 2, "long_context", P("data", None, "expert", None)),
    ],
)
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_placement(mesh_of_sizes, name, batch, rules, spec, stacked):
    """Sequences, heads, and where the rules say so the rows of a sequence are split; the layers never."""
    model = placed(name, mesh_of_sizes((2, 2, 2)), stacked=stacked, rules=rules_named(rules))
    leaf = jax.tree.leaves(abstract_cache(model, batch, LENGTH).moe)[0]
    assert leaf.sharding.is_equivalent_to(
        jax.NamedSharding(model.mesh, P(None, *spec) if stacked else spec), leaf.ndim
    ), leaf.sharding.spec


@pytest.mark.parametrize(("platform", "size"), [("tpu", 640), ("gpu", 576), ("cpu", 576)])
def test_latent_vectors_fill_the_registers_of_a_tpu(platform, size):
    axes = ("batch", None, "length", "latent")
    part = cache_part((2, 1, 8, 576), axes, mesh=abstract_mesh((1, 1, 1), platform), rules=Rules(), dtype=jnp.bfloat16)
    assert part.shape == (2, 1, 8, size)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("name", LAYER)
def test_prefill_and_decode_give_what_the_whole_pass_gives(created, name, stacked):
    """Sequences of unequal length, which decode at different positions."""
    model = created(name, stacked=stacked)
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (3, 9))
    expected = np.asarray(model(tokens).logits)
    np.testing.assert_allclose(decoding.teacher_forced(model, tokens, np.array([1, 8, 4])), expected, atol=1e-5)
