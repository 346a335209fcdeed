"""What a new user gives in the first minutes: a directory that is not whole, a name of the Hub, a URL, a full disk."""

from __future__ import annotations

import json
import shutil

import pytest

import glm_jax
from glm_jax import configs, count_parameters
from tests.checkpoint.range_server import serving

ONE = "--mesh=data=1"


@pytest.fixture
def config_only(hf, tmp_path):
    """A directory of config.json alone."""
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copyfile(hf / "config.json", directory / "config.json")
    return directory


def test_inspect_of_a_config_alone_says_what_it_declares_and_what_is_missing(call, config_only):
    said = call("inspect", f"--model={config_only}")
    assert said.status == 0 and said.out.startswith(f"{config_only} (config)\n")
    assert "has no *.safetensors: parameters and bytes are those that config.json declares" in said.err
    described = call("inspect", f"--model={config_only}", "--json").json
    assert described["kind"] == "config"
    assert described["config"] == json.loads(json.dumps(configs.from_hf(config_only).__dict__, default=vars))
    total = described["parameters"]["total"]
    assert total == count_parameters(configs.from_hf(config_only)).total
    assert described["bytes_by_dtype"]["bfloat16"] == 2 * (total - described["bytes_by_dtype"]["float32"] // 4)


def test_inspect_of_a_directory_without_anything(call, tmp_path):
    assert "holds no checkpoint" in call("inspect", f"--model={tmp_path}").complaint


@pytest.mark.parametrize(
    "verb",
    [
        ["convert", "--target=out", "--source"],
        ["generate", "--tokens=5", "--model"],
        ["chat", "--message=a", "--model"],
    ],
)
@pytest.mark.parametrize("name", ["zai-org/GLM-4.5-Air", "someone/Tuned-Air"])
def test_a_name_of_the_hub_is_told_how_to_get_at_it(call, monkeypatch, tmp_path, verb, name):
    monkeypatch.chdir(tmp_path)
    said = call(*verb, name).complaint
    assert f"hf://{name}" in said and f"hf download {name} --local-dir {name.split('/')[1]}" in said


def test_inspect_takes_the_names_of_published_checkpoints_and_has_a_hint_for_others(call):
    assert call("inspect", "--model=zai-org/GLM-4.5-Air").out.startswith("zai-org/GLM-4.5-Air (preset)")
    assert "hf download someone/Tuned-Air" in call("inspect", "--model=someone/Tuned-Air").complaint


def test_python_gives_the_same_hint_and_plain_paths_get_none(tmp_path):
    for opening in (glm_jax.load, glm_jax.Chat):
        with pytest.raises(glm_jax.CheckpointError, match="hf download moonshotai/Kimi-K2"):
            opening("moonshotai/Kimi-K2")
        for path in (tmp_path / "a" / "b", "./model", "model", "a/b/c", f"{tmp_path.name}"):
            with pytest.raises(glm_jax.CheckpointError) as raised:
                opening(path)
            assert "hf://" not in str(raised.value)


def test_a_url_is_a_model(call, hf):
    """Text files come along for as long as they are read; no path of a copy is shown, and `//` stays."""
    prompt = ["generate", "--prompt=12*34", "--max_new_tokens=4", "--json", ONE]
    message = ["chat", "--message=12*34", "--max_new_tokens=4", "--json", ONE]
    with serving(hf) as server:
        for command, key in ((prompt, "tokens"), (message, "content")):
            there, here = (call(*command, f"--model={model}").json[key] for model in (server.url, hf))
            assert there == here
        report = call("doctor", f"--model={server.url}", "--json").json
        assert {check["status"] for check in report["checks"]} == {"ok"}
        assert call("inspect", f"--model={server.url}", "--json").json["kind"] == "huggingface"
        server.absent = "tokenizer.json"
        said = call("chat", "--message=a", f"--model={server.url}").complaint
        assert server.url in said and "glm_jax-" not in said


def test_doctor_says_everything_that_is_wrong_at_once(call, hf, tmp_path):
    directory = shutil.copytree(hf, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_attention_heads": "many", "strange_key": 5, "quantization_config": {"quant_method": "of tomorrow"}}
    (directory / "config.json").write_text(json.dumps(config))
    shards = sorted(directory.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1000])
    (directory / "tokenizer.json").write_text("{")
    (directory / "chat_template.jinja").write_text("{% for %}")
    (directory / "generation_config.json").write_text('{"top_p": 7}')
    said = call("doctor", f"--model={directory}", "--json")
    assert said.status == 1
    checks = json.loads(said.out)["checks"]
    wrong = " ".join(check["detail"] for check in checks if check["status"] != "ok")
    for part in (
        "num_attention_heads", "strange_key", "of tomorrow", shards[0].name, shards[1].name, "tokenizer.json",
        "chat_template.jinja", "top_p is 7",
    ):  # fmt: skip
        assert part in wrong, part
    details = [check["detail"] for check in checks]
    assert len(details) == len(set(details))


def test_doctor_of_a_config_alone(call, config_only):
    said = call("doctor", f"--model={config_only}", "--json")
    found = {check["check"]: check["status"] for check in json.loads(said.out)["checks"]}
    assert said.status == 1 and found["checkpoint"] == "error"
    assert {found[name] for name in ("tokenizer", "chat template")} == {"warning"}
