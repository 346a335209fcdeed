"""A transformer is a value: described without memory, made the same on every mesh, and unchanged by use."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import InputError, Transformer, configs, count_parameters
from glm_jax.model.transformer import check_tokens
from glm_jax.sharding import weights_by_name
from tests.model.conftest import small

TINY = configs.get("tiny-glm")
NAMES = ["tiny-glm", "tiny-deepseek", "tiny-kimi"]


def values(model: Transformer) -> dict[str, jax.Array]:
    return {name: weight.get_raw_value() for name, weight in weights_by_name(model).items()}


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (batch, length))


# --- making one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_constructor_describes_what_create_makes(created, name):
    described, made = values(Transformer(small(name))), values(created(name, stacked=True))
    assert all(isinstance(value, jax.ShapeDtypeStruct) for value in described.values())
    assert {n: v.shape for n, v in made.items()} == {n: v.shape for n, v in described.items()}
    assert sum(value.size for value in made.values()) == count_parameters(small(name)).total


def test_a_seed_gives_the_same_weights_on_every_mesh(created, one_device):
    one, many = (values(created("tiny-glm", stacked=True, sizes=sizes)) for sizes in ((1, 1, 1), (2, 2, 2)))
    other = values(Transformer.create(small("tiny-glm"), mesh=one_device, seed=2, stacked=True))
    drawn = {name for name, value in one.items() if np.ptp(value) > 0}
    assert len(drawn) > 10
    for name, value in one.items():
        np.testing.assert_array_equal(many[name], value)
        assert np.array_equal(other[name], value) is (name not in drawn), name
    assert len({np.asarray(one[name]).tobytes() for name in drawn}) == len(drawn)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_router_bias_is_float32_whatever_the_dtype(mesh_of_sizes, dtype):
    mesh = mesh_of_sizes((1, 1, 2))
    model = Transformer.create(small("tiny-glm"), mesh=mesh, dtype=dtype, stacked=False)
    assert model.mesh == mesh and model.weights_dtype == jnp.dtype(dtype)
    assert model.moe[0].moe.router.bias.get_raw_value().dtype == jnp.float32
    assert model(tokens(1, 3)).logits.dtype == jnp.float32


# --- counting -------------------------------------------------------------------------------------------------------


def test_counts_of_a_small_model_by_hand():
    attention = 64 * 16 * (8 + 2 + 2) + 16 * (8 + 2 + 2) + 8 * 16 * 64 + 2 * 16  # q k v, their biases, out, two norms
    expert, norms = 3 * 64 * 32, 2 * 64
    dense = attention + norms + 3 * 64 * 128
    router = 8 * 64
    moe = attention + norms + router + 8 + (8 + 1) * expert  # and a bias for each expert
    mtp = moe + 64 * 128 + 3 * 64
    decoder = dense + 3 * moe + 64
    counts = count_parameters(TINY)
    assert counts.total == decoder + 2 * 512 * 64 + mtp
    assert counts.without_mtp == decoder + 2 * 512 * 64
    assert (counts.report, counts.report_without_mtp) == (decoder + mtp, decoder)
    idle = 8 + 6 * expert  # two of eight experts work
    assert counts.active_without_mtp == decoder - 3 * idle
    assert counts.active == decoder + mtp - 4 * idle
    assert counts.active_with_embeddings == counts.active_without_mtp + 2 * 512 * 64


def test_a_tied_embedding_is_counted_once(one_device):
    tied = dataclasses.replace(small("tiny-glm"), tie_embeddings=True)
    assert count_parameters(small("tiny-glm")).total - count_parameters(tied).total == 512 * 64
    model = Transformer.create(tied, mesh=one_device)
    out = model(tokens(1, 4))
    np.testing.assert_allclose(out.logits, out.hidden @ model.embedding.weight[...].T, atol=1e-5)


# --- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_pass(created, name):
    model = created(name)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(model)]
    mtp = model.mtp is not None
    out = model(tokens(2, 5), mtp=mtp)
    assert out.logits.shape == (2, 5, 512) and out.hidden.shape == (2, 5, 64)
    assert (out.mtp_logits.shape == (2, 4, 512)) if mtp else out.mtp_logits is None
    np.testing.assert_array_equal(model(tokens(2, 5), mtp=mtp).logits, out.logits)
    for old, new in zip(before, jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("name", ["tiny-glm", "tiny-deepseek"])
def test_no_row_sees_what_comes_after(created, name):
    """A row of the decoder sees the tokens up to its own, a row of the MTP layer one more."""
    model = created(name)
    given = tokens(1, 8)
    for changed in (3, 7):
        other = given.copy()
        other[0, changed] += 1
        one, two = model(given, mtp=True), model(other % TINY.vocab_size, mtp=True)
        for left, right, first in ((one.logits, two.logits, changed), (one.mtp_logits, two.mtp_logits, changed - 1)):
            rows = np.abs(np.asarray(left - right)).max(axis=(0, 2))
            assert (rows[:first] < 1e-6).all() and (rows[first:] > 1e-5).all()


def test_the_mtp_layer_of_its_parts(created):
    """[norm of the next embedding | norm of the hidden state], projected, one more layer, a norm, the main head."""
    model, given = created("tiny-glm"), np.array([[3, 1, 4, 15, 9, 2]])
    out = model(given, mtp=True)

    def norm(x, scale):
        return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + TINY.norm_eps) * np.asarray(scale)

    weights = values(model)
    following = norm(np.asarray(weights["embedding.weight"])[given[:, 1:]], weights["mtp.embed_norm.scale"])
    hidden = norm(np.asarray(out.hidden)[:, :-1], weights["mtp.hidden_norm.scale"])
    joined = np.concatenate([following, hidden], axis=-1) @ np.asarray(weights["mtp.projection"]).T
    # The layer itself, as the one layer of a decoder whose embedding gives what was joined.
    shell = Transformer(dataclasses.replace(TINY, num_layers=1, num_dense_layers=0, num_mtp_layers=0))
    parts = values(model)
    parts["embedding.weight"] = jnp.zeros_like(parts["embedding.weight"]).at[given[0, 1:]].set(joined[0])
    for name, weight in weights_by_name(shell).items():
        source = name.replace("moe.", "mtp.layer.", 1) if name.startswith("moe.") else name
        value = parts["mtp.norm.scale" if name == "final_norm.scale" else source]
        weight.set_raw_value(value[None] if name.startswith("moe.") else value)
    np.testing.assert_allclose(shell(given[:, 1:]).logits, out.mtp_logits, atol=1e-5)


def test_one_token_leaves_the_mtp_layer_nothing_to_say(created):
    assert created("tiny-glm")(tokens(2, 1), mtp=True).mtp_logits.shape == (2, 0, 512)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[1, 2], [3]], "the sequences given have different lengths"),
        ([1, 2], r"got int64 \(2,\)"),
        ([[[1]]], r"got int64 \(1, 1, 1\)"),
        ([[]], r"at least one of each; got float64 \(1, 0\)"),
        (np.zeros((0, 3), int), r"got int64 \(0, 3\)"),
        ([[1.0]], "got float64"),
        ([[True]], "got bool"),
        ([["a"]], "tokens must be integers"),
        ([[512]], r"token 512 is outside the vocabulary 0\.\.511"),
        ([[-1, 600]], r"token -1 is outside the vocabulary 0\.\.511"),
        (np.zeros((1, 1025), int), "1025 tokens exceed the model's 1024 positions"),
    ],
)
def test_what_are_no_tokens(given, words):
    with pytest.raises(InputError, match=words) as caught:
        check_tokens(given, TINY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.int64])
def test_tokens_of_any_integers(dtype):
    checked = check_tokens(np.array([[1, 2]], dtype), TINY)
    assert checked.dtype == np.int32 and checked.tolist() == [[1, 2]]


def test_no_mtp_layer_to_run(created):
    with pytest.raises(InputError, match=r"this model has no MTP layer \(num_mtp_layers is 0\)"):
        created("tiny-kimi")(tokens(1, 2), mtp=True)
