"""A conversation as token ids: the one place where the text of messages meets the tokenizer.

What a user, a tool or a fetched page writes must not end a turn or open another. So the conversation is rendered twice,
as it is and with texts that can become no control token (`control_tokens.Guard`). Where both give the same control
tokens, which is nearly always, the ids are those of the plain rendering, encoded whole, as transformers has them.
Otherwise somebody wrote a control token into a message: the guarded rendering is encoded, with control tokens only
where the template wrote them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.errors import TextError
from glm_jax.text.chat_template import ChatTemplate
from glm_jax.text.control_tokens import Guard, control_tokens, unused_characters
from glm_jax.text.conversation import Conversation, Rendered
from glm_jax.text.tokenizer_protocol import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation for a model.

    Attributes:
        token_ids: what the model reads.
        text: what they say.
        ending: the text's end without the white space after it, in which only the template's delimiters are whole.
        generation: where in the text stands what the assistant writes; see `Rendered`.
        calls: the number of tool calls in the conversation.
    """

    token_ids: list[int]
    text: str
    ending: str
    generation: tuple[tuple[int, int], ...] = ()
    calls: int = 0


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
    sanitize_control_tokens: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """Returns the prompt of a conversation.

    Args:
        template: the checkpoint's.
        tokenizer: likewise.
        messages: as `ChatTemplate.render`, like the next three.
        tools: the declared tools.
        enable_thinking: whether the answer has thoughts.
        add_generation_prompt: end with the opening of an assistant's turn.
        sanitize_control_tokens: whether control tokens in the text of messages and tools are text. False encodes them
            as control tokens: whoever wrote the text can then end its turn and begin another's.
        variables: further variables of the template.

    Raises:
        TextError: as `ChatTemplate.render`; text that has no UTF-8 form.
    """
    given = {**(variables or {}), "add_generation_prompt": add_generation_prompt}
    if enable_thinking is not None:
        given = {"enable_thinking": enable_thinking, **given}
    conversation = template.prepare(messages, tools, given)
    calls = sum(len(message.get("tool_calls", ())) for message in conversation.messages)
    plain = template.render_prepared(conversation)
    if not sanitize_control_tokens:
        ids = tokenizer.encode(plain.text)
        return Prompt(ids, plain.text, plain.text.rstrip(), plain.generation, calls)
    control = control_tokens(tokenizer, template.own_text)
    (character,) = unused_characters([_everything(conversation), plain.text, template.own_text], 1)
    guard = Guard(control, character)
    try:
        guarded_conversation = conversation.guarded(guard)
    except RecursionError as error:
        raise TextError("the messages or tools nest too deeply") from error
    guarded = template.render_prepared(guarded_conversation)
    text, spans = guard.written(guarded.text)
    expected = [control[text[start:end]] for start, end in spans]
    ending = guarded.text.rstrip()
    ids = tokenizer.encode(plain.text)
    control_ids = frozenset(control.values())
    if [i for i in ids if i in control_ids] == expected:
        return Prompt(ids, plain.text, ending, plain.generation, calls)
    ids = tokenizer.encode_guarded(text, control, spans)
    if [i for i in ids if i in control_ids] != expected:
        raise TextError(f"{template.origin}: this tokenizer makes control tokens of text that the messages wrote")
    return Prompt(ids, text, ending, _moved(guarded, guard), calls)


def _everything(conversation: Conversation) -> list[Any]:
    return [conversation.messages, conversation.tools, conversation.variables]


def _moved(rendered: Rendered, guard: Guard) -> tuple[tuple[int, int], ...]:
    """The spans of a guarded text as spans of the text without the guarding characters."""

    def place(at: int) -> int:
        return len(guard.written(rendered.text[:at])[0])

    return tuple((place(start), place(end)) for start, end in rendered.generation)
