"""Check this machine, and with --model a checkpoint: versions, devices, the chosen operations, what the files lack.

A warning limits what can be done (a checkpoint without a tokenizer still continues token ids); an error stops it. With
an error the exit status is 1; where jax finds no devices at all nothing is checked, one line says what to install.

With --compare the checkpoint is held against a Hugging Face directory: the architecture, every tensor, stop ids and
vocabulary, and, against transformers (which must be installed), the residual stream layer by layer, the experts
chosen, the logits and the rotation. Any difference beyond the tolerance is an error.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import doctor_compare, printing
from glm_jax.cli.shared_flags import define_allow_unknown, define_json, define_processes
from glm_jax.errors import Error

if TYPE_CHECKING:
    from glm_jax.configs import ModelConfig

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
PREFILL_TOKENS = 4096
PLATFORMS = ("cpu", "gpu", "tpu")
OK, WARNING, ERROR = "ok", "warning", "error"
# A tool that a chat template must not leave out.
PROBE = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}}}


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""
    text = "directory of an Orbax or a Hugging Face checkpoint to check"
    absl_flags.DEFINE_string("model", None, text, flag_values=flags)
    doctor_compare.define_flags(flags)
    define_allow_unknown(flags)
    define_processes(flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Report on the machine, and on --model."""
    doctor_compare.check_flags(flags)
    from glm_jax import configs

    devices, checks = _devices()
    config, comparison = configs.get("glm-4.5-air"), None
    if flags.model is not None:
        found, source = check_checkpoint(flags.model, flags.allow_unknown)
        checks += found
        config = config if source is None else source.config
        if flags.compare is not None and source is not None:
            comparison, compared = doctor_compare.run(flags, source)
            checks += compared
    result = {
        "ok": all(check["status"] != ERROR for check in checks),
        "versions": _versions(),
        "processes": _processes(devices),
        "devices": devices,
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "operations": chosen_operations(config),
        "checks": checks,
    }
    if flags.compare is not None:
        result["comparison"] = comparison
    if not flags.json:
        _print(result)
    return result


def _versions() -> dict[str, str]:
    import glm_jax

    versions = {"glm_jax": glm_jax.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _devices() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every device with its memory, and a check that counts them.

    Raises:
        Error: jax finds none; what to install.
    """
    import jax

    from glm_jax.sharding import find_devices

    found = find_devices()
    devices = []
    local = {device.id for device in jax.local_devices()}  # the others' memory only their own processes know
    for device in found:
        memory = (device.memory_stats() or {}).get("bytes_limit") if device.id in local else None
        described = {"id": device.id, "platform": device.platform, "kind": device.device_kind}
        devices.append({**described, "process": device.process_index, "memory_bytes": memory})
    kinds = sorted({device["kind"] for device in devices})
    return devices, [_check("devices", OK, f"{len(devices)} of {', '.join(kinds)}")]


def _processes(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Which process of which job this is, and how many of the devices are its own."""
    from glm_jax.runtime import distributed

    running = distributed.start()
    own = sum(device["process"] == running.index for device in devices)
    return {**dataclasses.asdict(running), "local_devices": own, "global_devices": len(devices)}


def chosen_operations(config: ModelConfig) -> dict[str, dict[str, str]]:
    """The implementation of each operation by platform; of the routed experts for one token and for a long prompt."""
    from glm_jax.kernels import Load, ops_for_platform

    moe, found = config.moe, {}
    for name in PLATFORMS:
        ops = ops_for_platform(name)
        loads = {
            phase: Load(tokens, moe.num_experts_per_token, moe.num_experts, moe.num_experts)
            for phase, tokens in (("decode", 1), ("prefill", PREFILL_TOKENS))
        }
        found[name] = ops.to_json() | {f"experts, {phase}": ops.experts_for(loads[phase]).name for phase in loads}
    return found


def check_checkpoint(
    directory: str, allow_unknown: Collection[str] = ()
) -> tuple[list[dict[str, str]], doctor_compare.Source | None]:
    """The checks of a checkpoint's files, and the open checkpoint (None if it does not open)."""
    from glm_jax.checkpoint import open_source
    from glm_jax.checkpoint.files import is_url
    from glm_jax.checkpoint.text_files import text_files
    from glm_jax.serving import text_directory

    source = None
    try:
        source = open_source(directory, allow_unknown=allow_unknown)
    except Error as error:
        checks = [_check("checkpoint", ERROR, str(error)), *_faults_apart(directory, allow_unknown, str(error))]
        if not is_url(directory) and not Path(directory).is_dir():
            return checks, None
    else:
        opens = f"opens; {source.config.model_type}, {source.config.num_layers} layers"
        checks = [_check("checkpoint", OK, "; ".join([opens, *source.notes]))]
    try:
        with text_files(directory) as files:
            checks += _text_checks(text_directory(files), None if source is None else source.config)
    except Error as error:
        checks.append(_check("text", WARNING, str(error)))
    return [*checks, *([] if source is None else [*_quantized_weights(source), _router_bias(source)])], source


def _faults_apart(directory: str, allow_unknown: Collection[str], said: str) -> list[dict[str, str]]:
    """What is wrong with the parts of a directory that does not open, each looked at by itself.

    Opening stops at the first: a wrong config.json hides that files are missing.
    """
    from glm_jax.checkpoint.directories import open_directory
    from glm_jax.checkpoint.orbax_source import MANIFEST
    from glm_jax.checkpoint.quantization_config import read_quantization
    from glm_jax.checkpoint.safetensors_dir import SafetensorsDir
    from glm_jax.checkpoint.source import read_config_bytes
    from glm_jax.configs.hf import parse_config_json, read_hf
    from glm_jax.configs.hf_nested import text_config

    def content() -> dict[str, Any]:
        return parse_config_json(read_config_bytes(place), place.at("config.json"))

    looks: dict[str, Callable[[], Any]] = {
        "config.json": lambda: read_hf(content(), allow_unknown=allow_unknown),
        "quantisation": lambda: read_quantization(text_config(content())),
        "tensors": lambda: SafetensorsDir(place),
    }
    faults: list[dict[str, str]] = []
    try:
        place = open_directory(directory)
        if MANIFEST in place.names():
            return []
    except Error:
        return []
    for name, look in looks.items():
        try:
            look()
        except Error as error:
            if str(error) not in (said, *(fault["detail"] for fault in faults)):
                faults.append(_check(name, ERROR, str(error)))
    return faults


def _text_checks(files: Path, config: ModelConfig | None) -> list[dict[str, str]]:
    """The checks of what text needs: tokenizer, template and settings; `config` is None if it is not known."""
    from glm_jax.text import ChatTemplate, GenerationDefaults, load_tokenizer

    def tokenizer() -> tuple[str, str]:
        size = load_tokenizer(files).vocab_size
        if config is None:
            return OK, f"{size} ids"
        return (OK if size <= config.vocab_size else ERROR), f"{size} ids, the model has {config.vocab_size}"

    def template() -> tuple[str, str]:
        loaded = ChatTemplate.load(files)
        question = [{"role": "user", "content": "hello"}]
        loaded.render(question)
        try:
            loaded.render(question, tools=[PROBE])
        except Error as error:
            return WARNING, f"renders, but not with tools ({error})"
        return OK, "renders" if loaded.declares_tools else "renders; requests with tools take the package's template"

    def stop_tokens() -> tuple[str, str]:
        found = GenerationDefaults.load(files).stop_ids
        return (OK, ", ".join(map(str, found))) if found else (WARNING, "none: answers end by their length alone")

    def passed_over() -> list[dict[str, str]]:
        try:
            return [_check("generation settings", WARNING, note) for note in GenerationDefaults.load(files).notes]
        except Error:  # which the check of the stop tokens says
            return []

    looks = {"tokenizer": tokenizer, "chat template": template, "stop tokens": stop_tokens}
    return [*(_try(name, look) for name, look in looks.items()), *passed_over()]


def _try(name: str, look: Callable[[], tuple[str, str]]) -> dict[str, str]:
    try:
        return _check(name, *look())
    except Error as error:
        return _check(name, WARNING, str(error))


def _quantized_weights(source: doctor_compare.Source) -> list[dict[str, str]]:
    """Of a quantised checkpoint: which weights run as they are stored, on all devices here, and which not."""
    from glm_jax.checkpoint.quantized_load import plan_leaves
    from glm_jax.model.transformer import runtime_model
    from glm_jax.sharding import default_mesh, describe, find_devices

    if not source.quantized_weights():
        return []
    try:
        mesh = default_mesh(source.config, find_devices())
        leaves, notes = plan_leaves(source, runtime_model(source.config, mesh), mesh)
    except Error as error:
        return [_check("quantised weights", WARNING, str(error))]
    formats = ", ".join(dict.fromkeys(leaf.layout.describe() for leaf in leaves.values()))
    kept = f"{len(leaves)} run as they are stored" + (f" ({formats})" if leaves else "")
    detail = "; ".join([f"on mesh {describe(mesh)} {kept}", *notes])
    return [_check("quantised weights", WARNING if notes else OK, detail)]


def _router_bias(source: Any) -> dict[str, str]:
    """The router's correction bias must be float32 in storage: rounded to bfloat16 it chooses other experts."""
    from glm_jax.checkpoint.compare import router_bias_dtypes

    dtypes = router_bias_dtypes(source)
    if dtypes <= {"float32"}:
        return _check("router bias", OK, "float32")
    return _check("router bias", WARNING, f"stored as {', '.join(sorted(dtypes))}; rounded, it chooses other experts")


def _check(name: str, status: str, detail: str) -> dict[str, str]:
    return {"check": name, "status": status, "detail": detail}


def _print(result: dict[str, Any]) -> None:
    print(printing.columns(list(result["versions"].items())))
    print(f"\nhost memory {printing.format_bytes(result['host_memory_bytes'])}")
    processes = result["processes"]
    if processes["count"] > 1:
        where = f"found by {processes['detected_by']}, coordinator {processes['coordinator']}"
        print(f"process {processes['index']} of {processes['count']} ({where})")
    for device in result["devices"]:
        memory = device["memory_bytes"]
        size = "the host's" if memory is None else printing.format_bytes(memory)
        if device["process"] != processes["index"]:
            size = f"known to process {device['process']}"
        print(f"device {device['id']}: {device['kind']} ({device['platform']}), memory {size}")
    print("\noperations, by platform")
    names = list(result["operations"][PLATFORMS[0]])
    table = [("", *PLATFORMS)]
    table += [(name, *(result["operations"][each][name] for each in PLATFORMS)) for name in names]
    print(printing.columns(table, indent="  "))
    if result.get("comparison") is not None:
        doctor_compare.print_places(result["comparison"])
    print()
    print(printing.columns([(check["status"], check["check"], check["detail"]) for check in result["checks"]]))
