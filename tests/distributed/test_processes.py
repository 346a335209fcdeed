"""Two and four real processes: the tokens and the weights of one, and an end for all where one of them ends."""

from __future__ import annotations

import hashlib
import json
import signal

import numpy as np
import pytest

import glm_jax
from glm_jax.sharding import weights_by_name
from tests.cli.checkpoints import write_checkpoint
from tests.distributed import prompts
from tests.distributed.launch import free_port, program, spawn, wait, worker

HEARTBEAT = 10
CONTINUE = ["--tokens=5,6,7", "--max_new_tokens=24", "--temperature=1", "--seed=7", "--ignore_eos"]


@pytest.fixture(scope="module")
def one(orbax):
    """The model on one device of this process."""
    return glm_jax.load(orbax, mesh=glm_jax.make_mesh())


@pytest.fixture(scope="module")
def arrays(one):
    """Its weights by name."""
    return {name: np.asarray(weight.get_raw_value()) for name, weight in weights_by_name(one).items()}


def check_generate(orbax, one, *, processes: int, devices: int, mesh: str) -> None:
    expected = glm_jax.generate(one, [[5, 6, 7]], max_new_tokens=24, temperature=1.0, seed=7)[0]
    assert len(set(expected)) > 12  # not one token over and over
    arguments = ["generate", f"--model={orbax}", *CONTINUE, f"--mesh={mesh}", "--nowarmup", "--json"]
    first, *others = program(processes, devices, *arguments)
    assert first.status == 0, first.err
    result = json.loads(first.out)
    assert first.out.count("\n") == 1
    assert (result["tokens"], result["mesh"]) == (expected, mesh)
    assert [(other.status, other.out, other.complaints) for other in others] == [(0, "", [])] * len(others)


def test_two_processes_by_two_devices_decode_the_tokens_of_one(orbax, one):
    check_generate(orbax, one, processes=2, devices=2, mesh="data=1,expert=2,tensor=2")


@pytest.mark.slow
def test_four_processes_by_one_device_decode_the_tokens_of_one(orbax, one):
    check_generate(orbax, one, processes=4, devices=1, mesh="data=1,expert=2,tensor=2")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_two_processes_decode_quantised_weights_as_one_does(tmp_path, method):
    glm_jax.convert(write_checkpoint(tmp_path / "hf"), tmp_path / "orbax", quantize=method)
    one = glm_jax.load(tmp_path / "orbax", mesh=glm_jax.make_mesh())
    check_generate(tmp_path / "orbax", one, processes=2, devices=2, mesh="data=1,expert=2,tensor=2")


def boxes(reads, name: str) -> list[list[list[int]]]:
    """What was read of a weight, as [start, stop] of each of its dimensions.

    In an unrolled model `moe.3.attention.q` is layer 3 of the source's `moe.attention.q`.
    """
    group, layer, *rest = name.split(".")
    if not layer.isdigit():
        return [where for read, where in reads if read == name]
    found = [where for read, where in reads if read == ".".join([group, *rest])]
    return [where[1:] for where in found if where[0][0] <= int(layer) < where[0][1]]


def check_load(orbax, one, arrays, found) -> None:
    """Each process read and holds its devices' slices, each once; together they hold all; they say what one says."""
    held = {name: np.zeros(array.shape, bool) for name, array in arrays.items()}
    for process in found:
        own = {name: np.zeros(array.shape, int) for name, array in arrays.items()}
        for name, bounds, digest in process["shards"]:
            index = tuple(slice(*part) for part in bounds)
            assert hashlib.sha256(arrays[name][index].tobytes()).hexdigest() == digest, (name, bounds)
            own[name][index] = 1
            held[name][index] = True
        for name, of_weight in own.items():
            times = np.zeros_like(of_weight)
            for box in boxes(process["reads"], name):
                times[tuple(slice(*part) for part in box)] += 1
            np.testing.assert_array_equal(times, of_weight, err_msg=name)
    assert all(whole.all() for whole in held.values())
    expected = {name: glm_jax.generate(one, prompts.PROMPTS, **how) for name, how in prompts.WAYS.items()}
    assert [process["tokens"] for process in found] == [expected] * len(found)


@pytest.mark.slow
def test_two_by_two_hold_the_weights_of_one(orbax, one, arrays, tmp_path):
    found = worker(2, 2, tmp_path, orbax, "expert=2,tensor=2")
    assert [(process["index"], process["count"], process["devices"]) for process in found] == [
        (0, 2, [2, 4]),
        (1, 2, [2, 4]),
    ]
    check_load(orbax, one, arrays, found)


@pytest.mark.slow
def test_four_by_one_hold_the_weights_of_one(orbax, one, arrays, tmp_path):
    check_load(orbax, one, arrays, worker(4, 1, tmp_path, orbax, "data=2,expert=2"))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_one_by_eight_holds_the_weights_of_one(orbax, arrays, mesh_of_sizes, sizes):
    model = glm_jax.load(orbax, mesh=mesh_of_sizes(sizes))
    for name, weight in weights_by_name(model).items():
        np.testing.assert_array_equal(np.asarray(weight.get_raw_value()), arrays[name], err_msg=name)


def test_what_one_process_cannot_do_ends_both_with_one_line(orbax, tmp_path):
    common = [f"--coordinator=127.0.0.1:{free_port()}", "--process_count=2", *CONTINUE]

    def command(index):
        model = orbax if index == 0 else tmp_path / "nothing"
        return ["-m", "glm_jax.cli", "generate", f"--model={model}", f"--process_index={index}", *common]

    first, second = wait(spawn(2, 1, command))
    assert (first.status, second.status) == (2, 2)
    assert (first.out, second.out) == ("", "")
    line = f"glm-jax: error: process 1: {tmp_path / 'nothing'} is not a directory; "
    assert len(first.complaints) == 1 and first.complaints[0].startswith(line)
    assert second.complaints == []


def test_the_others_end_when_a_process_is_killed(orbax):
    common = [f"--coordinator=127.0.0.1:{free_port()}", "--process_count=2", f"--heartbeat_timeout={HEARTBEAT}"]
    more = ["--tokens=5,6,7", "--max_new_tokens=500", "--temperature=1", "--ignore_eos"]

    def command(index):
        return ["-m", "glm_jax.cli", "generate", f"--model={orbax}", f"--process_index={index}", *common, *more]

    processes = spawn(2, 1, command)
    assert processes[0].stdout is not None
    begun = processes[0].stdout.read(1)
    processes[1].send_signal(signal.SIGKILL)
    first, second = wait(processes)
    assert begun.isdigit()  # decoding, on both
    assert first.status not in (0, None) and second.status == -signal.SIGKILL
