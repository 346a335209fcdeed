"""plan: the rules it ranks, the weights it takes, the names it knows, the lines that load so, the fewest devices."""

from __future__ import annotations

import json
import shlex

import jax
import pytest

import glm_jax
from glm_jax.sharding import rules_named
from tests.checkpoint import quantized_sources as sources

GIB = 2**30
TINY = ("--model=tiny-glm", "--device=h200", "--count=8", "--batch=8", "--length=64")


def test_the_first_mesh_needs_few_bytes_without_a_word_about_rules(call):
    flags = "--device v5p --topology 4x4x4 --job decode --batch 64 --length 4096 --weights bfloat16 --json"
    planned = call("plan", "--model", "glm-4.5", *flags.split()).json
    first = planned["meshes"][0]
    assert first["bytes_per_device"]["total"] <= 13 * GIB
    assert (first["rules"], planned["rules"]) == ("serve_latency", "serve_latency")
    assert planned["rules_tried"] == ["default", "serve_latency", "serve_throughput", "long_context"]
    alone = call("plan", "--model", "glm-4.5", *flags.split(), "--rules=serve_latency").json
    assert alone["rules_tried"] == ["serve_latency"]
    same = [entry for entry in alone["meshes"] if entry["mesh"] == first["mesh"]]
    assert same == [first]


@pytest.mark.parametrize("job", ["decode", "prefill", "train"])
def test_each_entry_is_that_of_its_rules_alone(call, job):
    flags = (*TINY, f"--job={job}", "--json")
    together = call("plan", *flags).json
    for name in together["rules_tried"]:
        alone = {json.dumps(entry["mesh"]): entry for entry in call("plan", *flags, f"--rules={name}").json["meshes"]}
        own = [entry for entry in together["meshes"] if entry["rules"] == name]
        assert own == [alone[json.dumps(entry["mesh"])] for entry in own]
        # every mesh that these rules can hold is there, by them or by others that come to the same on it
        assert {json.dumps(entry["mesh"]) for entry in together["meshes"]} >= set(alone)
    tried = [(json.dumps(entry["mesh"]), entry["rules"]) for entry in together["meshes"]]
    assert len(set(tried)) == len(tried)


def test_rules_that_come_to_the_same_on_a_mesh_are_planned_once(call):
    meshes = call("plan", *TINY, "--json").json["meshes"]
    # on one axis of experts the default splits nothing that the rules for long contexts do not, but for the batch
    assert [entry["rules"] for entry in meshes if entry["mesh"] == {"data": 8, "expert": 1, "tensor": 1}] == [
        "default",
        "serve_latency",
    ]


def test_people_see_the_rules_and_why_a_quicker_bound_is_not_first(call):
    flags = ("--device=v5p", "--topology=4x4x4", "--batch=64")
    lines = call("plan", "--model=glm-4.5", *flags).out.splitlines()
    assert lines[3].split()[:2] == ["mesh", "rules"]
    assert lines[4].split()[:2] == ["data=1,expert=8,tensor=8", "serve_latency"]
    assert "the first: data=1,expert=8,tensor=8 by rules serve_latency" in lines
    assert any("by default may be quicker, at 16.78 GiB a device" in line for line in lines)
    assert "to load so (DIR: a checkpoint of glm-4.5):" in lines


@pytest.mark.parametrize("rules", [None, "default", "serve_latency", "serve_throughput"])
def test_the_lines_that_load_do_so(call, hf, rules):
    flags = ("--device=cpu", "--count=8", "--batch=2", "--length=64", *([f"--rules={rules}"] if rules else []))
    planned = call("plan", "--model", hf, *flags, "--json").json
    first, load = planned["meshes"][0], planned["load"]
    assert load["prepare"] == []
    scope: dict = {}
    exec(load["python"], scope)
    model = scope["model"]
    assert dict(model.mesh.shape) == first["mesh"]
    assert model.rules == rules_named(first["rules"])
    said = call(*shlex.split(load["command"])[1:], "--max_new_tokens=1", "--json").json
    assert said["completion_tokens"] == 1
    assert load["command"] in call("plan", "--model", hf, *flags).out


def test_lines_for_other_weights_than_the_checkpoints(call, hf, orbax):
    flags = ("--device=h200", "--count=2", "--json")

    def load(*more: str, model=hf):
        return call("plan", "--model", model, *flags, *more).json["load"]

    assert load("--weights=int8")["prepare"] == [
        f"glm-jax convert --source {hf} --target {hf}-int8 --quantize int8",
    ]
    assert f"--model {hf}-int8 --mesh" in load("--weights=int8")["command"]
    assert load("--weights=int8", model=orbax)["prepare"][0] == f"glm-jax export --source {orbax} --target {orbax}-hf"
    assert "--dtype float32" in load("--weights=FP32")["command"]
    assert "--dtype" not in load("--weights=BF16")["command"]
    training = load("--job=train")
    assert training["command"] is None and "glm_jax.load(" in training["python"]


@pytest.mark.parametrize("kind", ["deepseek-128", "glm-bf16", "kimi-32", "deepseek-odd"])
@pytest.mark.parametrize("form", ["huggingface", "orbax"])
def test_a_quantised_checkpoint_is_planned_as_it_is_loaded(call, tmp_path, kind, form):
    directory = sources.checkpoint(sources.KINDS[kind]).write(tmp_path / "hf")
    if form == "orbax":
        assert call("convert", f"--source={directory}", f"--target={tmp_path / 'kept'}", "--quantized=keep").status == 0
        directory = tmp_path / "kept"
    flags = ("--device=cpu", "--count=2", "--length=16", "--json")
    own = call("plan", "--model", directory, *flags).json
    plain = call("plan", "--model", directory, *flags, "--weights=bfloat16").json
    assert (own["weights_as_stored"], plain["weights_as_stored"]) == (True, False)
    assert own["job"]["weights"] == {"d": "fp8", "g": "fp8", "k": "int4"}[kind[0]]
    for planned in (own, plain):
        scope: dict = {}
        exec(planned["load"]["python"], scope)
        first = planned["meshes"][0]
        held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(scope["model"])]
        # norms and routers are float32 on a CPU
        assert sum(held) == pytest.approx(first["bytes_per_device"]["weights"], rel=0.05)
        assert [note for note in first["notes"] if note.startswith("dequantised")] == list(scope["model"].notes)


def test_a_config_json_alone_tells_the_format(call, tmp_path):
    # a Kimi config says exactly which modules are quantised, so that its files can say no more
    made = sources.checkpoint(sources.kimi())
    whole = made.write(tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((whole / "config.json").read_text())
    flags = ("--device=h200", "--count=2", "--json")
    plans = [call("plan", "--model", directory, *flags).json for directory in (whole, tmp_path / "bare")]
    assert plans[0]["meshes"] == plans[1]["meshes"]
    assert plans[1]["stored_weights"] == "int4 in groups of 32"


def test_presets_are_planned_as_they_are_published(call):
    flags = ("--device=h200", "--count=16", "--batch=8")
    said = call("plan", "--model=deepseek-v3", *flags).out.splitlines()[0]
    assert said == (
        "deepseek-v3: decode of 8 x 4096 tokens, weights fp8, as published (fp8 in blocks of 128 x 128), cache bfloat16"
    )
    assert "weights bfloat16, as published, cache bfloat16" in call("plan", "--model=glm-4.5", *flags).out
    planned = call("plan", "--model=deepseek-v3", "--device=h200", "--count=1", "--json").json
    published = 688_574_839_360 - 2 * 2 * 129_280 * 7168  # bytes of the files, but for the MTP layer's copies
    (first,) = {entry["bytes_per_device"]["weights"] for entry in planned["meshes"]}
    assert 1 < first / published < 1.035  # a scale for each output and 128 inputs, where the files have one for a block
    assert planned["load"]["command"].startswith("glm-jax generate --model DIR --mesh ")


def test_training_dequantises(call):
    flags = ("--device=v5p", "--topology=8x8x8", "--job=train", "--batch=512")
    out = call("plan", "--model=deepseek-v3", *flags).out
    assert "weights bfloat16, dequantised for training from fp8 in blocks of 128 x 128" in out
    complaint = call("plan", "--model=deepseek-v3", *flags, "--weights=fp8").complaint
    assert complaint == "--weights fp8 cannot be trained; right would be bfloat16 or float32"


@pytest.mark.parametrize(
    ("written", "preset", "stored"),
    [
        ("GLM-4.5-Air", "glm-4.5-air", None),
        ("zai-org/GLM-4.5-Air", "glm-4.5-air", None),
        ("hf://zai-org/GLM-4.5", "glm-4.5", None),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air", "fp8 with a scale for each output channel"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3", "fp8 in blocks of 128 x 128"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-v3.1", "fp8 in blocks of 128 x 128"),
        ("moonshotai/Kimi-K2-Instruct-0905", "kimi-k2-0905", "fp8 in blocks of 128 x 128"),
        ("moonshotai/Kimi-K2-Thinking", "kimi-k2-thinking", "int4 in groups of 32"),
    ],
)
def test_models_by_their_names_on_the_hub(call, written, preset, stored):
    planned = call("plan", "--model", written, "--device=h200", "--count=16", "--json").json
    assert (planned["model"], planned["preset"], planned["stored_weights"]) == (written, preset, stored)
    described = call("inspect", "--model", written, "--json").json
    assert described["config"] == call("inspect", "--model", preset, "--json").json["config"]


def test_a_directory_of_that_name_comes_before_the_hubs(call, hf, tmp_path, monkeypatch):
    (tmp_path / "zai-org").mkdir()
    (tmp_path / "zai-org" / "GLM-4.5-Air").symlink_to(hf)
    monkeypatch.chdir(tmp_path)
    assert call("plan", "--model=zai-org/GLM-4.5-Air", "--device=cpu", "--count=1", "--json").json["preset"] is None
    assert call("inspect", "--model=zai-org/GLM-4.5-Air", "--json").json["kind"] == "huggingface"


def test_words_are_taken_in_any_case(call):
    flags = ("--model=Tiny-GLM", "--device=H200", "--job=Decode", "--weights=FP8", "--cache_dtype=BF16")
    planned = call("plan", *flags, "--count=1", "--rules=Default", "--json").json
    assert planned["job"] | {"batch": 1, "length": 1024} == planned["job"]
    assert (planned["job"]["weights"], planned["job"]["cache_dtype"]) == ("fp8", "bfloat16")


PUBLISHED = {
    ("glm-4.5", "bfloat16"): {"h100": 16, "h200": 8},
    ("glm-4.5", "fp8"): {"h100": 8, "h200": 4},
    ("glm-4.5-air", "bfloat16"): {"h100": 4, "h200": 2},
    ("glm-4.5-air", "fp8"): {"h100": 2, "h200": 1},
}


@pytest.mark.parametrize(("model", "weights"), PUBLISHED)
def test_the_fewest_devices_are_the_published_ones(call, model, weights):
    flags = ("--count=auto", "--batch=8", "--length=4096", f"--weights={weights}", "--json")
    rows = call("plan", f"--model={model}", "--device=h100,h200", *flags).json["kinds"]
    assert {row["device"]: row["count"] for row in rows} == PUBLISHED[model, weights]


def test_a_table_over_kinds(call):
    flags = ("--model=glm-4.5-air", "--device=h100,h200,b200,v5p", "--count=auto", "--batch=8")
    planned = call("plan", *flags, "--json").json
    rows = {row["device"]: row for row in planned["kinds"]}
    assert list(rows) == ["h100", "h200", "b200", "v5p"]
    assert rows["v5p"]["topology"] == "2x2x1"
    lines = call("plan", *flags).out.splitlines()
    assert lines[0] == "glm-4.5-air: decode of 8 x 4096 tokens, weights bfloat16, as published, cache bfloat16"
    for line, row in zip(lines[3:], rows.values(), strict=False):
        assert row["fits"] is True and row["bytes_per_device"] <= row["memory_bytes"]
        assert line.split()[:3] == [str(row["count"]), "x", row["device"]]
        # the same as a plan of that kind and number by itself
        asked = f"--topology={row['topology']}" if row["topology"] else f"--count={row['count']}"
        alone = call("plan", "--model=glm-4.5-air", f"--device={row['device']}", asked, "--batch=8", "--json").json
        first = alone["meshes"][0]
        assert (row["mesh"], row["rules"], row["step_seconds"]) == (
            first["mesh"],
            first["rules"],
            first["step_seconds"],
        )
        assert row["load"] == alone["load"]


def test_one_kind_with_the_fewest_devices_has_the_whole_plan(call):
    flags = ("--model=glm-4.5", "--device=H200", "--batch=8", "--json")
    auto = call("plan", *flags, "--count=auto").json
    rows = auto.pop("kinds")
    assert auto == call("plan", *flags, "--count=8").json
    assert [row["count"] for row in rows] == [8]


def test_a_kind_that_is_named_twice_is_one_kind(call):
    flags = ("--model=tiny-glm", "--count=1", "--json")
    assert call("plan", *flags, "--device=h100,H100, h100").json == call("plan", *flags, "--device=h100").json


def test_as_many_of_each_kind_as_asked(call):
    flags = ("--model=glm-4.5", "--device=h100,h200", "--count=8", "--batch=8", "--weights=bfloat16")
    rows = call("plan", *flags, "--json").json["kinds"]
    assert [(row["count"], row["fits"]) for row in rows] == [(8, False), (8, True)]
    assert "does not fit" in call("plan", *flags).out


def test_what_fits_on_no_number_of_devices(call):
    flags = ("--model=kimi-k2", "--device=v5e,h200", "--count=auto", "--weights=float32", "--batch=512")
    planned = call("plan", *flags, "--length=131072", "--json").json
    (small, large) = planned["kinds"]
    assert (small["count"], small["fits"]) == (None, False)
    assert small["reason"] == "fits on no number of them: more memory each, or a smaller job"
    assert large["fits"] is True
    assert "v5e: fits on no number of them" in call("plan", *flags, "--length=131072").out


def test_a_device_known_by_its_figures_is_timed(call):
    figures = ("--memory=143771MiB", "--bandwidth=4.8TB/s", "--tflops=989.4", "--link=450GB/s")
    flags = ("--model=glm-4.5", "--count=8", "--batch=8", "--rules=default", "--json")
    own = call("plan", *flags, *figures).json
    known = call("plan", *flags, "--device=h200").json
    assert own["device"]["kind"] == "any" and own["device_source"] == "as given"
    times = [{json.dumps(e["mesh"]): e["step_seconds"] for e in plan["meshes"]} for plan in (own, known)]
    assert times[0] == pytest.approx(times[1])
    slower = call("plan", *flags, "--device=h200", "--bandwidth=2.4TB/s").json["meshes"][0]
    assert slower["seconds"]["memory"] == pytest.approx(2 * known["meshes"][0]["seconds"]["memory"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--memory=80"], "--memory 80 is 80 bytes; probably meant: --memory 80GB or --memory 80GiB"),
        (["--memory=141"], "--memory 141 is 141 bytes; probably meant: --memory 141GB or --memory 141GiB"),
        (["--memory=81559"], "--memory 81559 is 81559 bytes; probably meant: --memory 81559MB or --memory 81559MiB"),
        (["--memory=79.6"], "--memory 79.6 is 79.6 bytes; probably meant: --memory 79.6GB or --memory 79.6GiB"),
        (
            ["--memory=80GB", "--bandwidth=3350", "--tflops=989"],
            "--bandwidth 3350 is 3350 bytes a second; probably meant: --bandwidth 3350GB/s",
        ),
        (
            ["--device=h100", "--bandwidth=3.35"],
            "--bandwidth 3.35 is 3.35 bytes a second; probably meant: --bandwidth 3.35TB/s",
        ),
        (["--device=h100", "--link=450"], "--link 450 is 450 bytes a second; probably meant: --link 450GB/s"),
        (["--device=h100", "--memory=0.08"], "--memory 0.08 is 0.08 bytes; probably meant: --memory 0.08TB"),
        (["--memory=80GB", "--bandwidth=3TB"], "--tflops must be given, too"),
        (["--memory=80GB", "--tflops=989"], "--bandwidth must be given, too"),
        (["--device=h200", "--tflops=989e12"], "--tflops 9.89e+14 is no rate; right would be in 10^12 operations"),
        (["--device=h200", "--bandwidth=fast"], "--bandwidth 'fast' is no size; right would be bytes a second, or"),
        (["--device=h200", "--memory=80GB/s"], "--memory '80GB/s' is no size"),
        (["--device=h200", "--count=many"], "--count 'many' is no number of devices; right would be a number such as"),
        (["--device=h200,h300"], "no device is called 'h300'; known: h100, "),
        (["--device=h200,h100", "--memory=80GB"], "--memory is of one kind, and --device h200,h100 names 2"),
        (["--device=h200,h100", "--compile"], "--compile is of one kind, and --device h200,h100 names 2"),
        (["--device=v5p,v6e", "--topology=2x2"], "--topology is of one kind, and --device v5p,v6e names 2"),
        (["--device=v5p", "--topology=2x2x1", "--count=auto"], "--topology 2x2x1 says how many devices there are"),
        (
            ["--memory=1MB", "--count=auto", "--job=train", "--compile"],
            "--compile proves the first mesh that fits, and none does: fits on no number of them",
        ),
        (["--device=h200", "--rules=fastest"], "no rules are called 'fastest'; known: default, serve_latency"),
        (["--device=h200", "--model=ckpt/glm-4.5"], "ckpt/glm-4.5 is neither a directory nor a known model; known"),
    ],
)
def test_impossible_requests(call, flags, complaint):
    assert call("plan", "--model=tiny-glm", "--count=8", *flags).complaint.startswith(complaint)


def test_several_kinds_need_a_number(call):
    complaint = call("plan", "--model=tiny-glm", "--device=h100,h200").complaint
    assert complaint == "--count must be given with several kinds: a number, or auto"


def test_presets_have_one_published_format_that_this_package_reads():
    from glm_jax.checkpoint.stored_formats import StoredFormats

    for name in glm_jax.configs.names():
        preset = glm_jax.configs.find(name)
        assert preset is not None and preset.name == name
        stored = StoredFormats.declared(preset.config, {"quantization_config": preset.quantization})
        assert (stored.kind is None) is (preset.quantization is None)
