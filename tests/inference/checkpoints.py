"""Random checkpoints whose MTP layer is often right, as a trained one is: rounds that accept none, some and all drafts.

The layers add little to the embedding of the newest token, and the MTP layer passes on the embedding that it gets, so
that both mostly say what follows the newest token; what the layers add decides the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import glm_jax
from glm_jax import Transformer
from tests import published
from tests.conventions.tree import ROOT
from tests.operations import DENSE

FAMILIES = ("glm4_moe", "deepseek_v3", "glm4_moe_lite")
DEMO = ROOT / "examples" / "demo_model"
SHAPE = {"num_hidden_layers": 2, "vocab_size": 32, "num_key_value_heads": 8}
SHARE = 0.2  # of the layers' outputs
LONGEST = 64  # tokens of a text whose drafts are made by whole passes


def write(directory: Path, *, seed: int = 2, **changes: Any) -> Path:
    """Write such a checkpoint; `changes` are keys of config.json."""
    config = published.config_json(**{**SHAPE, "dtype": "float32", **changes})
    arrays = published.tensors(config, seed=seed, copies=())
    for name, array in arrays.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            array *= SHARE
        elif name.endswith("eh_proj.weight"):
            array *= SHARE
            array[:, : len(array)] += np.eye(len(array), dtype=np.float32)
        elif name.endswith("shared_head.norm.weight"):
            array[:] = arrays["model.norm.weight"]
    return published.write(directory, config, arrays)


def prompts(lengths: tuple[int, ...], *, vocab: int = SHAPE["vocab_size"]) -> list[list[int]]:
    """Random prompts of these lengths."""
    return [np.random.default_rng(length).integers(0, vocab, length).tolist() for length in lengths]


def rounds_of_whole_passes(
    model: Transformer, prompt: list[int], new: list[int], drafts: int
) -> Iterator[tuple[list[int], list[int]]]:
    """What speculation has to do to write `new` after the prompt, without any cache.

    Yields for each round the drafts and the tokens that follow in truth, fewer at the end. Every draft comes from a
    pass of the MTP layer over the whole sequence: the main model's hidden states as far as it has seen the tokens, then
    the layer's own outputs.
    """
    tokens = np.array([prompt + new])
    padded = np.pad(tokens, ((0, 0), (0, LONGEST - tokens.shape[1])))  # so that all texts share one program
    hidden = np.asarray(model(padded, ops=DENSE).hidden)[:, : tokens.shape[1]]
    newest = len(prompt)  # the place of the newest token; the first comes from the prompt alone
    while newest < len(prompt) + len(new) - 1:
        known, states, guessed = tokens[:, : newest + 1].copy(), hidden.copy(), list[int]()
        for distance in range(drafts):
            out, likeliest = _mtp(model, known, states)
            guessed.append(int(likeliest[0, newest - 1 + distance]))
            known = np.append(known, [[guessed[-1]]], axis=1)
            states = np.concatenate([states[:, : newest + distance], out[:, newest + distance - 1 :][:, :1]], axis=1)
        truth = (prompt + new)[newest + 1 : newest + 1 + drafts]
        yield guessed, truth
        right = [guess == true for guess, true in zip(guessed, truth, strict=False)]
        newest += 1 + (right.index(False) if False in right else len(right))


def _mtp(model: Transformer, known: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The MTP layer's outputs, and the tokens that they make likeliest, for known tokens and the states before them."""
    rows = known.shape[1] - 1
    following, before = np.zeros((1, LONGEST), np.int32), np.zeros((1, LONGEST, states.shape[2]), states.dtype)
    following[:, :rows], before[:, :rows] = known[:, 1:], states[:, :rows]
    with jax.set_mesh(model.mesh):
        out, likeliest = _mtp_jit(model, following, before)
    return np.asarray(out), np.asarray(likeliest)


@jax.jit
def _mtp_jit(model: Transformer, following: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    positions = np.arange(following.shape[1], dtype=np.int32)[None]
    context = model.context(jax.numpy.asarray(positions), prefill=True, ops=DENSE)
    out, _, _ = model.mtp(model.embedding(following), before, context, None)
    return out, jax.numpy.argmax(model.logits(out), axis=-1)


def load_demo(mesh: Any) -> Transformer:
    """The bundled model in float32: trained, and nearly always right about its second token."""
    return glm_jax.load(DEMO, mesh=mesh, dtype="float32")
