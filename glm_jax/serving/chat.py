"""Text in, text out: a conversation becomes tokens, the new tokens become thoughts, answer and tool calls.

Everything that turns text into tokens and back comes from the checkpoint: its tokenizer, its chat template, its stop
tokens. A call that was cut off or is malformed is never reported as a tool call. One answer at a time; batches are the
engine's business.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm_jax.errors import TextError
from glm_jax.inference import Sampling
from glm_jax.model import Transformer
from glm_jax.serving.generation import Generation, Usage
from glm_jax.serving.text_processor import TextProcessor
from glm_jax.text import (
    ContentDelta,
    Event,
    MalformedToolCall,
    Prompt,
    ReasoningDelta,
    StreamDecoder,
    StreamParser,
    ToolCall,
    encode_chat,
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
        notes: what was asked for and could not be done, such as a switch that the template does not have.
    """

    finish_reason: str
    usage: Usage
    notes: tuple[str, ...] = ()


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
        notes: see `Finished`.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    notes: tuple[str, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the assistant's message, to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    **({} if call.id is None else {"id": call.id}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message

    def to_json(self) -> dict[str, Any]:
        """The answer as JSON values."""
        return {
            "reasoning": self.reasoning,
            "content": self.content,
            "tool_calls": [_call_to_json(call) for call in self.tool_calls],
            "finish_reason": self.finish_reason,
            "usage": self.usage.to_json(),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


class Chat:
    """A model that one talks to. `glm_jax.Chat` opens one from a checkpoint directory.

    Args:
        model: on its mesh.
        text: the tokenizer, template and settings that the model was trained with.

    Raises:
        TextError: the tokenizer has ids that the model does not know.
    """

    def __init__(self, model: Transformer, text: TextProcessor) -> None:
        self.model, self.text = model, text
        self._untold = text.defaults.notes  # until the first answer has told them
        known, size = model.config.vocab_size, text.tokenizer.vocab_size
        if size > known:
            raise TextError(f"the tokenizer has {size} ids, the model {known}: they do not belong together")

    def __repr__(self) -> str:
        return f"Chat(\n{textwrap.indent(f'{self.model!r}', '  ')}\n  {self.text!r}\n)"

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
        speculative: int = 0,
        template_variables: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
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
            speculative: tokens to draft with the MTP layer for each pass of the model; needs temperature 0.
            template_variables: further switches of the template (`clear_thinking`, `reasoning_effort`). What the
                template does not read is named in the notes of the answer.
            sanitize_control_tokens: False lets control tokens in the text of messages be control tokens.

        Raises:
            TextError: messages or tools of the wrong form, or refused by the template. At once, like all errors here.
            InputError: a setting out of range, or a conversation longer than the model's positions.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = encode_chat(
            self.text.template,
            self.text.tokenizer,
            messages,
            tools=tools,
            enable_thinking=thinking,
            sanitize_control_tokens=sanitize_control_tokens,
            variables=template_variables,
        )
        if max_new_tokens is None:
            max_new_tokens = max(1, min(MAX_NEW_TOKENS, self.model.config.max_positions - len(prompt.token_ids)))
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=_first(temperature, self.text.defaults.temperature, 0.0),
            top_k=_first(top_k, self.text.defaults.top_k, 0),
            top_p=_first(top_p, self.text.defaults.top_p, 1.0),
            seed=seed,
            stop=self.text.defaults.stop_ids,
            speculative=speculative,
        )
        parser = self._parser(prompt, tools)
        notes = self._notes(thinking, template_variables or {}, bool(tools))
        return self._events(self._generate(prompt.token_ids, sampling), parser, notes)

    def _parser(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None) -> StreamParser:
        """The parser of the answer to a prompt.

        With thinking off the prompt ends after `</think>`, so that the answer begins at once; other templates open the
        thoughts themselves. Only the prompt's end counts, and only what the template wrote there.
        """
        form = self.text.answer_format
        in_thinking = form.think is not None and prompt.ending.endswith(form.think[0])
        return StreamParser(in_thinking, bool(tools), tools=tools, answer_format=form, first_call=prompt.calls)

    def _notes(self, thinking: bool | None, variables: Mapping[str, Any], with_tools: bool) -> tuple[str, ...]:
        """What was asked for that the template has no switch for; before the first answer also by the checkpoint."""
        untold, self._untold = self._untold, ()
        off = ["enable_thinking"] if thinking is False and self.text.answer_format.think else []
        unread = self.text.template.unread([*off, *variables], with_tools=with_tools)
        named = {"enable_thinking": "thinking off"}
        return untold + tuple(
            f"the chat template has no switch for {named.get(name, name)}: it changes nothing" for name in unread
        )

    def _generate(self, prompt: list[int], sampling: Sampling) -> Generation:
        """The one place where the model is asked."""
        return Generation(self.model, prompt, sampling)

    def _events(self, generation: Generation, parser: StreamParser, notes: tuple[str, ...]) -> Iterator[ChatEvent]:
        decoder = StreamDecoder(self.text.tokenizer, skip_special=True, shown=self.text.answer_format.delimiters)
        calls = 0
        for text in self._texts(generation, decoder):
            for event in parser.push(text):
                calls += isinstance(event, ToolCall)
                yield event
        yield from parser.finish()
        reason = "length" if not generation.stopped else "tool_calls" if calls else "stop"
        yield Finished(reason, generation.usage, notes)

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
            case ContentDelta(text) | MalformedToolCall(text):
                content.append(text)
            case ToolCall():
                calls.append(event)
            case Finished(reason, usage, notes):
                return Reply("".join(reasoning), "".join(content), tuple(calls), reason, usage, notes)
    raise ValueError("the events end without Finished")


def _call_to_json(call: ToolCall) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(call).items() if value is not None}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
