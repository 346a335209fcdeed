"""A small random model on a device against the same weights in float32 on the CPU, both in this process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glm_jax
from benchmarks import _common as common
from glm_jax.kernels import ops_for
from glm_jax.sharding import map_weights, with_shardings

LARGEST = 1e-3  # of the logits' standard deviation, in float32
MEDIAN = {"float32": 1e-4, "bfloat16": 0.03}
NEW_TOKENS = 16


def config() -> glm_jax.configs.ModelConfig:
    """A small model with every part: QK-norm, biases, dense and MoE layers, MTP; activations stay at order 1."""
    tiny = glm_jax.configs.get("tiny-glm")
    rope = dataclasses.replace(tiny.attention.rope, rotary_dim=32)
    attention = dataclasses.replace(tiny.attention, head_dim=64, rope=rope)
    moe = dataclasses.replace(tiny.moe, num_experts=16, num_experts_per_token=4, expert_width=128)
    changes = {"embed_dim": 256, "mlp_width": 512, "num_layers": 3, "initializer_range": 256**-0.5}
    return dataclasses.replace(tiny, attention=attention, moe=moe, **changes)


def measure(run: common.Run, device: Any, implementations: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    """Logits of each implementation on the device, and greedy tokens, against the float32 CPU result."""
    cpu = jax.devices("cpu")[0]
    mesh, reference_mesh = (glm_jax.make_mesh(devices=[place]) for place in (device, cpu))
    tokens = np.random.default_rng(0).integers(0, config().vocab_size, (3, 48)).astype(np.int32)
    with jax.default_device(cpu):
        start = common.random_model(config(), reference_mesh, jnp.bfloat16, seed=1)
        exact = on_mesh(start, reference_mesh, np.float32)
        expected = exact(tokens, mtp=True, ops=common.ops_with(exact, "dense"))
        continued = continuations(exact, tokens[:, :8])
    for dtype in ("float32", "bfloat16"):
        model = on_mesh(start, mesh, jnp.dtype(dtype))
        for name in implementations:
            row = {"dtype": dtype, "experts": name or "default"}
            yield run.attempt(row, functools.partial(logits, model, tokens, expected, name=name))
        yield run.attempt({"dtype": dtype}, functools.partial(greedy, model, continued))


def within_limits(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether rows were measured and all of them agree."""
    return bool(rows) and all(row.get("within_limits", False) for row in rows)


def on_mesh(model: Any, mesh: Any, dtype: Any) -> Any:
    """The model's weights on another mesh, in another dtype but for those whose dtype is pinned."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    shardings: dict[str, Any] = {}
    map_weights(
        lambda name, weight: shardings.setdefault(name, weight.get_raw_value().sharding), with_shardings(abstract, mesh)
    )

    def move(name: str, weight: Any) -> jax.Array:
        value = np.asarray(weight[...])
        return jax.device_put(value if weight.pinned else value.astype(dtype), shardings[name])

    moved = map_weights(move, model)
    moved.ops = ops_for(mesh)
    return moved


def continuations(model: Any, prompts: np.ndarray) -> np.ndarray:
    """Prompts with the likeliest tokens after them, by whole passes: no cache, no sampling, one padded shape."""
    tokens = np.pad(prompts, ((0, 0), (0, NEW_TOKENS)))
    for at in range(prompts.shape[1], tokens.shape[1]):
        tokens[:, at] = np.asarray(model(tokens, ops=common.ops_with(model, "dense")).logits)[:, at - 1].argmax(-1)
    return tokens


def greedy(model: Any, continued: np.ndarray) -> dict[str, Any]:
    """How many greedy tokens of `generate` are those of the reference; in float32 all must be."""
    prompts = continued[:, :-NEW_TOKENS].tolist()
    generated = np.array(glm_jax.generate(model, prompts, max_new_tokens=NEW_TOKENS))
    same = float(np.mean(generated == continued[:, -NEW_TOKENS:]))
    return {"greedy_tokens_equal": same, "within_limits": same == 1.0 or model.dtype != jnp.float32}


def logits(model: Any, tokens: np.ndarray, expected: Any, *, name: str | None) -> dict[str, Any]:
    """Differences of the logits in standard deviations of the expected ones.

    In bfloat16 a near tie in a router may fall the other way, and that token then differs: there the median counts.
    """
    out = model(tokens, mtp=True, ops=common.ops_with(model, name))
    row: dict[str, Any] = {}
    for part in ("logits", "mtp_logits"):
        exact = np.asarray(getattr(expected, part))
        difference = np.abs(np.asarray(getattr(out, part)) - exact) / exact.std()
        row |= {f"{part}_largest": float(difference.max()), f"{part}_median": float(np.median(difference))}
    equal = np.asarray(out.logits).argmax(-1) == np.asarray(expected.logits).argmax(-1)
    dtype = jnp.dtype(model.dtype).name
    medians = max(row["logits_median"], row["mtp_logits_median"]) <= MEDIAN[dtype]
    largest = max(row["logits_largest"], row["mtp_logits_largest"]) <= LARGEST
    return row | {"argmax_equal": float(equal.mean()), "within_limits": medians and (largest or dtype != "float32")}
