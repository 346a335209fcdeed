"""What a caller asks of a generation, checked where it is built."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable

from glm_jax.configs import ModelConfig
from glm_jax.errors import InputError

MAX_INTEGER = 2**63 - 1
MAX_DRAFTS = 32  # far beyond what pays: each is one more pass of the MTP layer in the compiled round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: at most this many new tokens a prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: choose among the k likeliest tokens only; 0 for all.
        top_p: choose among the likeliest tokens that together reach this probability; 1 for all. Applied after top_k.
        seed: of the random choices. A prompt's choices depend on it, the prompt's place in the list and the position.
        stop: token ids that end a sequence; the one that did is the last new token.
        speculative: tokens to draft with the MTP layer for each pass of the model, 0 to 32; greedy only. It changes how
            fast the tokens come, not which.

    Raises:
        InputError: a value is out of its range, or two do not go together; the message names them.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    speculative: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0), ("speculative", 0)):
            object.__setattr__(self, name, _bounded(getattr(self, name), name, low))
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise InputError(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.speculative > MAX_DRAFTS:
            raise InputError(f"speculative must be an integer of at most {MAX_DRAFTS}, not {self.speculative}")
        if self.speculative and not self.greedy:
            raise InputError(
                f"speculative decoding is greedy: speculative {self.speculative} needs temperature 0, "
                f"not {self.temperature}"
            )
        object.__setattr__(self, "stop", _stop_ids(self.stop))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


def check_prompts(prompts: object, config: ModelConfig, max_new_tokens: int) -> list[list[int]]:
    """Return the prompts as lists of ints.

    Raises:
        InputError: they are no list, or a prompt is empty, holds what is no token of the vocabulary, or leaves no room
            for the new tokens.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts are {type(prompts).__name__}, not a list of lists of token ids, as [[5, 6, 7]]")
    checked = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str | bytes) or not hasattr(prompt, "__iter__"):
            raise InputError(f"prompt {number} is {type(prompt).__name__}, not a list of token ids")
        tokens = [_integer(token, f"prompt {number}") for token in prompt]
        if not tokens:
            raise InputError(f"prompt {number} is empty; a prompt has at least one token")
        wrong = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise InputError(f"prompt {number}: token {wrong} is outside the vocabulary 0..{config.vocab_size - 1}")
        if len(tokens) + max_new_tokens > config.max_positions:
            raise InputError(
                f"prompt {number}: {len(tokens)} tokens and {max_new_tokens} new ones exceed the model's "
                f"{config.max_positions} positions"
            )
        checked.append(tokens)
    return checked


def check_speculative(sampling: Sampling, config: ModelConfig) -> None:
    """Check that a model can draft.

    Raises:
        InputError: drafts are asked of a model without an MTP layer.
    """
    if sampling.speculative and not config.num_mtp_layers:
        raise InputError(
            f"speculative {sampling.speculative} needs an MTP layer to draft with; this model has none "
            "(num_mtp_layers is 0): use speculative 0"
        )


def check_steps_per_call(steps: int | None, max_new_tokens: int) -> int | None:
    """Return the steps of a call, no more than there are new tokens; None as it is.

    Raises:
        InputError: they are no positive integer.
    """
    return None if steps is None else min(_bounded(steps, "steps_per_call", 1), max_new_tokens)


def _stop_ids(stop: object) -> tuple[int, ...]:
    if isinstance(stop, str | bytes) or not isinstance(stop, Iterable):
        raise InputError(
            f"stop: {stop!r} is no list of token ids; right would be a list of them, such as stop=[5], or () for none"
        )
    return tuple(_integer(token, "stop") for token in stop)


def _bounded(value: object, name: str, low: int) -> int:
    number = _integer(value, name)
    if number < low:
        raise InputError(f"{name} must be an integer of at least {low}, not {number}")
    if number > MAX_INTEGER:
        raise InputError(f"{name} must be an integer of at most {MAX_INTEGER}, not {number}")
    return number


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool):
        raise InputError(f"{name}: {value!r} is not an integer")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name}: {value!r} is not an integer") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
