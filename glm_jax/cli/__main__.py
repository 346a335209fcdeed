"""The program: `glm-jax`, or `python -m glm_jax.cli`. Ctrl-C ends it in one line from the first moment on."""

from __future__ import annotations

import sys

from glm_jax.cli import interrupts


def main() -> int:
    """Run the program on the process's arguments and return its exit status."""
    with interrupts.end_the_process():
        from glm_jax.cli import main as program

        return program.main()


if __name__ == "__main__":
    sys.exit(main())
