"""The lines that load a model as it was planned: of the command line, and of Python."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_jax.cli.plan_model import PlannedModel
    from glm_jax.planning import Job, MeshPlan
    from glm_jax.planning.kinds import Device

DIRECTORY = "DIR"  # stands for a checkpoint of a preset
PROMPT = "Hello"
TRAIN = "train"


def loading_lines(model: PlannedModel, job: Job, entry: MeshPlan, device: Device) -> dict[str, Any]:
    """What to type for a mesh of a plan.

    Returns `prepare` (commands that make the planned format first, mostly none), `command` (None for training, which
    has no verb) and `python`; `DIR` in them is a checkpoint's directory where --model named a preset.
    """
    directory, prepare = _prepared(model, job)
    options = _options(model, job, entry, device)
    flags = {"model": directory, **options, "prompt": PROMPT}
    command = ["glm-jax", "generate", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    return {
        "prepare": prepare,
        "command": None if job.kind == TRAIN else shlex.join(command),
        "python": _python(directory, options),
    }


def _prepared(model: PlannedModel, job: Job) -> tuple[str, list[str]]:
    """The directory to load, and the commands that make it."""
    directory = DIRECTORY if model.preset else model.name
    if job.storage.narrow is None:
        return directory, []
    commands, source = [], directory
    if not model.convertible:
        source = f"{directory}-hf"
        commands.append(["glm-jax", "export", "--source", directory, "--target", source])
    target = f"{directory.rstrip('/')}-{job.weights}"
    commands.append(["glm-jax", "convert", "--source", source, "--target", target, "--quantize", job.weights])
    return target, [shlex.join(command) for command in commands]


def _options(model: PlannedModel, job: Job, entry: MeshPlan, device: Device) -> dict[str, str]:
    """The flags of a verb that loads."""
    from glm_jax.sharding.presets import name_of

    options = {"mesh": ",".join(f"{axis}={size}" for axis, size in entry.mesh.shape.items())}
    rules = name_of(entry.rules) or "default"
    if rules != "default":
        options["rules"] = rules
    if job.dtype.name != ("float32" if device.platform == "cpu" else "bfloat16"):
        options["dtype"] = job.dtype.name
    if model.stored is not None and not job.quantized:
        options["quantized"] = "dequantize"
    return options


def _python(directory: str, options: dict[str, str]) -> str:
    arguments = [repr(directory), f"mesh=glm_jax.make_mesh({options['mesh'].replace(',', ', ')})"]
    imports = "import glm_jax"
    if "rules" in options:
        imports += "; from glm_jax.sharding import rules_named"
        arguments.append(f"rules=rules_named({options['rules']!r})")
    arguments += [f"{name}={options[name]!r}" for name in ("dtype", "quantized") if name in options]
    return f"{imports}; model = glm_jax.load({', '.join(arguments)})"
