"""A part of a model's layers: the weights are the whole model's, and the configuration has only these."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint.layer_range import LayerRange
from glm_jax.configs import ModelConfig
from glm_jax.errors import InputError
from glm_jax.model.transformer import with_layer_layout
from glm_jax.sharding import QuantizedArray, weights_by_name
from tests import published
from tests.checkpoint import quantized_sources as sources

DENSE, LAYERS = 2, 5
SHAPE = {"num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The same weights in four forms."""
    place = tmp_path_factory.mktemp("layers")
    made = sources.checkpoint(sources.deepseek((16, 8)), **SHAPE)
    forms = {"hf": made.write(place / "hf", shards=2), "plain": made.write_plain(place / "plain")}
    for name, source in (("kept", "hf"), ("orbax", "plain")):
        glm_jax.convert(forms[source], place / name, quantized="keep")
        forms[name] = place / name
    return forms


def layers_of(model: Any, config: ModelConfig) -> list[dict[str, np.ndarray]]:
    """The arrays of each decoder layer by name, and behind these those of the rest of the model."""
    found: list[dict[str, np.ndarray]] = [{} for _ in range(config.num_layers + 1)]
    for name, weight in weights_by_name(model).items():
        group, number, rest = [*name.split(".", 2), "", ""][:3]
        numbered = number.isdecimal() and group in ("dense", "moe")
        layer = int(number) + (group == "moe") * config.num_dense_layers if numbered else -1
        value = weight.get_raw_value()
        parts = {"": value} if not isinstance(value, QuantizedArray) else {".v": value.values, ".s": value.scale}
        found[layer] |= {(rest if numbered else name) + suffix: np.asarray(part) for suffix, part in parts.items()}
    return found


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.tobytes()) == (right[name].dtype, right[name].tobytes()), name


@pytest.mark.parametrize("form", ["hf", "plain", "kept", "orbax"])
def test_a_range_has_the_layers_of_the_whole(directories, mesh_of_sizes, form):
    options: dict[str, Any] = {"mesh": mesh_of_sizes((1, 2, 2)), "stacked": False}
    whole = glm_jax.load(directories[form], **options)
    all_layers = layers_of(whole, whole.config)
    for start, stop in ((0, 1), (1, 2), (0, 4), (1, 4), (2, 3), (3, 5), (0, 5)):
        part = glm_jax.load(directories[form], layers=f"{start}:{stop}", **options)
        dense = max(0, min(stop, DENSE) - start)
        assert (part.config.num_layers, part.config.num_dense_layers) == (stop - start, dense)
        assert (part.mtp is not None) == bool(part.config.num_mtp_layers) == (stop == LAYERS)
        *layers, rest = layers_of(part, part.config)
        for layer, expected in zip(layers, all_layers[start:stop], strict=True):
            same(layer, expected)
        same(rest, {name: array for name, array in all_layers[-1].items() if stop == LAYERS or name[:3] != "mtp"})
        if form == "hf":
            stacked = glm_jax.load(directories[form], layers=slice(start, stop), mesh=options["mesh"], stacked=True)
            for one, two in zip(
                layers_of(with_layer_layout(stacked, stacked=False), part.config),
                [*layers, rest],
                strict=True,
            ):
                same(one, two)


def test_a_range_runs_as_a_model_of_its_own(tmp_path, one_device):
    """Layers 1 to 3 of five are the model that has these tensors as its layers 0 to 2."""
    config = published.config_json(**SHAPE, num_nextn_predict_layers=0, dtype="float32")
    tensors = published.tensors(config, seed=5)
    whole = published.write(tmp_path / "whole", config, tensors)
    smaller = {**config, "num_hidden_layers": 3, "first_k_dense_replace": 1}
    moved = {}
    for name, array in tensors.items():
        number = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if number is None or 1 <= number < 4:
            moved[name if number is None else name.replace(f"layers.{number}.", f"layers.{number - 1}.")] = array
    expected = glm_jax.load(published.write(tmp_path / "part", smaller, moved), mesh=one_device)
    part = glm_jax.load(whole, mesh=one_device, layers=slice(1, 4))
    assert part.config == expected.config
    tokens = np.random.default_rng(0).integers(0, 128, (1, 9))
    assert np.array_equal(part(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        (None, (0, 5)),
        ("0:4", (0, 4)),
        (" 1 : 3 ", (1, 3)),
        (":2", (0, 2)),
        ("3:", (3, 5)),
        (":", (0, 5)),
        (slice(0, 4), (0, 4)),
        (slice(None), (0, 5)),
        (slice(2, None, 1), (2, 5)),
        (slice(np.int64(1), 2), (1, 2)),
    ],
    ids=str,
)
def test_ways_to_say_a_range(directories, given, bounds):
    config = dataclasses.replace(glm_jax.configs.from_hf(directories["plain"]), num_mtp_layers=1)
    part = LayerRange.of(config, given)
    assert (part.start, part.stop) == bounds
    assert (part.config == config) == (bounds == (0, 5))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("2:2", "the range of layers 2:2 is empty; the model has 5, and right would be 0:4"),
        ("3:1", "is empty"),
        ("0:0", "is empty"),
        ("0:6", "the range of layers 0:6 has some that this model lacks; the model has 5"),
        ("5:", "is empty"),
        ("7:9", "has some that this model lacks"),
        ("-2:", "'-2:' is no range of layers; right would be '0:4'"),
        ("4", "'4' is no range"),
        ("0:4:2", "no range"),
        ("0-4", "no range"),
        ("", "no range"),
        ("٠:٢", "no range"),
        (slice(0, 4, 2), r"slice\(0, 4, 2\) is no range of layers; right would be slice\(0, 4\) or '0:4'"),
        (slice(-2, None), "has some that this model lacks"),
        (slice(0.0, 2), "no range"),
        (slice(False, True), "no range"),
        (4, "no range"),
    ],
    ids=str,
)
def test_what_is_no_range(directories, given, words):
    with pytest.raises(InputError, match=words):
        glm_jax.load(directories["plain"], layers=given)
