"""The files beside a checkpoint's tensors (config, tokenizer, template, generation settings), on a disk.

Tokenizers open files by their paths; of a checkpoint under a URL these few are copied to a directory for the while.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from glm_jax.checkpoint.conversion import copy_assets
from glm_jax.checkpoint.directories import open_directory
from glm_jax.checkpoint.files import is_url
from glm_jax.errors import Error


@contextlib.contextmanager
def text_files(checkpoint: str | os.PathLike[str]) -> Iterator[Path]:
    """The checkpoint's directory, or of one under a URL a directory with its files, gone after the block.

    Errors of the block name the URL, not the copy.

    Raises:
        CheckpointError: the files under the URL cannot be read.
    """
    if not is_url(checkpoint):
        yield Path(checkpoint)
        return
    with tempfile.TemporaryDirectory(prefix="glm_jax-") as place:
        url, copy = os.fspath(checkpoint).rstrip("/"), Path(place, "checkpoint")
        copy_assets(open_directory(url), copy)
        try:
            yield copy
        except Error as error:
            raise type(error)(str(error).replace(str(copy), url)) from error
