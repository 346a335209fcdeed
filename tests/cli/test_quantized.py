"""Quantised checkpoints on the command line: convert either way, inspect, export."""

from __future__ import annotations

import pytest

from tests.checkpoint import quantized_sources as sources


@pytest.fixture(scope="module")
def made() -> sources.Checkpoint:
    return sources.checkpoint(sources.deepseek((16, 24)))


@pytest.fixture(scope="module")
def fp8(made, tmp_path_factory):
    return made.write(tmp_path_factory.mktemp("quantised") / "fp8")


@pytest.mark.parametrize(
    ("flags", "words", "dtypes"),
    [
        ([], "dequantised to bfloat16", {"bfloat16", "float32"}),
        (["--quantized=keep"], "kept", {"bfloat16", "float32", "float8_e4m3fn"}),
    ],
)
def test_convert_says_what_became_of_it(call, made, fp8, tmp_path, flags, words, dtypes):
    assert call("convert", f"--source={fp8}", f"--target={tmp_path / 'out'}", *flags).status == 0
    described = call("inspect", f"--model={tmp_path / 'out'}", "--json").json
    assert described["source_quantization"] == f"fp8 in blocks of 16 x 24, {words}"
    assert described["bytes_by_dtype"].keys() == dtypes
    assert call("export", f"--source={tmp_path / 'out'}", f"--target={tmp_path / 'back'}").status == 0
    back = sources.read(tmp_path / "back")
    expected = made.tensors if flags else made.plain
    assert {name: array.tobytes() for name, array in back.items()} == {n: a.tobytes() for n, a in expected.items()}


def test_inspect_of_a_source(call, made, fp8, hf):
    quantized = sum(name.endswith("_scale_inv") for name in made.tensors)
    table = call("inspect", f"--model={fp8}").out
    assert f"source quantisation  fp8 in blocks of 16 x 24, {quantized} of {len(made.plain)} tensors\n" in table
    assert "source quantisation" not in call("inspect", f"--model={hf}").out
    assert call("inspect", f"--model={hf}", "--json").json["source_quantization"] is None


def test_inspect_names_every_format(call, tmp_path):
    made, _ = sources.mixed()
    said = call("inspect", f"--model={made.write(tmp_path / 'hf')}", "--json").json["source_quantization"]
    for words in ("int4 in groups of 32", "int8 with a scale for each output channel", "fp8 in blocks of 16 x 16"):
        assert words in said


def test_other_words_are_refused(call, fp8, tmp_path):
    said = call("convert", f"--source={fp8}", f"--target={tmp_path / 'out'}", "--quantized=fp8")
    assert "quantized" in said.complaint and "dequantize" in said.complaint


def test_doctor_says_what_runs_as_it_is_stored(call, fp8, hf, tmp_path):
    def row(directory) -> dict[str, str] | None:
        checks = call("doctor", f"--model={directory}", "--json").json["checks"]
        return next((check for check in checks if check["check"] == "quantised weights"), None)

    found = row(fp8)
    assert found is not None and found["status"] == "warning"
    assert "because groups of 24 do not divide the inputs that a device has of them: dense.attention" in found["detail"]
    found = row(sources.checkpoint(sources.deepseek()).write(tmp_path / "fp8"))
    assert found is not None and found["status"] == "ok"
    assert found["detail"].endswith(" 25 run as they are stored (fp8 in blocks of 128 x 128)")
    assert row(hf) is None


def test_loading_says_what_it_dequantises(call, fp8):
    flags = ("generate", f"--model={fp8}", "--tokens=5,6", "--max_new_tokens=1", "--mesh=data=1", "--layers=0:1")
    kept, said = call(*flags), call(*flags, "--quantized=dequantize")
    assert kept.status == said.status == 0
    assert "dequantised, because groups of 24 do not divide" in kept.err and "moe." not in kept.err
    assert "dequantised" not in said.err


def test_layers_that_there_are_not(call, fp8):
    for verb, flag in (("generate", "--tokens=5"), ("chat", "--message=hello")):
        said = call(verb, f"--model={fp8}", flag, "--layers=3:7")
        assert "range of layers 3:7 has some that this model lacks; the model has 3" in said.complaint
