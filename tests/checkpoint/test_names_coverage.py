"""The name tables against the complete lists of the tensors of two published checkpoints, both ways, without weights.

The lists (name, shape, dtype and file of every tensor, read off the real headers) lie beside the repository; these
tests skip where they are absent.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from glm_jax import configs, count_parameters
from glm_jax.checkpoint.names import canonical_mappings, is_ignored
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name

LISTS = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = {"deepseek-r1": "deepseek_r1_tensor_index.json.gz", "kimi-k2": "kimi_k2_tensor_index.json.gz"}
ENTRIES = {"deepseek-r1": 91_991, "kimi-k2": 139_644}
SCALE, BLOCK = "_scale_inv", 128

pytestmark = pytest.mark.skipif(not LISTS.is_dir(), reason="no lists of published tensors beside the repository")


@functools.cache
def listed(name: str) -> dict[str, dict[str, Any]]:
    return json.loads(gzip.decompress((LISTS / FILES[name]).read_bytes()))


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_used_or_known_junk_and_every_weight_is_filled(name):
    config, tensors = configs.get(name), listed(name)
    assert len(tensors) == ENTRIES[name]
    weights = {tensor for tensor in tensors if not tensor.endswith(SCALE)}
    ignored = {tensor for tensor in weights if is_ignored(tensor)}
    assert weights - ignored == canonical_mappings(config).keys()
    assert len(ignored) == (61 if name == "kimi-k2" else 0)


@pytest.mark.parametrize("name", FILES)
def test_every_shape_is_right_and_every_scale_has_its_weight(name):
    tensors = listed(name)
    for tensor, mapping in canonical_mappings(configs.get(name)).items():
        assert tuple(tensors[tensor]["shape"]) == mapping.shape, tensor
        scale = tensors.get(tensor + SCALE)
        assert (scale is not None) == (tensors[tensor]["dtype"] == "F8_E4M3"), tensor
        if scale is not None:
            assert scale["shape"] == [math.ceil(size / BLOCK) for size in mapping.shape], tensor
    assert {t.removesuffix(SCALE) for t in tensors if t.endswith(SCALE)} <= canonical_mappings(configs.get(name)).keys()


@pytest.mark.parametrize("name", FILES)
def test_every_element_of_every_weight_has_one_tensor(name):
    """The mappings tile the weights: their sizes add up, and no two have the same place."""
    config = configs.get(name)
    sizes = {weight: math.prod(w.get_raw_value().shape) for weight, w in weights_by_name(Transformer(config)).items()}
    mappings = canonical_mappings(config).values()
    assert len({(mapping.weight, mapping.index) for mapping in mappings}) == len(mappings)
    filled = dict.fromkeys(sizes, 0)
    for mapping in mappings:
        filled[mapping.weight] += math.prod(mapping.part_shape)
    assert filled == sizes
    assert sum(sizes.values()) == count_parameters(config).total
