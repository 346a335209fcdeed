"""Random checkpoints in Hugging Face's form, with the demo's tokenizer and template, for tests that need no sense."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from glm_jax import configs
from glm_jax.checkpoint.names import canonical_mappings
from glm_jax.checkpoint.safetensors import NUMPY_DTYPES, TensorSpec
from glm_jax.checkpoint.safetensors_writer import SafetensorsWriter
from glm_jax.configs import ModelConfig, to_hf
from tests.conventions.tree import ROOT

# Two layers and an MTP layer: what there is to compile, once of each.
CONFIG = dataclasses.replace(configs.get("tiny-glm"), num_layers=2, max_positions=512)
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHARD_BYTES = 300_000  # makes several shards of the checkpoint above


def write_checkpoint(
    directory: Path, config: ModelConfig = CONFIG, *, text: bool = True, router_bias: str = "F32"
) -> Path:
    """Writes a checkpoint with random weights (the same for the same configuration) and, if asked, its text files."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    mappings = canonical_mappings(config)
    dtypes = {name: router_bias if name.endswith("e_score_correction_bias") else "BF16" for name in mappings}
    plan = [TensorSpec(name, dtypes[name], mapping.shape) for name, mapping in mappings.items()]
    with SafetensorsWriter(directory, plan, max_shard_bytes=SHARD_BYTES) as writer:
        for spec in plan:
            writer.write(spec.name, (rng.standard_normal(spec.shape) * 0.1).astype(NUMPY_DTYPES[spec.dtype]))
    (directory / "config.json").write_text(json.dumps(to_hf(config)))
    for name in TEXT_FILES if text else ():
        shutil.copyfile(ROOT / "examples" / "demo_model" / name, directory / name)
    return directory
