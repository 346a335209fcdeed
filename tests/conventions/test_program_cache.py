"""The cache of compiled programs that the tests share: child processes use it, and what is damaged there fails none."""

from __future__ import annotations

import os

import jax

from tests import processes

PROGRAM = """
    import jax, jax.numpy as jnp
    print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).sum())
"""


def test_it_is_that_of_this_process_and_of_its_children():
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    child = processes.said("import jax; print(jax.config.jax_compilation_cache_dir)")
    assert child.strip() == jax.config.jax_compilation_cache_dir


def test_damaged_entries_are_compiled_anew_without_a_word(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = processes.run(processes.command(PROGRAM), **cache)
    entries = sorted(tmp_path.glob("*-cache"))
    assert len(entries) >= 2
    for number, entry in enumerate(entries):
        entry.write_bytes(entry.read_bytes()[:20] if number % 2 else b"of something else")
    again = processes.run(processes.command(PROGRAM), **cache)
    assert (first.returncode, first.stderr) == (again.returncode, again.stderr) == (0, "")
    assert first.stdout == again.stdout
