"""A checkpoint's own weight format: planned bytes equal those of the arrays that loading it holds."""

from __future__ import annotations

import pickle

import jax
import pytest

from glm_jax import configs
from glm_jax.checkpoint import convert, load, open_source
from glm_jax.checkpoint.stored_formats import StoredFormats
from glm_jax.errors import InputError
from glm_jax.planning import Job
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.planning.placement import abstract_model, place
from glm_jax.sharding import rules_named
from tests.checkpoint import quantized_sources as sources

PLACEMENTS = [((1, 1, 1), "default"), ((1, 1, 2), "default"), ((2, 2, 2), "serve_latency"), ((1, 4, 1), "default")]


def held_by_each(tree) -> set[int]:
    by_device: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            by_device[shard.device] = by_device.get(shard.device, 0) + shard.data.nbytes
    return set(by_device.values())


KINDS = {name: sources.KINDS[name] for name in ("deepseek-128", "deepseek-odd", "glm-bf16", "kimi-32", "kimi-odd")}
KINDS |= {
    name: sources.COMPRESSED[name]
    for name in ("int4-asymmetric", "int8-packed-asymmetric", "fp8-tensor", "fp8-group", "int8-asymmetric")
}


@pytest.fixture(scope="module", params=list(KINDS))
def directory(request, tmp_path_factory):
    return sources.checkpoint(KINDS[request.param]).write(tmp_path_factory.mktemp("stored") / request.param)


@pytest.mark.parametrize(("sizes", "rules"), PLACEMENTS)
def test_bytes_are_those_of_the_loaded_arrays(mesh_of_sizes, directory, sizes, rules):
    source = open_source(directory)
    placing = rules_named(rules)
    stored = StoredFormats.of(source)
    job = Job(config=source.config, kind="decode", batch=8, length=16, weights="float32", stored=stored, rules=placing)
    planned = place(abstract_model(job), job, abstract_mesh(sizes, "cpu"))
    model = load(directory, mesh=mesh_of_sizes(sizes), dtype="float32", rules=placing)
    assert held_by_each(model) == {sum(part.nbytes for part in planned.parts.values())}
    assert planned.notes == tuple(note for note in model.notes if note.startswith("dequantised"))
    assert job.quantized


def test_a_converted_checkpoint_that_kept_its_format_says_the_same(directory, tmp_path):
    convert(directory, tmp_path / "kept", quantized="keep")
    source, kept = (StoredFormats.of(open_source(place)) for place in (directory, tmp_path / "kept"))
    whole = {name: layout for name, layout in source.formats.items() if layout is not None}
    assert {name: layout for name, layout in kept.formats.items() if layout is not None} == whole


def test_four_bits_take_half_a_byte_on_accelerators(tmp_path):
    source = open_source(sources.checkpoint(sources.kimi()).write(tmp_path))
    stored = StoredFormats.of(source)
    job = Job(config=source.config, kind="decode", batch=1, length=16, stored=stored)
    name = next(iter(stored.formats))
    on = {
        platform: place(abstract_model(job), job, abstract_mesh((1, 1, 1), platform)).parts[name]
        for platform in ("cpu", "gpu", "tpu")
    }
    scales = 4 * on["gpu"].size // 32
    assert on["gpu"].nbytes == on["tpu"].nbytes == on["gpu"].size // 2 + scales
    assert on["cpu"].nbytes == on["cpu"].size + scales


def test_what_a_config_declares_goes_to_another_process():
    preset = configs.find("deepseek-v3")
    assert preset is not None
    stored = StoredFormats.declared(preset.config, {"quantization_config": preset.quantization})
    again = pickle.loads(pickle.dumps(stored))
    assert again == stored and again.kind == "fp8"
    assert StoredFormats.declared(preset.config, {}).kind is None


def test_weights_are_said_once():
    preset = configs.find("kimi-k2")
    assert preset is not None
    stored = StoredFormats.declared(preset.config, {"quantization_config": preset.quantization})
    with pytest.raises(InputError, match="--weights int4 says what the checkpoint's own formats say; one is enough"):
        Job(config=preset.config, kind="decode", batch=1, length=1, weights="int4", stored=stored)
    with pytest.raises(InputError, match="--weights fp8 cannot be trained; right would be bfloat16 or float32"):
        Job(config=preset.config, kind="train", batch=1, length=1, stored=stored)
