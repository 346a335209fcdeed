"""Broken sources and impossible targets: one clear line each, nothing left behind, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint.orbax_source import MANIFEST
from glm_jax.errors import CheckpointError, ConfigError, Error
from tests import processes, published

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.1."
DOWN = f"{LAYER}mlp.experts.3.down_proj.weight"


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every entry below a directory with its bytes (None for directories and links)."""
    found = {}
    for path in sorted(directory.rglob("*")):
        plain = path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        found[str(path.relative_to(directory))] = path.read_bytes() if plain else None
    return found


def refused(directory: Path, action: Callable[[], Any]) -> str:
    """The one line with which an action is refused; the directory is as it was."""
    before = tree(directory)
    with pytest.raises(Error) as caught:
        action()
    assert tree(directory) == before
    line = str(caught.value)
    assert line and "\n" not in line and len(line) < 2000, line
    return line


def refused_source(directory: Path, error: type[Error] = CheckpointError) -> str:
    """The line with which conversion and loading both refuse the source `hf` in a directory."""
    line = refused(directory, lambda: glm_jax.convert(directory / "hf", directory / "out"))
    with pytest.raises(error) as caught:
        glm_jax.load(directory / "hf")
    assert str(caught.value) == line
    return line


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return published.checkpoint(tmp_path / "hf", shards=3)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return published.checkpoint(tmp_path / "hf")


def shard(directory: Path, number: int = 2) -> Path:
    return directory / f"model-{number:05d}-of-00003.safetensors"


def edit_index(directory: Path, **places: str | None) -> None:
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"].update(places)
    (directory / INDEX).write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], None], **config: Any) -> None:
    arrays = published.read(directory)
    change(arrays)
    published.write(directory, published.config_json(**config), arrays)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_missing_shard(tmp_path, sharded):
    shard(sharded).unlink()
    assert "1 of 3 files missing: 'model-00002-of-00003.safetensors'" in refused_source(tmp_path)


def test_missing_shards_without_an_index(tmp_path, sharded):
    shard(sharded).unlink()
    (sharded / INDEX).unlink()
    assert "1 of 3 files missing: 'model-00002-of-00003.safetensors'" in refused_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 1000, -1])
def test_a_truncated_shard(tmp_path, sharded, keep):
    data = shard(sharded).read_bytes()
    shard(sharded).write_bytes(data[:keep])
    line = refused_source(tmp_path)
    assert str(shard(sharded)) in line and "truncated" in line


def test_an_empty_set_of_tensors(tmp_path, single):
    (single / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "missing: model.embed_tokens.weight" in refused_source(tmp_path)


def test_a_directory_without_tensors(tmp_path, single):
    (single / "model.safetensors").unlink()
    assert "no *.safetensors file" in refused_source(tmp_path)


def test_a_git_lfs_pointer(tmp_path, single):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (single / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in refused_source(tmp_path)


def test_two_single_files(tmp_path, single):
    shutil.copyfile(single / "model.safetensors", single / "copy.safetensors")
    assert "2 safetensors files and no index" in refused_source(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_unreadable_file(tmp_path, single, name):
    (single / name).chmod(0)
    line = refused_source(tmp_path, Error)
    assert name in line and "ermission denied" in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_directory_in_place_of_a_file(tmp_path, single, name):
    (single / name).unlink()
    (single / name).mkdir()
    assert name in refused_source(tmp_path, Error)


# --- the index ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["../out.safetensors", "a/../../out.safetensors", "ABSOLUTE", "", ".", "..", "x\n.safetensors"]
)
def test_an_index_that_names_a_file_outside(tmp_path, sharded, place):
    shutil.copyfile(shard(sharded), tmp_path / "out.safetensors")
    edit_index(sharded, **{DOWN: str(tmp_path / "out.safetensors") if place == "ABSOLUTE" else place})
    assert "a plain file name under the directory is right" in refused_source(tmp_path)


def test_a_shard_that_is_a_link_out_of_the_directory(tmp_path, sharded):
    shutil.move(shard(sharded), tmp_path / "elsewhere.safetensors")
    shard(sharded).symlink_to(tmp_path / "elsewhere.safetensors")
    assert "is a link that leaves the directory" in refused_source(tmp_path)


def test_an_index_that_is_a_link_out_of_the_directory(tmp_path, sharded):
    shutil.move(sharded / INDEX, tmp_path / "elsewhere.json")
    (sharded / INDEX).symlink_to(tmp_path / "elsewhere.json")
    assert "is a link that leaves the directory" in refused_source(tmp_path)


def test_an_index_that_names_a_tensor_that_is_not_there(tmp_path, sharded):
    edit_index(sharded, extra="model-00001-of-00003.safetensors")
    assert "tensors that the index names and their file lacks: 'extra'" in refused_source(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "NaN"])
def test_a_broken_index(tmp_path, sharded, content):
    (sharded / INDEX).write_text(content)
    assert INDEX in refused_source(tmp_path)


# --- tensors --------------------------------------------------------------------------------------------------------


def test_a_wrong_shape(tmp_path, single):
    rewrite(single, lambda arrays: arrays.update({DOWN: arrays[DOWN].T.copy()}))
    assert f"1 of the wrong shape: {DOWN} is [32, 64], should be [64, 32]" in refused_source(tmp_path)


def test_a_dtype_that_does_not_exist(tmp_path, single):
    edit_header(single / "model.safetensors", lambda header: header[DOWN].update(dtype="BF17"))
    line = refused_source(tmp_path)
    assert DOWN in line and "'BF17' is none of" in line


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.uint8])
def test_a_dtype_that_is_not_supported(tmp_path, single, dtype):
    rewrite(single, lambda arrays: arrays.update({DOWN: arrays[DOWN].astype(dtype)}))
    assert f"1 of a dtype that is not supported: {DOWN} is " in refused_source(tmp_path)


def test_an_extra_tensor(tmp_path, single):
    rewrite(single, lambda arrays: arrays.update({"model.extra.weight": np.ones(3, np.float32)}))
    assert "1 not known to this architecture: model.extra.weight" in refused_source(tmp_path)


def test_every_missing_tensor_is_named(tmp_path, single):
    gone = [DOWN, "model.norm.weight", "lm_head.weight", f"{LAYER}self_attn.q_norm.weight"]
    rewrite(single, lambda arrays: [arrays.pop(name) for name in gone])
    line = refused_source(tmp_path)
    assert "4 missing" in line and all(name in line for name in gone)


def test_every_kind_of_trouble_is_in_one_line(tmp_path, single):
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.extra.weight"] = np.ones(3, np.float32)
        arrays["model.norm.weight"] = np.ones(3, np.float32)
        del arrays[DOWN]

    rewrite(single, change)
    line = refused_source(tmp_path)
    assert "model.extra.weight" in line and "model.norm.weight is [3], should be [64]" in line and DOWN in line


@pytest.mark.parametrize("number", [4, 46, 92])
def test_a_layer_under_another_number(tmp_path, single, number):
    def move(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if name.startswith("model.layers.3.")]:
            arrays[name.replace("layers.3.", f"layers.{number}.")] = arrays.pop(name)

    rewrite(single, move)
    line = refused_source(tmp_path)
    assert "not known to this architecture" in line and f"model.layers.{number}." in line


def test_one_tensor_under_another_number(tmp_path, single):
    wrong = DOWN.replace("layers.1", "layers.0")
    rewrite(single, lambda arrays: arrays.update({wrong: arrays.pop(DOWN)}))
    line = refused_source(tmp_path)
    assert f"1 not known to this architecture: {wrong}" in line and f"1 missing: {DOWN}" in line


def test_a_part_of_the_mtp_layer(tmp_path, single):
    gone = "model.layers.3.eh_proj.weight"
    rewrite(single, lambda arrays: arrays.pop(gone))
    assert f"1 missing: {gone}" in refused_source(tmp_path)


def test_a_layer_too_many_that_is_no_mtp_layer(tmp_path, single):
    rewrite(single, without_mtp_tensors, num_nextn_predict_layers=0)
    assert "not known to this architecture: model.layers.3." in refused_source(tmp_path)


def without_mtp_tensors(arrays: dict[str, np.ndarray]) -> None:
    for name in list(arrays):
        if name.startswith("model.layers.3.") and any(part in name for part in ("norm.", "eh_proj", "shared_head")):
            del arrays[name]


def test_more_mtp_layers_than_one(tmp_path, single):
    rewrite(single, lambda arrays: arrays.update({"model.layers.4.enorm.weight": np.ones(64, np.float32)}))
    assert "num_mtp_layers 2 is not supported: 0 or 1" in refused_source(tmp_path, ConfigError)


def test_experts_stored_fused_and_one_by_one(tmp_path, single):
    arrays = published.read(single)
    both = {**arrays, f"{LAYER}mlp.experts.down_proj": published.fused(arrays)[f"{LAYER}mlp.experts.down_proj"]}
    published.write(single, published.config_json(), both)
    assert "stored twice (fused and for each expert)" in refused_source(tmp_path)


# --- config.json ----------------------------------------------------------------------------------------------------


def write_config(directory: Path, content: Any) -> None:
    (directory / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))


# Each decides a shape, so that transformers' default, that of a published model, does not fit the tensors.
SHAPES = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "use_qk_norm", "vocab_size")


@pytest.mark.parametrize(
    "key", ["hidden_size", "moe_intermediate_size", "n_routed_experts", "use_qk_norm", "vocab_size"]
)
def test_a_config_without_a_key_that_its_tensors_contradict(tmp_path, single, key):
    content = published.config_json()
    del content[key]
    write_config(single, content)
    line = refused_source(tmp_path)
    assert f"left out, so that transformers' defaults for glm4_moe hold: {key}=" in line


def test_a_config_without_a_model_type(tmp_path, single):
    content = published.config_json()
    del content["model_type"]
    write_config(single, content)
    assert "model_type is missing" in refused_source(tmp_path, ConfigError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096, which means attention to the last tokens only"),
        ({"logit_scale": 2.0}, "may change what the model computes: logit_scale (--allow_unknown=logit_scale passes"),
        ({"quantization": {"bits": 4}}, "quantization is MLX's own quantisation, which is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sliding"),
        ({"n_group": None}, "n_group is null, not of type int"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a finite number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta is not a number in rope_parameters"),
        ({"model_type": "glm5_moe"}, "model_type 'glm5_moe' is not supported; supported: glm4_moe"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which means another activation in every MLP; supported: 'si"),
        ({"hidden_size": "64"}, "hidden_size is '64', not of type int"),
        ({"hidden_size": True}, "hidden_size is True, not of type int"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, not of type int"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"num_key_value_heads": 3}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_token 9 exceeds num_experts 8"),
        ({"n_group": 3}, "num_groups 3 does not divide num_experts 8"),
        ({"first_k_dense_replace": -1}, "num_dense_layers -1 is not within 0..3"),
        ({"num_nextn_predict_layers": 2}, "num_mtp_layers 2 is not supported: 0 or 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6', not of type float"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0 at the top but 1000000.0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'; known: fp8, compressed-tensors"),
    ],
)
def test_a_config_that_cannot_be(tmp_path, single, changes, words):
    write_config(single, {**published.config_json(), **changes})
    assert words in refused_source(tmp_path, ConfigError)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"glm4_moe"', "[" * 100_000, '{"model_type": "\\ud800"}'])
def test_a_config_that_is_no_object(tmp_path, single, content):
    write_config(single, content)
    refused_source(tmp_path, ConfigError)


def test_a_config_that_is_not_there(tmp_path, single):
    (single / "config.json").unlink()
    assert "config.json does not exist" in refused_source(tmp_path, ConfigError)


def test_all_trouble_of_a_config_is_in_one_line(tmp_path, single):
    content = published.config_json(unheard=1, vocab_size="a")
    content |= {"n_group": "1", "rope_theta": None}
    write_config(single, content)
    line = refused_source(tmp_path, ConfigError)
    assert all(part in line for part in ("n_group is '1'", "rope_theta is null", "unheard", "vocab_size is 'a'"))


# --- the target -----------------------------------------------------------------------------------------------------


def test_a_target_that_holds_something(tmp_path, single):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert "exists and is not empty" in refused(tmp_path, lambda: glm_jax.convert(single, tmp_path / "out"))


def test_a_target_that_is_a_file(tmp_path, single):
    (tmp_path / "out").write_text("x")
    assert "exists and is not a directory" in refused(tmp_path, lambda: glm_jax.convert(single, tmp_path / "out"))


def test_a_target_that_is_the_source(tmp_path, single):
    assert "exists and is not empty" in refused(tmp_path, lambda: glm_jax.convert(single, single))


@pytest.mark.parametrize("place", ["out", "deep/er/out"])
def test_a_target_inside_the_source(tmp_path, single, place):
    """The result would become part of what it was made from."""
    assert "inside" in refused(tmp_path, lambda: glm_jax.convert(single, single / place))


def test_a_source_that_is_not_there(tmp_path):
    assert "is not a directory" in refused(tmp_path, lambda: glm_jax.convert(tmp_path / "no", tmp_path / "out"))
    assert "is not a directory" in refused(tmp_path, lambda: glm_jax.load(tmp_path / "no"))
    assert "is no Orbax checkpoint" in refused(tmp_path, lambda: glm_jax.export(tmp_path / "no", tmp_path / "out"))


def test_a_target_below_a_file(tmp_path, single):
    (tmp_path / "file").write_text("x")
    assert "file" in refused(tmp_path, lambda: glm_jax.convert(single, tmp_path / "file" / "out"))


RUN = """
    import resource, signal, sys
    import glm_jax
    verb, source, target, limit = sys.argv[1:]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        getattr(glm_jax, verb)(source, target)
    except glm_jax.Error as error:
        print(error)
"""


def test_a_full_disk(tmp_path, single):
    """On a real file system of 1 MB where the test may mount one; else the process may write no larger file."""
    glm_jax.convert(single, tmp_path / "orbax")
    place = tmp_path / "small"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        for verb, source in (("convert", single), ("export", tmp_path / "orbax")):
            line = processes.said(RUN, verb, source, place / "out", 0 if mounted else 4000)
            assert len(line.splitlines()) == 1, line
            assert ("free" if mounted else "larger than") in line and str(place / "out") in line
            assert os.listdir(place) == []
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_midway(tmp_path, single):
    """The check beforehand is no promise: another process may take the room. A limit on file sizes stands for it.

    What a conversion had done by then is kept for the next start of it, and nothing has the final name.
    """
    glm_jax.convert(single, tmp_path / "orbax")
    for verb, source in (("convert", single), ("export", tmp_path / "orbax")):
        before = tree(tmp_path)
        line = processes.said(RUN, verb, source, tmp_path / "out", 10_000)
        assert len(line.splitlines()) == 1 and "larger than" in line and str(tmp_path / "out") in line
        assert {path for path in tree(tmp_path) if ".partial-unfinished" not in str(path)} == set(before)
        assert (tree(tmp_path) == before) or "the same command goes on from there" in line
        getattr(glm_jax, verb)(source, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        assert tree(tmp_path) == before


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_is_killed_leaves_no_final_name(tmp_path, single, end):
    program = """
        import signal, sys
        import glm_jax
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        def progress(done, total):
            if done > total // 2:
                print("half", flush=True)
                sys.stdin.read()
        glm_jax.convert(sys.argv[1], sys.argv[2], progress=progress)
    """
    command = processes.command(program, single, tmp_path / "out")
    with processes.started(command, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.send_signal(end)
        process.communicate(timeout=processes.GIVE_UP)
    assert process.returncode != 0
    left = set(os.listdir(tmp_path)) - {"hf"}
    assert "out" not in left and all(name.startswith("out.partial-") for name in left)
    glm_jax.convert(single, tmp_path / "out")
    assert glm_jax.load(tmp_path / "out").config.num_layers == 3


# --- a damaged Orbax directory --------------------------------------------------------------------------------------


@pytest.fixture
def orbax(tmp_path: Path, single: Path) -> Path:
    glm_jax.convert(single, tmp_path / "orbax")
    return tmp_path / "orbax"


def refused_orbax(directory: Path) -> str:
    """The line with which export refuses the directory `orbax`; loading refuses it too."""
    with pytest.raises(CheckpointError) as caught:
        glm_jax.load(directory / "orbax")
    assert "\n" not in str(caught.value)
    return refused(directory, lambda: glm_jax.export(directory / "orbax", directory / "back"))


def chunk(orbax: Path) -> Path:
    return orbax / "default" / "moe.moe.experts.gate_up" / "c.1.3.0.0.0"


def test_a_flipped_byte(tmp_path, orbax):
    data = bytearray(chunk(orbax).read_bytes())
    data[len(data) // 2] ^= 1
    chunk(orbax).write_bytes(data)
    assert "moe.moe.experts.gate_up" in refused_orbax(tmp_path)


def test_a_missing_chunk(tmp_path, orbax):
    chunk(orbax).unlink()
    assert "moe.moe.experts.gate_up" in refused_orbax(tmp_path)


def test_a_truncated_chunk(tmp_path, orbax):
    chunk(orbax).write_bytes(chunk(orbax).read_bytes()[:-1])
    assert "moe.moe.experts.gate_up" in refused_orbax(tmp_path)


def test_a_missing_array(tmp_path, orbax):
    shutil.rmtree(orbax / "default" / "final_norm.scale")
    assert "final_norm.scale" in refused_orbax(tmp_path)


def test_a_manifest_that_names_fewer_weights(tmp_path, orbax):
    content = json.loads((orbax / MANIFEST).read_text())
    content["config"]["use_qk_norm"] = False
    (orbax / MANIFEST).write_text(json.dumps(content))
    assert "dense.attention.q_norm.scale is not known" in refused_orbax(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"layout_version": 1}', "[" * 100_000])
def test_a_damaged_manifest(tmp_path, orbax, content):
    (orbax / MANIFEST).write_text(content)
    assert MANIFEST in refused_orbax(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layout_version",), 2),
        (("config", "hidden_size"), "64"),
        (("config", "hidden_size"), None),
        (("config", "mtp_copies"), 5),
        (("config", "mtp_copies"), ["other"]),
        (("config", "model_type"), "glm5"),
        (("config",), []),
        (("tensors",), []),
        (("tensors", "lm_head.weight"), {"dtype": "BF16"}),
        (("tensors", "lm_head.weight"), 3),
        (("tensors", "lm_head.weight", "dtype"), "BF17"),
        (("tensors", "lm_head.weight", "dtype"), 7),
    ],
)
def test_a_manifest_with_wrong_values(tmp_path, orbax, path, value):
    content = json.loads((orbax / MANIFEST).read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (orbax / MANIFEST).write_text(json.dumps(content))
    assert MANIFEST in refused_orbax(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 32), ("num_hidden_layers", 4), ("n_routed_experts", 4)])
def test_a_manifest_of_another_model(tmp_path, orbax, key, value):
    """What the arrays hold is not what the configuration asks for: no zeros, no slices, one line."""
    content = json.loads((orbax / MANIFEST).read_text())
    content["config"][key] = value
    (orbax / MANIFEST).write_text(json.dumps(content))
    line = refused_orbax(tmp_path)
    assert "arrays that do not fit its glm_jax.json" in line and ", should be [" in line


def test_nothing_is_made_where_a_mesh_does_not_divide(tmp_path, single, mesh_of_sizes):
    line = refused(tmp_path, lambda: glm_jax.load(single, mesh=mesh_of_sizes((1, 1, 8))))
    assert "kv_heads = 2 does not divide over mesh axis tensor = 8" in line and "sizes that do: 1, 2" in line
