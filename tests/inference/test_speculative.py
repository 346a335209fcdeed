"""Speculation changes how fast the tokens come, not which; and it counts its drafts right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import glm_jax
from glm_jax import InputError, Transformer
from glm_jax.inference import Acceptance, Sampling, stream
from glm_jax.inference.runner import Runner
from glm_jax.inference.speculative import MAX_IN_FLIGHT, Speculator
from glm_jax.model import create_cache
from glm_jax.serving import TextProcessor
from glm_jax.sharding import batch_sharding
from tests import published
from tests.inference import checkpoints
from tests.inference.checkpoints import FAMILIES
from tests.operations import CPU, DENSE

UNEQUAL = checkpoints.prompts((1, 3, 9, 17, 30))
PAIR = [[5, 6, 7], [8]]
NEW = 23  # a multiple of no number of drafts and one


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family."""
    root = tmp_path_factory.mktemp("speculative")
    return {family: checkpoints.write(root / family, model_type=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def demo(one_device) -> Transformer:
    return checkpoints.load_demo(one_device)


def run(model: Transformer, prompts: list[list[int]], **settings: Any) -> tuple[list[list[int]], Acceptance]:
    """The new tokens of each prompt, and what became of the drafts."""
    batches = stream(model, prompts, Sampling(**settings), ops=DENSE)
    new: list[list[int]] = [[] for _ in prompts]
    for batch in batches:
        for tokens, more in zip(new, batch, strict=True):
            tokens += more
    return new, batches.acceptance


# --- the layer that drafts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_query_goes_on_as_it_does_among_all(directory, one_device, family, prefill):
    """And all tokens are cached, as they are when all are queries."""
    model = glm_jax.load(directory[family], mesh=one_device)
    rng, shape = np.random.default_rng(3), (3, 5, model.config.embed_dim)
    laid_out = batch_sharding(3, one_device, model.rules, length=5)
    embedded, hidden = (jax.device_put(rng.normal(size=shape).astype("float32"), laid_out) for _ in range(2))
    start = np.zeros((3, 1), np.int32) if prefill else np.array([[0], [2], [7]], np.int32)
    positions = jax.device_put(start + np.arange(5, dtype=np.int32), laid_out)
    chosen = np.array([4, 0, 2])
    query_index = jax.device_put(chosen, batch_sharding(3, one_device, model.rules))

    @jax.jit
    def mtp(embedded, hidden, cache, positions, query_index):
        context = model.context(positions, prefill=prefill, ops=DENSE)
        return model.mtp(embedded, hidden, context, cache, query_index=query_index)

    with jax.set_mesh(one_device):
        cache = create_cache(model, 3, 16, mtp=True).mtp
        whole, cached, ids = mtp(embedded, hidden, cache, positions, None)
        one, cached_too, its_ids = mtp(embedded, hidden, cache, positions, query_index)
    np.testing.assert_allclose(one[:, 0], np.asarray(whole)[np.arange(3), chosen], atol=1e-4)
    np.testing.assert_array_equal(its_ids[:, 0], np.asarray(ids)[np.arange(3), chosen])
    for ours, theirs in zip(jax.tree.leaves(cached_too), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_unequal_prompts(directory, one_device, family, drafts):
    model = glm_jax.load(directory[family], mesh=one_device, stacked=drafts == 2)
    new, acceptance = run(model, UNEQUAL, max_new_tokens=NEW, speculative=drafts)
    assert new == run(model, UNEQUAL, max_new_tokens=NEW)[0]
    # Or nothing would be shown: some rounds accept several drafts, some none.
    assert acceptance.accepted[min(drafts, 3) - 1] > 0 and acceptance.accepted[0] < acceptance.drafted[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_one_prompt_and_over_seeds(tmp_path, one_device, family):
    for seed in range(4):
        path = checkpoints.write(tmp_path / str(seed), model_type=family, seed=seed)
        model = glm_jax.load(path, mesh=one_device, stacked=True)
        prompt = checkpoints.prompts((5 + seed,))
        plain = glm_jax.generate(model, prompt, max_new_tokens=NEW)
        assert glm_jax.generate(model, prompt, max_new_tokens=NEW, speculative=2) == plain


def test_a_model_of_dense_layers_alone_with_tied_embeddings(tmp_path, one_device):
    """The MTP layer has experts even where no other layer has."""
    path = checkpoints.write(tmp_path / "hf", first_k_dense_replace=2, tie_word_embeddings=True)
    model = glm_jax.load(path, mesh=one_device, stacked=True)
    plain, _ = run(model, UNEQUAL, max_new_tokens=NEW)
    assert run(model, UNEQUAL, max_new_tokens=NEW, speculative=2)[0] == plain


def test_weights_kept_in_bfloat16(directory, one_device):
    model = glm_jax.load(directory["deepseek_v3"], mesh=one_device, stacked=True, dtype="bfloat16")
    plain, _ = run(model, UNEQUAL, max_new_tokens=NEW)
    assert run(model, UNEQUAL, max_new_tokens=NEW, speculative=2)[0] == plain


def test_numbers_of_new_tokens(demo):
    """All ends that a round of four tokens can have, at the first token, too."""
    plain = run(demo, PAIR, max_new_tokens=11)[0]
    for number in range(1, 12):
        new, acceptance = run(demo, PAIR, max_new_tokens=number, speculative=3)
        assert new == [tokens[:number] for tokens in plain]
        assert (acceptance.rounds == 0) == (number == 1)


def test_stop_tokens_anywhere_in_a_round(demo):
    """Each token of the text in turn as the stop token, in rounds that accept nearly everything."""
    text = TextProcessor.load(checkpoints.DEMO)
    prompts = [
        text.tokenizer.encode(text.template.render([{"role": "user", "content": question}]))
        for question in ("What is 3+4-7+1-1?", "Ball under cup 2. Swap 2-3 1-3. Where is the ball?")
    ]
    plain, _ = run(demo, prompts, max_new_tokens=24)
    total = Acceptance.none(3)
    for stop in set(plain[0] + plain[1]):
        cut = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in plain]
        new, acceptance = run(demo, prompts, max_new_tokens=24, stop=(stop, 511), speculative=3)
        assert new == cut
        # Every token but the first of a sequence is the model's own at the end of a round, or an accepted draft.
        assert sum(map(len, cut)) - len(cut) <= acceptance.rounds + sum(acceptance.accepted)
        total += acceptance
    assert (total.rates[0] or 0) > 0.9, total


@pytest.mark.parametrize(("family", "drafts"), [("glm4_moe", 5), ("deepseek_v3", 1)])
def test_up_to_the_last_position(tmp_path, one_device, family, drafts):
    """The cache ends with the model's positions, 40 here, and drafts reach beyond them.

    The longest prompt ends at the last position; shorter ones go on while it drafts on beyond the end for nothing.
    """
    path = checkpoints.write(tmp_path / "hf", model_type=family, max_position_embeddings=40)
    model = glm_jax.load(path, mesh=one_device, stacked=True)
    prompts = checkpoints.prompts((28, 5, 27, 1))
    plain, _ = run(model, prompts, max_new_tokens=12)
    assert run(model, prompts, max_new_tokens=12, speculative=drafts)[0] == plain
    full = checkpoints.prompts((39, 1, 4, 38))
    assert run(model, full, max_new_tokens=1, speculative=drafts)[0] == run(model, full, max_new_tokens=1)[0]


def test_rows_beyond_the_cache_are_not_written(directory, one_device):
    """A sequence that has ended runs on beyond the cache: what lies there stays what it was."""
    model = glm_jax.load(directory["glm4_moe"], mesh=one_device)
    speculator = Speculator(model, 3, ops=DENSE, steps_per_call=1)
    state = speculator.prefill(checkpoints.prompts((14,)), padded_length=16, cache_length=16)
    state = state._replace(positions=state.positions + 2)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(state.cache)]
    state, _, _ = speculator.decode(state, rounds=3)
    assert int(state.positions[0]) >= 19
    for old, new in zip(before, jax.tree.leaves(state.cache), strict=True):
        np.testing.assert_array_equal(new, old)


# --- all forms of the model and of the loop -------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_one_program_for_all_rounds_does_what_one_for_each_does(directory, one_device, stacked):
    model = glm_jax.load(directory["glm4_moe"], mesh=one_device, stacked=stacked)
    results = []
    for steps in (16, 1):
        speculator = Speculator(model, 2, ops=DENSE, steps_per_call=steps)
        state = speculator.prefill(UNEQUAL, padded_length=32, cache_length=64)
        state, chosen, accepted = speculator.decode(state, rounds=4)
        state, *more = speculator.decode(state, rounds=4)
        results.append((chosen, accepted, *more, *map(np.asarray, (state.tokens, state.positions, state.drafts))))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("steps", [2, 5, 16, 1000])
def test_steps_of_a_call(directory, one_device, steps, stacked):
    """As on an accelerator, where those of a call are one program: the same tokens, so many together."""
    model = glm_jax.load(directory["deepseek_v3"], mesh=one_device, stacked=stacked)
    plain, _ = run(model, UNEQUAL, max_new_tokens=NEW)
    sizes = []
    for drafts in (0, 2):
        batches = stream(
            model, UNEQUAL, Sampling(max_new_tokens=NEW, speculative=drafts), steps_per_call=steps, ops=DENSE
        )
        came = list(batches)
        assert [[token for batch in came for token in batch[row]] for row in range(len(UNEQUAL))] == plain
        sizes.append([max(map(len, batch)) for batch in came])
    whole = min(steps, NEW)
    assert sizes[0] == [1, *(min(whole, NEW - 1 - taken) for taken in range(0, NEW - 1, whole))]
    assert max(sizes[1][1:]) <= -(-whole // 3) * 3


def test_steps_of_a_call_that_are_not_possible(demo):
    for steps, message in ((0, "at least 1, not 0"), (-2, "at least 1, not -2"), (1.5, "1.5 is not an integer")):
        with pytest.raises(InputError, match=f"steps_per_call.*{message}"):
            stream(demo, PAIR, Sampling(max_new_tokens=2), steps_per_call=steps)


MESHES = {"2x2x2": (2, 2, 2), "1x1x8": (1, 1, 8), "1x4x2": (1, 4, 2), "8x1x1": (8, 1, 1)}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("glm4_moe", "2x2x2"),
        ("deepseek_v3", "2x2x2"),
        ("glm4_moe", "1x1x8"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("glm4_moe", "8x1x1"), ("glm4_moe_lite", "1x4x2"))),
    ],
)
def test_tokens_on_many_devices(directory, one_device, mesh_of_sizes, family, sizes):
    """Four prompts, which some of the meshes divide; in the loop, whose state must keep its layout."""
    plain, _ = run(glm_jax.load(directory[family], mesh=one_device), UNEQUAL[:4], max_new_tokens=12)
    model = glm_jax.load(directory[family], mesh=mesh_of_sizes(MESHES[sizes]), stacked=family != "glm4_moe")
    speculator = Speculator(model, 2, ops=DENSE, steps_per_call=16)
    state = speculator.prefill(UNEQUAL[:4], padded_length=32, cache_length=64)
    first = np.asarray(state.tokens)
    state, chosen, accepted = speculator.decode(state, rounds=6)
    for row, tokens in enumerate(plain):
        new = [first[row], *(t for c, a in zip(chosen[:, row], accepted[:, row], strict=True) for t in c[: a + 1])]
        assert len(new) > 6 and new[:12] == tokens[: len(new)]


def test_generation_on_many_devices(directory, one_device, mesh_of_sizes):
    """Round by round, of five prompts that the mesh does not divide."""
    models = (
        glm_jax.load(directory["glm4_moe"], mesh=mesh, stacked=True) for mesh in (one_device, mesh_of_sizes((1, 4, 2)))
    )
    plain, new = (run(m, UNEQUAL, max_new_tokens=NEW, speculative=k)[0] for m, k in zip(models, (0, 2), strict=True))
    assert new == plain


def test_few_steps_are_taken_beyond_the_last_token(directory, one_device, monkeypatch):
    """None where the number of tokens ends it; behind a stop token those that were on their way."""
    started = counted(monkeypatch, Runner, "steps")
    model = glm_jax.load(directory["glm4_moe"], mesh=one_device)
    (tokens,), _ = run(model, UNEQUAL[:1], max_new_tokens=NEW)
    assert sum(started) == NEW - 1
    last = next(i for i in range(3, NEW) if tokens[i] not in tokens[:i])  # a token that comes late the first time
    started.clear()
    assert run(model, UNEQUAL[:1], max_new_tokens=NEW, stop=(tokens[last],))[0] == [tokens[: last + 1]]
    assert last <= sum(started) < last + CPU.max_in_flight


@pytest.mark.parametrize("drafts", [1, 3])
def test_few_rounds_are_taken_beyond_the_last_token(demo, monkeypatch, drafts):
    """One a call on a CPU; behind a stop token those that were on their way."""
    started = counted(monkeypatch, Speculator, "rounds")
    (tokens,), _ = run(demo, PAIR[:1], max_new_tokens=NEW)
    last = next(i for i in range(6, NEW) if tokens[i] not in tokens[:i])  # a token that comes late the first time
    for stop, new in (((), tokens), ((tokens[last],), tokens[: last + 1])):
        started.clear()
        found, taken = run(demo, PAIR[:1], max_new_tokens=NEW, stop=stop, speculative=drafts)
        assert found == [new]
        assert set(started) == {1} and taken.rounds <= len(started) < taken.rounds + MAX_IN_FLIGHT


def counted(monkeypatch, kind: type[Runner] | type[Speculator], what: str) -> list[int]:
    """How many steps or rounds each call starts from now on."""
    started: list[int] = []

    def start(self: Any, *args: Any, **options: Any) -> Any:
        started.append(options[what])
        return original(self, *args, **options)

    original: Any = kind.start
    monkeypatch.setattr(kind, "start", start)
    return started


# --- the count of the drafts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "drafts"), [("glm4_moe", 1), ("glm4_moe", 3), ("deepseek_v3", 2)])
def test_acceptance_is_that_of_whole_passes(directory, one_device, family, drafts):
    model = glm_jax.load(directory[family], mesh=one_device, stacked=drafts == 2)
    drafted, accepted = np.zeros(drafts, int), np.zeros(drafts, int)
    new, acceptance = run(model, UNEQUAL, max_new_tokens=NEW, speculative=drafts)
    for prompt, tokens in zip(UNEQUAL, new, strict=True):
        for guessed, truth in checkpoints.rounds_of_whole_passes(model, prompt, tokens, drafts):
            drafted[: len(truth)] += 1
            right = np.array(guessed[: len(truth)]) == truth
            accepted[: len(truth)] += np.cumprod(right)
    assert acceptance == Acceptance(tuple(drafted), tuple(accepted))
    assert acceptance.rates == tuple(accepted / drafted)


def test_first_drafts_are_those_of_the_forward_pass(directory, one_device):
    """Row t of the MTP logits predicts token t + 2: the one draft of each round, read off the whole text."""
    model = glm_jax.load(directory["glm4_moe"], mesh=one_device)
    (prompt,) = checkpoints.prompts((6,))
    (new,), acceptance = run(model, [prompt], max_new_tokens=40, speculative=1)
    text = np.array([prompt + new])
    drafts = np.argmax(model(text, mtp=True, ops=DENSE).mtp_logits[0], axis=-1)
    newest, rounds, right = len(prompt), 0, 0
    while newest + 1 < text.shape[1]:
        hit = drafts[newest - 1] == text[0, newest + 1]
        newest, rounds, right = newest + 1 + hit, rounds + 1, right + hit
    assert acceptance == Acceptance((rounds,), (right,))
    assert 0 < right < rounds


def test_a_round_counts_no_draft_behind_the_end():
    assert Acceptance.of_round(3, 2, 3, ended=False) == Acceptance((1, 1, 1), (1, 1, 0))
    assert Acceptance.of_round(3, 3, 4, ended=False) == Acceptance((1, 1, 1), (1, 1, 1))
    assert Acceptance.of_round(3, 3, 4, ended=True) == Acceptance((1, 1, 1), (1, 1, 1))
    assert Acceptance.of_round(3, 3, 1, ended=True) == Acceptance((1, 0, 0), (1, 0, 0))
    assert Acceptance.of_round(3, 0, 1, ended=True) == Acceptance((1, 0, 0), (0, 0, 0))
    assert Acceptance.of_round(3, 1, 2, ended=True) == Acceptance((1, 1, 0), (1, 0, 0))
    total = Acceptance.none(2) + Acceptance((4, 3), (3, 1)) + Acceptance((1, 0), (0, 0))
    assert total.to_json() == {"drafted": [5, 3], "accepted": [3, 1], "rates": [0.6, 1 / 3]}
    assert (total.rounds, Acceptance.none(1).rates, Acceptance.none(0).rounds) == (5, (None,), 0)


def test_plain_decoding_has_no_drafts_to_count(demo):
    assert run(demo, PAIR, max_new_tokens=2)[1].to_json() == {"drafted": [], "accepted": [], "rates": []}


def test_no_prompts(demo):
    assert glm_jax.generate(demo, [], max_new_tokens=4, speculative=2) == []


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"speculative": -1}, "speculative must be an integer of at least 0, not -1"),
        ({"speculative": 33}, "speculative must be an integer of at most 32, not 33"),
        ({"speculative": 2**70}, "speculative must be an integer of at most"),
        ({"speculative": 1.0}, "speculative: 1.0 is not an integer"),
        ({"speculative": True}, "speculative: True is not an integer"),
        ({"speculative": None}, "speculative: None is not an integer"),
        ({"speculative": "2"}, "speculative: '2' is not an integer"),
        ({"speculative": 2, "temperature": 0.5}, "greedy: speculative 2 needs temperature 0, not 0.5"),
    ],
)
def test_impossible_settings(demo, settings, words):
    with pytest.raises(InputError, match=words):
        glm_jax.generate(demo, [[5]], max_new_tokens=4, **settings)


def test_numpy_integers_are_integers(demo):
    plain, _ = run(demo, PAIR, max_new_tokens=4)
    assert run(demo, PAIR, max_new_tokens=np.int64(4), speculative=np.int64(3))[0] == plain


def test_a_model_without_the_layer_cannot_draft(tmp_path, one_device):
    source = published.checkpoint(tmp_path / "hf", model_type="kimi_k2", num_hidden_layers=2)
    model = glm_jax.load(source, mesh=one_device)
    with pytest.raises(InputError, match=r"speculative 1 needs an MTP layer .* has none .*: use speculative 0"):
        glm_jax.generate(model, [[5]], max_new_tokens=4, speculative=1)
    assert len(glm_jax.generate(model, [[5]], max_new_tokens=4, speculative=0)[0]) == 4
