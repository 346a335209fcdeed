"""Which process this is, from flags and from the variables that clusters set: as their documentation shows them."""

from __future__ import annotations

import http.server
import threading

import pytest

from glm_jax.errors import Error, InputError
from glm_jax.runtime import clusters
from glm_jax.runtime.clusters import Cluster, find, first_host, split_address

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009],login1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
OPEN_MPI_5 = {key: value for key, value in OPEN_MPI_4.items() if "orte" not in key} | {
    "PMIX_NAMESPACE": "prterun-a-7@1"
}
GKE_TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc,job-2.svc,job-3.svc"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


def cluster(found: str, index: int, count: int, address: str | None, devices: tuple[int, ...] | None = None) -> Cluster:
    return Cluster(
        detected_by=found, process_index=index, process_count=count, coordinator=address, local_devices=devices
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, cluster("none", 0, 1, None)),
        (SLURM, cluster("slurm", 11, 16, "gpu007:61441", (3,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, cluster("slurm", 11, 16, "gpu007:61441", (3,))),
        # One task a node has all of its GPUs, which jax's own reading would not show it.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0", "SLURM_NODEID": "11"},
            cluster("slurm", 11, 16, "gpu007:61441"),
        ),
        # Four tasks share eight GPUs; with --gpus-per-task, or one visible each, Slurm has shared them out.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            cluster("slurm", 11, 16, "gpu007:61441", (6, 7)),
        ),
        (SLURM | {"SLURM_GPUS_PER_TASK": "1"}, cluster("slurm", 11, 16, "gpu007:61441")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, cluster("slurm", 11, 16, "gpu007:61441")),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "1,2"}, cluster("slurm", 11, 16, "gpu007:61441")),
        (SLURM | {"SLURM_STEP_ID": "1"}, cluster("slurm", 11, 16, "gpu007:62450", (3,))),
        (SLURM | {"JAX_COORDINATOR_PORT": "1234"}, cluster("slurm", 11, 16, "gpu007:1234", (3,))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "ib0:1234"}, cluster("slurm", 11, 16, "ib0:1234", (3,))),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, cluster("slurm", 0, 1, None, (3,))),
        # The batch script itself, in which srun has started nothing.
        ({key: value for key, value in SLURM.items() if "STEP" not in key}, cluster("none", 0, 1, None)),
        # mpirun inside a Slurm job: mpirun's processes count.
        (SLURM | OPEN_MPI_4, cluster("open mpi", 2, 4, f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", (0,))),
        (
            OPEN_MPI_4 | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b,2620:10d::2]:43370"},
            cluster("open mpi", 2, 4, "[fe80::b9b]:61441", (0,)),
        ),
        (GKE_TPU, cluster("tpu", 1, 4, "job-0.svc:8482")),
        (GKE_TPU | POD, cluster("tpu", 1, 4, "job-0.svc:8482")),
        (
            GKE_TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a:80"},
            cluster("tpu", 5, 8, "a:8482"),
        ),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, cluster("tpu", 0, 1, None)),
        (GKE_TPU | {"JAX_PLATFORMS": "cpu"}, cluster("none", 0, 1, None)),
        (
            {"GLM_JAX_COORDINATOR": "a:1", "GLM_JAX_PROCESS_COUNT": "4", "GLM_JAX_PROCESS_INDEX": "2"} | SLURM,
            cluster("environment", 2, 4, "a:1"),
        ),
        # An indexed Kubernetes job whose manifest says the rest.
        (POD | {"GLM_JAX_COORDINATOR": "a:1", "GLM_JAX_PROCESS_COUNT": "4"}, cluster("environment", 3, 4, "a:1")),
    ],
)
def test_what_is_found(environ, expected):
    assert find(environ=environ) == expected


def test_flags_come_first():
    named = {"coordinator": "a:1", "process_count": 4, "process_index": 2}
    there = {"GLM_JAX_COORDINATOR": "b:2", "GLM_JAX_PROCESS_COUNT": "9", "GLM_JAX_PROCESS_INDEX": "7"}
    for environ in ({}, SLURM, there):
        assert find(**named, environ=environ) == cluster("flags", 2, 4, "a:1")
    assert find(process_count=1, environ=SLURM) == cluster("flags", 0, 1, None)
    assert find(coordinator="[::1]:99", environ=SLURM) == cluster("slurm", 11, 16, "[::1]:99", (3,))


def test_open_mpi_5_on_one_host_agrees_on_a_port_and_elsewhere_asks_for_one():
    here = OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    addresses = {find(environ=here | {"OMPI_COMM_WORLD_RANK": str(rank)}).coordinator for rank in range(4)}
    (address,) = addresses
    host, port = split_address(address)
    assert host == "127.0.0.1" and 61440 <= port < 65536
    with pytest.raises(InputError, match="open mpi does not tell where process 0 is; give --coordinator HOST:PORT"):
        find(environ=OPEN_MPI_5)
    assert find(coordinator="a:1", environ=OPEN_MPI_5) == cluster("open mpi", 2, 4, "a:1", (0,))


@pytest.mark.parametrize(
    ("named", "environ", "complaint"),
    [
        ({"coordinator": "a:1"}, {}, "--coordinator a:1 needs --process_count and --process_index: no Slurm"),
        ({"process_count": 2}, {}, "--process_count 2 needs --process_index, 0 to 1"),
        ({"process_index": 1}, {}, "--process_index 1 needs --process_count"),
        ({"process_count": 2, "process_index": 0}, {}, "--process_count 2 needs --coordinator HOST:PORT"),
        ({"process_count": 0}, {}, "--process_count 0: there must be at least 1 process"),
        ({"process_count": 2, "process_index": 2, "coordinator": "a:1"}, {}, "--process_index 2 is none of the 2"),
        ({"process_count": 2, "process_index": -1, "coordinator": "a:1"}, {}, "--process_index -1 is none of the 2"),
        ({"process_count": 2, "process_index": 0, "coordinator": "a"}, {}, "coordinator 'a' is no address; right wou"),
        ({"process_count": 2, "process_index": 0, "coordinator": "a:0"}, {}, "coordinator 'a:0' is no address"),
        ({"process_count": 2, "process_index": 0, "coordinator": "a:65536"}, {}, "coordinator 'a:65536' is no addre"),
        ({}, {"GLM_JAX_PROCESS_COUNT": "two"}, "GLM_JAX_PROCESS_COUNT='two' in the environment is no number"),
        ({}, SLURM | {"SLURM_PROCID": "16"}, "slurm: process 16 of 16 cannot be"),
        ({}, SLURM | {"SLURM_PROCID": ""}, "slurm did not set SLURM_PROCID"),
        ({}, POD, "this is pod 3 of an indexed Kubernetes job of unknown size: set GLM_JAX_COORDINATOR and"),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu: 2 workers, but TPU_WORKER_ID does not say which this one is"),
    ],
)
def test_what_is_refused(named, environ, complaint):
    with pytest.raises(Error) as caught:
        find(**named, environ=environ)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("rack[1,3-5]n[01-16],login", "rack1n01"),
        ("a-b[3-4].example.org,c", "a-b3.example.org"),
    ],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_a_tpu_vm_says_it_through_its_metadata_server(monkeypatch):
    attributes = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6",
        "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n",
    }

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = attributes.get(self.path.rsplit("/", 1)[1])
            asked = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if asked and text is not None else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(clusters, "_on_tpu_vm", lambda: True)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert find(environ=environ) == cluster("tpu", 3, 4, "10.0.0.1:8482")
        attributes["tpu-env"] = ""
        assert find(environ=environ) == cluster("tpu", 1, 2, "10.0.0.5:8482")
        attributes["worker-network-endpoints"] = "10.0.0.5"
        attributes["agent-worker-number"] = "0"
        assert find(environ=environ) == cluster("tpu", 0, 1, None)
        attributes.clear()
        assert find(environ=environ) == cluster("none", 0, 1, None)
        server.shutdown()
    assert find(environ=environ) == cluster("none", 0, 1, None)  # a machine with chips and no such server
