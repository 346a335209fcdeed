"""Every way to bring tokens to their experts gives what a loop over choices gives, in values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import InputError
from glm_jax.kernels import ops_for_platform, with_implementations
from glm_jax.layers import dispatch
from glm_jax.layers.dispatch import ALL_TO_ALL, DISPATCHES, GATHER, RAGGED, choose_dispatch, run_experts
from tests.operations import CPU, DENSE

EXPERTS, WIDTH, EMBED, CHOICES = 8, 12, 16, 3
ALL = ("data", "expert", "tensor")
# Mesh sizes, then the mesh axes of the batch, of the sequence, of the experts, of their width and of their storage.
LAYOUTS: dict[str, tuple[tuple[int, int, int], dict[str, tuple[str, ...]]]] = {
    "experts": ((1, 8, 1), {"batch": ("data", "expert"), "experts": ("expert",)}),
    "experts-and-width": ((1, 4, 2), {"batch": ("data", "expert"), "experts": ("expert",), "width": ("tensor",)}),
    "replicas": ((2, 2, 2), {"batch": ("data", "expert"), "experts": ("expert",), "width": ("tensor",)}),
    "everywhere": ((2, 2, 2), {"batch": ALL, "experts": ALL}),
    "other-order": ((2, 2, 2), {"batch": ALL, "experts": ("tensor", "data")}),
    "tokens-whole-on-one-axis": ((2, 2, 2), {"batch": ("data",), "experts": ("data", "expert"), "width": ("tensor",)}),
    "sequence": ((1, 4, 2), {"length": ("expert",), "experts": ("expert", "tensor")}),
    "fsdp": ((2, 2, 2), {"batch": ("data", "expert"), "experts": ("expert",), "stored": ("data",)}),
}


CASES = {
    GATHER: ("experts-and-width", "everywhere", "tokens-whole-on-one-axis", "sequence", "fsdp"),
    ALL_TO_ALL: tuple(LAYOUTS),
    RAGGED: ("experts", "other-order", "tokens-whole-on-one-axis", "sequence"),
}


def case(seed: int, *, crowded: bool = False, shape: tuple[int, int] = (8, 8)) -> tuple[np.ndarray, ...]:
    """Tokens with distinct choices; `crowded` sends all of them to the same experts, the worst there is."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*shape, EMBED)).astype(np.float32)
    order = np.arange(EXPERTS) if crowded else None
    ids = np.stack([order if crowded else rng.permutation(EXPERTS) for _ in range(x.size // EMBED)])
    weights = rng.uniform(0.1, 1, (*shape, CHOICES)).astype(np.float32)
    gate_up = rng.normal(size=(EXPERTS, 2, WIDTH, EMBED)).astype(np.float32) / 4
    down = rng.normal(size=(EXPERTS, EMBED, WIDTH)).astype(np.float32) / 4
    return x, ids[:, :CHOICES].reshape(*shape, CHOICES).astype(np.int32), weights, gate_up, down


def plain(x: Any, ids: Any, weights: Any, gate_up: Any, down: Any) -> Any:
    """The reference: each choice of each token by itself, on one device."""
    gate, up = (jnp.einsum("btkfd,btd->btkf", gate_up[ids, i], x) for i in (0, 1))
    return jnp.einsum("btkdf,btkf,btk->btd", down[ids], jax.nn.silu(gate) * up, weights)


def placed(mesh: Any, axes: dict[str, tuple[str, ...]], arrays: tuple[np.ndarray, ...]) -> list[jax.Array]:
    token = (axes.get("batch"), axes.get("length"))
    specs = [token, token, token]
    specs.append((axes.get("experts"), None, axes.get("width"), axes.get("stored")))
    specs.append((axes.get("experts"), axes.get("stored"), axes.get("width")))
    return [jax.device_put(a, NamedSharding(mesh, PartitionSpec(*s))) for a, s in zip(arrays, specs, strict=True)]


def emulated_ragged(
    operand: jax.Array, output: jax.Array, starts: Any, sizes: Any, to: Any, received: Any, *, axis_name: Any
) -> jax.Array:
    """What `lax.ragged_all_to_all` is documented to do, from whole copies: CPUs cannot run the operation itself."""
    del received
    me = lax.axis_index(axis_name)
    gather = functools.partial(lax.all_gather, axis_name=axis_name)
    rows, starts, sizes, to = gather(operand), gather(starts), gather(sizes), gather(to)
    slots = jnp.arange(output.shape[0])
    for source in range(rows.shape[0]):
        offset = slots - to[source, me]
        hit = (offset >= 0) & (offset < sizes[source, me])
        taken = rows[source].at[starts[source, me] + offset].get(mode="clip")
        output = jnp.where(hit.reshape(-1, *[1] * (output.ndim - 1)), taken, output)
    return output


@pytest.fixture(autouse=True)
def ragged_on_cpu(monkeypatch):
    monkeypatch.setattr(dispatch.lax, "ragged_all_to_all", emulated_ragged)


def runner(name: str) -> Callable[..., jax.Array]:
    def run(x, ids, weights, gate_up, down):
        return run_experts(x, ids, weights, gate_up=gate_up, down=down, ops=DENSE, dispatch=name)

    return run


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in DISPATCHES for layout in CASES[name]])
def test_values_and_gradients(mesh_of_sizes, name, layout):
    """The crowded case needs every round that there is."""
    sizes, axes = LAYOUTS[layout]
    mesh = mesh_of_sizes(sizes)

    def value(run, x, ids, weights, gate_up, down):
        out = run(x, ids, weights, gate_up, down)
        return jnp.sum(jnp.sin(out)), out

    with jax.set_mesh(mesh):
        ours = jax.jit(jax.grad(functools.partial(value, runner(name)), argnums=(0, 2, 3, 4), has_aux=True))
        for crowded in (False, True):
            arrays = case(1, crowded=crowded)
            on_mesh = placed(mesh, axes, arrays)
            gradients, out = ours(*on_mesh)
            for one, two in zip((out, *gradients), [on_mesh[i] for i in (0, 0, 2, 3, 4)], strict=True):
                assert one.sharding.is_equivalent_to(two.sharding, two.ndim)
            expected, reference = jax.grad(functools.partial(value, plain), argnums=(0, 2, 3, 4), has_aux=True)(*arrays)
            np.testing.assert_allclose(out, reference, atol=2e-5)
            for one, two in zip(gradients, expected, strict=True):
                np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("implementation", ["block_gmm", "ragged", "expert_loop"])
@pytest.mark.parametrize("name", [GATHER, ALL_TO_ALL])
def test_sorted_implementations_have_gradients_on_a_mesh(mesh_of_sizes, name, implementation):
    arrays, (sizes, axes) = case(2), LAYOUTS["replicas"]
    mesh = mesh_of_sizes(sizes)

    def value(x, ids, weights, gate_up, down):
        ops = with_implementations(CPU, experts=implementation)
        return jnp.sum(jnp.sin(run_experts(x, ids, weights, gate_up=gate_up, down=down, ops=ops, dispatch=name)))

    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(value, argnums=(0, 2, 3, 4)))(*placed(mesh, axes, arrays))
    expected = jax.grad(lambda *a: jnp.sum(jnp.sin(plain(*a))), argnums=(0, 2, 3, 4))(*arrays)
    for one, two in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_ragged_exchange_lowers_where_it_exists(monkeypatch, mesh_of_sizes, platform):
    monkeypatch.undo()
    mesh, arrays = mesh_of_sizes((1, 4, 2)), case(0)
    with jax.set_mesh(mesh):
        on_mesh = placed(mesh, LAYOUTS["experts-and-width"][1], arrays)
        step = jax.jit(jax.grad(lambda *a: jnp.sum(runner(RAGGED)(*a)), argnums=(0, 2, 3, 4)))
        text = step.trace(*on_mesh).lower(lowering_platforms=(platform,)).as_text()
    assert "ragged_all_to_all" in text


def test_the_choice():
    assert choose_dispatch(RAGGED, 64, 16) == choose_dispatch(ALL_TO_ALL, 10**6, 1) == GATHER
    assert choose_dispatch(RAGGED, 10**5, 16) == RAGGED
    assert {name: ops_for_platform(name).exchange for name in ("cpu", "gpu", "tpu")} == {
        "cpu": ALL_TO_ALL,
        "gpu": RAGGED,
        "tpu": RAGGED,
    }


def test_an_unknown_way_is_refused():
    x, ids, weights, gate_up, down = map(jnp.asarray, case(0))
    with pytest.raises(InputError, match="'ring' is not known; right would be one of gather, all_to_all"):
        run_experts(x, ids, weights, gate_up=gate_up, down=down, ops=DENSE, dispatch="ring")
