"""The Jinja environment of chat templates: a sandbox with what Hugging Face templates expect.

Trimmed blocks, `break` and `continue`, `tojson` as the models were trained on it, `raise_exception`, `strftime_now`,
and the block `{% generation %}`, whose content passes through between two characters that the caller chooses.
"""

from __future__ import annotations

import contextvars
import datetime
import json
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm_jax.text.template_values import is_none

# The characters before and after the text of a `{% generation %}` block.
GENERATION_BRACKETS: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar("brackets", default=("", ""))


class Refused(jinja2.TemplateError):
    """What a template's own raise_exception raises."""


def make_environment() -> jinja2.Environment:
    """Returns a new environment."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        finalize=lambda value: "" if value is None else value,
    )
    environment.filters["tojson"] = _tojson
    environment.tests["none"] = is_none
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def literal_text(environment: jinja2.Environment, source: str) -> str:
    """Returns what a template itself may write, its data and its string constants, apart by null characters."""
    tree = environment.parse(source)
    data = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    constants = [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join([*data, *constants])


def template_line(error: BaseException) -> str:
    """The place in the template, as ", line N", from the traceback that Jinja rewrites to its lines."""
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes, which training learns from."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_bracketed"), [], [], body).set_lineno(line)

    def _bracketed(self, caller: Callable[[], str]) -> str:
        before, after = GENERATION_BRACKETS.get()
        return f"{before}{caller()}{after}"


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    *,
    sort_keys: bool = False,
) -> str:
    """JSON as the models were trained on it: not escaped for HTML, other scripts as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
