"""The demo model's text files, built once for all tests of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import demo_tokenizer


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    demo_tokenizer.build(directory)
    return directory
