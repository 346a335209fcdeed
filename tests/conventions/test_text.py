"""What no file of the checkout may contain: the paths of one machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conventions.tree import ROOT, expect_none

# A home or work directory at the root, where a path can begin; "docs/home" and "example.org/home" are none.
MACHINE_PATH = re.compile(r"""(?<![\w./~$})<>-])/(?:work|root|home)(?=[/\s"'`),;:]|$)""", re.MULTILINE)
SKIPPED = {"build", "dist"}


def tracked_files(root: Path) -> Iterator[Path]:
    """Yields the files that git tracks or would add; without git, all but hidden directories and build outputs."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=root, capture_output=True, check=True)
        found = [root / name for name in done.stdout.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = list(root.rglob("*"))
    for path in found:
        parents = path.relative_to(root).parts[:-1]
        hidden = any(part.startswith(".") and part != ".ci" for part in parents)
        if path.is_file() and not hidden and not SKIPPED.intersection(parents):
            yield path


def path_faults(files: Iterator[Path]) -> list[str]:
    """Returns a line for every path of a machine in a text file."""
    faults = []
    for path in files:
        content = path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode("utf-8", errors="replace")
        for match in MACHINE_PATH.finditer(text):
            faults.append(f"{path}:{text.count(chr(10), 0, match.start()) + 1}: names a path of one machine")
    return faults


def test_no_file_names_a_path_of_one_machine():
    expect_none(path_faults(tracked_files(ROOT)))


def test_the_listing_finds_the_package_and_no_environment():
    names = {path.relative_to(ROOT).as_posix() for path in tracked_files(ROOT)}
    assert {"glm_jax/errors.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(".venv/")]


@pytest.mark.parametrize("directory", ["work", "root", "home"])
@pytest.mark.parametrize(
    ("template", "allowed"),
    [
        ("cd /{}", False),
        ('open("/{}/x.txt")', False),
        ("PATH=/{}/me/bin:/bin", False),
        ("see docs/{}/index.md", True),
        ("see example.org/{}/", True),
        ("$DIR/{}/x", True),
        ("/{}er/x", True),
    ],
)
def test_path_check_can_fail(tmp_path, directory, template, allowed):
    path = tmp_path / "a.py"
    path.write_text(template.format(directory))
    assert (path_faults(iter([path])) == []) is allowed
