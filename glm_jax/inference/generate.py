"""Tokens in, tokens out, for one batch of prompts: the plain way to generate, without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from glm_jax.inference.config import Sampling, check_prompts
from glm_jax.inference.runner import Runner
from glm_jax.inference.sampling import Sampler
from glm_jax.layers.step import Kernels
from glm_jax.model import Transformer

MIN_BUCKET = 16
STEPS_PER_CALL = 16


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
) -> list[list[int]]:
    """Return the new tokens of each prompt.

    Args:
        model: a model on a mesh.
        prompts: token ids, of any lengths; they run as one batch.
        max_new_tokens: at most this many new tokens each.
        temperature: 0 is greedy.
        top_k: among the k likeliest tokens only; 0 for all.
        top_p: among the likeliest tokens that together reach this probability only; 1 for all.
        seed: of the random choices; the same seed and prompts give the same tokens.
        stop: token ids that end a sequence; the one that did is its last new token.

    Raises:
        InputError: a prompt or a setting is not possible.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop)
    )
    results: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, sampling):
        for result, tokens in zip(results, new, strict=True):
            result.extend(tokens)
    return results


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    steps_per_call: int = STEPS_PER_CALL,
    kernels: Kernels | None = None,
) -> Iterator[list[list[int]]]:
    """Yield the new tokens of each prompt as they come, the first after the prefill, then after every few steps.

    Raises:
        InputError: a prompt or a setting is not possible.
    """
    checked = check_prompts(prompts, model.config, sampling.max_new_tokens)
    if not checked:
        return iter(())
    return _stream(Runner(model, kernels=kernels), checked, sampling, steps_per_call)


def _stream(
    runner: Runner, prompts: list[list[int]], sampling: Sampling, steps_per_call: int
) -> Iterator[list[list[int]]]:
    sampler = Sampler.create(sampling)
    limit, longest = runner.model.config.max_positions, max(map(len, prompts))
    room = bucket(longest + sampling.max_new_tokens, limit)
    state = runner.prefill(prompts, sampler, padded_length=bucket(longest, limit), room=room)
    running = [True] * len(prompts)
    yield _accept(np.asarray(state.tokens)[None], running, sampling.stop)
    left = sampling.max_new_tokens - 1
    while left and any(running):
        # A whole call even where fewer steps are left: another number of steps would be another compilation.
        state, tokens = runner.decode(state, sampler, steps=steps_per_call)
        yield _accept(tokens[:left], running, sampling.stop)
        left -= min(left, steps_per_call)


def bucket(length: int, limit: int) -> int:
    """The padded length: the next power of two, at least 16, at most `limit` (the model's positions)."""
    return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), limit)


def _accept(tokens: np.ndarray, running: list[bool], stop: tuple[int, ...]) -> list[list[int]]:
    """The tokens [steps, B] of the sequences that still run, up to their stop; marks those that stopped."""
    accepted: list[list[int]] = [[] for _ in running]
    for row, new in enumerate(accepted):
        for token in tokens[:, row] if running[row] else ():
            new.append(int(token))
            if token in stop:
                running[row] = False
                break
    return accepted
