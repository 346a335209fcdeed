"""Whether what follows a place in a text is of a certain form, as far as the text has come."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

Part = str | tuple[str, str] | list[str]


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """A bounded form that text has or not; `follows` says which, or that more text is needed.

    Attributes:
        whole: matches the form.
        beginning: matches what may yet become it, up to the end of the text.
    """

    whole: re.Pattern[str]
    beginning: re.Pattern[str]

    @classmethod
    def of(cls, *alternatives: Sequence[Part]) -> Lookahead:
        """Builds one from alternatives, each a sequence of parts.

        A part is a regular expression whose every beginning it matches too, such as `[a-z]{0,9}`; or two, the second of
        which matches the beginnings of what the first matches; or, as a list, texts of which one follows.
        """
        whole = "|".join("".join(map(_whole, parts)) for parts in alternatives)
        beginnings = [
            "".join(map(_whole, parts[:i])) + _beginning(part) for parts in alternatives for i, part in enumerate(parts)
        ]
        return cls(re.compile(whole), re.compile("|".join(beginnings)))

    def follows(self, text: str, at: int) -> bool | None:
        """Whether the form stands at a place of the text; None if only more text can tell."""
        if self.whole.match(text, at):
            return True
        return None if self.beginning.fullmatch(text, at) else False


def _whole(part: Part) -> str:
    if isinstance(part, tuple):
        return part[0]
    return part if isinstance(part, str) else f"(?:{'|'.join(map(re.escape, part))})"


def _beginning(part: Part) -> str:
    if isinstance(part, tuple):
        return part[1]
    if isinstance(part, str):
        return part
    starts = {text[:size] for text in part for size in range(len(text))}
    return f"(?:{'|'.join(map(re.escape, sorted(starts)))})"
