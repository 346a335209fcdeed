"""What is to run, said completely: nothing about devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from glm_jax.checkpoint.stored_formats import StoredFormats
from glm_jax.configs import ModelConfig
from glm_jax.errors import InputError
from glm_jax.sharding import Rules

DECODE, PREFILL, TRAIN = "decode", "prefill", "train"
KINDS = (DECODE, PREFILL, TRAIN)
MAX_BATCH = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStorage:
    """How weights are kept.

    Attributes:
        dtype: of the arithmetic, and of what is not quantised.
        narrow: of experts and projections, if they are quantised.
        group: inputs that share a float32 scale; None for all inputs of an output.
    """

    dtype: Any
    narrow: Any = None
    group: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheStorage:
    """How the cache is kept: `scaled` with a float32 scale for each vector of a head."""

    dtype: Any
    scaled: bool = False


WEIGHTS = {
    "bfloat16": WeightStorage(dtype=jnp.bfloat16),
    "float16": WeightStorage(dtype=jnp.float16),
    "float32": WeightStorage(dtype=jnp.float32),
    "fp8": WeightStorage(dtype=jnp.bfloat16, narrow=jnp.float8_e4m3fn),
    "int8": WeightStorage(dtype=jnp.bfloat16, narrow=jnp.int8),
    "int4": WeightStorage(dtype=jnp.bfloat16, narrow=jnp.int4, group=128),
}
CACHES = {
    "bfloat16": CacheStorage(dtype=jnp.bfloat16),
    "float16": CacheStorage(dtype=jnp.float16),
    "float32": CacheStorage(dtype=jnp.float32),
    "fp8": CacheStorage(dtype=jnp.float8_e4m3fn),
    "int8": CacheStorage(dtype=jnp.int8, scaled=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A model and what it is to do.

    Attributes:
        config: the architecture.
        kind: `decode` is one step of one token a sequence, `prefill` one pass over the prompts, `train` one step.
        batch: sequences, over all devices.
        length: tokens of each: of the prompt, of the training row, or that the cache has room for.
        weights: a name of `WEIGHTS`. In less than 16 bits experts and projections are kept; router, norms, biases,
            embedding and head stay bfloat16, in which the arithmetic is.
        stored: the formats of a checkpoint that is loaded as it is stored: what of it loading keeps quantised is so,
            and the rest, with the arithmetic, as `weights` says.
        cache: a name of `CACHES`, by default the dtype of the arithmetic.
        rules: where the logical axes go.

    Raises:
        InputError: it cannot be done on any devices.
    """

    config: ModelConfig
    kind: str
    batch: int
    length: int
    weights: str = "bfloat16"
    stored: StoredFormats | None = None
    cache: str | None = None
    rules: Rules = dataclasses.field(default_factory=Rules)

    def __post_init__(self) -> None:
        _among("job", self.kind, KINDS)
        _among("weights", self.weights, tuple(WEIGHTS))
        if self.cache is not None:
            _among("cache_dtype", self.cache, tuple(CACHES))
        if not 1 <= self.batch <= MAX_BATCH:
            raise InputError(f"--batch must be at least 1 and at most {MAX_BATCH}, not {self.batch}")
        if self.length < 1:
            raise InputError(f"--length must be at least 1, not {self.length}")
        if self.length > self.config.max_positions:
            raise InputError(f"--length {self.length} exceeds the model's {self.config.max_positions} positions")
        if self.stored is not None and self.storage.narrow is not None:
            raise InputError(f"--weights {self.weights} says what the checkpoint's own formats say; one is enough")
        if self.kind == TRAIN and self.quantized:
            raise InputError(f"--weights {self.format} cannot be trained; right would be bfloat16 or float32")
        if self.kind == TRAIN and self.cache is not None:
            raise InputError("--cache_dtype says nothing about training, which keeps no cache")

    @property
    def quantized(self) -> bool:
        """Whether experts and projections, or some of them, are kept in less than 16 bits."""
        return self.storage.narrow is not None or (self.stored is not None and self.stored.kind is not None)

    @property
    def format(self) -> str:
        """In one word how experts and projections are kept: `bfloat16`, `fp8`, ..."""
        return self.weights if self.stored is None else self.stored.kind or self.weights

    @property
    def storage(self) -> WeightStorage:
        """How the weights are kept."""
        return WEIGHTS[self.weights]

    @property
    def dtype(self) -> Any:
        """The dtype of the arithmetic, and of the weights that are not quantised."""
        return jnp.dtype(self.storage.dtype)

    @property
    def cache_storage(self) -> CacheStorage:
        """How the cache is kept."""
        return CACHES[self.cache or self.dtype.name]

    @property
    def queries(self) -> int:
        """Tokens of a sequence that one step computes."""
        return 1 if self.kind == DECODE else self.length


def _among(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"--{name} {value!r} is not known; right would be one of {', '.join(known)}")
