"""Which mesh and rules come first, and the fewest devices that hold a job."""

from __future__ import annotations

import dataclasses

import pytest

from glm_jax import configs
from glm_jax.checkpoint.stored_formats import StoredFormats
from glm_jax.errors import ShardingError
from glm_jax.planning import Job, choose_cluster, make_plan, smallest_cluster
from glm_jax.planning.devices import clusters
from glm_jax.planning.kinds import DEVICES
from glm_jax.planning.memory import Bytes
from glm_jax.planning.mesh_plan import MeshPlan
from glm_jax.planning.meshes import abstract_mesh, meshes
from glm_jax.planning.placement import abstract_model, place
from glm_jax.planning.ranking import candidates, on_mesh, ranked
from glm_jax.planning.roofline import Times
from glm_jax.planning.work import Work
from glm_jax.sharding import PRESETS, Rules, rules_named


def tiny(**changes) -> Job:
    wanted = {"config": configs.get("tiny-glm"), "kind": "decode", "batch": 8, "length": 64, **changes}
    return Job(**wanted)


def entry(seconds: float | None, total: int, *, fits: bool = True) -> MeshPlan:
    return MeshPlan(
        mesh=abstract_mesh((1, 1, 8)),
        rules=Rules(),
        held=Bytes(weights=total, cache=0, gradients=0, optimizer=0, activations=0, collectives=0),
        fits=fits,
        largest_batch=1,
        largest_length=1,
        work=Work(operations=0.0, traffic=0.0, collectives=()),
        times=None if seconds is None else Times(compute=seconds, memory=0.0, communication=0.0),
        notes=(),
    )


@pytest.mark.parametrize(
    ("found", "order"),
    [
        ([(1.0, 100), (1.4, 70)], [1, 0]),  # such bounds do not tell which is quicker: the fewer bytes
        ([(1.0, 100), (1.6, 70)], [0, 1]),  # such do
        ([(1.0, 100), (1.4, 95)], [0, 1]),  # hardly fewer
        ([(1.0, 100), (1.2, 74), (1.4, 70)], [1, 0, 2]),  # hardly more than the fewest, and quicker
        ([(1.0, 100), (1.2, 90), (1.4, 70), (9.0, 10)], [2, 0, 1, 3]),
        ([(None, 100), (None, 70)], [1, 0]),
    ],
)
def test_the_one_to_take_comes_first_and_the_rest_by_time(found, order):
    entries = [entry(*one) for one in found]
    assert ranked(entries[::-1], rules=2) == [entries[place] for place in order]


def test_with_one_placement_the_quickest_is_first():
    slow, quick = entry(1.4, 70), entry(1.0, 100)
    assert ranked([slow, quick], rules=1) == [quick, slow]


def test_what_does_not_fit_comes_last_with_the_fewest_bytes_first():
    fitting, large, larger = entry(5.0, 10), entry(1.0, 100, fits=False), entry(0.5, 200, fits=False)
    assert ranked([larger, large, fitting], rules=3) == [fitting, large, larger]
    assert ranked([larger, large], rules=3) == [large, larger]
    assert ranked([], rules=3) == []


@pytest.mark.parametrize("kind", ["decode", "prefill", "train"])
def test_rules_that_come_to_the_same_place_the_same(kind):
    job = tiny(kind=kind)
    model = abstract_model(job)
    for mesh in meshes(8):
        by_form: dict[Rules, set[tuple]] = {}
        for rules in PRESETS.values():
            own = dataclasses.replace(job, rules=rules)
            try:
                parts = place(model, own, mesh).parts.values()
            except ShardingError:
                by_form.setdefault(on_mesh(rules, mesh), set()).add(())
                continue
            by_form.setdefault(on_mesh(rules, mesh), set()).add(tuple((part.name, part.local) for part in parts))
        assert all(len(found) == 1 for found in by_form.values())


def test_a_plan_by_several_rules_is_their_plans_together():
    job, cluster = tiny(), choose_cluster("h200", count=8)
    together = make_plan(job, cluster, rules=candidates("decode"))
    alone = [make_plan(dataclasses.replace(job, rules=rules), cluster) for rules in candidates("decode")]
    known = {(each.mesh, each.rules): each for plan in alone for each in plan.meshes}
    assert all(known[each.mesh, each.rules] == each for each in together.meshes)
    held = {mesh for plan in alone for mesh in (each.mesh for each in plan.meshes)}
    assert {each.mesh for each in together.meshes} == held
    assert {each.mesh for each in together.refused} == set(meshes(8, "gpu")) - held
    assert together.job.rules == together.meshes[0].rules


@pytest.mark.parametrize("kind", ["decode", "train"])
@pytest.mark.parametrize("memory", [200_000, 500_000, 1_000_000, 2**30])
@pytest.mark.parametrize("device", ["h100", "v5e"])
def test_no_smaller_cluster_holds_the_job(kind, memory, device):
    job, rules = tiny(kind=kind), candidates(kind)
    own = dataclasses.replace(DEVICES[device], memory=memory)
    found = smallest_cluster(job, own, rules=rules)

    def fits(cluster) -> bool:
        return any(each.fits for each in make_plan(job, cluster, rules=rules).meshes)

    few = [cluster for cluster in clusters(own) if cluster.count <= 32]
    first = next((cluster for cluster in few if fits(cluster)), None)
    assert first == (found if found is not None and found.count <= 32 else None)


@pytest.mark.parametrize(("name", "device"), [("kimi-k2-thinking", "h200"), ("deepseek-v3.1", "b200")])
def test_no_smaller_cluster_holds_a_published_checkpoint(name, device):
    preset = configs.find(name)
    assert preset is not None
    stored = StoredFormats.declared(preset.config, {"quantization_config": preset.quantization})
    job = Job(config=preset.config, kind="decode", batch=8, length=4096, stored=stored)
    rules = candidates("decode")
    found = smallest_cluster(job, DEVICES[device], rules=rules)
    assert found is not None and found.count <= 8
    for cluster in clusters(DEVICES[device]):
        assert any(each.fits for each in make_plan(job, cluster, rules=rules).meshes) is (cluster == found)
        if cluster == found:
            break


def test_what_repeats_on_every_device_fits_on_no_number_of_them():
    job = tiny(kind="prefill", batch=1, length=1024)  # one prompt is not split by the default rules
    own = dataclasses.replace(DEVICES["h100"], memory=300_000)
    assert smallest_cluster(job, own, rules=[rules_named("default")]) is None
