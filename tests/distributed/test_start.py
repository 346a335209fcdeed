"""start() in one process: what it finds, what it refuses, and the fetching of results."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import glm_jax
from glm_jax.cli.main import main
from glm_jax.errors import Error, InputError
from glm_jax.runtime import distributed
from glm_jax.sharding.host_arrays import to_devices, to_host

TWO = {"coordinator": "127.0.0.1:9", "process_count": 2, "process_index": 0}

pytestmark = pytest.mark.usefixtures("alone")


def test_one_process_is_started_by_nothing_and_stays_the_same():
    running = glm_jax.distributed.start()
    assert (running.index, running.count, running.detected_by, running.coordinator) == (0, 1, "none", None)
    assert (running.local_devices, running.global_devices) == (jax.local_device_count(), jax.device_count())
    assert running.describe() == "one process"
    assert glm_jax.distributed.start() is running
    assert glm_jax.distributed.start(process_count=1, process_index=0) is running
    with pytest.raises(InputError, match="already started: this is one process"):
        glm_jax.distributed.start(**TWO)


def test_it_must_come_before_devices_are_used():
    with pytest.raises(Error, match="came after jax had used its devices; call it first of all"):
        glm_jax.distributed.start(**TWO)


@pytest.mark.parametrize("name", ["start_timeout", "heartbeat_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_timeouts_are_seconds(name, value):
    with pytest.raises(InputError, match=f"{name} .*: right would be seconds, at least 1"):
        glm_jax.distributed.start(**{name: value})


def test_there_is_nobody_to_end():
    with pytest.raises(RuntimeError, match="no other processes"):
        distributed.fail(2, "x")


@pytest.mark.parametrize("spec", [(), ("data",), (None, ("expert", "tensor"))])
def test_arrays_go_to_the_devices_and_back(mesh_of_sizes, spec):
    array = np.arange(32, dtype=np.int32).reshape(4, 8)
    placed = to_devices(array, NamedSharding(mesh_of_sizes((2, 2, 2)), PartitionSpec(*spec)))
    assert placed.sharding.spec == PartitionSpec(*spec)
    np.testing.assert_array_equal(to_host(placed), array)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--process_count=2"], "--process_count 2 needs --process_index, 0 to 1"),
        (["--coordinator=a:1"], "--coordinator a:1 needs --process_count and --process_index"),
        (["--process_count=1", "--start_timeout=0"], "start_timeout 0: right would be seconds, at least 1"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "chat", "doctor"])
def test_the_verbs_refuse_in_one_line(capfd, verb, flags, complaint):
    model = [] if verb == "doctor" else ["--model=nowhere"]
    assert main([verb, *model, *flags]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"glm-jax: error: {complaint}") and said.err.count("\n") == 1


def test_inspect_prints_in_the_first_process_only(capfd):
    arguments = ["inspect", "--model=tiny-glm", "--json", "--coordinator=127.0.0.1:9", "--process_count=2"]
    assert main([*arguments, "--process_index=1"]) == 0
    assert capfd.readouterr().out == ""
    assert main([*arguments, "--process_index=0"]) == 0
    assert capfd.readouterr().out.startswith('{"model": "tiny-glm"')


def test_doctor_tells_which_process_this_is(capfd):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["processes"]
    assert (found["index"], found["count"], found["detected_by"], found["coordinator"]) == (0, 1, "none", None)
    assert (found["local_devices"], found["global_devices"]) == (jax.device_count(), jax.device_count())
