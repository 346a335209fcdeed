"""Which implementation of `files.Directory` reads a place: memory maps for a path, requests for a URL."""

from __future__ import annotations

import os

from glm_jax.checkpoint.files import Directory, is_url
from glm_jax.checkpoint.local_files import LocalDirectory
from glm_jax.checkpoint.remote import RemoteDirectory


def open_directory(place: str | os.PathLike[str]) -> Directory:
    """The directory at a path or a URL.

    Raises:
        CheckpointError: the path is not a directory, or the package that reads this kind of URL is not installed.
    """
    return RemoteDirectory(place) if isinstance(place, str) and is_url(place) else LocalDirectory(place)
