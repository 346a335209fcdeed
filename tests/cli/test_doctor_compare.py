"""doctor --compare: checkpoints of every family agree with transformers, and what is wrong is found where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.checkpoint import orbax_io
from glm_jax.cli.main import main
from tests import oracle, published

LAYERS = 3  # of the small shapes: one dense, two with experts
SHAPE = {"num_hidden_layers": LAYERS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """The random checkpoint that transformers saved, by family; float32, so that nothing of a change is rounded off."""
    made: dict[str, Path] = {}

    def get(model_type: str = "glm4_moe") -> Path:
        if model_type not in made:
            made[model_type] = oracle.save(
                tmp_path_factory.mktemp("oracle") / model_type, model_type=model_type, seed=4, **SHAPE
            )
        return made[model_type]

    return get


@pytest.fixture
def altered(tmp_path, checkpoint) -> Callable[..., Path]:
    """The Orbax checkpoint converted from a copy of a directory after `change` was made to its tensors and config."""

    def make(model_type: str, change: Callable[[dict[str, np.ndarray], dict[str, Any]], object]) -> Path:
        directory = checkpoint(model_type)
        arrays, config = published.read(directory), json.loads((directory / "config.json").read_text())
        change(arrays, config)
        source, target = tmp_path / "altered", tmp_path / "orbax"
        published.write(source, config, arrays)
        if (directory / "generation_config.json").exists():
            shutil.copyfile(directory / "generation_config.json", source / "generation_config.json")
        assert main(["convert", f"--source={source}", f"--target={target}"]) == 0
        return target

    return make


@pytest.fixture
def report(capfd) -> Callable[..., dict[str, Any]]:
    """Runs the comparison; the exit status must be what the report says."""

    def run(model: Path, reference: Path, *flags: str) -> dict[str, Any]:
        capfd.readouterr()
        status = main(["doctor", f"--model={model}", f"--compare={reference}", "--json", *flags])
        said = capfd.readouterr()
        assert status in (0, 1), said.err
        found = json.loads(said.out)
        assert found["ok"] is (status == 0)
        return found

    return run


def failed(found: dict[str, Any]) -> dict[str, str]:
    return {check["check"]: check["detail"] for check in found["checks"] if check["status"] == "error"}


def parity(found: dict[str, Any]) -> dict[str, Any]:
    return found["comparison"]["parity"]


@pytest.mark.parametrize("model_type", published.FAMILIES)
def test_every_family_agrees(model_type, checkpoint, altered, report):
    found = report(altered(model_type, lambda arrays, config: None), checkpoint(model_type))
    assert failed(found) == {}
    mtp = ["MTP layer"] if published.FAMILIES[model_type]["num_nextn_predict_layers"] else []
    names = ["embedding", *(f"layer {i}" for i in range(LAYERS)), "final norm", *mtp]
    places = parity(found)["places"]
    assert [place["name"] for place in places] == names
    assert all(place["cosine"] > 1 - 1e-9 and place["relative"] < 1e-4 for place in places)
    agreements = {place["name"]: place["router_agreement"] for place in places}
    routed = {"layer 1", "layer 2", *mtp}
    assert agreements == {name: 100.0 if name in routed else None for name in names}
    assert parity(found)["first_departure"] is None and parity(found)["departing_alone"] == []
    assert parity(found)["logits"]["difference"] < 1e-4
    assert (parity(found)["mtp_logits"] is not None) is bool(mtp)
    assert found["comparison"]["weights"]["compared"] == len(published.read(checkpoint(model_type)))
    yarn = published.FAMILIES[model_type].get("rope_scaling")
    assert yarn is None or found["comparison"]["tokens"][1] > yarn["original_max_position_embeddings"]


@pytest.mark.parametrize("model_type", ["glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    ("layer", "tensor"),
    [
        (0, "mlp.down_proj.weight"),
        (1, "self_attn.o_proj.weight"),
        (2, "mlp.shared_experts.up_proj.weight"),
        (LAYERS, "eh_proj.weight"),
    ],
)
def test_a_changed_weight_is_found_in_its_layer(model_type, layer, tensor, checkpoint, altered, report):
    name = f"model.layers.{layer}.{tensor}"
    found = report(altered(model_type, lambda arrays, _: arrays[name].__imul__(1.01)), checkpoint(model_type))
    place = f"layer {layer}" if layer < LAYERS else "MTP layer"
    assert parity(found)["first_departure"] == place
    assert parity(found)["departing_alone"] == [place]
    assert list(found["comparison"]["weights"]["differing"]) == [name]
    assert found["comparison"]["weights"]["differing"][name] > 0
    expected = {"weights", "residual stream", "MTP logits"} | ({"logits"} if layer < LAYERS else set())
    assert expected <= set(failed(found)) <= expected | {"router", "rope order"}
    assert name in failed(found)["weights"] and place in failed(found)["residual stream"]


def test_two_changed_layers_are_told_apart(checkpoint, altered, report):
    """After the first everything departs; each layer on the reference's stream shows the second."""

    def change(arrays, _config):
        for layer in (1, LAYERS):
            arrays[f"model.layers.{layer}.post_attention_layernorm.weight"] *= 1.01

    found = report(altered("glm4_moe", change), checkpoint("glm4_moe"))
    assert parity(found)["first_departure"] == "layer 1"
    assert parity(found)["departing_alone"] == ["layer 1", "MTP layer"]


def test_the_final_norm_is_a_place_of_its_own(checkpoint, altered, report):
    found = report(
        altered("glm4_moe", lambda arrays, _: arrays["model.norm.weight"].__imul__(1.01)), checkpoint("glm4_moe")
    )
    assert parity(found)["first_departure"] == "final norm"


def test_the_head_shows_in_the_logits_alone(checkpoint, altered, report):
    found = report(
        altered("glm4_moe", lambda arrays, _: arrays["lm_head.weight"].__imul__(1.01)), checkpoint("glm4_moe")
    )
    assert parity(found)["first_departure"] is None
    assert {"weights", "logits", "MTP logits"} == set(failed(found))


def test_the_embedding_is_the_first_place(checkpoint, altered, report):
    found = report(
        altered("glm4_moe", lambda arrays, _: arrays["model.embed_tokens.weight"].__imul__(1.01)),
        checkpoint("glm4_moe"),
    )
    assert parity(found)["first_departure"] == "embedding"
    assert parity(found)["departing_alone"] == []


def with_biases_that_matter(directory: Path, target: Path) -> Path:
    """A copy whose correction biases differ by less than bfloat16 can tell."""
    arrays, config = published.read(directory), json.loads((directory / "config.json").read_text())
    rng = np.random.default_rng(0)
    for name in arrays:
        if name.endswith(published.BIAS):
            arrays[name] = (-7.3 + 0.02 * rng.standard_normal(arrays[name].shape)).astype(np.float32)
    return published.write(target, config, arrays)


def test_rounded_router_biases_are_found(tmp_path, checkpoint, report):
    exact = with_biases_that_matter(checkpoint("glm4_moe"), tmp_path / "exact")
    arrays, config = published.read(exact), json.loads((exact / "config.json").read_text())
    biases = [name for name in arrays if name.endswith(published.BIAS)]
    rounded = published.stored({name: arrays[name] for name in biases}, "bfloat16", float32=())
    arrays |= {name: array.astype(np.float32) for name, array in rounded.items()}
    source = published.write(tmp_path / "rounded", config, arrays)
    assert main(["convert", f"--source={source}", f"--target={tmp_path / 'orbax'}"]) == 0
    found = report(tmp_path / "orbax", exact)
    assert sorted(found["comparison"]["weights"]["differing"]) == sorted(biases)
    assert "router" in failed(found)
    assert min(place["router_agreement"] or 100.0 for place in parity(found)["places"]) < 100
    assert parity(found)["first_departure"] == "layer 1"


def test_a_router_bias_stored_in_bfloat16_is_found(tmp_path, checkpoint, altered, report):
    model = altered("glm4_moe", lambda arrays, config: None)
    name = "moe.moe.router.bias"
    reader = orbax_io.OrbaxReader(model)
    spec = reader.spec(name)
    values = reader.read(name, tuple(slice(0, size) for size in spec.shape))
    item = model / orbax_io.ITEM_NAME
    shutil.rmtree(item / name)
    written = tmp_path / "written"
    with orbax_io.OrbaxWriter(written, {name: orbax_io.ArraySpec(spec.shape, "bfloat16", spec.shape)}) as writer:
        writer.write(name, (), values.astype(orbax_io.DTYPES["bfloat16"]))
    shutil.copytree(written / orbax_io.ITEM_NAME / name, item / name)
    found = report(model, checkpoint("glm4_moe"))
    assert failed(found)["checkpoint"].endswith("moe.moe.router.bias is bfloat16, should be float32")


def test_a_flipped_rope_order_is_found(checkpoint, altered, report):
    found = report(
        altered("deepseek_v3", lambda _, config: config.update(rope_interleave=False)),
        checkpoint("deepseek_v3"),
        "--layers=1",
    )
    wrong = failed(found)
    assert wrong["configuration"] == "attention.rope.interleaved is False, the reference's True"
    assert wrong["rope order"].startswith("configured half-split, but the first attention agrees with interleaved")
    assert "weights" not in wrong and "rope angles" not in wrong
    assert parity(found)["first_departure"] == "layer 0"


def test_a_wrong_eps_is_found(checkpoint, altered, report):
    found = report(
        altered("glm4_moe", lambda _, config: config.update(rms_norm_eps=1e-3)), checkpoint("glm4_moe"), "--layers=1"
    )
    assert failed(found)["configuration"] == "norm_eps is 0.001, the reference's 1e-05"
    assert parity(found)["first_departure"] == "layer 0"
    assert "final norm" in parity(found)["departing_alone"] and "rope angles" not in failed(found)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [("rope_theta", 10001.0, "theta"), ("factor", 41.0, "yarn.factor"), ("mscale_all_dim", 0.9, "yarn.mscale_all_dim")],
)
def test_wrong_angles_are_found(key, value, field, checkpoint, altered, report):
    found = report(
        altered("deepseek_v3", lambda _, config: config["rope_parameters"].update({key: value})),
        checkpoint("deepseek_v3"),
        "--layers=1",
    )
    assert failed(found)["configuration"].startswith(f"attention.rope.{field} is {value}")
    assert "rope angles" in failed(found)


def test_a_missing_stop_id_is_found(tmp_path, checkpoint, altered, report):
    reference = shutil.copytree(checkpoint("glm4_moe"), tmp_path / "reference")
    (reference / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    model = altered("glm4_moe", lambda _, config: None)
    (model / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    detail = "generation does not end at 7, which the reference's generation_config.json names"
    detail += "; generation_config.json names 5, the reference's 5, 7"
    assert failed(report(model, reference, "--layers=1")) == {"stop ids": detail}
    (model / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert failed(report(model, reference, "--layers=1")) == {}


def test_the_first_layers_only(tmp_path, checkpoint, altered, report):
    """What lies beyond them is neither read nor run."""

    def change(arrays, _config):
        arrays["model.layers.2.mlp.shared_experts.down_proj.weight"] *= 1.01

    model = altered("glm4_moe_lite", change)
    found = report(model, checkpoint("glm4_moe_lite"), "--layers=2")
    assert failed(found) == {}
    assert [place["name"] for place in parity(found)["places"]] == ["embedding", "layer 0", "layer 1", "final norm"]
    compared = [name for name in published.read(checkpoint("glm4_moe_lite")) if ".layers.2." not in name]
    compared = [name for name in compared if f".layers.{LAYERS}." not in name]
    assert found["comparison"]["weights"]["compared"] == len(compared)
    assert parity(report(model, checkpoint("glm4_moe_lite"), "--layers=3"))["first_departure"] == "layer 2"


def test_bfloat16_has_a_wider_tolerance_and_still_an_end(checkpoint, altered, report):
    flags = ("--dtype=bfloat16", "--layers=2")
    assert failed(report(checkpoint("glm4_moe"), checkpoint("glm4_moe"), *flags)) == {}
    name = "model.layers.1.self_attn.o_proj.weight"
    model = altered("glm4_moe", lambda arrays, _: arrays[name].__imul__(1.5))
    found = report(model, checkpoint("glm4_moe"), *flags)
    assert parity(found)["first_departure"] == "layer 1"


def test_what_is_not_finite_departs(checkpoint, altered, report):
    name = "model.layers.1.self_attn.o_proj.weight"
    found = report(altered("glm4_moe", lambda arrays, _: arrays[name].fill(np.nan)), checkpoint("glm4_moe"))
    assert parity(found)["first_departure"] == "layer 1"
    assert parity(found)["places"][2]["relative"] is None
    assert parity(found)["logits"]["difference"] is None
    assert found["comparison"]["weights"]["differing"] == {name: None}


def test_other_sizes_are_not_run(tmp_path, checkpoint, report):
    other = oracle.save(tmp_path / "other", seed=4, num_hidden_layers=LAYERS, vocab_size=120)
    found = report(other, checkpoint("glm4_moe"))
    assert parity(found) is None
    assert failed(found)["configuration"] == "vocab_size is 120, the reference's 128"
    assert failed(found)["vocabulary"] == "the model has 120 ids, the reference 128"
    assert "model.embed_tokens.weight" in failed(found)["weights"]


def test_tokens_and_prompt(call, hf, checkpoint):
    found = call("doctor", f"--model={hf}", f"--compare={hf}", "--prompt=What is 3+4?", "--layers=1", "--json").json
    assert failed(found) == {}
    assert found["comparison"]["tokens"][0] == 1
    statuses = {check["check"]: check["detail"] for check in found["checks"]}
    assert statuses["vocabulary"] == "tokenizer 512 ids, model 512: no padding"
    one = call("doctor", f"--model={hf}", f"--compare={hf}", "--tokens=5", "--layers=1", "--json").json
    assert one["comparison"]["tokens"] == [1, 1]
    order = next(check for check in one["checks"] if check["check"] == "rope order")
    assert order["status"] == "warning" and "both orders are the same" in order["detail"]


def test_the_table(call, checkpoint):
    said = call("doctor", f"--model={checkpoint()}", f"--compare={checkpoint()}", "--layers=2")
    assert said.status == 0
    assert "  place       cosine       difference  of its size  alone" in said.out
    assert "  embedding   1.000000000  0.0e+00" in said.out
    assert "ok       weights " in said.out


def test_a_reference_that_transformers_does_not_know(call, hf, tmp_path):
    strange = shutil.copytree(hf, tmp_path / "strange")
    content = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**content, "architectures": ["NoSuchForCausalLM"]}))
    said = call("doctor", f"--model={hf}", f"--compare={strange}")
    assert said.status == 2
    assert 'has no model class for architectures ["NoSuchForCausalLM"]' in said.err
