"""The rows of a latent cache on a TPU: whole lanes, of which those that hold nothing change nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from glm_jax import configs
from glm_jax.inference import generate
from glm_jax.kernels import ops_for_platform
from glm_jax.model import Transformer, allocate, create_cache
from glm_jax.planning import Job
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.planning.placement import abstract_model, cache_parts


def widths(model: str, platform: str | None) -> set[int]:
    job = Job(config=configs.get(model), kind="decode", batch=64, length=4096)
    parts = cache_parts(abstract_model(job), job, abstract_mesh((1, 8, 1), platform))
    return {part.shape[-1] for part in parts}


@pytest.mark.parametrize(("platform", "width"), [("tpu", 640), ("gpu", 576), ("cpu", 576), (None, 576)])
def test_on_a_tpu_latent_rows_are_whole_lanes(platform, width):
    assert widths("deepseek-v3", platform) == {width}
    assert widths("glm-4.5", platform) == {128}


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_lanes_that_hold_nothing_change_nothing(monkeypatch, one_device, stacked):
    model = Transformer.create(configs.get("tiny-deepseek"), mesh=one_device, stacked=stacked)
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    expected = generate(model, prompts, max_new_tokens=12)
    monkeypatch.setattr(allocate, "ops_for", lambda mesh: ops_for_platform("tpu"))
    with jax.set_mesh(model.mesh):
        rows = [leaf.shape[-1] for leaf in jax.tree.leaves(create_cache(model, 2, 32))]
    assert set(rows) == {ops_for_platform("tpu").storage.latent_multiple}
    wide = generate(model, prompts, max_new_tokens=12)
    np.testing.assert_array_equal(wide, expected)
