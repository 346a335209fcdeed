"""Damage done to files, by a seed: bytes that are lost, doubled or changed, and JSON values replaced by others."""

from __future__ import annotations

import json
import random
from typing import Any

_TOKENS = [b"", b"0", b"9", b"-", b"[", b"]", b"{", b"}", b'"', b"e9", b",", b"\x80", b"null", b"\0", b"\n", b"1e999"]
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, 10**30, 0.5, float("inf"), float("nan"), "", "x", "../x",
    "\ud800", [], {}, [[]], [0], [-1, 2], [2**40, 2**40], {"x": 1}, "y" * 3000,
]  # fmt: skip


def mutate(content: bytes, chance: random.Random) -> bytes:
    """`content` with one to three kinds of damage; JSON as JSON half of the time."""
    if content[:1] == b"{" and chance.random() < 0.5:
        try:
            return _mutate_json(content, chance)
        except ValueError:
            pass
    result = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(result) + 1)
        match chance.randrange(5):
            case 0:
                del result[place:]
            case 1 if place < len(result):
                result[place] ^= 1 << chance.randrange(8)
            case 2:
                result[place : place + chance.randint(1, 40)] = b""
            case 3:
                result[place:place] = result[place : place + chance.randint(1, 60)]
            case _:
                result[place : place + chance.randint(0, 3)] = chance.choice(_TOKENS)
    return bytes(result)


def _mutate_json(content: bytes, chance: random.Random) -> bytes:
    """One value, key or member somewhere in it replaced, removed or added."""
    root = {"": json.loads(content)}
    for _ in range(chance.randint(1, 2)):
        holder: Any = root
        key: Any = ""
        while isinstance(holder[key], (dict, list)) and holder[key] and chance.random() < 0.85:
            holder = holder[key]
            key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        match chance.randrange(4):
            case 0 if holder is not root:
                del holder[key]
                if not holder:
                    break
            case 1 if isinstance(holder, dict) and holder is not root:
                holder[chance.choice(["x", "", f"{key}x", str(key)[:-1]])] = holder.pop(key)
            case 2 if isinstance(holder[key], int):
                holder[key] = holder[key] * chance.choice([2, 10, 1000, 10**9, -1]) + chance.choice([0, 1])
            case _:
                deep: Any = 1
                for _ in range(chance.choice([0, 0, 3])):
                    deep = [deep]
                holder[key] = chance.choice([*_VALUES, deep])
    text = json.dumps(root[""])
    return text.encode() if chance.random() < 0.95 else b"[" * 200_000 + text.encode()
