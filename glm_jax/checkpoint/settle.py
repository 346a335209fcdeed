"""What the tensors of a source tell about its architecture, which config.json does not say, or says wrongly.

The MTP layer: transformers leaves it out of what it saves, quantised or not, and keeps the key that promises it; other
tools keep the layer and lose the key. Its copies of the embedding and the head, which no key mentions. And the head: if
it is stored it is used, also where config.json ties it to the embedding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from glm_jax.checkpoint.names import HEAD, mtp_copy_names, mtp_prefix
from glm_jax.configs import ModelConfig

# What an MTP layer has beside a decoder layer, under whatever suffix its quantisation gives the matrix.
_OF_MTP = re.compile(r"model\.layers\.(\d{1,6})\.(?:enorm|hnorm|eh_proj|shared_head)\.")


def settle(config: ModelConfig, names: Collection[str]) -> tuple[ModelConfig, list[str]]:
    """The configuration of a source with tensors of these names, with a note for each change of what config.json says.

    Raises:
        ConfigError: the source has more MTP layers than are supported.
    """
    notes = []
    if config.tie_embeddings and HEAD in names:
        config = dataclasses.replace(config, tie_embeddings=False)
        notes.append(f"config.json ties the head to the embedding, but {HEAD} is stored: the model uses it")
    count, named = _mtp_layers(config, names), config.num_mtp_layers
    if count != named:
        config = dataclasses.replace(config, num_mtp_layers=count, mtp_copies=())
        prefix = mtp_prefix(config)
        if count:
            notes.append(f"the config names no MTP layer but there are tensors {prefix}*: the model has it")
        else:
            notes.append(f"the config names an MTP layer but there is no tensor {prefix}*: going on without MTP")
    if not config.num_mtp_layers:
        return config, notes
    copies = tuple(kind for kind, name in mtp_copy_names(config).items() if name in names)
    return dataclasses.replace(config, mtp_copies=copies), notes


def _mtp_layers(config: ModelConfig, names: Collection[str]) -> int:
    """How many MTP layers have tensors, at least some; they follow the decoder layers without a gap."""
    numbers = {int(match[1]) for name in names if (match := _OF_MTP.match(name)) is not None}
    count = 0
    while config.num_layers + count in numbers:
        count += 1
    if count == 0 and any(name.startswith(mtp_prefix(config)) for name in names):
        return config.num_mtp_layers  # something is wrong with the layer, which comparing its tensors will tell
    return count
