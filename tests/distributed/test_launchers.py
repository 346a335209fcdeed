"""The launchers: they parse, start what they say, and every flag in them is one of the program's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import pytest

from glm_jax.cli.main import VERBS, verb_flags
from glm_jax.runtime.clusters import find
from tests.conventions.tree import ROOT

SCRIPTS = ROOT / "scripts"
SHELL = ("launch_slurm.sh", "launch_tpu_vm.sh")
MANIFESTS = ("launch_gke_gpu.yaml", "launch_gke_tpu.yaml")


def check_flags(verb: str, *arguments: str) -> None:
    assert verb in VERBS
    assert verb_flags(verb)([verb, *arguments]) == [verb]


def manifest(name: str) -> dict[str, Any]:
    """What the file says to Kubernetes."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((SCRIPTS / name).read_text(encoding="utf-8"))


def job_of(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The job of a manifest, its pod and the pod's container."""
    (replicated,) = manifest(name)["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return job, job["template"]["spec"], container


def fake(directory: Path, program: str) -> dict[str, str]:
    """An environment in which `program` prints its arguments, one a line."""
    path = directory / "bin" / program
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
    return {"PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}


def run(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / script, *arguments], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SHELL)
def test_scripts_are_bash_and_their_examples_are_commands(name):
    done = subprocess.run(["bash", "-n", SCRIPTS / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = (SCRIPTS / name).read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    examples = re.findall(rf"^# .*{re.escape(name)} (?:run )?((?:{'|'.join(VERBS)})\b.*)$", text, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        check_flags(*shlex.split(example, comments=True))


def test_slurm_starts_one_task_a_node_with_the_arguments_as_they_are(tmp_path):
    env = {**fake(tmp_path, "srun"), "VENV": "/opt/venv", "http_proxy": "http://proxy"}
    done = run("launch_slurm.sh", "generate", "--prompt=two words", env=env)
    assert done.stdout.splitlines() == [
        "--kill-on-bad-exit=1", "/opt/venv/bin/glm-jax", "generate", "--prompt=two words"
    ]  # fmt: skip
    done = run("launch_slurm.sh", env=env)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch ")
    options = re.findall(r"^#SBATCH (--\S+)$", (SCRIPTS / "launch_slurm.sh").read_text(), re.MULTILINE)
    assert {"--ntasks-per-node=1", "--gpus-per-node=8"} <= set(options)


def test_tpu_vm_runs_on_all_hosts_with_the_arguments_as_they_are(tmp_path):
    env = {**fake(tmp_path, "gcloud"), "TPU_NAME": "slice", "ZONE": "zone", "PROJECT": "project"}
    done = run("launch_tpu_vm.sh", "run", "generate", "--prompt=it's two words", env=env)
    *common, command = done.stdout.splitlines()
    assert common == [
        "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=zone", "--project=project", "--worker=all"
    ]  # fmt: skip
    assert shlex.split(command.removeprefix("--command=")) == [
        "glm-jax-venv/bin/glm-jax", "generate", "--prompt=it's two words"
    ]  # fmt: skip
    assert run("launch_tpu_vm.sh", "create", "v5p-32", "image", env=env).stdout.splitlines()[-2:] == [
        "--accelerator-type=v5p-32", "--version=image"
    ]  # fmt: skip
    assert run("launch_tpu_vm.sh", "create", env=env).returncode != 0
    assert run("launch_tpu_vm.sh", "start", env=env).returncode == 2
    assert "launch_tpu_vm.sh run doctor" in run("launch_tpu_vm.sh", "help", env={"TPU_NAME": ""}).stdout
    assert "set TPU_NAME" in run("launch_tpu_vm.sh", "run", "doctor", env={"TPU_NAME": ""}).stderr


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_jobsets_of_one_program(name):
    whole = manifest(name)
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod, container = job_of(name)
    assert job["parallelism"] == job["completions"] > 1 and job["completionMode"] == "Indexed"
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    program, *arguments = container["command"]
    assert program == "glm-jax"
    check_flags(*arguments)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def mesh_size(arguments: list[str]) -> int:
    (mesh,) = (argument for argument in arguments if argument.startswith("--mesh="))
    return prod(map(int, re.findall(r"\d+", mesh)))


def test_the_pods_of_the_gpu_manifest_find_each_other():
    job, _, container = job_of("launch_gke_gpu.yaml")
    environ = {variable["name"]: variable["value"] for variable in container["env"]}
    name, (replicated,) = manifest("launch_gke_gpu.yaml")["metadata"]["name"], ["workers"]
    port = container["ports"][0]["containerPort"]
    for index in range(job["parallelism"]):
        pod = environ | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)}
        found = find(environ=pod)
        assert (found.process_index, found.process_count) == (index, job["parallelism"])
        assert found.coordinator == f"{name}-{replicated}-0-0.{name}:{port}"
    assert mesh_size(container["command"]) == job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]


def test_the_pods_of_the_tpu_manifest_are_the_hosts_of_its_slice():
    job, pod, container = job_of("launch_gke_tpu.yaml")
    chips = prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    resources = container["resources"]
    assert resources["limits"] == resources["requests"]
    assert chips == job["parallelism"] * resources["limits"]["google.com/tpu"] == mesh_size(container["command"])
