"""`python -m glm_jax.cli` is `glm-jax`."""

from __future__ import annotations

import sys

from glm_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
