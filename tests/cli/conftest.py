"""The checkpoints that the verbs work on, and a way to call the program and see what it says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_jax.cli.main import main
from tests.cli.checkpoints import write_checkpoint


@dataclasses.dataclass(frozen=True)
class Said:
    """How a call of the program ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line on stderr of a call that was refused."""
        assert self.status == 2, (self.out, self.err)
        assert self.out == ""
        (line,) = self.err.splitlines()
        return line.removeprefix("glm-jax: error: ")


@pytest.fixture
def call(capfd) -> Callable[..., Said]:
    """Runs `glm-jax ARGUMENTS` in this process."""

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Said(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def hf(tmp_path_factory) -> Path:
    """A Hugging Face checkpoint of several shards."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "hf")


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Path:
    """The same checkpoint without tokenizer, template and generation settings."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "bare", text=False)


@pytest.fixture(scope="session")
def orbax(hf, tmp_path_factory) -> Path:
    """The checkpoint converted."""
    target = tmp_path_factory.mktemp("checkpoints") / "orbax"
    assert main(["convert", f"--source={hf}", f"--target={target}"]) == 0
    return target
