"""A platform that jax cannot start: one line that says what to install, from each verb and from Python."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests import processes

CUDA = "JAX_PLATFORMS=cuda: jax does not start, because its CUDA plugin is not installed: pip install 'glm_jax[cuda13]'"
WITHOUT_CUDA = pytest.mark.skipif(
    any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))), reason="the CUDA plugin is here"
)
FROM_PYTHON = """
import sys
import glm_jax
for call in (glm_jax.load, glm_jax.Chat, lambda _: glm_jax.make_mesh(), lambda _: glm_jax.make_mesh(tensor=2)):
    try:
        call(sys.argv[1])
    except glm_jax.Error as error:
        print(error)
"""


def complaint(*arguments: object, platforms: str) -> str:
    """What a process says that is refused."""
    done = processes.run([sys.executable, "-m", "glm_jax.cli", *map(str, arguments)], JAX_PLATFORMS=platforms)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("glm-jax: error: ")


@WITHOUT_CUDA
@pytest.mark.parametrize("verb", [["doctor"], ["generate", "--tokens=5"], ["chat", "--message=hello"]])
def test_every_verb_that_computes_says_what_to_install(hf, verb):
    assert complaint(*verb, f"--model={hf}", platforms="cuda").startswith(CUDA)


@WITHOUT_CUDA
def test_python_says_the_same_in_an_error_of_the_package(hf):
    said = processes.said(FROM_PYTHON, hf, JAX_PLATFORMS="cuda").splitlines()
    assert len(said) == 4 and all(line.startswith(CUDA) for line in said)


@WITHOUT_CUDA
def test_verbs_that_compute_nothing_need_no_platform(hf, tmp_path):
    for arguments in (["inspect", f"--model={hf}"], ["convert", f"--source={hf}", f"--target={tmp_path / 'orbax'}"]):
        done = processes.run([sys.executable, "-m", "glm_jax.cli", *arguments], JAX_PLATFORMS="cuda")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("platforms", "beginning"),
    [
        ("cpu,quantum", "JAX_PLATFORMS=cpu,quantum: jax does not start (Unable to initialize backend 'quantum'"),
        ("quantum", "JAX_PLATFORMS=quantum: jax does not start (Unable to initialize backend 'quantum'"),
    ],
)
def test_an_unknown_platform_is_named(platforms, beginning):
    line = complaint("doctor", platforms=platforms)
    assert line.startswith(beginning) and line.endswith("such as JAX_PLATFORMS=cpu")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU plugin is here")
def test_a_tpu_without_its_library():
    line = complaint("doctor", platforms="tpu")
    assert line.startswith("JAX_PLATFORMS=tpu: jax does not start, because its TPU plugin is not installed")
    assert "pip install 'glm_jax[tpu]'" in line
