"""Turn an Orbax checkpoint back into a Hugging Face checkpoint.

Tensors get the names and dtypes that they were converted from, or the form that --weights says; the target appears
when it is complete, and an export that was interrupted goes on with the same command.
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.cli.convert import summarize
from glm_jax.cli.shared_flags import define_json, need


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""
    absl_flags.DEFINE_string("source", None, "directory written by glm-jax convert", flag_values=flags)
    absl_flags.DEFINE_string("target", None, "directory to make; absent or empty", flag_values=flags)
    forms, text = ("bfloat16", "fp8-blocks", "fp8", "int8", "int4"), "write experts and dense projections in this form"
    absl_flags.DEFINE_enum(
        "weights", None, forms, f"{text}; by default as they are stored", case_sensitive=False, flag_values=flags
    )
    text = "size at which a new file begins"
    absl_flags.DEFINE_integer("max_shard_bytes", 5_000_000_000, text, lower_bound=1, flag_values=flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Export --source to --target."""
    need(flags, "source", "target")
    from glm_jax import checkpoint

    with printing.progress("exporting") as progress:
        report = checkpoint.export(
            flags.source,
            flags.target,
            weights=flags.weights,
            max_shard_bytes=flags.max_shard_bytes,
            progress=progress,
        )
    return summarize("exported", report, flags.target)
