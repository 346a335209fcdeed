"""Turn an Orbax checkpoint back into a Hugging Face checkpoint.

Tensors get the names and dtypes that they were converted from; the target appears when it is complete.
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
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Export --source to --target."""
    need(flags, "source", "target")
    from glm_jax import checkpoint

    with printing.progress("exporting") as progress:
        report = checkpoint.export(flags.source, flags.target, progress=progress)
    return summarize("exported", report, flags.target)
