"""One prompt's new tokens as they come, counted and timed: what every interface reports about an answer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from glm_jax.inference import Acceptance, Sampling, stream
from glm_jax.model import Transformer


@dataclasses.dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: new tokens, the one that stopped it included.
        prefill_seconds: from the prompt to the first new token, compilation included if there was any.
        decode_seconds: for the other new tokens; time that the caller spent between them does not count.
        acceptance: what became of the drafts; None without speculation.
    """

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    acceptance: Acceptance | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and new tokens together."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens by the time to the first new token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens after the first by the time for them; None if there was only one."""
        after_first = self.completion_tokens - 1
        return after_first / self.decode_seconds if after_first > 0 and self.decode_seconds > 0 else None

    def to_json(self) -> dict[str, Any]:
        """The counts and rates as JSON values."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            **({} if self.acceptance is None else {"acceptance": self.acceptance.to_json()}),
        }


class Generation:
    """The generation of one prompt: iterate over it once for the new tokens, some at a time.

    Attributes:
        tokens: the new tokens so far.

    Raises:
        InputError: the prompt is not possible; raised at once, not at the first token.
    """

    def __init__(self, model: Transformer, prompt: Sequence[int], sampling: Sampling) -> None:
        self.tokens: list[int] = []
        self._prompt_tokens = len(prompt)
        self._stop, self._speculative = frozenset(sampling.stop), sampling.speculative
        self._prefill_seconds = self._decode_seconds = 0.0
        self._batches = stream(model, [prompt], sampling)

    def __repr__(self) -> str:
        return f"Generation({self._prompt_tokens} prompt tokens, {len(self.tokens)} new)"

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            started = time.perf_counter()
            batch = next(self._batches, None)
            waited = time.perf_counter() - started
            if self.tokens:
                self._decode_seconds += waited
            else:
                self._prefill_seconds += waited
            if batch is None:
                return
            self.tokens += batch[0]
            yield batch[0]

    @property
    def stopped(self) -> bool:
        """Whether a stop token ended it, rather than the number of tokens."""
        return bool(self.tokens) and self.tokens[-1] in self._stop

    @property
    def usage(self) -> Usage:
        """What it has taken so far."""
        acceptance = self._batches.acceptance if self._speculative else None
        seconds = (self._prefill_seconds, self._decode_seconds)
        return Usage(self._prompt_tokens, len(self.tokens), *seconds, acceptance)
