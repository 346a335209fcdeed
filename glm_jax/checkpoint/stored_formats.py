"""Which weights of a checkpoint are quantised, and how: what a plan must know of one, without its files.

It is either read off an open checkpoint, or what a config.json promises. Then every matrix that the model has a product
for is taken as quantised, but for the modules that the config exempts.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Self

from glm_jax.checkpoint.names import TensorMapping, canonical_mappings
from glm_jax.checkpoint.quantization_config import read_quantization
from glm_jax.checkpoint.quantized import Format
from glm_jax.checkpoint.source import Source
from glm_jax.checkpoint.text_part import PREFIX
from glm_jax.configs import ModelConfig
from glm_jax.configs.hf_nested import text_config
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name


@dataclasses.dataclass(frozen=True)
class StoredFormats:
    """The part of a `Source` that decides what loading keeps quantised; it can be sent to another process.

    Attributes:
        formats: by weight, as `Source.quantized_weights`.
        mappings: by weight, of one of its matrices.
    """

    formats: Mapping[str, Format | None]
    mappings: Mapping[str, TensorMapping]

    @classmethod
    def of(cls, source: Source) -> Self:
        """Those of an open checkpoint."""
        formats = source.quantized_weights()
        return cls(formats, {name: source.mapping(name) for name in formats})

    @classmethod
    def declared(cls, config: ModelConfig, content: Mapping[str, Any]) -> Self:
        """Those that the content of a config.json with a `quantization_config` promises.

        Raises:
            ConfigError: the format is not known.
        """
        own = text_config(content)
        quantization = read_quantization(own)
        if quantization is None:
            return cls({}, {})
        if own is not content:
            quantization = dataclasses.replace(quantization, prefix=PREFIX)
        weights = weights_by_name(Transformer(dataclasses.replace(config, mtp_copies=())))
        found: dict[str, set[Format | None]] = defaultdict(set)
        mappings = {}
        for name, mapping in canonical_mappings(config).items():
            if mapping.weight in weights and weights[mapping.weight].contracting_dims:
                likeliest = () if quantization.exempts(name) else quantization.layouts_of(name)
                found[mapping.weight].add(next(iter(likeliest), None))
                mappings[mapping.weight] = mapping
        several = {name: layouts for name, layouts in found.items() if layouts != {None}}
        formats = {name: next(iter(layouts)) if len(layouts) == 1 else None for name, layouts in several.items()}
        return cls(formats, {name: mappings[name] for name in formats})

    def quantized_weights(self) -> dict[str, Format | None]:
        """As `Source.quantized_weights`."""
        return dict(self.formats)

    def mapping(self, weight: str) -> TensorMapping:
        """As `Source.mapping`."""
        return self.mappings[weight]

    def describe(self) -> str:
        """The formats in words."""
        return ", ".join(sorted({layout.describe() for layout in self.formats.values() if layout is not None}))

    @property
    def kind(self) -> str | None:
        """`fp8`, `int8`, `int4`, ...; where there are several, joined; None where nothing is quantised."""
        kinds = {layout.describe().split()[0] for layout in self.formats.values() if layout is not None}
        return "+".join(sorted(kinds)) or None
