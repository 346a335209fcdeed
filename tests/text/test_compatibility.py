"""Stop ids and vocabularies of two checkpoints against each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from glm_jax.errors import TextError
from glm_jax.text import load_tokenizer
from glm_jax.text.compatibility import compare_stop_ids, compare_vocabularies, stop_ids_by_file
from tests.conventions.tree import ROOT

DEMO = ROOT / "examples" / "demo_model"


def files(directory: Path, **content) -> Path:
    """A directory with config.json and generation_config.json of these eos ids; None leaves the key out."""
    directory.mkdir()
    for name, eos in content.items():
        (directory / f"{name}.json").write_text(json.dumps({} if eos is None else {"eos_token_id": eos}))
    return directory


def with_tokenizer(directory: Path, eos_token) -> Path:
    shutil.copyfile(DEMO / "tokenizer.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    return directory


@pytest.mark.parametrize("form", ["<|user|>", {"content": "<|user|>", "special": True}])
def test_each_file_is_read(tmp_path, form):
    directory = with_tokenizer(files(tmp_path / "a", config=[1, 2, 1], generation_config=3), form)
    user = load_tokenizer(DEMO).token_id("<|user|>")
    assert stop_ids_by_file(directory) == {
        "config.json": (1, 2),
        "generation_config.json": (3,),
        "tokenizer_config.json": (user,),
    }
    assert stop_ids_by_file(files(tmp_path / "b", config=None, generation_config=[])) == {}


def test_equal_stop_ids(tmp_path):
    one = files(tmp_path / "one", config=[1, 2], generation_config=[2, 1])
    assert compare_stop_ids(one, one).problems == ()
    assert compare_stop_ids(one, one).found == "2, 1"
    assert compare_stop_ids(one, one).notes == ()
    none = files(tmp_path / "none", config=None)
    assert compare_stop_ids(none, none).problems == ()


def test_files_that_disagree_are_noted(tmp_path):
    """As Kimi K2's do: the settings end a turn, the configuration a text."""
    one = files(tmp_path / "one", config=585, generation_config=586)
    result = compare_stop_ids(one, one)
    assert result.problems == ()
    assert result.notes == ("config.json names 585, generation_config.json names 586; generation ends at 586, 585",)


def test_an_id_of_the_tokenizer(tmp_path):
    user = load_tokenizer(DEMO).token_id("<|user|>")
    lacking = with_tokenizer(files(tmp_path / "lacking", generation_config=[5]), "<|user|>")
    assert compare_stop_ids(lacking, lacking).problems[0] == (
        f"generation does not end at {user}, which tokenizer_config.json names"
    )
    having = with_tokenizer(files(tmp_path / "having", generation_config=[user]), "<|user|>")
    assert compare_stop_ids(having, having).problems == ()


def test_an_id_of_one_side_only(tmp_path):
    one, two = files(tmp_path / "one", generation_config=[5]), files(tmp_path / "two", generation_config=[5, 7])
    assert compare_stop_ids(one, two).problems == (
        "generation does not end at 7, which the reference's generation_config.json names",
        "generation_config.json names 5, the reference's 5, 7",
    )
    assert compare_stop_ids(two, one).problems == ("generation_config.json names 5, 7, the reference's 5",)


def test_an_id_that_only_one_file_lacks(tmp_path):
    """Generation still ends there, but what reads this file alone would not."""
    one = files(tmp_path / "one", config=[5, 7], generation_config=[5])
    two = files(tmp_path / "two", config=[5, 7], generation_config=[7, 5])
    assert compare_stop_ids(one, two).problems == ("generation_config.json names 5, the reference's 7, 5",)
    assert compare_stop_ids(two, two).problems == compare_stop_ids(two, two).notes == ()


@pytest.mark.parametrize("wrong", ["5", [True], [-1], 1.5])
def test_what_is_no_id(tmp_path, wrong):
    with pytest.raises(TextError, match="eos_token_id"):
        stop_ids_by_file(files(tmp_path / "wrong", config=wrong))


@pytest.mark.parametrize("wrong", ["<|no such token|>", 5, ["a"]])
def test_what_is_no_token(tmp_path, wrong):
    with pytest.raises(TextError, match=r"tokenizer_config\.json: eos_token"):
        stop_ids_by_file(with_tokenizer(files(tmp_path / "wrong"), wrong))


def test_vocabularies(tmp_path):
    one = with_tokenizer(files(tmp_path / "one"), None)
    size, bare = load_tokenizer(one).vocab_size, files(tmp_path / "bare")

    def compared(ours: Path, theirs: Path, model: int, reference: int) -> tuple[str, tuple[str, ...]]:
        found = compare_vocabularies(ours, theirs, model_size=model, reference_size=reference)
        return found.found, found.problems

    assert compared(one, one, size, size) == (f"tokenizer {size} ids, model {size}: no padding", ())
    padded = f"tokenizer {size} ids, model {size + 8}: ids {size}..{size + 7} are padding"
    assert compared(one, one, size + 8, size + 8) == (padded, ())
    assert compared(one, one, size - 2, size - 2)[1] == (
        f"the tokenizer's ids {size - 2}..{size - 1} are beyond the model's",
    )
    assert compared(one, one, size + 8, size)[1] == (f"the model has {size + 8} ids, the reference {size}",)
    assert compared(one, bare, size, size)[1] == ("only the model has a tokenizer",)
    assert compared(bare, one, size, size)[1] == ("only the reference has a tokenizer",)
    assert compared(bare, bare, 9, 9) == ("the model has 9 ids; no tokenizer to compare with", ())


def test_tokenizers_of_different_sizes(tmp_path):
    one, two = (with_tokenizer(files(tmp_path / name), None) for name in ("one", "two"))
    content = json.loads((two / "tokenizer.json").read_text())
    size = load_tokenizer(one).vocab_size
    added = {**content["added_tokens"][-1], "id": size, "content": "<|one more|>"}
    (two / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], added]}))
    (problem,) = compare_vocabularies(one, two, model_size=size + 8, reference_size=size + 8).problems
    assert problem == f"the tokenizer has {size} ids, the reference's {size + 1}"
