"""The operations of one device, each with named implementations: the only place where a platform is asked for.

`ops_for(mesh)` chooses once for a model, which carries the choice through every pass. The interface, by operation:

    matmul(x [R, I], w [O, I], *, dtype) -> [R, O]           of one device's part, if the implementation is local
    matmul(x [..., *I], w [*O, *I], *, contracting_dims=1, dtype, out_sharding) -> [..., *O]   of whole arrays, if not
    attend(q [B, T, N, H], k [B, K, S, H], v [B, K, S, I], *, query_positions [B, T], scale, prefill) -> [B, T, N, I]
    experts(x_TD, ids_TK, weights_TK, *, gate_up_E2FD, down_EDF) -> y_TD                       of one device's part
    top_k(scores [..., E], *, k) -> int32 [..., k]
    argmax(scores [..., V]) -> int32 [...]
    storage: a `Storage`

`reference.py` specifies each. A local implementation runs in a `shard_map`, on the parts that a device has: of the
tokens and the heads in `attend`, of the tokens in `top_k` and `argmax`. One that is not takes whole arrays, whose
layouts jax derives. A weight that is not a single array (`QuantizedArray`, `PackedBfloat16`) is always multiplied
locally, and dequantised first unless the implementation takes any storage. An implementation of one's own takes the
place of a name:

    def my_matmul(x, w, *, dtype=None):
        return my_kernel(x, w).astype(dtype or x.dtype)

    ops = ops_for(mesh, matmul=Operation("mine", my_matmul, local=True))
    model(tokens, ops=ops)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from glm_jax.errors import InputError
from glm_jax.kernels import cpu, gpu, reference, storage, tpu
from glm_jax.kernels.attention import blockwise_attend
from glm_jax.kernels.expert_loop import expert_loop
from glm_jax.kernels.grouped import block_gmm_experts
from glm_jax.kernels.storage import Storage
from glm_jax.sharding import PackedBfloat16, QuantizedArray, all_gather_dim, platform, shard_local

MAX_DENSE_TOKENS = 512  # of a TPU's decode step, for which grouped products would copy the experts out of the stack


@dataclasses.dataclass(frozen=True)
class Operation:
    """A named implementation of one operation.

    Attributes:
        name: what reports call it.
        function: the implementation, with the operation's interface.
        local: it takes one device's own part of its operands, in a `shard_map`.
        any_storage: it takes weights as they are held. Otherwise it gets arrays, dequantised to the dtype of its first
            operand.
    """

    name: str
    function: Callable[..., Any] = dataclasses.field(repr=False)
    local: bool = False
    any_storage: bool = False

    def __call__(self, *operands: Any, **options: Any) -> Any:
        """The function itself, with weights as it takes them."""
        if not self.any_storage:
            dtype = operands[0].dtype
            operands = tuple(_dequantized(each, dtype) for each in operands)
            options = {name: _dequantized(each, dtype) for name, each in options.items()}
        return self.function(*operands, **options)

    def is_local_for(self, weight: Any) -> bool:
        """Whether a product with this weight is one of each device's own part."""
        return self.local or not isinstance(weight, jax.Array)

    def by_row(self, x: jax.Array, **options: Any) -> jax.Array:
        """The operation over the last dimension of x [..., n], of which a local one gets all: [...] or [..., m]."""
        if not self.local:
            return self(x, **options)
        layout = [(x, dimension) for dimension in range(x.ndim - 1)]
        return shard_local(lambda part: self(part, **options), all_gather_dim(x, x.ndim - 1), layout=layout)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a pass asks of the routed experts.

    Attributes:
        tokens: of the whole pass, on all devices.
        choices: experts for each token.
        experts: of the layer.
        held: of these, on each device.
    """

    tokens: int
    choices: int
    experts: int
    held: int


@dataclasses.dataclass(frozen=True)
class ByLoad:
    """Implementations of the routed experts, chosen when a pass is traced."""

    name: str
    choose: Callable[[Load], Operation] = dataclasses.field(repr=False)


Implementation = Operation | ByLoad | Storage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ops:
    """Which implementation of which operation a model runs, and what else its platform decides.

    Attributes:
        platform: of the mesh: `cpu`, `gpu` or `tpu`.
        matmul: products with weights.
        attend: attention.
        experts: the routed experts, one implementation or a choice by load.
        top_k: the router's choice.
        argmax: the token of the highest logit.
        storage: how weights are held.
        stacked_layers: the layers of a group are stacked for decoding, under a scan; else unrolled.
        exchange: how many tokens get to their experts, a name of `layers.dispatch.DISPATCHES`.
        steps_per_call: decode steps that are one program.
        max_in_flight: calls on their way while the results of the first are read.
        dispatch: a name of `layers.dispatch.DISPATCHES`, whatever the tokens; None leaves it to the model's rules.
    """

    platform: str
    matmul: Operation
    attend: Operation
    experts: Operation | ByLoad
    top_k: Operation
    argmax: Operation
    storage: Storage
    stacked_layers: bool
    exchange: str
    steps_per_call: int
    max_in_flight: int
    dispatch: str | None = None

    def experts_for(self, load: Load) -> Operation:
        """The implementation of the routed experts for a pass."""
        return self.experts.choose(load) if isinstance(self.experts, ByLoad) else self.experts

    def to_json(self) -> dict[str, str]:
        """The names of what was chosen, by operation."""
        names = {name: getattr(self, name).name for name in IMPLEMENTATIONS}
        layers = "stacked" if self.stacked_layers else "unrolled"
        return {**names, "layers": layers, "exchange": self.exchange}


def gpu_experts(load: Load) -> Operation:
    """A decode batch of fewer choices than a device holds experts reads those that it chose, a larger one all of them.

    Neither copies any. Many more rows go by blocks.
    """
    rows = load.tokens * load.choices
    if rows < load.held:
        return _EXPERTS["gemv"]
    return _EXPERTS["dense" if rows <= 8 * load.experts else "block_gmm"]


def tpu_experts(load: Load) -> Operation:
    """Decode steps and short prompts run all experts, longer prompts grouped products."""
    few = load.tokens * load.choices <= 4 * load.experts or load.tokens <= MAX_DENSE_TOKENS
    return _EXPERTS["dense" if few else "ragged"]


_EXPERTS = {
    name: Operation(name, function, local=True, any_storage=True)
    for name, function in {
        "dense": reference.dense_experts,
        "block_gmm": block_gmm_experts,
        "gemv": gpu.gemv_experts,
        "ragged": tpu.ragged_experts,
        "expert_loop": expert_loop,
    }.items()
}
IMPLEMENTATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "matmul": {
        "reference": Operation("reference", reference.matmul, any_storage=True),
        "flat": Operation("flat", gpu.flat_matmul, any_storage=True),
        "cpu": Operation("cpu", cpu.matmul, local=True, any_storage=True),
    },
    "attend": {
        "reference": Operation("reference", reference.attend),
        "blockwise": Operation("blockwise", blockwise_attend),
    },
    "experts": {
        **_EXPERTS,
        "gpu": ByLoad("gemv, dense or block_gmm by load", gpu_experts),
        "tpu": ByLoad("dense or ragged by load", tpu_experts),
    },
    "top_k": {
        "reference": Operation("reference", reference.top_k),
        "cpu": Operation("cpu", cpu.top_k, local=True),
    },
    "argmax": {"reference": Operation("reference", reference.argmax)},
    "storage": {each.name: each for each in (storage.ARRAY, storage.PACKED, storage.LANES)},
}
# What may stand for an operation: for all others an `Operation`.
_KINDS: Mapping[str, tuple[type, ...]] = {"experts": (Operation, ByLoad), "storage": (Storage,)}
_SHARED: dict[str, Any] = {"attend": "blockwise", "argmax": "reference"}
_REFERENCE = {name: "reference" for name in ("matmul", "attend", "top_k", "argmax")}
_ACCELERATOR = {
    **_SHARED,
    "top_k": "reference",
    "exchange": "ragged_all_to_all",
    "steps_per_call": 16,
    "max_in_flight": 1,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # In a loop XLA's CPU backend runs a step in parts: single steps are faster, with some on their way at once.
    "cpu": {
        **_SHARED,
        "matmul": "cpu",
        "top_k": "cpu",
        "experts": "expert_loop",
        "storage": "packed_bfloat16",
        "stacked_layers": False,
        "exchange": "all_to_all",
        "steps_per_call": 1,
        "max_in_flight": 4,
    },
    "gpu": {**_ACCELERATOR, "matmul": "flat", "experts": "gpu", "storage": "array", "stacked_layers": False},
    "tpu": {**_ACCELERATOR, "matmul": "reference", "experts": "tpu", "storage": "lanes", "stacked_layers": True},
    # Of an abstract model that lies on no mesh yet.
    "reference": {**_ACCELERATOR, **_REFERENCE, "experts": "dense", "storage": "array", "stacked_layers": True},
}


def ops_for(mesh: Mesh, **chosen: str | Implementation) -> Ops:
    """Return what a mesh's platform runs best.

    Args:
        mesh: of devices, or abstract.
        chosen: another implementation of an operation, by its name or as one of the caller's own.

    Raises:
        InputError: an operation or a name does not exist; the message lists those that do.
    """
    return with_implementations(ops_for_platform(platform(mesh)), **chosen)


def ops_for_platform(name: str) -> Ops:
    """As `ops_for`, of a platform: `cpu`, `gpu`, `tpu`, or `reference` for that of every operation."""
    if name not in _DEFAULTS:
        raise InputError(f"no operations are known for platform {name!r}; known: {', '.join(_DEFAULTS)}")
    defaults = _DEFAULTS[name]
    named = {operation: IMPLEMENTATIONS[operation][defaults[operation]] for operation in IMPLEMENTATIONS}
    return Ops(platform=name, **{**defaults, **named})


def with_implementations(ops: Ops, **chosen: str | Implementation) -> Ops:
    """Return `ops` with other implementations of some operations.

    Raises:
        InputError: an operation or a name does not exist, or a value is no implementation of this operation; the
            message lists what would be right.
    """
    found: dict[str, Any] = {}
    for operation, value in chosen.items():
        if operation not in IMPLEMENTATIONS:
            raise InputError(f"no operation is called {operation!r}; there are {', '.join(IMPLEMENTATIONS)}")
        known, kinds = IMPLEMENTATIONS[operation], _KINDS.get(operation, (Operation,))
        if isinstance(value, str) and value not in known:
            raise InputError(f"{operation} has no implementation {value!r}; there are {', '.join(known)}")
        if not isinstance(value, (str, *kinds)):
            own = "Storage(...)" if operation == "storage" else "Operation('mine', function)"
            raise InputError(
                f"{operation} is {value!r:.100}, no implementation; right would be {own}, or one of {', '.join(known)}"
            )
        found[operation] = known[value] if isinstance(value, str) else value
    return dataclasses.replace(ops, **found)


def check_ops(ops: Ops | None) -> None:
    """Raise InputError unless the `ops` that a caller passes in are such, or None, which leaves them to the model."""
    if not isinstance(ops, Ops | None):
        raise InputError(f"ops is {ops!r:.100}; right would be what glm_jax.kernels.ops_for(mesh) returns")


def _dequantized(operand: Any, dtype: Any) -> Any:
    """A weight as an array, whatever its storage; any other operand as it is."""
    return operand.dequantize(dtype) if isinstance(operand, QuantizedArray | PackedBfloat16) else operand
