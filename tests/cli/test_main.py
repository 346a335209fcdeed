"""The program itself: help, flags, what it says when it is misused, and its exit status."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from absl import flags as absl_flags

import glm_jax
from glm_jax.cli import main as program
from glm_jax.cli import printing
from tests import processes

WITHOUT_JAX = "import sys; from glm_jax.cli.main import main; main({!r}); assert 'jax' not in sys.modules"


@pytest.fixture
def verb(monkeypatch):
    """Makes a function the verb `fake`, for how the program treats verbs."""

    def install(run):
        module = type(sys)("glm_jax.cli.fake")
        module.__doc__ = "A verb.\n\nWith more to say."
        module.define_flags = lambda flags: absl_flags.DEFINE_boolean("json", False, "a flag", flag_values=flags)
        module.run = run
        monkeypatch.setitem(sys.modules, "glm_jax.cli.fake", module)
        monkeypatch.setitem(program.VERBS, "fake", ("fake", "a verb for tests"))

    return install


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_has_a_line_for_each_verb(call, arguments):
    said = call(*arguments)
    assert said.status == 0
    for name, (_, summary) in program.VERBS.items():
        assert [line.split(maxsplit=1) for line in said.out.splitlines()].count([name, summary]) == 1


@pytest.mark.parametrize("name", program.VERBS)
def test_help_of_a_verb_lists_its_flags_and_works_beside_others(call, name):
    said = call(name, "--source=x", "--help")
    assert said.status == 0
    assert "--[no]json  print one JSON object" in said.out
    assert all(len(line) <= 120 for line in said.out.splitlines())


def test_version(call):
    assert call("--version").out == f"glm-jax {glm_jax.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["generate", "--bad"]])
def test_no_jax_before_the_flags_are_parsed(arguments):
    processes.said(WITHOUT_JAX.format(arguments))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train-it"], "there is no verb 'train-it'; the verbs are convert, export"),
        (
            ["inspect", "--modle=x"],
            "Unknown command line flag 'modle'. Did you mean: model ?; see glm-jax inspect --help",
        ),
        (["inspect", "--model"], "Missing value for flag --model; see glm-jax inspect --help"),
        (["inspect", "glm-4.5"], "'glm-4.5' is no flag; they are written --flag=value"),
        (["inspect", "--nojson=1", "--model=x"], "--nojson=1 does not take an argument"),
        (["generate", "--max_new_tokens=many"], "flag --max_new_tokens=many: is no integer"),
        (["generate", "--dtype=float99"], "flag --dtype=float99: value should be one of <bfloat16|float16|float32>"),
        (["generate", "--max_new_tokens=\u0665"], "flag --max_new_tokens=\u0665: is no integer"),
        (["generate", "--seed=1_0"], "flag --seed=1_0: is no integer"),
        (["generate", "--top_p=\u0661"], "flag --top_p=\u0661: is no number"),
        (["generate", "--top_p=half"], "flag --top_p=half: could not convert string to float"),
        (["generate"], "--model must be given"),
        (["generate", "--model="], "--model must be given"),
        (["convert"], "--source and --target must be given"),
        (["plan", "--model=glm-4.5", "--device=h200"], "--count must be given: a number of devices, or auto"),
    ],
)
def test_misuse_is_one_line(call, arguments, complaint):
    assert call(*arguments).complaint.startswith(complaint)


@pytest.mark.parametrize(
    ("verb", "flag", "written", "meant"),
    [
        ("generate", "dtype", "BFloat16", "bfloat16"),
        ("generate", "quantized", "Dequantize", "dequantize"),
        ("convert", "quantize", "INT8", "int8"),
        ("convert", "quantized", "KEEP", "keep"),
        ("export", "weights", "FP8-Blocks", "fp8-blocks"),
        ("doctor", "dtype", "Float32", "float32"),
    ],
)
def test_choices_are_taken_in_any_case(verb, flag, written, meant):
    flags = absl_flags.FlagValues()
    importlib.import_module(f"glm_jax.cli.{verb}").define_flags(flags)
    flags([verb, f"--{flag}={written}"])
    assert flags[flag].value == meant


def test_flags_can_be_written_in_both_ways(call):
    results = [
        call("inspect", "--model=tiny-glm", "--json"),
        call("inspect", "--model", "tiny-glm", "--json=true"),
        call("inspect", "-model", "tiny-glm", "--json"),
    ]
    assert len({said.out for said in results}) == 1
    assert results[0].json["model"] == "tiny-glm"


def test_with_json_stdout_holds_the_object_alone(call, verb):
    def run(flags):
        print("chatter")
        return {"text": "é\n", "json": flags.json}

    verb(run)
    said = call("fake", "--json")
    assert said.out == '{"text": "\\u00e9\\n", "json": true}\n'
    assert said.err == "chatter\n"
    assert call("fake").out == "chatter\n"


@pytest.mark.parametrize(
    ("error", "status", "err"),
    [
        (glm_jax.CheckpointError("what is\nwrong"), 2, "glm-jax: error: what is wrong\n"),
        (PermissionError(13, "Permission denied", "some/where"), 2, "glm-jax: error: some/where: Permission denied\n"),
        (KeyboardInterrupt(), 130, "glm-jax: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_status_of_what_can_be_mended_and_of_what_is_stopped(call, verb, monkeypatch, error, status, err):
    def run(flags):
        raise error

    verb(run)
    monkeypatch.setattr(program.os, "dup2", lambda *descriptors: None)  # stdout is the test's
    said = call("fake")
    assert (said.status, said.out, said.err) == (status, "", err)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_a_stopped_process_leaves_at_once_whatever_the_device_still_runs(verb, monkeypatch, capfd, error, status):
    def run(flags):
        raise error

    verb(run)
    left = []
    monkeypatch.setattr(program.sys, "argv", ["glm-jax", "fake"])
    monkeypatch.setattr(program.os, "_exit", left.append)
    monkeypatch.setattr(program.os, "dup2", lambda *descriptors: None)
    program.main()
    assert left == [status]


def test_a_bug_is_not_hidden(call, verb):
    def run(flags):
        raise ZeroDivisionError

    verb(run)
    with pytest.raises(ZeroDivisionError):
        call("fake")


def test_status_is_1_where_the_object_says_not_ok(call, verb):
    verb(lambda flags: {"ok": False})
    assert call("fake").status == 1
    assert call("fake", "--json").status == 1


def test_process_prints_one_object_and_exits_with_2_on_errors(orbax):
    """Two real processes: nothing of jax or the logs reaches stdout, and a mesh that does not divide is refused."""
    devices = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "glm_jax.cli", "generate", f"--model={orbax}", "--tokens=5,6,7", "--json"]
    command += ["--max_new_tokens", "24", "--temperature", "0", "--ignore_eos"]

    def run(*more):
        return processes.run([*command, *more], XLA_FLAGS=devices)

    done = run("--mesh=data=1")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 24
    assert done.stdout.count("\n") == 1
    done = run("--mesh=tensor=8")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("glm-jax: error: ") and "does not divide over mesh axis tensor = 8" in line


def test_output_into_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m glm_jax.cli inspect --model=tiny-glm | true; echo ${{PIPESTATUS[0]}}"
    done = processes.run(["bash", "-c", command])
    assert (done.stdout.strip(), done.stderr) == ("141", "")


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(printing.time, "monotonic", lambda: now)
    with printing.progress("converting") as progress:
        for now in range(1, 51):
            progress(now * 100_000_000, 5_000_000_000)
        progress(5_000_000_000, 5_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        f"converting: {size} of 5.0 GB ({share}%), 100.0 MB/s"
        for size, share in (
            ("300.0 MB", 6),
            ("1.3 GB", 26),
            ("2.3 GB", 46),
            ("3.3 GB", 66),
            ("4.3 GB", 86),
            ("5.0 GB", 100),
        )
    ]


def test_columns_are_aligned():
    assert printing.columns([("a", "b"), ("long", "c")], indent="> ") == "> a     b\n> long  c"
