"""Talk to a model: line by line, or once with --message, or with --messages FILE, a conversation to be answered.

--tools FILE declares functions that the model may call: the calls are printed, and not run. Both files are JSON in
OpenAI's form.

Thoughts are shown dim on a terminal. At the prompt, /think on and /think off switch thinking, /clear begins anew,
/quit ends; Ctrl-C stops an answer. Without a terminal each line of the input is one turn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import chat_files, printing
from glm_jax.cli.shared_flags import define_integer, define_json, define_loading, define_sampling, need
from glm_jax.errors import Error, InputError

if TYPE_CHECKING:
    from glm_jax.serving import Chat, ChatEvent, Reply

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "commands: /think on, /think off, /clear, /quit"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""
    define_loading(flags)
    absl_flags.DEFINE_string("message", None, "answer this one message and end", flag_values=flags)
    text = 'a JSON list of messages ({"role": ..., "content": ...}) to answer; --message is one more'
    absl_flags.DEFINE_string("messages", None, text, flag_values=flags)
    text = 'a JSON list of the tools that the model may call ({"type": "function", "function": {...}})'
    absl_flags.DEFINE_string("tools", None, text, flag_values=flags)
    absl_flags.DEFINE_string("system", None, "the system message", flag_values=flags)
    absl_flags.DEFINE_boolean("thinking", True, "think before the answer", flag_values=flags)
    text = "at most this many new tokens an answer; by default 4096, or what the positions leave"
    define_integer(flags, "max_new_tokens", None, text)
    define_sampling(flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Answer --message or --messages, or hold a conversation."""
    need(flags, "model")
    once = flags.message is not None or flags.messages is not None
    if flags.json and not once:
        raise InputError("--json needs --message: it prints one answer; or --messages=FILE")
    messages = [] if flags.messages is None else chat_files.read_messages(flags.messages)
    if flags.system is not None and any(message["role"] == "system" for message in messages):
        raise InputError(f"--system and {flags.messages} both have a system message; give one of the two")
    tools = None if flags.tools is None else chat_files.read_tools(flags.tools)
    from glm_jax.checkpoint import open_source
    from glm_jax.checkpoint.text_files import text_files
    from glm_jax.cli.loading import load_model, loading_options
    from glm_jax.cli.sampling import chosen_sampling
    from glm_jax.runtime import distributed
    from glm_jax.serving import Chat, TextProcessor

    if not once and distributed.start().count > 1:
        raise InputError("a conversation runs in one process; over several give one --message")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "speculative")
    settings = {name: getattr(flags, name) for name in names}
    given = {name: value for name, value in settings.items() if value is not None}
    given |= {} if tools is None else {"tools": tools}
    source = open_source(flags.model, allow_unknown=flags.allow_unknown)
    # Everything that can be refused is, before the weights are loaded.
    with text_files(flags.model) as files:
        chosen_sampling(flags, source.config, files, told=False)
        options = loading_options(flags, source.config)
        text = TextProcessor.load(files)
    chat = Chat(load_model(source, options), text)
    conversation = Conversation(chat, flags.system, thinking=flags.thinking, settings=given, messages=messages)
    if not once:
        conversation.hold()
        return {}
    reply = conversation.answer(flags.message, show=not flags.json)
    return reply.to_json()


class Conversation:
    """The messages so far, and what to do with the next line."""

    def __init__(
        self,
        chat: Chat,
        system: str | None,
        *,
        thinking: bool,
        settings: dict[str, Any],
        messages: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.thinking = thinking
        self._chat = chat
        self._settings = settings
        self._opening = [*([] if system is None else [{"role": "system", "content": system}]), *messages]
        self.messages = list(self._opening)

    def hold(self) -> None:
        """Answer the lines of stdin until they end, or until /quit."""
        terminal = sys.stdin.isatty()
        if terminal:
            import readline  # noqa: F401  (gives input() its line editing)

            printing.notice(HELP)
        for line in _lines("> " if terminal else ""):
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer_or_say_why_not(line, interruptible=terminal)

    def answer(self, text: str | None, *, show: bool) -> Reply:
        """The answer to the messages and a user's, if there is one more; it joins them, and is shown as it comes."""
        from glm_jax.cli.sampling import describe_acceptance
        from glm_jax.serving import collect

        messages = [*self.messages, *([] if text is None else [{"role": "user", "content": text}])]
        events = self._chat.stream(messages, thinking=self.thinking, **self._settings)
        reply = collect(_shown(events) if show else events)
        if show and reply.usage.acceptance is not None:
            printing.notice(describe_acceptance(reply.usage.acceptance))
        self.messages = [*messages, reply.message]
        return reply

    def _answer_or_say_why_not(self, text: str, *, interruptible: bool) -> None:
        try:
            self.answer(text, show=True)
        except Error as error:
            if not interruptible:
                raise
            printing.notice(f"error: {error}")
        except KeyboardInterrupt:
            if not interruptible:
                raise
            print(PLAIN if _shows_colors() else "")

    def _command(self, line: str) -> None:
        if line == "/clear":
            self.messages = list(self._opening)
        elif line in ("/think on", "/think off"):
            self.thinking = line == "/think on"
        else:
            printing.notice(f"{line}: unknown; {HELP}")


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return


def _shown(events: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
    """Print the events as they pass: thoughts dim, each part on lines of its own."""
    from glm_jax.serving import Finished
    from glm_jax.text import ContentDelta, MalformedToolCall, ReasoningDelta, ToolCall

    dim, plain = (DIM, PLAIN) if _shows_colors() else ("", "")
    open_line: type | None = None
    for event in events:
        if open_line not in (None, type(event)):
            print(flush=True)
        open_line = type(event)
        if isinstance(event, ReasoningDelta):
            print(f"{dim}{event.text}{plain}", end="", flush=True)
        elif isinstance(event, ContentDelta | MalformedToolCall):
            print(event.text, end="", flush=True)
        else:
            open_line = None
        if isinstance(event, ToolCall):
            arguments = ", ".join(f"{key}={value!r}" for key, value in event.arguments.items())
            print(f"{event.name}({arguments})", flush=True)
        if isinstance(event, Finished) and event.finish_reason == "length":
            printing.notice(f"(cut off after {event.usage.completion_tokens} tokens)")
        for note in event.notes if isinstance(event, Finished) else ():
            printing.notice(f"({note})")
        yield event


def _shows_colors() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
