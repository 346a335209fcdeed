"""doctor: the report on the machine, and the checks of a checkpoint."""

from __future__ import annotations

import json
import platform
import shutil
import sys

import jax

from glm_jax.checkpoint.safetensors_dir import INDEX_NAME
from tests.cli.checkpoints import write_checkpoint


def statuses(report) -> dict[str, str]:
    return {check["check"]: check["status"] for check in report["checks"]}


def test_machine(call):
    report = call("doctor", "--json").json
    assert report["ok"] is True
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["jax"] == jax.__version__
    assert set(report["versions"]) >= {"glm_jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"}
    assert [device["id"] for device in report["devices"]] == [device.id for device in jax.devices()]
    assert set(report["operations"]) == {"cpu", "gpu", "tpu"}
    expected = {"matmul", "attend", "experts", "top_k", "argmax", "storage", "experts, decode", "experts, prefill"}
    assert all(expected <= set(chosen) for chosen in report["operations"].values())
    table = call("doctor").out
    assert f"jax               {jax.__version__}\n" in table
    assert "device 0: cpu (cpu), memory the host's\n" in table


def test_whole_checkpoints_pass(call, hf, orbax):
    for directory in (hf, orbax):
        report = call("doctor", f"--model={directory}", "--json").json
        names = ("devices", "checkpoint", "tokenizer", "chat template", "stop tokens", "router bias")
        assert statuses(report) == dict.fromkeys(names, "ok")


def test_what_only_text_needs_is_a_warning(call, bare):
    report = call("doctor", f"--model={bare}", "--json").json
    assert report["ok"] is True
    missing = ("tokenizer", "chat template", "stop tokens")
    assert {name for name, status in statuses(report).items() if status == "warning"} == set(missing)


def test_a_checkpoint_that_does_not_open_is_an_error(call, hf, tmp_path):
    damaged = shutil.copytree(hf, tmp_path / "damaged")
    (damaged / INDEX_NAME).write_text("{}")
    said = call("doctor", f"--model={damaged}")
    assert said.status == 1
    assert "error  checkpoint  " in said.out
    assert call("doctor", f"--model={tmp_path / 'nothing'}").status == 1


def test_a_rounded_router_bias_is_found(call, tmp_path):
    rounded = write_checkpoint(tmp_path / "rounded", text=False, router_bias="BF16")
    report = call("doctor", f"--model={rounded}", "--json").json
    assert report["checks"][-1] == {
        "check": "router bias",
        "status": "warning",
        "detail": "stored as bfloat16; rounded, it chooses other experts",
    }
    assert call("convert", f"--source={rounded}", f"--target={tmp_path / 'orbax'}").status == 0
    assert statuses(call("doctor", f"--model={tmp_path / 'orbax'}", "--json").json)["router bias"] == "ok"


def test_what_a_comparison_refuses(call, orbax, hf):
    def complaint(*flags: str) -> str:
        return call("doctor", *flags).complaint

    assert complaint("--layers=2") == "--layers needs --compare=HF_DIR"
    assert complaint(f"--model={hf}", "--dtype=float32") == "--dtype needs --compare=HF_DIR"
    assert complaint(f"--compare={hf}") == "--compare needs --model, the checkpoint to compare"
    both = (f"--model={orbax}", f"--compare={hf}")
    assert complaint(*both, "--layers=0") == "--layers=0 is not within 1..2, the layers of the model"
    assert complaint(*both, "--layers=3") == "--layers=3 is not within 1..2, the layers of the model"
    assert "token 512 is outside the vocabulary" in complaint(*both, "--tokens=5,512")
    assert complaint(*both, "--tokens=5", "--prompt=a") == "give the tokens either as --tokens or as --prompt"
    assert "is an Orbax checkpoint" in complaint(f"--model={hf}", f"--compare={orbax}")
    assert "is not a directory" in complaint(f"--model={hf}", "--compare=nowhere")


def test_a_comparison_without_torch_says_what_to_install(call, hf, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    said = call("doctor", f"--model={hf}", f"--compare={hf}")
    assert said.status == 2 and said.out == ""
    assert "needs torch and transformers, and torch is not installed here: pip install 'torch>=" in said.err


def test_a_checkpoint_that_does_not_open_is_not_compared(call, hf, tmp_path):
    said = call("doctor", f"--model={tmp_path / 'nothing'}", f"--compare={hf}", "--json")
    assert said.status == 1
    assert json.loads(said.out)["comparison"] is None


def test_a_template_that_leaves_out_tools_is_told(call, tmp_path):
    directory = write_checkpoint(tmp_path / "hf")
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report = call("doctor", f"--model={directory}", "--json").json
    assert statuses(report)["chat template"] == "warning"
    (detail,) = (check["detail"] for check in report["checks"] if check["check"] == "chat template")
    assert "renders, but not with tools" in detail and "leaves out the tools" in detail
