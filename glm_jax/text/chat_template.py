"""A checkpoint's chat template: messages, tools and flags in, the exact prompt text out.

The Jinja template is rendered the way its authors tested it, in the environment of `template_environment`. Messages of
the OpenAI form are put in order once, by `messages`; what templates disagree on is decided by what each does with it
(`template_values`). Turning text into ids is the business of `prompt`. A template that runs for ever is not guarded
against.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SecurityError

from glm_jax.errors import TextError
from glm_jax.text.call_ids import with_canonical_ids
from glm_jax.text.control_tokens import unused_characters
from glm_jax.text.conversation import SPECIAL_TOKEN_VARIABLES, Conversation, Rendered, without_brackets
from glm_jax.text.families import Family, family_of
from glm_jax.text.json_file import read_json_object_if_present, read_text
from glm_jax.text.messages import check_tools, normalize_messages
from glm_jax.text.template_environment import (
    GENERATION_BRACKETS,
    Refused,
    literal_text,
    make_environment,
    template_line,
)
from glm_jax.text.template_values import for_template

KIMI_CALL = "<|tool_call_begin|>"


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text, or name -> text: "default", and "tool_use" for requests with tools.
        origin: what errors call it, normally the file.
        variables: what every rendering sees beside the messages (`bos_token` and the like).
        family: what the checkpoint's files leave unsaid: a template that declares tools, where this one leaves them
            out, and whether calls need ids of a form of their own. Asked only where it matters.

    Raises:
        TextError: a syntax error, with origin and line.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        origin: str = "chat template",
        variables: Mapping[str, Any] | None = None,
        family: Callable[[], Family] | None = None,
    ):
        self.origin = origin
        self._variables = dict(variables or {})
        self._family = family
        sources = {"default": source} if isinstance(source, str) else dict(source)
        environment = make_environment()
        self._templates = {name: self._compile(environment, text) for name, text in sources.items()}
        trees = {name: environment.parse(text) for name, text in sources.items()}
        self._reads = {name: frozenset(jinja2.meta.find_undeclared_variables(tree)) for name, tree in trees.items()}
        literals = [literal_text(environment, text) for text in sources.values()]
        given = [value for value in self._variables.values() if isinstance(value, str)]
        self.own_text = "\0".join([*literals, *given])

    def __repr__(self) -> str:
        return f"ChatTemplate({self.origin!r})"

    def _compile(self, environment: jinja2.Environment, text: str) -> jinja2.Template:
        try:
            return environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise TextError(f"{self.origin}, line {error.lineno}: {error.message}") from error

    @classmethod
    def load(cls, directory: str | os.PathLike[str], family: Family | None = None) -> ChatTemplate:
        """Returns the template of a checkpoint directory.

        `chat_template.jinja` comes first, then the key `chat_template` of `tokenizer_config.json`: a text, or a list of
        `{"name": ..., "template": ...}`. Only where neither is there comes the family's.

        Args:
            directory: with the files.
            family: the checkpoint's; looked up if it is not given.

        Raises:
            TextError: there is none, or it cannot be read.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise TextError(f"{directory}: is not a directory; a chat template is read from its checkpoint's directory")
        config_path = directory / "tokenizer_config.json"
        config = read_json_object_if_present(config_path)
        variables: dict[str, Any] = {}
        for name in SPECIAL_TOKEN_VARIABLES:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                variables[name] = token
        path = directory / "chat_template.jinja"
        known = functools.cache(lambda: family_of(directory) if family is None else family)
        if path.exists():
            return cls(read_text(path), origin=str(path), variables=variables, family=known)
        if config.get("chat_template") is not None:
            source = _named_templates(config["chat_template"], config_path)
            return cls(source, origin=f"{config_path} (chat_template)", variables=variables, family=known)
        family = family_of(directory) if family is None else family
        if family.template is None:
            raise TextError(
                f"{directory}: has no chat template; looked for chat_template.jinja and the key chat_template of "
                "tokenizer_config.json"
            )
        return cls._of_family(family, variables)

    @classmethod
    def _of_family(cls, family: Family, variables: Mapping[str, Any]) -> ChatTemplate:
        """The package's own template for a family that has one."""
        assert family.template is not None
        given = {**variables, **family.template_variables}
        return cls(read_text(family.template), origin=family.template.name, variables=given, family=lambda: family)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Returns the prompt text.

        Args:
            messages: OpenAI form: role, content, and where they apply reasoning_content, tool_calls, tool_call_id. They
                are not changed.
            tools: `{"type": "function", "function": {...}}` each; none and an empty list are the same.
            enable_thinking: False asks for an answer without thoughts; None leaves it to the template, which for GLM
                means thinking. Templates see it as `enable_thinking` (GLM) and as `thinking` (DeepSeek, Kimi).
            add_generation_prompt: end with the opening of an assistant's turn.
            **variables: further variables of the template (`clear_thinking`, `reasoning_effort`).

        Raises:
            TextError: messages or tools of the wrong form, a template that refuses them, fails, or leaves the tools
                out.
        """
        if enable_thinking is not None:
            variables = {"enable_thinking": enable_thinking, **variables}
        conversation = self.prepare(messages, tools, {**variables, "add_generation_prompt": add_generation_prompt})
        return self.render_prepared(conversation).text

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> Conversation:
        """Returns a conversation in the form that `render_prepared` takes; see `render`."""
        ordered = normalize_messages(messages)
        if self._wants_canonical_ids(ordered):
            ordered = with_canonical_ids(ordered)
        given = dict(variables)
        if given.get("enable_thinking") is not None:
            given.setdefault("thinking", given["enable_thinking"])
        return Conversation(ordered, check_tools(tools), given)

    def render_prepared(self, conversation: Conversation) -> Rendered:
        """Returns the prompt of a prepared conversation; see `render`."""
        if conversation.tools is None:
            return self._render(conversation, self._select(with_tools=False))
        name = self._select(with_tools=True)
        rendered = self._render(conversation, name)
        if not self._leaves_out_tools(conversation, name, rendered):
            return rendered
        other = self._family().template if self._family is not None else None
        if other is None:
            raise TextError(
                f"{self.origin}: leaves out the tools; describe them in a system message, or use a template with tools"
            )
        assert self._family is not None
        return self._of_family(self._family(), self._variables).render_prepared(conversation)

    def _leaves_out_tools(self, conversation: Conversation, name: str, rendered: Rendered) -> bool:
        """Whether the prompt is what it would be without tools. A template of their own is taken to declare them."""
        if name != "default":
            return False
        if "tools" not in self._reads[name] and not self._reads[name] & {"tools_ts_str"}:
            return True
        try:
            return self._render(dataclasses.replace(conversation, tools=None), name) == rendered
        except TextError:
            return False  # without tools the template fails, so it does something with them

    @property
    def declares_tools(self) -> bool:
        """Whether the template itself puts tools into a prompt, as far as its text says."""
        name = self._select(with_tools=True)
        return name != "default" or "tools" in self._reads[name]

    def unread(self, names: Sequence[str], *, with_tools: bool = False) -> tuple[str, ...]:
        """Returns those of some variables that the template does not read, so that they change nothing.

        `enable_thinking` and `thinking` are one switch.
        """
        reads = self._reads[self._select(with_tools=with_tools)]
        switch = {"enable_thinking", "thinking"}
        known = reads | (switch if reads & switch else frozenset())
        return tuple(name for name in names if name not in known)

    def _wants_canonical_ids(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        if not any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
            return False
        return KIMI_CALL in self.own_text or (self._family is not None and self._family().canonical_call_ids)

    def _render(self, conversation: Conversation, name: str) -> Rendered:
        """Renders with arguments that are object and text in one; where the template fails on them, with their text."""
        try:
            return self._render_once(conversation, name)
        except _Failed as failure:
            if any(message.get("tool_calls") for message in conversation.messages):
                try:
                    return self._render_once(conversation, name, arguments_as_text=True)
                except _Failed:
                    pass
            raise TextError(str(failure)) from failure.__cause__

    def _render_once(self, conversation: Conversation, name: str, *, arguments_as_text: bool = False) -> Rendered:
        messages = [
            for_template(message, f"messages[{i}]", arguments_as_text=arguments_as_text)
            for i, message in enumerate(conversation.messages)
        ]
        visible = {
            "documents": None,
            **self._variables,
            **conversation.variables,
            "messages": messages,
            "tools": conversation.tools,
        }
        try:
            before, after = unused_characters([visible, self.own_text], 2)
        except RecursionError as error:
            raise TextError("the messages or tools nest too deeply") from error
        token = GENERATION_BRACKETS.set((before, after))
        try:
            return without_brackets(self._templates[name].render(visible), before, after)
        except TextError as error:
            raise TextError(f"{self.origin}: {error}") from error
        except SecurityError as error:
            raise TextError(f"{self.origin}: does what a template may not ({error})") from error
        except Refused as error:
            raise TextError(f"{self.origin}: refuses these messages: {error}") from error
        except Exception as error:  # whatever a template's expression can raise
            line = template_line(error)
            raise _Failed(f"{self.origin}{line}: fails on these messages: {_first_line(error)}") from error
        finally:
            GENERATION_BRACKETS.reset(token)

    def _select(self, *, with_tools: bool) -> str:
        if with_tools and "tool_use" in self._templates:
            return "tool_use"
        if "default" not in self._templates:
            names = ", ".join(sorted(self._templates)) or "none"
            raise TextError(f'{self.origin}: has no template named "default" (it has: {names})')
        return "default"


class _Failed(Exception):
    """A template's expression failed."""


def _named_templates(value: Any, path: Path) -> str | dict[str, str]:
    if isinstance(value, str):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        named = {"": None}
    if not named or not all(isinstance(part, str) for entry in named.items() for part in entry):
        raise TextError(f'{path}: chat_template must be a text or a list of {{"name": ..., "template": ...}}')
    return named


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
