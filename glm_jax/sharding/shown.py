"""How values that hold arrays look at a prompt: dtypes and shapes in one line, never the numbers of a whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_MOST = 4  # items of a list, or entries of a dictionary, that are written out


def short_repr(value: Any) -> str:
    """A dataclass in one line: `Output(logits=float32[1, 4, 512], hidden=float32[1, 4, 128], ...)`.

    A class takes it as its own: `__repr__ = short_repr` in its body.
    """
    fields = ", ".join(f"{field.name}={_short(getattr(value, field.name))}" for field in dataclasses.fields(value))
    return f"{type(value).__name__}({fields})"


def _short(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, Mapping):
        return f"{{{_listed([f'{key!r}: {_short(item)}' for key, item in value.items()])}}}"
    if isinstance(value, (tuple, list)):
        parts = [_short(item) for item in value]
        if len(parts) > 1 and len(set(parts)) == 1:
            return f"{len(parts)} x {parts[0]}"
        return f"({_listed(parts)})"
    text = repr(value)
    return text if text.count("\n") == 0 and len(text) <= 200 else f"<{type(value).__name__}>"


def _listed(parts: list[str]) -> str:
    more = [f"{len(parts) - _MOST} more"] if len(parts) > _MOST else []
    return ", ".join([*parts[:_MOST], *more])
