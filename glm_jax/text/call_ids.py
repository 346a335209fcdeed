"""Kimi's ids of tool calls, `functions.NAME:N`, with N counting the calls of a conversation from 0.

The model reads the called function's name off the id, and so does the parser. Two things go wrong in practice: clients
send a history with ids of their own (`call_abc`), after which Kimi stops calling or copies the foreign form; and the
model itself writes ids that are nearly of its form. `with_canonical_ids` mends the former, `name_of_call` the latter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.text.argument_values import read_object
from glm_jax.text.tool_schemas import Tools

_CANONICAL = re.compile(r"functions\.([^\s<>]+):[0-9]+")
_NUMBERED = re.compile(r"(?!functions\.)([^\s<>]+):[0-9]+")
_INDEX = re.compile(r"[\W_]*[0-9]+\W*\Z")
_PREFIX = re.compile(r"\W*functions?[\W_]*", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\W_]+")
_WITHOUT_NAME = re.compile(r"(?:functions?)?[\W_0-9]*", re.IGNORECASE)
# Ids that clients and servers make up at random.
_RANDOM = re.compile(r"(?:call|tool|toolu|fc|chatcmpl)(?:[-_:.].*|[0-9].*)?|[0-9a-fA-F-]{8,}", re.DOTALL)


def new_call_id(name: str, number: int) -> str:
    """Returns the id of a conversation's call with a number."""
    return f"functions.{name}:{number}"


@dataclasses.dataclass(frozen=True)
class NamedCall:
    """What an id and its arguments say: the function's name, its arguments, and whether the id is of Kimi's form."""

    name: str
    arguments: dict[str, Any]
    keeps_id: bool


def name_of_call(call_id: str, arguments: dict[str, Any], tools: Tools) -> NamedCall | None:
    """Returns which function a call is of, None if it cannot be told.

    Kimi's own form comes first, whether or not the name is declared. Then a declared name that is left when
    `functions`, punctuation and a number are taken off. An id that says nothing of a name belongs to the one declared
    tool that accepts the arguments, or to the one that they name.
    """
    without_name = _WITHOUT_NAME.fullmatch(call_id) is not None
    canonical = _CANONICAL.fullmatch(call_id)
    if canonical is not None and (canonical[1] in tools or not (tools and without_name)):
        return NamedCall(canonical[1], arguments, True)
    numbered = _NUMBERED.fullmatch(call_id)
    if numbered is not None and (numbered[1] in tools or not (tools or without_name)):
        return NamedCall(numbered[1], arguments, True)
    declared = _declared_name(call_id, tools)
    if declared is not None:
        return NamedCall(declared, arguments, False)
    if without_name or _RANDOM.fullmatch(call_id):
        return _by_arguments(arguments, tools)
    return None if numbered is None else NamedCall(numbered[1], arguments, True)


def _declared_name(call_id: str, tools: Tools) -> str | None:
    forms = []
    for form in (call_id, _PREFIX.sub("", call_id, count=1) if _PREFIX.match(call_id) else call_id):
        forms += [form, _INDEX.sub("", form)]
    for form in forms:
        if form in tools:
            return form
    for form in forms:
        alike = [name for name in tools if _folded(name) == _folded(form)]
        if len(alike) == 1 and _folded(form):
            return alike[0]
    return None


def _folded(name: str) -> str:
    return _SEPARATORS.sub("", name).casefold()


def _by_arguments(arguments: dict[str, Any], tools: Tools) -> NamedCall | None:
    accepting = [name for name, tool in tools.items() if tool.accepts(arguments)]
    if len(accepting) == 1:
        return NamedCall(accepting[0], arguments, False)
    name = arguments.get("name")
    if not isinstance(name, str) or name not in tools:
        return None
    rest = {key: value for key, value in arguments.items() if key != "name"}
    for key in ("arguments", "parameters"):
        inner = rest.get(key) if len(rest) == 1 else None
        inner = read_object(inner) if isinstance(inner, str) else inner
        if isinstance(inner, dict):
            return NamedCall(name, inner, False)
    return NamedCall(name, rest, False) if tools[name].accepts(rest) else None


def with_canonical_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns copies of normalised messages in which every call, and its result, has an id of Kimi's form.

    An id that has the form and the call's own name stays. A result belongs to the first call with its id that has none
    yet; one without an id answers the first call that has none. A result of a call that is not there keeps its id.
    """
    taken = {call["id"] for message in messages for call in message.get("tool_calls") or () if _is_canonical(call)}
    count = 0
    open_calls: list[tuple[Any, str]] = []  # the client's id, ours
    answered: dict[Any, str] = {}
    result: list[dict[str, Any]] = []
    for message in messages:
        changed = dict(message)
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                ours = call["id"] if _is_canonical(call) else _free_id(_name(call), count, taken)
                count += 1
                open_calls.append((call.get("id"), ours))
                calls.append({**call, "id": ours})
            changed["tool_calls"] = calls
        elif message.get("role") == "tool":
            theirs = message.get("tool_call_id")
            place = next((i for i, (known, _) in enumerate(open_calls) if not theirs or known == theirs), None)
            if place is not None:
                known, changed["tool_call_id"] = open_calls.pop(place)
                answered[known] = changed["tool_call_id"]
            elif theirs in answered:
                changed["tool_call_id"] = answered[theirs]
        result.append(changed)
    return result


def _name(call: Mapping[str, Any]) -> str:
    return str(call.get("function", call)["name"])


def _is_canonical(call: Mapping[str, Any]) -> bool:
    found = _CANONICAL.fullmatch(call["id"]) if isinstance(call.get("id"), str) else None
    return found is not None and found[1] == _name(call)


def _free_id(name: str, number: int, taken: set[str]) -> str:
    while new_call_id(name, number) in taken:
        number += 1
    taken.add(new_call_id(name, number))
    return new_call_id(name, number)
