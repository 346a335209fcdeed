"""Directories appear whole or not at all, and the file system's refusals are one clear line."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from glm_jax.checkpoint import atomic
from glm_jax.checkpoint.atomic import check_free_space, format_bytes, new_directory, reporting_os_errors
from glm_jax.errors import CheckpointError


def test_success_publishes_everything_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "out"
    with new_directory(target) as partial:
        assert partial.parent == target.parent and partial.name.startswith("out.partial-")
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "no", "/src")]
)
def test_failure_removes_everything_and_passes_the_exception_on(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise error
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_an_empty_target_is_taken_and_a_link_to_one_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_directory(tmp_path / "link") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").exists()


def test_a_target_with_contents_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, words in (("full", "exists and is not empty"), ("file", "exists and is not a directory")):
        with pytest.raises(CheckpointError, match=words), new_directory(tmp_path / name):
            raise AssertionError("the body must not run")
    assert (tmp_path / "full" / "precious").exists()
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_a_target_filled_meanwhile_keeps_both(tmp_path: Path) -> None:
    words = r"finished output is kept at .*out\.partial-"
    with pytest.raises(CheckpointError, match=words) as caught, new_directory(tmp_path / "out") as partial:
        (partial / "mine").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("y")
    assert (tmp_path / "out" / "theirs").exists()
    assert (Path(str(caught.value).split("kept at ")[1]) / "mine").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left on the device .*7.0 GB needed"),
        (errno.EROFS, "read-only"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_a_refusing_file_system_is_one_line(
    tmp_path: Path, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "check_free_space", lambda *_: None)
    with pytest.raises(CheckpointError, match=words) as caught, new_directory(tmp_path / "out", bytes_needed=7 * 10**9):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value) and str(tmp_path / "out") in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_permission_denied_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "no", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"permission denied"), new_directory(tmp_path / "out"):
        pass


def test_an_error_that_names_its_file_is_reported_with_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'gone'}: No such file"), reporting_os_errors(tmp_path):
        os.stat(tmp_path / "gone")


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CheckpointError, match=r"needs .* are free there"):
        check_free_space(tmp_path / "not" / "yet", free * 2)
    with pytest.raises(CheckpointError, match="needs"), new_directory(tmp_path / "out", bytes_needed=free * 2):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_999, "1.0 MB"),
        (213 * 10**9, "213.0 GB"),
        (2 * 10**12, "2.0 TB"),
    ],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert format_bytes(count) == text
