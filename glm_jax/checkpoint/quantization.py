"""What a config.json says of quantised matrices: groups of modules with a format each, and modules that have none.

It says how, the tensors say which: a matrix is quantised if its scales are there. Of the formats that the config leaves
for a matrix, the first that its tensors fit is its own.

Names are matched as compressed-tensors matches them (`utils/match.py`): a module's whole name, `re:` and a pattern that
matches from its beginning, or its class; of several targets of different groups, names before patterns before classes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from glm_jax.checkpoint.quantized import Format
from glm_jax.errors import ConfigError

PATTERN = "re:"
# A module's classes. Tools that quantise files instead of modules take an embedding for a linear layer, too.
_LINEAR = (frozenset({"Linear", "LinearBase", "Module"}),)
_EMBEDDING = (frozenset({"Embedding", "Module"}), frozenset({"Linear", "LinearBase"}))


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules that are quantised alike.

    Attributes:
        name: its key in the config.
        layouts: the formats that the config leaves open, the likeliest first; none if weights are not quantised.
        targets: names, patterns and classes of modules.
    """

    name: str
    layouts: tuple[Format, ...]
    targets: tuple[str, ...] = ("Linear",)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a config.json says of its quantised matrices.

    Attributes:
        groups: modules that are quantised alike.
        ignore: names, patterns and classes of modules that are not quantised.
        notes: sentences for the user about what is passed over.
        prefix: what the names may have before those of the language model's tensors.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def layouts(self) -> tuple[Format, ...]:
        """Every format that the config leaves open."""
        return tuple(dict.fromkeys(layout for group in self.groups for layout in group.layouts))

    def exempts(self, weight: str) -> bool:
        """Whether a weight's module (its name without `.weight`) is not to be quantised."""
        return any(True for _ in self._matching(weight, self.ignore))

    def layouts_of(self, weight: str) -> tuple[Format, ...]:
        """The formats that the config leaves open for a weight, by rank; none if no target is its module."""
        groups = [self._group_of[target] for target in self._matching(weight, self._ranked)]
        return tuple(dict.fromkeys(layout for group in groups for layout in group.layouts))

    def describe(self) -> str:
        """For people."""
        first = dict.fromkeys(group.layouts[0].describe() for group in self.groups if group.layouts)
        return " and ".join(first) or "no format of weights"

    @functools.cached_property
    def _group_of(self) -> dict[str, Group]:
        return {target: group for group in self.groups for target in group.targets}

    @functools.cached_property
    def _ranked(self) -> tuple[str, ...]:
        return tuple(sorted(self._group_of, key=lambda target: (target.startswith(PATTERN), target)))

    def _matching(self, weight: str, targets: Iterable[str]) -> Iterable[str]:
        """Those of the targets that a weight's module has: names and patterns in order, then classes."""
        module = weight.removesuffix(".weight")
        names = [module]
        if self.prefix:  # as in the files, and as in the memory of transformers
            names += [self.prefix + module, "model." + self.prefix + module.removeprefix("model.")]
        found = [target for target in targets if any(_matches(name, target) for name in names)]
        for classes in _EMBEDDING if module.endswith("embed_tokens") else _LINEAR:
            found += [target for target in targets if target in classes and target not in found]
        return found


def _matches(name: str, target: str) -> bool:
    if target.startswith(PATTERN):
        return re.match(target.removeprefix(PATTERN), name) is not None
    return target == name


def names_of(content: Mapping[str, Any], key: str, *, where: str = "") -> tuple[str, ...]:
    """A list of names, patterns and classes of modules.

    Raises:
        ConfigError: it is no list of strings, or a pattern is none.
    """
    names = content.get(key) or []
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise wrong(f"{where}{key} {shown(content, key)}; a list of names is right")
    for item in names:
        if item.startswith(PATTERN):
            try:
                re.compile(item.removeprefix(PATTERN))
            except (re.error, RecursionError, OverflowError) as error:
                raise wrong(f"{where}{key} has {item!r:.200}, which is no regular expression: {error}") from None
    return tuple(names)


def require(
    content: Mapping[str, Any], key: str, legal: tuple[Any, ...], *, where: str = "", default: Any = ...
) -> Any:
    """A value that must be one of `legal`.

    Raises:
        ConfigError: it is another one.
    """
    value = content.get(key, default)
    if not any(value is item or (type(value) is type(item) and value == item) for item in legal):
        raise wrong(f"{where}{key} {shown(content, key)}; known: {', '.join(repr(item) for item in legal)}")
    return value


def shown(content: Mapping[str, Any], key: str) -> str:
    """A value in an error's words."""
    return f"is {content[key]!r:.200}" if key in content else "is missing"


def wrong(what: str) -> ConfigError:
    """The error of a quantization_config."""
    return ConfigError(f"config.json: quantization_config: {what}")
