"""convert and export: what they make and say, and every refusal of a bad source or target, with nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from glm_jax.checkpoint.safetensors_dir import INDEX_NAME, SafetensorsDir
from glm_jax.cli import printing

LAST_SHARD = "model-00002-of-00002.safetensors"


def tensors(directory: Path) -> dict[str, tuple]:
    with SafetensorsDir(directory) as files:
        return {info.name: (info.dtype, info.shape, array.tobytes()) for info, array in files.stream()}


def test_there_and_back(call, hf, orbax, tmp_path):
    said = call("export", f"--source={orbax}", f"--target={tmp_path / 'back'}")
    assert said.status == 0
    assert said.out.startswith("exported 101 tensors, 545.4 kB in ") and said.out.endswith(f"to {tmp_path / 'back'}\n")
    assert tensors(tmp_path / "back") == tensors(hf)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_report_as_json_and_notes(call, hf, tmp_path):
    source = shutil.copytree(hf, tmp_path / "source")
    shutil.copyfile(source / LAST_SHARD, source / "other.safetensors")
    said = call("convert", "--source", source, "--target", tmp_path / "out", "--json")
    report = said.json
    assert (report["tensors"], report["bytes"], report["target"]) == (101, 545_408, str(tmp_path / "out"))
    (note,) = report["notes"]
    assert "other.safetensors" in note
    assert f"note: {note}\n" in said.err


@pytest.fixture
def source(hf, tmp_path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(hf, tmp_path / "source")


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_header(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new, 1))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def name_outside(path: Path) -> None:
    index = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={**index, "lm_head.weight": "../secret.safetensors"})


def config_with(**changes):
    return lambda directory: edit_json(directory / "config.json", **changes)


def last_header_with(new: bytes):
    return lambda directory: edit_header(directory / LAST_SHARD, b'"BF16"', new)


DAMAGES = {
    "missing shard": (lambda d: (d / LAST_SHARD).unlink(), f"1 of 2 files missing: '{LAST_SHARD}'"),
    "truncated shard": (lambda d: truncate(d / LAST_SHARD), "is truncated: its header describes"),
    "wrong shape": (config_with(moe_intermediate_size=48), "of the wrong shape: model.layers"),
    "no such dtype": (last_header_with(b'"BF17"'), "dtype 'BF17' is none of"),
    "dtype that is no weight's": (last_header_with(b'"I16" '), "is I16, not BF16, F16, F32"),
    "index leaves the directory": (lambda d: name_outside(d / INDEX_NAME), "a plain file name under the directory"),
    "missing key": (config_with(n_routed_experts=None), "n_routed_experts=128"),
    "unknown key": (config_with(logit_scale=2.0), "may change what the model computes: logit_scale (--allow_unknown"),
    "sliding window": (config_with(sliding_window=4096), "which means attention to the last tokens only"),
    "architecture": (config_with(model_type="llama"), "model_type 'llama' is not supported"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "JSON"),
}


def test_an_unknown_key_passes_where_it_is_allowed(call, source, tmp_path):
    edit_json(source / "config.json", logit_scale=2.0, residual_scale=0.5)
    target, allow = tmp_path / "out", "--allow_unknown=logit_scale,residual_scale"
    said = "config.json: passed over as allowed, though they may change what the model computes: logit_scale (2.0)"
    assert "residual_scale (" in call("convert", f"--source={source}", f"--target={target}", "--dry_run", "--json").out
    notes = call("convert", f"--source={source}", f"--target={target}", "--verify", "--json", allow).json["notes"]
    assert any(note.startswith(said) for note in notes)
    assert call("convert", f"--source={source}", f"--target={target}", "--verify", "--json", allow).json["ok"]
    assert said in call("inspect", f"--model={source}", allow).err
    assert said in call("plan", f"--model={source}", "--device=h100", "--count=1", allow).err
    loading = ["generate", f"--model={source}", "--tokens=5", "--max_new_tokens=1", "--ignore_eos", "--mesh=data=1"]
    assert said in call(*loading, allow).err
    assert "logit_scale, residual_scale" in call(*loading).complaint


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_source_is_one_line_and_leaves_nothing(call, source, tmp_path, damage):
    change, complaint = DAMAGES[damage]
    change(source)
    assert complaint in call("convert", f"--source={source}", f"--target={tmp_path / 'out'}").complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_one_line_for_the_verbs_that_read_it(call, source, damage):
    change, complaint = DAMAGES[damage]
    change(source)
    assert complaint in call("inspect", f"--model={source}", "--json").complaint
    assert complaint in call("generate", f"--model={source}", "--tokens=5", "--json").complaint


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_target_that_holds_something_stays_as_it_is(call, hf, orbax, tmp_path, verb):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    source = hf if verb == "convert" else orbax
    said = call(verb, f"--source={source}", f"--target={tmp_path / 'taken'}")
    assert "exists and is not empty; name a new directory" in said.complaint
    assert [path.read_text() for path in (tmp_path / "taken").iterdir()] == ["years of work"]


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_target_that_is_a_file(call, hf, orbax, tmp_path, verb):
    (tmp_path / "file").write_text("text")
    said = call(verb, f"--source={hf if verb == 'convert' else orbax}", f"--target={tmp_path / 'file'}")
    assert "exists and is not a directory" in said.complaint


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_source_that_is_none(call, tmp_path, verb):
    said = call(verb, f"--source={tmp_path / 'nothing'}", f"--target={tmp_path / 'out'}")
    assert {"convert": "is not a directory", "export": "is no Orbax checkpoint"}[verb] in said.complaint
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_hugging_face_source(call, hf, tmp_path):
    said = call("export", f"--source={hf}", f"--target={tmp_path / 'out'}")
    assert "is no Orbax checkpoint of glm_jax" in said.complaint


@contextlib.contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: what a full disk does to a writer, for one process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_a_full_disk_is_one_line_and_nothing_has_the_final_name(call, hf, orbax, tmp_path, verb):
    source = hf if verb == "convert" else orbax
    with largest_file(10_000):
        said = call(verb, f"--source={source}", f"--target={tmp_path / 'out'}")
    assert "the file is larger than the file system or the process limit allows" in said.complaint
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [] or (left == ["out.partial-unfinished"] and "the same command goes on" in said.complaint)
    assert call(verb, f"--source={source}", f"--target={tmp_path / 'out'}").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_ctrl_c_says_how_to_go_on(call, hf, orbax, tmp_path, monkeypatch, verb):
    seen = []

    @contextlib.contextmanager
    def interrupted(what):
        def progress(done, total):
            seen.extend(path.name.partition("-")[0] for path in tmp_path.iterdir())
            if done > total / 2:
                raise KeyboardInterrupt

        yield progress

    monkeypatch.setattr(printing, "progress", interrupted)
    source = hf if verb == "convert" else orbax
    said = call(verb, f"--source={source}", f"--target={tmp_path / 'out'}")
    assert (said.status, said.out, set(seen)) == (130, "", {"out.partial"})
    assert "the same command goes on from there" in said.err
    monkeypatch.undo()
    assert call(verb, f"--source={source}", f"--target={tmp_path / 'out'}").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_chunk_is_named(call, orbax, tmp_path):
    damaged = shutil.copytree(orbax, tmp_path / "damaged")
    chunk = next(path for path in sorted((damaged / "default" / "head.weight").iterdir()) if path.name.startswith("c."))
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    assert "default/head.weight" in call("export", f"--source={damaged}", f"--target={tmp_path / 'out'}").complaint
    assert "default/head.weight" in call("generate", f"--model={damaged}", "--tokens=5").complaint
    assert not (tmp_path / "out").exists()
