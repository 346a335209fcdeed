"""Tokens in, tokens out, for one batch of prompts: the plain way to generate, without a scheduler."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence

import jax

from glm_jax.errors import InputError
from glm_jax.inference.acceptance import Acceptance
from glm_jax.inference.config import Sampling, check_prompts, check_speculative, check_steps_per_call
from glm_jax.inference.runner import Runner
from glm_jax.inference.sampling import Sampler
from glm_jax.inference.speculative import Speculator
from glm_jax.kernels import Ops, check_ops
from glm_jax.model import Transformer
from glm_jax.sharding.host_arrays import to_host

MIN_BUCKET = 16


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    speculative: int = 0,
) -> list[list[int]]:
    """Return the new tokens of each prompt.

    With `speculative` the tokens are those without, faster: each is the main model's own choice. It chooses them in
    passes over several tokens instead of one, which round differently, so that the likeliest of two tokens may change
    where their logits are equal but for rounding. In float32 that takes logits that agree to about six digits; in
    bfloat16, to about two, it may happen in a long text. It is then as good a choice, made by the same model.

    Args:
        model: a model on a mesh.
        prompts: token ids, of any lengths; they run as one batch.
        max_new_tokens: at most this many new tokens each.
        temperature: 0 is greedy.
        top_k: among the k likeliest tokens only; 0 for all.
        top_p: among the likeliest tokens that together reach this probability only; 1 for all.
        seed: of the random choices; the same seed and prompts give the same tokens.
        stop: token ids that end a sequence; the one that did is its last new token.
        speculative: tokens to draft with the MTP layer for each pass of the model; greedy only. `stream` also counts
            how many of them were right.

    Raises:
        InputError: a prompt or a setting is not possible.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,  # type: ignore[arg-type]  # which makes a tuple of it, and refuses what is no list
        speculative=speculative,
    )
    results: list[list[int]] = []
    for new in stream(model, prompts, sampling):
        results = results or [[] for _ in new]
        for result, tokens in zip(results, new, strict=True):
            result.extend(tokens)
    return results


class Stream(Iterator[list[list[int]]]):
    """The new tokens of a batch as they come: each time one list a prompt, empty once the prompt's sequence has ended.

    Attributes:
        acceptance: the drafts of the tokens that came so far; without speculation it has no places.
    """

    def __init__(self, batches: Iterator[tuple[list[list[int]], Acceptance]], drafts: int) -> None:
        self.acceptance = Acceptance.none(drafts)
        self._batches = batches

    def __repr__(self) -> str:
        return f"Stream({self.acceptance!r})"

    def __next__(self) -> list[list[int]]:
        new, acceptance = next(self._batches)
        self.acceptance += acceptance
        return new


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    steps_per_call: int | None = None,
    ops: Ops | None = None,
) -> Stream:
    """The new tokens of each prompt as they come, the first after the prefill, then after every few steps.

    Args:
        model: a model on a mesh.
        prompts: token ids, of any lengths; they run as one batch.
        sampling: how tokens are chosen, and when a sequence ends.
        steps_per_call: decode steps that are one program, whose tokens come together; with speculation as many rounds
            as may give that many. By default one on a CPU and 16 elsewhere. On a CPU more make small models faster, and
            large ones slower.
        ops: the operations to use; by default the model's own.

    Raises:
        InputError: a prompt or a setting is not possible; at once, not at the first token.
    """
    if not isinstance(model, Transformer):
        raise InputError(f"model is {type(model).__name__}, not a model; right would be glm_jax.load(DIRECTORY)")
    check_ops(ops)
    checked = check_prompts(prompts, model.config, sampling.max_new_tokens)
    check_speculative(sampling, model.config)
    steps = check_steps_per_call(steps_per_call, sampling.max_new_tokens)
    if not checked:
        return Stream(iter(()), sampling.speculative)
    if sampling.speculative:
        speculator = Speculator(model, sampling.speculative, ops=ops, steps_per_call=steps)
        return Stream(_speculate(speculator, checked, sampling), sampling.speculative)
    return Stream(_decode(Runner(model, ops=ops, steps_per_call=steps), checked, sampling), 0)


def bucket(length: int, limit: int) -> int:
    """The padded length: the next power of two, at least 16, at most `limit` (the model's positions)."""
    return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), limit)


def _decode(
    runner: Runner, prompts: list[list[int]], sampling: Sampling
) -> Iterator[tuple[list[list[int]], Acceptance]]:
    """Prefill, then calls of decode steps."""
    sampler, nothing = Sampler.create(sampling), Acceptance.none(0)
    sequences = [_Sequence(sampling) for _ in prompts]
    state = runner.prefill(prompts, sampler, **_lengths(runner.model, prompts, sampling))
    yield [s.take([token]) for s, token in zip(sequences, to_host(state.tokens), strict=True)], nothing
    in_flight: collections.deque[list[jax.Array]] = collections.deque()
    while left := max(sequence.left for sequence in sequences):
        while len(in_flight) < runner.max_in_flight and len(in_flight) * runner.steps_per_call < left:
            state, started = runner.start(state, sampler, steps=runner.steps_per_call)
            in_flight.append(started)
        tokens = runner.fetch(in_flight.popleft())
        yield [sequence.take(tokens[:, row]) for row, sequence in enumerate(sequences)], nothing


def _speculate(
    speculator: Speculator, prompts: list[list[int]], sampling: Sampling
) -> Iterator[tuple[list[list[int]], Acceptance]]:
    """Prefill, then calls of rounds."""
    drafts, rounds = speculator.drafts, speculator.rounds_per_call
    sequences = [_Sequence(sampling) for _ in prompts]
    state = speculator.prefill(prompts, **_lengths(speculator.model, prompts, sampling))
    first = to_host(state.tokens)
    yield [s.take([token]) for s, token in zip(sequences, first, strict=True)], Acceptance.none(drafts)
    in_flight: collections.deque[list[jax.Array]] = collections.deque()
    while left := max(sequence.left for sequence in sequences):
        # Those on their way count for all that they can give: most do.
        while len(in_flight) < speculator.max_in_flight and len(in_flight) * rounds * (drafts + 1) < left:
            state, started = speculator.start(state, rounds=rounds)
            in_flight.append(started)
        chosen, accepted = speculator.fetch(in_flight.popleft())
        new: list[list[int]] = [[] for _ in sequences]
        acceptance = Acceptance.none(drafts)
        for row, sequence in enumerate(sequences):
            for tokens, count in zip(chosen[:, row], accepted[:, row], strict=True):
                if sequence.left:
                    taken = sequence.take(tokens[: count + 1])
                    new[row] += taken
                    acceptance += Acceptance.of_round(drafts, int(count), len(taken), ended=not sequence.left)
        yield new, acceptance


class _Sequence:
    """How many tokens one sequence may still take: none after a stop token."""

    def __init__(self, sampling: Sampling) -> None:
        self.left, self._stop = sampling.max_new_tokens, sampling.stop

    def take(self, tokens: Iterable[int]) -> list[int]:
        """Those of the tokens that belong to the sequence."""
        taken: list[int] = []
        for token in tokens:
            if not self.left:
                break
            taken.append(int(token))
            self.left = 0 if token in self._stop else self.left - 1
        return taken


def _lengths(model: Transformer, prompts: list[list[int]], sampling: Sampling) -> dict[str, int]:
    """The padded length of the prompts, and the length of the cache."""
    limit, longest = model.config.max_positions, max(map(len, prompts))
    return {"padded_length": bucket(longest, limit), "cache_length": bucket(longest + sampling.max_new_tokens, limit)}
