"""Kinds of devices and the slices that TPUs come in."""

from __future__ import annotations

import pytest

import glm_jax
from glm_jax.planning.devices import choose_cluster, choose_device, clusters, topologies
from glm_jax.planning.kinds import DEVICES, find_device


@pytest.mark.parametrize(
    ("kind", "topology", "devices"),
    [
        ("v5e", "4x4", 16),
        ("v5e", "2x4", 8),
        ("v6e", "8x8", 64),
        ("v6e", "16x16", 256),
        ("v5p", "2x2x1", 4),
        ("v5p", "2x2x4", 16),
        ("v5p", "4x4x4", 64),
        ("v5p", "4X4X4", 64),
        ("v5p", "4x4x8", 128),
        ("v5p", "16x16x24", 6144),
        ("tpu7x", "2x2x1", 8),
        ("tpu7x", "4x4x4", 128),
    ],
)
def test_a_slice_has_its_chips_and_tpu7x_two_devices_each(kind, topology, devices):
    cluster = choose_cluster(kind, topology=topology)
    assert cluster.count == devices
    assert cluster.topology == tuple(map(int, topology.lower().split("x")))


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        ("v5p", "4x4"),
        ("v5p", "3x4x4"),
        ("v5p", "8x4x4"),
        ("v5p", "2x2x8"),
        ("v5p", "24x24x24"),
        ("v5e", "4x4x4"),
        ("v5e", "2x8"),
        ("v5e", "16x32"),
        ("v6e", "0x4"),
        ("v6e", "4"),
        ("v6e", "4x"),
        ("v6e", "-4x4"),
        ("v6e", "99999999999999x4"),
        ("v6e", ""),
    ],
)
def test_other_shapes_are_refused_with_those_there_are(kind, topology):
    with pytest.raises(glm_jax.InputError, match=f"{kind} has no topology '{topology}'; those of up to 256 chips: "):
        choose_cluster(kind, topology=topology)


@pytest.mark.parametrize(
    ("kind", "chips", "shape"),
    [("v5p", 16, (2, 2, 4)), ("v5p", 512, (8, 8, 8)), ("v5e", 32, (4, 8)), ("v6e", 4, (2, 2))],
)
def test_a_count_of_chips_takes_the_most_compact_slice(kind, chips, shape):
    assert choose_cluster(kind, count=chips).topology == shape


def test_every_kind_has_what_the_makers_say():
    # GB of memory, TB/s, and 10^12 operations a second in bfloat16, of a device: the makers' headline figures
    headlines = {
        "h100": (80, 3.35, 989),
        "h200": (141, 4.8, 989),
        "b200": (180, 8.0, 2250),
        "b300": (288, 8.0, 2250),
        "gb200": (186, 8.0, 2500),
        "a100": (80, 2.04, 312),
        "a100-40gb": (40, 1.56, 312),
        "mi300x": (192, 5.3, 1307),
        "l40s": (48, 0.864, 362),
        "a6000": (48, 0.768, 155),
        "rtx4090": (24, 1.01, 165),
        "rtx5090": (32, 1.79, 210),
        "rtxpro6000": (96, 1.79, 504),
        "v5e": (16, 0.819, 197),
        "v5p": (95, 2.765, 459),
        "v6e": (32, 1.64, 918),
        "tpu7x": (96, 3.69, 1154),
    }
    assert set(DEVICES) == {*headlines, "cpu"}
    for name, (memory, traffic, rate) in headlines.items():
        device = DEVICES[name]
        assert device.speed is not None
        # makers count in 10^9 and in 2^30 bytes; a program may use a little less
        assert 0.93 * memory * 10**9 < device.memory < 1.01 * memory * 2**30
        assert device.speed.memory == pytest.approx(traffic * 1e12, rel=0.01)
        assert device.speed.bfloat16 == pytest.approx(rate * 1e12, rel=0.01)
    for device in DEVICES.values():
        speed = device.speed
        assert speed is not None and device.source
        assert speed.float32 <= speed.bfloat16 <= min(speed.fp8, speed.int8)
        # the operations for each byte at which arithmetic starts to count
        assert 5 < speed.bfloat16 / speed.memory < 700


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("A100", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("a100_40gb", "a100-40gb"),
        ("L40S", "l40s"),
        ("A6000", "a6000"),
        ("RTX A6000", "a6000"),
        ("RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("RTX PRO 6000", "rtxpro6000"),
        ("RTX_PRO_6000", "rtxpro6000"),
        ("GB200", "gb200"),
        ("B300", "b300"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU v5p", "v5p"),
        ("v6e", "v6e"),
        ("Trillium", "v6e"),
        ("TPU7x", "tpu7x"),
        ("CPU", "cpu"),
    ],
)
def test_kinds_are_found_as_people_write_them(written, name):
    assert choose_device(written) is DEVICES[name]


def test_no_two_kinds_have_the_same_name():
    for device in DEVICES.values():
        for name in (device.name, *device.aliases):
            assert find_device(name) is find_device(name.upper().replace("-", " ")) is device


def test_figures_replace_those_of_a_kind_or_make_one():
    known = choose_device("h200", memory=10**11, bandwidth=4 * 10**12, tflops=790)
    speed = DEVICES["h200"].speed
    assert known.speed is not None and speed is not None
    assert (known.memory, known.speed.memory, known.speed.bfloat16) == (10**11, 4e12, 790e12)
    assert known.speed.link == speed.link
    own = choose_device(None, memory=10**11, bandwidth=4 * 10**12, tflops=800, link=10**11)
    assert own.speed is not None
    assert (own.name, own.speed.memory, own.speed.bfloat16, own.speed.link) == ("any", 4e12, 800e12, 1e11)
    assert own.platform == "gpu" and own.domain == 8
    assert choose_device(None, memory=10**11).speed is None


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"memory": 10**11, "bandwidth": 10**12}, "--tflops must be given, too: the time of a step is of its"),
        ({"memory": 10**11, "tflops": 800.0}, "--bandwidth must be given, too"),
        ({"memory": 10**11, "link": 10**11}, "--bandwidth must be given, too"),
        ({"bandwidth": 10**12, "tflops": 800.0}, "--device or --memory must be given; devices: h100, "),
        ({"memory": 10**11, "bandwidth": 10**12, "tflops": 0.0}, "--tflops must be more than 0, not 0.0"),
    ],
)
def test_figures_that_say_too_little(given, complaint):
    with pytest.raises(glm_jax.InputError) as refusal:
        choose_device(None, **given)
    assert str(refusal.value).startswith(complaint)


def test_an_unknown_kind_is_told_how_to_describe_one():
    with pytest.raises(glm_jax.InputError, match="described by --memory 96GB --bandwidth 4TB/s --tflops 800 without"):
        choose_device("h300")


def test_clusters_are_what_one_would_rent():
    counts = [cluster.count for cluster in clusters(DEVICES["h100"])]
    assert counts[:24] == [*range(1, 8), *range(8, 65, 8), 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    assert counts == sorted(set(counts))
    slices = list(clusters(DEVICES["v5p"]))
    assert [cluster.topology for cluster in slices[:5]] == [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)]
    assert [cluster.count for cluster in clusters(DEVICES["tpu7x"])][:2] == [8, 16]


def test_slices_are_listed_by_size_without_repeats():
    for name in ("v5e", "v5p", "v6e", "tpu7x"):
        found = topologies(DEVICES[name])
        assert len(set(found)) == len(found)
        assert next(max(shape) for shape in found) <= 2
    assert topologies(DEVICES["h100"]) == ()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"device": "h300", "count": 8},
            "no device is called 'h300'; known: h100, h200, b200, b300, gb200, a100, ",
        ),
        ({"device": None, "count": 8}, "--device or --memory must be given; devices: h100"),
        ({"device": None, "memory": 100}, "--count must be given: a number of devices, or auto"),
        ({"device": "h200"}, "--count must be given: a number of devices, or auto"),
        ({"device": "h200", "count": 0}, "--count must be at least 1, not 0"),
        ({"device": "h200", "count": -3}, "--count must be at least 1, not -3"),
        ({"device": "h200", "count": 10**18}, "--count must be at most 100000, not 1000000000000000000"),
        ({"device": "h200", "count": 8, "memory": 0}, "--memory must be more than 0, not 0"),
        ({"device": "h200", "topology": "2x4"}, "h200 comes in no topologies; right would be --count and a number"),
        ({"device": None, "memory": 5, "topology": "2x4"}, "any comes in no topologies"),
        ({"device": "v5p"}, "--topology or --count must be given for v5p; topologies: 2x2x1"),
        ({"device": "v5p", "count": 7}, "v5p has no slice of 7 chips; those of up to 256: 2x2x1"),
        ({"device": "v5e", "topology": "4x4", "count": 8}, "--topology 4x4 has 16 chips, --count says 8"),
    ],
)
def test_impossible_clusters(arguments, complaint):
    with pytest.raises(glm_jax.InputError) as refusal:
        choose_cluster(**arguments)
    assert str(refusal.value).startswith(complaint)
