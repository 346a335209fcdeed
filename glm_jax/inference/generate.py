"""Tokens in, tokens out, for one batch of prompts: the plain way to generate, without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from glm_jax.inference.config import Sampling, check_prompts
from glm_jax.inference.sampling import Sampler
from glm_jax.inference.steps import DecodeState, decode, prefill
from glm_jax.layers.step import Kernels
from glm_jax.model import Transformer, create_cache
from glm_jax.sharding import batch_sharding

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
    return _stream(model, checked, sampling, steps_per_call, kernels or Kernels()) if checked else iter(())


def _stream(
    model: Transformer, prompts: list[list[int]], sampling: Sampling, steps_per_call: int, kernels: Kernels
) -> Iterator[list[list[int]]]:
    mesh = model.mesh
    sampler = Sampler.create(sampling)
    state = start(model, prompts, sampling.max_new_tokens, sampler, kernels=kernels)
    first = np.asarray(state.tokens)
    running = [True] * len(prompts)
    yield _accept(first[None], running, sampling.stop)
    left = sampling.max_new_tokens - 1
    while left and any(running):
        # A whole call even where fewer steps are left: another number of steps would be another compilation.
        with jax.set_mesh(mesh):
            state, tokens = decode(model, state, sampler, steps=steps_per_call, kernels=kernels)
        yield _accept(np.asarray(tokens)[:left], running, sampling.stop)
        left -= min(left, steps_per_call)


def start(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, *, kernels: Kernels
) -> DecodeState:
    """Prefill checked prompts into a cache with room for the new tokens."""
    mesh, positions = model.mesh, model.config.max_positions
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), bucket(int(lengths.max()), positions)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    room = bucket(int(lengths.max()) + max_new_tokens, positions)
    placed = batch_sharding(len(prompts), mesh)
    with jax.set_mesh(mesh):
        cache = create_cache(model, len(prompts), room)
        tokens, lengths = jax.device_put((padded, lengths), placed)
        return prefill(model, tokens, lengths, cache, sampler, kernels=kernels)


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
