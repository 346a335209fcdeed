"""Tables for notebooks, which show a value's `_repr_html_` in place of its text."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Iterator
from typing import Any


def html_table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title over rows of a name and a value."""
    body = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{body}</table>"


def field_rows(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a dataclass and of those inside it, under names such as `attention.rope.theta`."""
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(item):
            yield name, type(item).__name__
            yield from field_rows(item, f"{name}.")
        else:
            yield name, f"{item:,}" if type(item) is int else str(item)
