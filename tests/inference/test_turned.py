"""Weights of small models turned round for few rows: the same numbers, made once, and only where that pays."""

from __future__ import annotations

import dataclasses
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import configs
from glm_jax.inference import generate, turned
from glm_jax.inference.runner import Runner
from glm_jax.inference.speculative import Speculator
from glm_jax.model import Transformer
from glm_jax.sharding import QuantizedArray, TurnedArray, make_mesh, map_weights, multiply_together, weights_by_name
from glm_jax.sharding import turned as turned_array

ONE = {"devices": jax.devices()[:1]}


def tiny(seed: int = 0, **changes: object) -> Transformer:
    config = dataclasses.replace(configs.get("tiny-glm"), **changes)
    return Transformer.create(config, mesh=make_mesh(**ONE), seed=seed)


def placed(rng: np.random.Generator, *shape: int) -> jax.Array:
    place = jax.NamedSharding(make_mesh(**ONE), jax.sharding.PartitionSpec())
    return jax.device_put(rng.normal(size=shape).astype(np.float32), place)


def product(x: np.ndarray, weight: jax.Array, inputs: int) -> np.ndarray:
    """What a weight gives, by a sum over its inputs."""
    over = range(weight.ndim - inputs, weight.ndim)
    rows = x.reshape(x.shape[0], *(weight.shape[i] for i in over))
    summed = np.tensordot(rows, np.asarray(weight), (range(1, rows.ndim), over))
    return summed.reshape(x.shape[0], -1)


@pytest.mark.parametrize("max_part", [1, 40, 2**16])
@pytest.mark.parametrize(("shape", "inputs"), [((6, 10), 1), ((10, 3, 4), 2), ((4, 2, 3, 5), 1)], ids=str)
def test_products_are_those_of_the_weight(shape, inputs, max_part, monkeypatch):
    monkeypatch.setattr(turned_array, "MAX_PART", max_part)
    rng = np.random.default_rng(0)
    weight = placed(rng, *shape)
    (array,) = TurnedArray.together([weight], inputs)
    x = rng.normal(size=(3, math.prod(shape[len(shape) - inputs :]))).astype(np.float32)
    np.testing.assert_allclose(array.multiply(x), product(x, weight, inputs), atol=1e-5)
    assert array.shape == shape and array.ndim == len(shape) and array[...] is array
    assert sum(part.size for part in array.parts) == weight.size
    assert all(part.size <= max_part or part.shape[1] == 1 for part in array.parts)
    with pytest.raises(IndexError, match="right would be"):
        array[0]


@pytest.mark.parametrize("max_part", [1, 40, 2**16])
@pytest.mark.parametrize("heads", [(4, 2, 2), (1, 3), (5,)], ids=str)
def test_weights_turned_together_are_multiplied_together(heads, max_part, monkeypatch):
    monkeypatch.setattr(turned_array, "MAX_PART", max_part)
    rng = np.random.default_rng(1)
    weights = [placed(rng, count, 3, 7) for count in heads]
    arrays, x = TurnedArray.together(weights, 1), rng.normal(size=(5, 7)).astype(np.float32)
    for ours, weight in zip(multiply_together(x, arrays), weights, strict=True):
        np.testing.assert_allclose(ours, product(x, weight, 1), atol=1e-5)
    if len(heads) > 1:
        for array in arrays:
            with pytest.raises(AssertionError, match="multiply together"):
                array.multiply(x)


def family(name: str) -> Transformer:
    """A small model of a family with latent or grouped-query attention, groups of experts, tied embeddings or not."""
    if name == "tied":
        return tiny(tie_embeddings=True)
    return tiny() if name == "tiny-glm" else Transformer.create(small(name), mesh=make_mesh(**ONE), seed=3)


def small(name: str) -> configs.ModelConfig:
    preset, base = configs.get(name), configs.get("tiny-glm")
    assert isinstance(preset.attention, configs.MlaConfig)
    attention = dataclasses.replace(preset.attention, num_heads=4, q_rank=24, kv_rank=16, nope_dim=8, value_dim=8)
    moe = dataclasses.replace(base.moe, num_groups=preset.moe.num_groups // 4, num_groups_per_token=1)
    return dataclasses.replace(base, attention=attention, moe=moe)


def form(model: Transformer, *, mtp: bool = False) -> turned.Form | None:
    return turned.few_rows_form(model, turned.plain_form(model).leaves, mtp=mtp)


def other_form(model: Transformer, *, mtp: bool = False) -> Transformer | None:
    """The model as it is for passes of a few rows; None if it has no form of its own for them."""
    few = form(model, mtp=mtp)
    return None if few is None else jax.tree.unflatten(few.structure, few.leaves)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("name", ["tiny-glm", "tied", "deepseek-v3"])
def test_passes_of_few_rows_are_those_of_the_model(name, mtp):
    model = family(name)
    few = other_form(model, mtp=mtp)
    assert few is not None
    changed = {name for name, weight in weights_by_name(few).items() if isinstance(weight.get_raw_value(), TurnedArray)}
    assert not any(key.startswith("embedding") or "experts" in key or key.endswith("kv_b") for key in changed)
    # A round of one sequence sends all its rows through these alone; the rest of the layer takes the one that drafts.
    all_rows = {"mtp.projection", "mtp.layer.attention.k", "mtp.layer.attention.v"}
    assert "mtp.projection" in changed and ({key for key in changed if key.startswith("mtp.")} <= all_rows) != mtp
    assert ("head.weight" in changed) == (model.head is not None)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 3))
    expected, ours = model(tokens, mtp=True), few(tokens, mtp=True)
    for one, other in ((ours.logits, expected.logits), (ours.mtp_logits, expected.mtp_logits)):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.std(other)))


@pytest.mark.parametrize("name", ["tiny-glm", "tied", "deepseek-v3"])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_tokens_are_those_without(name, drafts, monkeypatch):
    model = family(name)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in (5, 9, 2)]
    ours = [generate(model, some, max_new_tokens=12, speculative=drafts) for some in (prompts, prompts[:1])]
    monkeypatch.setattr(turned, "MAX_PARAMETERS", 0)
    assert ours == [generate(model, some, max_new_tokens=12) for some in (prompts, prompts[:1])]


def test_which_passes_have_few_rows():
    rows = (1, 2, turned.MAX_ROWS, turned.MAX_ROWS + 1)
    assert [turned.are_few(count) for count in rows] == [False, True, True, False]


@pytest.mark.parametrize("why", ["stacked", "bfloat16", "devices", "large", "abstract", "quantised"])
def test_models_that_keep_their_weights_as_they_are(why, monkeypatch):
    config = configs.get("tiny-glm")
    if why == "abstract":
        assert other_form(Transformer(config)) is None
        return
    if why == "large":
        monkeypatch.setattr(turned, "MAX_PARAMETERS", 1000)
    mesh = make_mesh(tensor=2, devices=jax.devices()[:2]) if why == "devices" else make_mesh(**ONE)
    model = Transformer.create(
        config, mesh=mesh, stacked=why == "stacked", dtype="bfloat16" if why == "bfloat16" else None
    )
    if why == "quantised":

        def quantise(name, weight):
            value = weight.get_raw_value()
            if not name.endswith("shared.down"):
                return value
            return QuantizedArray(value.astype(jnp.int8), jnp.ones(value.shape[:-1], jnp.float32))

        model = map_weights(quantise, model)
    assert other_form(model) is None


def test_they_are_made_once_and_again_when_a_weight_changes():
    model = tiny()
    first = form(model)
    assert first is not None and form(model) is first
    assert Runner(model)._forms.of(2).leaves is Speculator(model, 1)._forms.of(2).leaves is first.leaves
    both = form(model, mtp=True)
    assert both is not None and Speculator(model, 1)._forms.of(4, mtp=True).leaves is both.leaves
    assert {id(leaf) for leaf in first.leaves} & {id(leaf) for leaf in both.leaves}  # one copy of the main weights
    prompts = [[1, 2, 3], [4, 5]]
    before = generate(model, prompts, max_new_tokens=8, speculative=1)
    model.head.weight.set_value(jnp.flip(model.head.weight.get_raw_value(), axis=0))
    assert form(model) is not first
    after = generate(model, prompts, max_new_tokens=8, speculative=1)
    assert after == generate(model, prompts, max_new_tokens=8)
    last = model.config.vocab_size - 1
    assert [row[0] for row in after] == [last - row[0] for row in before]


def test_they_go_with_their_model():
    model = tiny()
    form(model)
    held = len(turned._MADE)
    del model
    gc.collect()
    assert len(turned._MADE) < held


def test_values_that_are_exchanged_weight_by_weight_are_seen():
    """A training step returns a new model of the same class: no copy of another one's weights may answer for it."""
    model = tiny()
    generate(model, [[1, 2], [3, 4]], max_new_tokens=2)
    other = map_weights(lambda name, weight: weight.get_raw_value() * 1.5, model)
    prompts = [[1, 2, 3], [7, 8]]
    alone = [generate(other, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert generate(other, prompts, max_new_tokens=6) == alone
