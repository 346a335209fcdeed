"""Each family with latent attention on many devices is the same model as on one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import glm_jax
from glm_jax import ShardingError
from glm_jax.model import create_cache
from tests import decoding, published
from tests.operations import DENSE

MESHES = {"1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2), "8x1x1": (8, 1, 1)}
FAMILIES = ["deepseek_v3", "kimi_k2", "glm4_moe_lite"]
FAST = {("deepseek_v3", "1x1x8"), ("deepseek_v3", "2x2x2"), ("kimi_k2", "1x8x1"), ("glm4_moe_lite", "8x1x1")}
CASES = [
    pytest.param(family, sizes, id=f"{family}-{name}", marks=() if (family, name) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for name, sizes in MESHES.items()
]


@pytest.mark.parametrize(("model_type", "sizes"), CASES)
def test_logits_prefill_and_decode(checkpoint_of, single_of, mesh_of_sizes, model_type, sizes):
    """The whole pass, with the MTP layer where there is one, then the same through the latent cache."""
    one = single_of(model_type)
    model = glm_jax.load(checkpoint_of(model_type), mesh=mesh_of_sizes(sizes), stacked=False)
    tokens = published.tokens(4, 9)
    has_mtp = one.mtp is not None
    ours, reference = (m(tokens, mtp=has_mtp, ops=DENSE) for m in (model, one))
    for name in ("logits", "mtp_logits") if has_mtp else ("logits",):
        left, right = np.asarray(getattr(ours, name)), np.asarray(getattr(reference, name))
        assert np.abs(left - right).max() <= 1e-4 * right.std(), name
    expected = np.asarray(reference.logits)
    decoded = decoding.teacher_forced(model, tokens, np.array([1, 4, 8, 6]), ops=DENSE)
    assert np.abs(decoded - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_latent_cache_is_split_by_batch_and_whole_for_every_head(checkpoint_of, mesh_of_sizes, model_type):
    model = glm_jax.load(checkpoint_of(model_type), mesh=mesh_of_sizes((2, 2, 2)), stacked=False)
    attention = model.config.attention
    with jax.set_mesh(model.mesh):
        leaves = jax.tree.leaves(create_cache(model, 8, 16))
    for leaf in leaves:
        assert leaf.shape == (8, 1, 16, attention.latent_dim)
        batch = leaf.sharding.shard_shape(leaf.shape)
        assert batch[1:] == leaf.shape[1:] and batch[0] in (2, 4)


def test_heads_that_do_not_divide_are_refused(tmp_path, mesh_of_sizes):
    source = published.checkpoint(
        tmp_path / "hf", model_type="deepseek_v3", num_attention_heads=6, num_key_value_heads=6
    )
    with pytest.raises(ShardingError, match=r"heads.*6"):
        glm_jax.load(source, mesh=mesh_of_sizes((1, 1, 8)))
