"""The devices that jax sees, or one line that says why it sees none and what would give some.

jax itself ends with an AssertionError, or with its list of backends, where the platform of JAX_PLATFORMS has no plugin.
"""

from __future__ import annotations

import importlib.util

import jax

from glm_jax.errors import Error

# Platform, as JAX_PLATFORMS names it -> what it is called, the modules of its plugin, and how to install one.
_PLUGINS = {
    "cuda": (
        "CUDA",
        ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        "pip install 'glm_jax[cuda13]' (or 'glm_jax[cuda12]' for a driver of CUDA 12)",
    ),
    "tpu": ("TPU", ("libtpu",), "pip install 'glm_jax[tpu]'"),
    "rocm": ("ROCm", ("jax_rocm7_plugin", "jax_rocm60_plugin"), "install jax's plugin for ROCm"),
}
_ALIASES = {"gpu": "cuda"}


def find_devices() -> list[jax.Device]:
    """The devices that jax sees.

    Raises:
        Error: the platform asked for does not start; one line that says what to install or to set.
    """
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # jax asserts that a platform of JAX_PLATFORMS has a device
        raise Error(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Why jax does not start, and what to do about it."""
    asked = jax.config.values["jax_platforms"]
    words = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0] or "none of its platforms has a device"
    if not asked:
        return f"jax finds no devices: {words}"
    line = f"JAX_PLATFORMS={asked}: jax does not start"
    for name in asked.split(","):
        name = _ALIASES.get(name, name)
        if name not in _PLUGINS or not _concerns(words, name, asked):
            continue
        title, modules, install = _PLUGINS[name]
        if not any(importlib.util.find_spec(module) for module in modules):
            return f"{line}, because its {title} plugin is not installed: {install}, or set JAX_PLATFORMS=cpu"
    return f"{line} ({words}); right would be a platform that this machine has, such as JAX_PLATFORMS=cpu"


def _concerns(words: str, name: str, asked: str) -> bool:
    """Whether jax's complaint is about a platform; it names one, or there was only one."""
    return f"'{name}'" in words or "," not in asked or "'" not in words
