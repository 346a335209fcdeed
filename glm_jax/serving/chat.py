"""Text in, text out: a conversation becomes tokens, the new tokens become thoughts, answer and tool calls.

Everything that turns text into tokens and back comes from the checkpoint: its tokenizer, its chat template, its stop
tokens. A call that was cut off or is malformed is never reported as a tool call. One answer at a time; batches are the
engine's business.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from glm_jax.checkpoint import load
from glm_jax.checkpoint.orbax_source import ASSETS, is_orbax
from glm_jax.errors import CheckpointError, TextError
from glm_jax.inference import Sampling
from glm_jax.model import Transformer
from glm_jax.serving.generation import Generation, Usage
from glm_jax.text import (
    BrokenCall,
    ChatTemplate,
    ContentDelta,
    Event,
    GenerationDefaults,
    ReasoningDelta,
    StreamDecoder,
    StreamParser,
    Tokenizer,
    ToolCall,
    load_tokenizer,
)

MAX_NEW_TOKENS = 4096  # where the caller names no number; the cache is made for it

Messages = str | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of an answer.

    Attributes:
        finish_reason: `stop`, `length` (cut off by the number of tokens), or `tool_calls` (stopped after at least one
            complete call).
        usage: what the answer took.
    """

    finish_reason: str
    usage: Usage


ChatEvent = Event | Finished


@dataclasses.dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        reasoning: the thoughts, "" without any.
        content: the answer; a tool call that was cut off or is malformed stands here as text.
        tool_calls: the complete calls, in order.
        finish_reason: see `Finished`.
        usage: what the answer took.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the assistant's message, to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message

    def to_json(self) -> dict[str, Any]:
        """The answer as JSON values."""
        return {
            "reasoning": self.reasoning,
            "content": self.content,
            "tool_calls": [dataclasses.asdict(call) for call in self.tool_calls],
            "finish_reason": self.finish_reason,
            "usage": self.usage.to_json(),
        }


class Chat:
    """A model that one talks to.

    Args:
        checkpoint: an Orbax or a Hugging Face directory; or a model, with `tokenizer`, `template` and `defaults`.
        mesh: where the weights go; over all devices by default.
        dtype: of the weights; by default float32 on CPU and bfloat16 elsewhere.
        tokenizer: instead of the checkpoint's.
        template: instead of the checkpoint's.
        defaults: stop tokens and sampling settings, instead of the checkpoint's.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        template: its chat template.
        defaults: its stop tokens and recommended sampling.

    Raises:
        TextError: tokenizer, template or stop tokens are missing or unreadable, or are not the model's.
        CheckpointError, ConfigError, ShardingError: as `glm_jax.load`.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | Transformer,
        *,
        mesh: Mesh | None = None,
        dtype: Any = None,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        # What is quick to read comes first, so that what is missing shows before the weights are loaded.
        if isinstance(checkpoint, Transformer):
            if tokenizer is None or template is None or defaults is None:
                raise TextError("a model alone has no text side: pass tokenizer, template and defaults with it")
        else:
            directory = text_directory(checkpoint)
            tokenizer = load_tokenizer(directory) if tokenizer is None else tokenizer
            template = ChatTemplate.load(directory) if template is None else template
            defaults = GenerationDefaults.load(directory) if defaults is None else defaults
        if not defaults.stop_ids:
            raise TextError(f"{_shown(checkpoint)}: names no stop tokens (eos_token_id in generation_config.json)")
        if not isinstance(checkpoint, Transformer):
            checkpoint = load(Path(checkpoint), mesh=mesh, dtype=dtype)
        if tokenizer.vocab_size > checkpoint.config.vocab_size:
            raise TextError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model {checkpoint.config.vocab_size}: "
                "they do not belong together"
            )
        self.model, self.tokenizer, self.template, self.defaults = checkpoint, tokenizer, template, defaults

    def stream(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = True,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[ChatEvent]:
        """Yield the events of the answer as they come, `Finished` the last.

        Args:
            messages: the conversation in OpenAI's form, or one user message as text.
            tools: declared tools; without any, nothing is read as a call.
            thinking: False asks for the answer without thoughts; None leaves it to the template.
            max_new_tokens: by default 4096, or what the model's positions leave.
            temperature: 0 is greedy; by default what the checkpoint recommends, or else greedy.
            top_k: likewise, or else no limit.
            top_p: likewise, or else 1.
            seed: of the random choices.

        Raises:
            TextError: messages or tools of the wrong form, or refused by the template. At once, like all errors here.
            InputError: a setting out of range, or a conversation longer than the model's positions.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.template.render(messages, tools=tools, enable_thinking=thinking)
        prompt = self.tokenizer.encode(text)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(MAX_NEW_TOKENS, self.model.config.max_positions - len(prompt)))
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=_first(temperature, self.defaults.temperature, 0.0),
            top_k=_first(top_k, self.defaults.top_k, 0),
            top_p=_first(top_p, self.defaults.top_p, 1.0),
            seed=seed,
            stop=self.defaults.stop_ids,
        )
        # With thinking off the prompt ends after </think>, so that the answer begins at once. Other templates open the
        # thoughts themselves. Only the prompt's end counts: a user may write these tags too.
        parser = StreamParser(text.rstrip().endswith("<think>"), bool(tools), tools=tools)
        return self._events(self._generate(prompt, sampling), parser)

    def _generate(self, prompt: list[int], sampling: Sampling) -> Generation:
        """The one place where the model is asked."""
        return Generation(self.model, prompt, sampling)

    def _events(self, generation: Generation, parser: StreamParser) -> Iterator[ChatEvent]:
        decoder = StreamDecoder(self.tokenizer, skip_special=True)
        calls = 0
        for text in self._texts(generation, decoder):
            for event in parser.push(text):
                calls += isinstance(event, ToolCall)
                yield event
        yield from parser.finish()
        reason = "length" if not generation.stopped else "tool_calls" if calls else "stop"
        yield Finished(reason, generation.usage)

    def _texts(self, generation: Generation, decoder: StreamDecoder) -> Iterator[str]:
        """The text of each few new tokens, without the token that stops it."""
        for tokens in generation:
            written = tokens[:-1] if generation.stopped else tokens
            yield "".join(decoder.push(token) for token in written)
        yield decoder.flush()

    def __call__(self, messages: Messages, **settings: Any) -> Reply:
        """Return the whole answer; messages, settings and errors are those of `stream`."""
        return collect(self.stream(messages, **settings))


def collect(events: Iterator[ChatEvent]) -> Reply:
    """The events of one answer as a whole."""
    reasoning, content, calls = [], [], []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text) | BrokenCall(text):
                content.append(text)
            case ToolCall():
                calls.append(event)
            case Finished(reason, usage):
                return Reply("".join(reasoning), "".join(content), tuple(calls), reason, usage)
    raise ValueError("the events end without Finished")


def text_directory(checkpoint: str | os.PathLike[str]) -> Path:
    """The directory with a checkpoint's tokenizer, template and generation settings.

    Raises:
        CheckpointError: there is no such checkpoint directory.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; a checkpoint is an Orbax or a Hugging Face directory")
    return path / ASSETS if is_orbax(path) else path


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _shown(checkpoint: Any) -> str:
    return "the model" if isinstance(checkpoint, Transformer) else os.fspath(checkpoint)
