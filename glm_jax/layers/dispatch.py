"""Tokens to the devices that hold their experts, and the results back: one `shard_map`, three ways.

    gather             every device of a group that shares the experts gathers the tokens of the whole group and runs
                       its own experts on them; a reduce-scatter sums the partial results and returns them to the
                       tokens' devices. The fewest exchanges: for decode, and wherever tokens are replicated.
    all_to_all         each choice of a token is a row that goes to the device of its expert, in buffers of equal size,
                       and its result comes back: for prompts and training, where gathered tokens would be too many.
    ragged_all_to_all  the same without padding on the wire, where the backend can: TPU and GPU.

Both exchanges are exact: a buffer holds a quarter more rows than even routing sends, and rows that do not fit go in a
further round. Rounds that no device needs are skipped. No token is dropped.

The arrays' own layouts tell which mesh axes split experts, expert width and tokens. Tokens that are replicated along an
axis that splits experts stay where they are: each device runs the experts it has, and an all-reduce sums the results.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.errors import InputError
from glm_jax.kernels import Load, Ops
from glm_jax.kernels.grouped import sort_order
from glm_jax.sharding import WeightArray, axes_of, local_size
from glm_jax.sharding.activation import gather_weight
from glm_jax.sharding.rules import spec_of

GATHER, ALL_TO_ALL, RAGGED = "gather", "all_to_all", "ragged_all_to_all"
DISPATCHES = (GATHER, ALL_TO_ALL, RAGGED)
MIN_ROWS = 1024  # rows (tokens times choices) of a device from which they are exchanged rather than gathered
SLACK = 1.25  # of a buffer over what even routing sends
ROW_MULTIPLE = 8  # buffers are whole tiles of so many rows

Routed = tuple[jax.Array, ...]  # tokens, the experts that they chose, and the weights of these
MeshAxes = tuple[str, ...]
Run = Callable[[jax.Array, jax.Array], jax.Array]  # of rows and the expert of each
Experts = Callable[..., jax.Array]  # of tokens, ids and weights
Round = Callable[..., jax.Array]


def choose_dispatch(exchange: str, rows: int, peers: int) -> str:
    """The dispatch of `rows` choices of a device's tokens among `peers` devices; `exchange` is the platform's."""
    return GATHER if peers == 1 or rows < MIN_ROWS else exchange


def run_experts(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    *,
    gate_up: WeightArray,
    down: WeightArray,
    ops: Ops,
    dispatch: str | None = None,
) -> jax.Array:
    """Routed experts on x [B, T, D], with ids and weights [B, T, K], gate_up [E, 2, F, D] and down [E, D, F].

    `ops` has the implementation of the experts. `dispatch` is one of `DISPATCHES`; None leaves it to `choose_dispatch`.

    Raises:
        InputError: there is no such dispatch.
    """
    if dispatch not in (None, *DISPATCHES):
        raise InputError(f"dispatch {dispatch!r} is not known; right would be one of {', '.join(DISPATCHES)}")
    load = Load(x.shape[0] * x.shape[1], ids.shape[2], gate_up.shape[0], local_size(gate_up, 0))
    experts = ops.experts_for(load)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _alone(x, ids, weights, (gate_up, down), experts=experts)
    out_layout = spec_of(axes_of(x, 0), axes_of(x, 1), None)
    if mesh.size == 1:  # XLA's CPU backend would run each exchange of one device with itself
        alone = functools.partial(_alone, experts=experts)
        return jax.shard_map(alone, out_specs=out_layout, check_vma=False)(x, ids, weights, (gate_up, down))
    sizes = dict(mesh.shape)
    tokens = (*axes_of(x, 0), *axes_of(x, 1))
    layout = _Layout(
        experts=axes_of(gate_up, 0),
        width=axes_of(gate_up, 2),
        shared=tuple(axis for axis in axes_of(gate_up, 0) if axis in tokens),
        tokens=tokens,
        fsdp=(axes_of(gate_up, 3), axes_of(down, 1)),
        sizes=tuple(sizes.items()),
    )
    if dispatch is None:
        rows = ids.size // math.prod(sizes[axis] for axis in tokens)
        dispatch = choose_dispatch(ops.exchange, rows, layout.peers)
    if not layout.shared:
        dispatch = GATHER

    def region(x, ids, weights, gate_up, down):
        gate_up = gather_weight(gate_up, layout.fsdp[0], dimension=3)
        down = gather_weight(down, layout.fsdp[1], dimension=1)
        local = functools.partial(experts, gate_up_E2FD=gate_up, down_EDF=down)
        # Typed here as differing where the weights do, so that its gradient is summed over these axes as the tokens it
        # belongs to, not as the rows that are sent.
        x = _varying(x, gate_up, down)
        routed = tuple(a.reshape(-1, a.shape[-1]) for a in (x, ids, weights))
        if dispatch == GATHER:
            out = _gathered(routed, layout, experts=local, held=gate_up.shape[0])
        else:
            send = _ragged_round if dispatch == RAGGED else _padded_round
            out = _exchanged(routed, layout, experts=local, weights=(gate_up, down), send=send)
        return _once(out, [axis for axis in (*layout.fsdp[0], *layout.fsdp[1]) if axis not in tokens]).reshape(x.shape)

    return jax.shard_map(region, out_specs=out_layout)(x, ids, weights, gate_up, down)


def _alone(
    x: jax.Array, ids: jax.Array, weights: jax.Array, matrices: tuple[WeightArray, WeightArray], *, experts: Experts
) -> jax.Array:
    """All experts on x, ids and weights [B, T, ...], without a mesh or on one of a single device."""
    routed = (a.reshape(-1, a.shape[-1]) for a in (x, ids, weights))
    return experts(*routed, gate_up_E2FD=matrices[0], down_EDF=matrices[1]).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The mesh axes of one layer: of its experts, of their width, of the tokens, and those of both experts and tokens.

    `shared` stands in the order in which the experts are split: a peer's index along it is row-major. `fsdp` are
    those along which gate and up, and down, are only stored split: they are gathered for the products.
    """

    experts: MeshAxes
    width: MeshAxes
    shared: MeshAxes
    tokens: MeshAxes
    fsdp: tuple[MeshAxes, MeshAxes]
    sizes: tuple[tuple[str, int], ...]

    def devices(self, axes: MeshAxes) -> int:
        """Devices of a group over axes."""
        return math.prod(dict(self.sizes)[axis] for axis in axes)

    @property
    def peers(self) -> int:
        """Devices among which tokens are exchanged."""
        return self.devices(self.shared)

    @property
    def summed(self) -> MeshAxes:
        """The axes along which devices have partial results of the same tokens."""
        return tuple(axis for axis in (*self.experts, *self.width) if axis not in self.shared)


def _gathered(routed: Routed, layout: _Layout, *, experts: Experts, held: int) -> jax.Array:
    """This device's tokens [T, D] with all experts applied: gather, run, sum back."""
    x, ids, weights = routed
    if layout.shared:
        x, ids, weights = (lax.all_gather(a, layout.shared, axis=0, tiled=True) for a in (x, ids, weights))
    if layout.experts:
        ids = ids - lax.axis_index(layout.experts) * held
    partial = experts(x, ids, weights)
    if layout.summed:
        partial = lax.psum(partial, layout.summed)
    return lax.psum_scatter(partial, layout.shared, scatter_dimension=0, tiled=True) if layout.shared else partial


def _exchanged(
    routed: Routed, layout: _Layout, *, experts: Experts, weights: tuple[WeightArray, WeightArray], send: Round
) -> jax.Array:
    """The same by exchanging rows with the peers that hold their experts, in as many rounds as the routing needs."""
    x, ids, weight_of_choice = routed
    (tokens, choices), peers, held = ids.shape, layout.peers, weights[0].shape[0]
    peer, local_id = _owners(ids, layout, held)
    plan = _Plan.of(peer.reshape(-1), peers)
    most = tokens * min(choices, held)  # a token chooses no expert twice
    even = SLACK * tokens * choices / layout.devices(layout.experts)
    capacity = min(most, ROW_MULTIPLE * math.ceil(even / ROW_MULTIPLE))
    varying = tuple(dict.fromkeys((*layout.tokens, *layout.experts, *layout.width, *itertools.chain(*layout.fsdp))))

    def one_round(number: jax.Array | int, total: jax.Array) -> jax.Array:
        first = number * capacity
        run = functools.partial(_run_rows, experts=experts)
        back = send((x, local_id.reshape(-1)), plan, _Window(first, capacity, choices, layout.shared), run)
        # Each choice picks its result up from its slot: a sum in fixed order, unlike a scatter-add.
        slot = jnp.where(peer < peers, peer * capacity + plan.rank.reshape(peer.shape) - first, 0)
        here = (peer < peers) & (plan.rank.reshape(peer.shape) // capacity == number)
        picked = back.at[jnp.where(here, slot, 0)].get(mode="clip").astype(jnp.float32)
        picked = jnp.where(here[..., None], picked, 0.0)
        return total + jnp.einsum("tkd,tk->td", picked, weight_of_choice, precision=lax.Precision.HIGHEST)

    total = _varying(jnp.zeros(x.shape, jnp.float32), x, ids, weights)
    rounds = -(-most // capacity)
    if rounds == 1:
        total = one_round(0, total)
    else:
        most_sent = lax.pmax(_varying(jnp.max(plan.counts), ids, weights), varying)

        @jax.checkpoint
        def body(total, number):
            needed = number * capacity < most_sent
            return lax.cond(needed, lambda t: one_round(number, t), lambda t: t, total), None

        total, _ = lax.scan(body, total, jnp.arange(rounds))
    total = total.astype(x.dtype)
    return lax.psum(total, layout.summed) if layout.summed else total


def _run_rows(x_RD: jax.Array, ids_R: jax.Array, *, experts: Experts) -> jax.Array:
    """Rows by the one expert each is for; an id below 0 marks an empty slot."""
    return experts(x_RD, ids_R[:, None], jnp.where(ids_R >= 0, 1.0, 0.0)[:, None])


def _owners(ids: jax.Array, layout: _Layout, held: int) -> tuple[jax.Array, jax.Array]:
    """The peer that holds each expert (`peers` for one that another device with the same tokens runs), and its id."""
    owner, peer, stride = ids // held, jnp.zeros_like(ids), 1
    mine = jnp.ones(ids.shape, bool)
    for axis in reversed(layout.experts):
        size = dict(layout.sizes)[axis]
        if axis in layout.shared:
            peer, stride = peer + owner % size * stride, stride * size
        else:
            mine &= owner % size == lax.axis_index(axis)
        owner = owner // size
    return jnp.where(mine, peer, layout.peers), ids % held


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Rows sorted by the peer they go to.

    Attributes:
        order: the rows [R] by peer, stable.
        counts: rows for each peer [P].
        starts: where each peer's rows begin in `order` [P].
        rank: of each row among those of its peer [R].
    """

    order: jax.Array
    counts: jax.Array
    starts: jax.Array
    rank: jax.Array

    @classmethod
    def of(cls, peer: jax.Array, peers: int) -> _Plan:
        """The plan of rows that go to `peer` [R]; one that is `peers` goes nowhere."""
        order = sort_order(peer)
        counts = jnp.sum(peer[:, None] == jnp.arange(peers), axis=0, dtype=jnp.int32)
        starts = jnp.cumsum(counts) - counts
        place = sort_order(order)  # of each row in the order
        return cls(order, counts, starts, place - jnp.append(starts, 0).at[peer].get(mode="clip"))


@dataclasses.dataclass(frozen=True)
class _Window:
    """The rows of one round: `capacity` of each peer from rank `first` on; `choices` rows are one token's."""

    first: jax.Array | int
    capacity: int
    choices: int
    axes: MeshAxes

    def sent(self, plan: _Plan) -> jax.Array:
        """How many rows go to each peer."""
        return jnp.clip(plan.counts - self.first, 0, self.capacity)


def _padded_round(tokens: Routed, plan: _Plan, window: _Window, run: Run) -> jax.Array:
    """Send one window of rows in buffers of equal size, run them, and get the results [P * capacity, D] back.

    `tokens` are x [T, D] and the expert of each row [R].
    """
    x, ids = tokens
    place = plan.starts[:, None] + window.first + jnp.arange(window.capacity)
    used = (jnp.arange(window.capacity) < window.sent(plan)[:, None]).reshape(-1)
    row = plan.order.at[place.reshape(-1)].get(mode="clip")
    out = jnp.where(used[:, None], x.at[row // window.choices].get(mode="clip"), 0)
    swap = functools.partial(lax.all_to_all, axis_name=window.axes, split_axis=0, concat_axis=0, tiled=True)
    return swap(run(swap(out), swap(jnp.where(used, ids.at[row].get(mode="clip"), -1))))


def _ragged_round(tokens: Routed, plan: _Plan, window: _Window, run: Run) -> jax.Array:
    """As `_padded_round`, sending only the rows in use. The buffer has `capacity` rows for each peer."""
    x, ids = tokens
    capacity, peers = window.capacity, plan.counts.shape[0]
    sizes = window.sent(plan)
    swap = functools.partial(lax.all_to_all, axis_name=window.axes, split_axis=0, concat_axis=0, tiled=True)
    received = swap(sizes)
    first = jnp.minimum(plan.starts + window.first, plan.order.shape[0])
    mine = jnp.full((peers,), lax.axis_index(window.axes) * capacity, jnp.int32)
    slots = jnp.arange(peers, dtype=jnp.int32) * capacity
    rows = x.at[plan.order // window.choices].get(mode="clip")

    def there(array: jax.Array, empty: int) -> jax.Array:
        buffer = jnp.full_like(array, empty, shape=(peers * capacity, *array.shape[1:]))
        return lax.ragged_all_to_all(array, buffer, first, sizes, mine, received, axis_name=window.axes)

    # The barrier rounds the results before they are sent: the exchange transposes what it sends, and a compiler would
    # fuse that with the experts' sum and transpose, and so write, float32.
    got = lax.optimization_barrier(run(there(rows, 0), there(ids.at[plan.order].get(mode="clip"), -1)))
    empty = jnp.zeros_like(got)
    return lax.ragged_all_to_all(got, empty, slots, received, mine, sizes, axis_name=window.axes)


def _varying(array: jax.Array, *like: Any) -> jax.Array:
    """The array typed as differing along all mesh axes along which any of `like` does."""
    for other in jax.tree.leaves(like):
        array = array + jnp.zeros_like(other[(0,) * other.ndim], dtype=array.dtype)
    return array


def _once(array: jax.Array, axes: list[str]) -> jax.Array:
    """An array that is the same along `axes`, though its type does not know it, typed as such."""
    for axis in dict.fromkeys(axes):
        array = lax.psum(jnp.where(lax.axis_index(axis) == 0, array, 0), axis)
    return array
