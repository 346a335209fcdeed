"""Show on which meshes of a number of devices a model fits.

For every mesh that divides the model: the bytes of weights and cache on each device. Activations and the compiler's
scratch space come on top and are not counted. Nothing is loaded and no device is needed.
"""

from __future__ import annotations

import math
from typing import Any

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.cli.shared_flags import DTYPES, define_integer, define_json, define_number, need
from glm_jax.errors import InputError

GIB = 2**30
LENGTH = 4096
MAX_DEVICES = 100_000


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""
    text = "a known model such as glm-4.5-air, or the directory of a checkpoint"
    absl_flags.DEFINE_string("model", None, text, flag_values=flags)
    define_integer(flags, "devices", None, "number of devices")
    define_number(flags, "memory", None, "of each device, in GiB")
    define_integer(flags, "batch", 1, "sequences at a time")
    text = f"tokens of each sequence, prompt and answer; by default {LENGTH}, or the model's positions"
    define_integer(flags, "length", None, text)
    absl_flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "of weights and cache", flag_values=flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """List the meshes of --devices for --model."""
    need(flags, "model", "devices", "memory")
    for name in ("devices", "memory", "batch", "length"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be above 0, and finite, not {value}")
    if flags.devices > MAX_DEVICES:
        raise InputError(f"--devices must be at most {MAX_DEVICES}, not {flags.devices}")
    from glm_jax import checkpoint
    from glm_jax.cli import mesh_plan
    from glm_jax.cli.loading import named_config

    config = named_config(flags.model) or checkpoint.open_source(flags.model).config
    length = min(LENGTH, config.max_positions) if flags.length is None else flags.length
    if length > config.max_positions:
        raise InputError(f"--length {length} exceeds the model's {config.max_positions} positions")
    request = mesh_plan.Request(config, flags.dtype, flags.batch, length)
    limit = int(flags.memory * GIB)
    meshes: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for mesh in mesh_plan.meshes(flags.devices):
        try:
            weights, cache = mesh_plan.bytes_per_device(request, mesh)
        except mesh_plan.ShardingError as error:
            refused.append({"mesh": dict(mesh.shape), "reason": str(error)})
            continue
        total = weights + cache
        found = {"weights": weights, "cache": cache, "total": total}
        meshes.append({"mesh": dict(mesh.shape), "bytes_per_device": found, "fits": total <= limit})
    meshes.sort(key=lambda entry: entry["bytes_per_device"]["total"])
    if not flags.json:
        _print(meshes, refused)
    return {"meshes": meshes, "refused": refused}


def _print(meshes: list[dict[str, Any]], refused: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [("mesh", "weights", "cache", "GiB a device", "")]
    for entry in meshes:
        sizes = [f"{size / GIB:.2f}" for size in entry["bytes_per_device"].values()]
        rows.append((_written(entry["mesh"]), *sizes, "fits" if entry["fits"] else "does not fit"))
    if meshes:
        print(printing.columns(rows))
        print("activations and the compiler's scratch space come on top")
    if refused:
        print(f"{len(refused)} meshes do not divide the model:")
        print(printing.columns([(_written(entry["mesh"]), entry["reason"]) for entry in refused], indent="  "))


def _written(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())
