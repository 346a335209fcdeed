"""The figures of `plan` as people write them: bytes with a unit, bytes a second, a number of devices."""

from __future__ import annotations

import re

from glm_jax.errors import InputError

MAX_BYTES = 2**60
AUTO = "auto"
_PREFIXES = "kmgtp"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, 1)}
_SMALLEST = 10**9  # bytes, or bytes a second, from which on a number without a unit is taken as it stands
# What a smaller one may mean, in bytes or bytes a second, by flag; the units are tried in this order.
_LIKELY = {"memory": (10**9, 10**12), "bandwidth": (10**11, 10**14), "link": (10**9, 10**13)}
_LIKELY_PREFIXES = "gtmk"
_SPELLINGS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def parse_memory(text: str) -> int:
    """Bytes of --memory, from a number with a unit, or without one if it is as large as a device's memory.

    Raises:
        InputError: it is no such thing, or nothing that a device could have; the message says what was meant.
    """
    return _parse(text, "memory", ("80GB", "76GiB"), rate=False)


def parse_rate(text: str, flag: str) -> int:
    """Bytes a second of a flag, from a number with a unit: 3.35TB/s.

    Raises:
        InputError: likewise.
    """
    return _parse(text, flag, ("3.35TB/s", "900GB/s"), rate=True)


def parse_count(text: str) -> int | None:
    """The number of --count; None for `auto`.

    Raises:
        InputError: it is neither.
    """
    if text.lower() == AUTO:
        return None
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise InputError(f"--count {text!r} is no number of devices; right would be a number such as 8, or {AUTO}")
    return int(text)


def spelled(text: str) -> str:
    """A dtype as this program calls it: in lower case, and `bf16` in full."""
    return _SPELLINGS.get(text.lower(), text.lower())


def _parse(text: str, flag: str, examples: tuple[str, str], *, rate: bool) -> int:
    match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,20}))? ?([A-Za-z]{0,3})(/s)?", text)
    unit = None if match is None or (match[4] and not rate) else _UNITS.get(match[3].lower())
    if match is None or unit is None:
        what = "bytes a second" if rate else "bytes"
        raise InputError(
            f"--{flag} {text!r} is no size; right would be {what}, or a number with a unit: {', '.join(examples)}"
        )
    size = int(match[1]) * unit + int(match[2] or 0) * unit // 10 ** len(match[2] or "")
    number = match[1] + (f".{match[2]}" if match[2] else "")
    if not match[3] and size < _SMALLEST and float(number) > 0:
        raise InputError(_meant(number, flag, rate=rate))
    if not 1 <= size <= MAX_BYTES:
        raise InputError(f"--{flag} must be at least 1 byte and at most {MAX_BYTES}, not {text}")
    return size


def _meant(number: str, flag: str, *, rate: bool) -> str:
    """What a number without a unit says, and what is more likely."""
    second = "/s" if rate else ""
    low, high = _LIKELY[flag]
    units = (f"{prefix.upper()}B" for prefix in _LIKELY_PREFIXES if low <= float(number) * _UNITS[f"{prefix}b"] <= high)
    decimal = next(units, "GB")
    likely = f"--{flag} {number}{decimal}{second}"
    binary = f" or --{flag} {number}{decimal[0]}iB" if not rate else ""
    return f"--{flag} {number} is {number} bytes{' a second' if rate else ''}; probably meant: {likely}{binary}"
