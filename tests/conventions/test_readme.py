"""The documentation is true: its Python runs, its commands parse, what it points to is there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from absl import flags as absl_flags

import glm_jax
from glm_jax import configs
from glm_jax.cli.main import VERBS, verb_flags
from tests.cli.checkpoints import write_checkpoint
from tests.conventions.tree import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/checkpoints.md",
    "docs/cli.md",
    "docs/clusters.md",
    "docs/kernels.md",
    "docs/plan.md",
    "docs/scale.md",
    "docs/sharding.md",
    "docs/text.md",
)
DEMO = "examples/demo_model"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def tree_paths(tree: str) -> list[str]:
    """The paths of a tree whose entries are indented by two blanks a level and explained after two more."""
    paths, parents = [], []
    for line in filter(str.strip, tree.splitlines()):
        entry = re.match(r"( *)(\S+)(?:  .*)?$", line)
        assert entry is not None, line
        parents[len(entry[1]) // 2 :] = [entry[2]]
        paths.append("".join(parents))
    return paths


def commands(text: str) -> list[list[str]]:
    """The calls of glm-jax in indented blocks, without their comments."""
    found = re.findall(r"^    (?:\$ )?glm-jax +([a-z]+ +--.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A working directory with the demo checkpoint: the bundled one, or a random one until that has weights."""
    if (ROOT / DEMO / "model.safetensors").exists():
        shutil.copytree(ROOT / DEMO, tmp_path / DEMO)
    else:
        write_checkpoint(tmp_path / DEMO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_the_readme_runs_as_it_stands(checkout, capsys):
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    counted, new, shapes, *rest = capsys.readouterr().out.splitlines()
    config = configs.from_hf(DEMO)
    assert counted == f"{glm_jax.count_parameters(config).total} parameters"
    assert re.fullmatch(r"\[\[(\d+, ){7}\d+\], \[(\d+, ){7}\d+\]\]", new)
    assert shapes == f"(1, 4, {config.vocab_size}) (1, 3, {config.vocab_size})"
    assert rest[-1].startswith("Finished(")


def test_plain_orbax_reads_a_checkpoint_as_documented(checkout, capsys):
    glm_jax.convert(DEMO, "ckpt/demo")
    documented = blocks((ROOT / "docs/checkpoints.md").read_text(encoding="utf-8"), "python")
    (code,) = [block for block in documented if "orbax" in block]
    exec(compile(code, "checkpoints.md", "exec"), {})
    config = configs.from_hf(DEMO)
    moe = config.moe
    shape = (config.num_moe_layers, moe.num_experts, 2, moe.expert_width, config.embed_dim)
    assert capsys.readouterr().out.endswith(f" {shape}\n")


def test_the_tree_of_the_readme_is_the_checkout():
    (tree,) = blocks(README, "text")
    listed = tree_paths(tree)
    assert [path for path in listed if not (ROOT / path).exists()] == []
    parts = {f"glm_jax/{path.parent.name}/" for path in (ROOT / "glm_jax").glob("*/__init__.py")}
    assert {path for path in listed if re.fullmatch(r"glm_jax/\w+/", path)} == parts


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_the_flags_that_they_are_shown_with(document):
    for verb, *arguments in commands((ROOT / document).read_text(encoding="utf-8")):
        assert verb in VERBS
        assert verb_flags(verb)([verb, *arguments]) == [verb], arguments


def test_the_readings_can_fail():
    assert tree_paths("a/\n  b/   text\n    c.py\n  d.py  more\ne/  x\n") == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e/"]
    (command,) = commands("    glm-jax inspect --modle x  # why\n")
    assert command == ["inspect", "--modle", "x"]
    with pytest.raises(absl_flags.UnrecognizedFlagError):
        verb_flags("inspect")(command)
