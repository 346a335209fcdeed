"""Placements with names: what to split over which mesh axis, for a purpose.

A preset is a `Rules` like any other; `dataclasses.replace` makes a variant of one. None names a size: the mesh has
those, and an axis of size 1 splits nothing.

    serve_latency     Small batches. Every matrix is split over every device, so that a step reads the fewest bytes and
                      no device holds a copy: heads and widths over `tensor`, experts over `data x expert`, all else
                      besides along the model's width (`fsdp`). A decode step moves tokens between devices, never a
                      weight, and the experts see gathered tokens; a prompt gathers matrices, and exchanges rows.
    serve_throughput  Large batches, and latent attention, whose cache has no heads to split. Attention is data
                      parallel: the batch and its cache are split over every device, attention and shared experts are
                      whole on each, the routed experts are split over `expert x tensor`. Tokens go to their experts
                      and back, and nothing else is sent.
    train             Weights, gradients and optimizer split over every device: experts over `expert`, heads and widths
                      over `tensor`, and all matrices besides over `data x expert` (`fsdp`), gathered where they are
                      used, their gradients summed and split again. Tokens go to their experts (all-to-all).
    long_context      Few long sequences. Their tokens, in the cache, too, are split over `expert`: keys and values of
                      a prompt are gathered for each layer, and in a decode step each device attends to the tokens
                      that it has, and the results are combined. Heads, widths and experts as by default.
"""

from __future__ import annotations

from glm_jax.errors import ShardingError
from glm_jax.sharding.mesh import DATA, EXPERT, TENSOR
from glm_jax.sharding.rules import Rules

PRESETS = {
    "default": Rules(),
    "serve_latency": Rules(expert=(DATA, EXPERT), fsdp=(DATA, EXPERT)),
    "serve_throughput": Rules(
        batch=(DATA, EXPERT, TENSOR), heads=(), kv_heads=(), expert=(EXPERT, TENSOR), mlp=(), vocab=()
    ),
    "train": Rules(fsdp=(DATA, EXPERT)),
    "long_context": Rules(batch=(DATA,), length=(EXPERT,)),
}


def name_of(rules: Rules) -> str | None:
    """The name of the preset that rules are equal to, or None."""
    return next((name for name, preset in PRESETS.items() if preset == rules), None)


def rules_named(name: str) -> Rules:
    """The preset of that name, in any case.

    Raises:
        ShardingError: there is none; the message lists them.
    """
    if name.lower() not in PRESETS:
        raise ShardingError(f"no rules are called {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name.lower()]
