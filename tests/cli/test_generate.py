"""generate: the contract that scripts rely on, and what is refused before any weight is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import ClassVar

import pytest

import glm_jax
from glm_jax.checkpoint import source
from glm_jax.checkpoint.local_files import LocalDirectory
from glm_jax.text import load_tokenizer
from tests.cli.checkpoints import CONFIG, write_checkpoint

ONE = "--mesh=data=1"
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def expected(orbax) -> list[int]:
    """The 24 likeliest tokens after PROMPT."""
    model = glm_jax.load(orbax, mesh=glm_jax.make_mesh())
    return glm_jax.generate(model, [PROMPT], max_new_tokens=24)[0]


def contract(model) -> list[str]:
    text = f"generate --model {model} --tokens 5,6,7 --max_new_tokens 24 --temperature 0 --ignore_eos --json"
    return text.split()


@pytest.mark.parametrize("fixture", ["orbax", "hf", "bare"])
def test_contract(call, request, expected, fixture):
    result = call(*contract(request.getfixturevalue(fixture)), ONE).json
    assert result["tokens"] == expected
    assert (result["prompt_tokens"], result["completion_tokens"], result["finish_reason"]) == (3, 24, "length")
    assert result["prefill_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0
    assert (result["warm"], result["mesh"], result["dtype"]) == (True, "data=1,expert=1,tensor=1", "float32")


class _CountingDirectory(LocalDirectory):
    """A directory that keeps the names of all files that were looked for."""

    wanted: ClassVar[list[str]] = []

    def find(self, names):
        chosen = list(names)
        self.wanted.extend(chosen)
        return super().find(chosen)


@pytest.mark.parametrize(
    "verb", [["generate", "--tokens=5"], ["chat", "--message=hi", "--nothinking"]], ids=lambda verb: verb[0]
)
def test_a_verb_opens_its_checkpoint_once(call, hf, monkeypatch, verb):
    monkeypatch.setattr(source, "open_directory", _CountingDirectory)
    _CountingDirectory.wanted.clear()
    assert call(*verb, f"--model={hf}", "--max_new_tokens=1", ONE).status == 0
    assert _CountingDirectory.wanted.count("config.json") == 1


def test_tokens_come_as_tokens(call, orbax, expected):
    said = call("generate", f"--model={orbax}", "--tokens=5, 6,7", "--max_new_tokens=24", "--ignore_eos", ONE)
    assert said.out == ",".join(map(str, expected)) + "\n"
    assert said.err.startswith("3 prompt tokens, 24 new; prefill ") and "compilation included" in said.err


def test_text_comes_as_text(call, orbax):
    tokenizer = load_tokenizer(orbax / "hf")
    tokens = tokenizer.encode("hello 12")
    model = glm_jax.load(orbax, mesh=glm_jax.make_mesh())
    (new,) = glm_jax.generate(model, [tokens], max_new_tokens=24)
    arguments = ["generate", f"--model={orbax}", "--prompt=hello 12", "--max_new_tokens=24", "--ignore_eos", ONE]
    assert call(*arguments).out == tokenizer.decode(new) + "\n"
    result = call(*arguments, "--json").json
    assert (result["tokens"], result["text"]) == (new, tokenizer.decode(new))


def test_text_begins_as_the_checkpoint_wants(call, orbax, tmp_path):
    model = shutil.copytree(orbax, tmp_path / "model")
    path = model / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True, "bos_token": "<sop>"}))
    arguments = ["--max_new_tokens=8", "--ignore_eos", "--nowarmup", ONE, "--json"]
    expected = call("generate", f"--model={orbax}", "--prompt=<sop>hello 12", *arguments).json
    for prompt in ("hello 12", "<sop>hello 12"):
        result = call("generate", f"--model={model}", f"--prompt={prompt}", *arguments).json
        assert (result["tokens"], result["prompt_tokens"]) == (expected["tokens"], expected["prompt_tokens"])


def test_stop_tokens_are_the_checkpoints(call, orbax, expected, tmp_path):
    model = shutil.copytree(orbax, tmp_path / "model")
    stop = expected[2]
    (model / "hf" / "generation_config.json").write_text(f'{{"eos_token_id": {stop}}}')
    result = call("generate", f"--model={model}", "--tokens=5,6,7", "--max_new_tokens=24", ONE, "--json").json
    assert result["tokens"] == expected[: expected.index(stop) + 1]
    assert result["finish_reason"] == "stop"
    assert call(*contract(model), ONE).json["tokens"] == expected


def test_sampling_is_seeded_and_its_defaults_are_the_checkpoints(call, bare, expected, tmp_path):
    def tokens(model, *flags):
        arguments = ["--tokens=5,6,7", "--max_new_tokens=24", ONE, "--json", "--nowarmup"]
        return call("generate", f"--model={model}", *arguments, *flags).json["tokens"]

    drawn = tokens(bare, "--temperature=5", "--seed=1")
    assert drawn == tokens(bare, "--temperature=5", "--seed=1") != tokens(bare, "--temperature=5", "--seed=2")
    assert tokens(bare, "--temperature=5", "--top_k=1") == tokens(bare, "--temperature=5", "--top_p=1e-6") == expected
    model = shutil.copytree(bare, tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": 5.0}')
    assert tokens(model, "--seed=1") == drawn
    assert tokens(model, "--temperature=0") == expected


def test_a_mesh_of_eight_devices(call, orbax, expected):
    result = call(*contract(orbax), "--mesh=data=1,expert=4,tensor=2").json
    assert (result["tokens"], result["mesh"]) == (expected, "data=1,expert=4,tensor=2")


def test_dtype(call, orbax):
    arguments = [f"--model={orbax}", "--tokens=5", "--max_new_tokens=1", "--dtype=bfloat16", ONE, "--json"]
    result = call("generate", *arguments).json
    assert (result["dtype"], result["decode_tokens_per_second"]) == ("bfloat16", None)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tokens=5,x"], "--tokens '5,x': 'x' is no token id; right would be --tokens=5,6,7"),
        (["--tokens="], "--tokens '': '' is no token id; right would be --tokens=5,6,7"),
        (["--tokens=5", "--prompt=a"], "give the prompt either as --tokens or as --prompt"),
        ([], "give the prompt either as --tokens or as --prompt"),
        (["--prompt="], "prompt 0 is empty; a prompt has at least one token"),
        (["--tokens=5,512"], "prompt 0: token 512 is outside the vocabulary 0..511"),
        (["--tokens=-1"], "prompt 0: token -1 is outside the vocabulary 0..511"),
        (
            ["--tokens=5", "--max_new_tokens=512"],
            "1 tokens and 512 new ones exceed the model's 512 positions",
        ),
        (["--tokens=5", "--max_new_tokens=-3"], "max_new_tokens must be an integer of at least 1, not -3"),
        (["--tokens=5", "--max_new_tokens", "0"], "max_new_tokens must be an integer of at least 1, not 0"),
        (["--tokens=5", "--temperature=-1"], "temperature must be a finite number of at least 0, not -1.0"),
        (["--tokens=5", "--temperature=nan"], "temperature must be a finite number of at least 0, not nan"),
        (["--tokens=5", "--top_p=0"], "top_p must be above 0 and at most 1, not 0.0"),
        (["--tokens=5", "--top_k=-1"], "top_k must be an integer of at least 0, not -1"),
        (["--tokens=5", "--seed=-1"], "seed must be an integer of at least 0, not -1"),
        (["--tokens=5", "--mesh=expert=3"], "does not divide over mesh axis expert = 3"),
        (["--tokens=5", "--mesh=expert=16"], "needs 16 devices; there are 8"),
        (["--tokens=5", "--mesh=rows=2"], "'rows=2' is wrong; right would be 'data=1,expert=4,tensor=2'"),
    ],
)
@pytest.mark.parametrize("json", [[], ["--json"]])
def test_impossible_requests(call, orbax, flags, complaint, json):
    assert complaint in call("generate", f"--model={orbax}", *flags, *json).complaint


def test_places_that_hold_no_model(call, tmp_path, bare):
    (tmp_path / "file").write_text("text")
    for place in (tmp_path / "nothing", tmp_path / "file"):
        assert f"{place} is not a directory" in call("generate", f"--model={place}", "--tokens=5").complaint
    assert "holds no checkpoint" in call("generate", f"--model={tmp_path}", "--tokens=5").complaint
    assert "has no tokenizer" in call("generate", f"--model={bare}", "--prompt=a").complaint


def test_a_directory_that_may_not_be_read(call, bare, tmp_path):
    model = shutil.copytree(bare, tmp_path / "model")
    model.chmod(0)
    with_all_rights = os.geteuid() == 0  # for whom there is no such directory
    if with_all_rights:
        os.seteuid(65_534)
    try:
        said = call("generate", f"--model={model}", "--tokens=5")
    finally:
        if with_all_rights:
            os.seteuid(0)
        model.chmod(0o755)
    assert "ermission denied" in said.complaint


def test_speculation_gives_the_same_tokens_and_counts_its_drafts(call, orbax, expected):
    result = call(*contract(orbax), "--speculative=2", ONE).json
    assert result["tokens"] == expected
    counts = result["acceptance"]
    assert len(counts["drafted"]) == len(counts["accepted"]) == 2
    assert counts["rates"] == [a / d for a, d in zip(counts["accepted"], counts["drafted"], strict=True)]
    # Each round gives one token of the model's own, and its accepted drafts; the first token comes before all rounds.
    assert counts["drafted"][0] + sum(counts["accepted"]) in (23, 24)
    assert "acceptance" not in call(*contract(orbax), ONE).json
    said = call(*[flag for flag in contract(orbax) if flag != "--json"], "--speculative=2", ONE)
    assert said.out == ",".join(map(str, expected)) + "\n"
    shares = ", ".join(f"{100 * rate:.1f}%" for rate in counts["rates"])
    assert said.err.splitlines()[-1] == f"drafts accepted, by place: {shares} of {counts['drafted'][0]} rounds"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--speculative=-1"], "speculative must be an integer of at least 0, not -1"),
        (["--speculative=33"], "speculative must be an integer of at most 32, not 33"),
        (["--speculative=1.5"], "speculative"),
        (["--speculative=1", "--temperature=0.5"], "speculative 1 needs temperature 0, not 0.5"),
    ],
)
@pytest.mark.parametrize("verb", [["generate", "--tokens=5"], ["chat", "--message=a"]])
def test_impossible_speculation(call, orbax, verb, flags, complaint):
    assert complaint in call(*verb, f"--model={orbax}", *flags).complaint


@pytest.mark.parametrize("verb", [["generate", "--tokens=5"], ["chat", "--message=a"]])
def test_speculation_needs_the_layer_and_greedy_defaults(call, tmp_path, verb):
    config = dataclasses.replace(CONFIG, num_mtp_layers=0)
    model = write_checkpoint(tmp_path / "model", config)
    assert "this model has none" in call(*verb, f"--model={model}", "--speculative=1").complaint
    model = write_checkpoint(tmp_path / "sampled")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.6}))
    assert "needs temperature 0, not 0.6" in call(*verb, f"--model={model}", "--speculative=1").complaint
