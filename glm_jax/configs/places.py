"""What to say of a place that is no directory: a repository of the Hub by its name is the likeliest thing meant."""

from __future__ import annotations

import os
import re
from pathlib import Path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def hub_hint(place: str | os.PathLike[str]) -> str:
    """How to get at a repository of the Hugging Face Hub, if a place looks like the name of one; else ""."""
    name = os.fspath(place)
    if not _REPOSITORY.fullmatch(name) or Path(name).parent.exists():
        return ""
    return (
        f"; for the repository of that name on the Hugging Face Hub give hf://{name} (read range by range: "
        f"pip install 'glm_jax[remote]' huggingface_hub), or download it: hf download {name} "
        f"--local-dir {name.partition('/')[2]}"
    )
