"""Reading the JSON files beside a checkpoint, with every fault as one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm_jax.errors import TextError


def read_text(path: Path) -> str:
    """Returns the contents of a UTF-8 file (a byte order mark is passed over); TextError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; TextError if it cannot be read, is not JSON, or is not an object."""
    text = read_text(path)
    if not text.strip():
        raise TextError(f"{path}: is empty; a JSON object was expected")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}: is not JSON ({error}); the file may be cut off") from error
    if not isinstance(value, dict):
        raise TextError(f"{path}: holds a JSON {type(value).__name__}; an object was expected")
    return value


def read_json_object_if_present(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or an empty one if there is no such file."""
    return read_json_object(path) if path.exists() else {}
