"""Decoding as the CUDA compiler compiles it for GPUs that are not there: in place, and without a copy of a weight.

Models of real width and few layers, each in a process of the environment that has the compiler. Their temporaries do
not grow with the layers (which is tested), so they are held against the cache of the whole depth.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from glm_jax import configs
from glm_jax.errors import InputError
from glm_jax.planning import Job, choose_cluster
from glm_jax.planning.compile import estimate
from glm_jax.planning.gpu_targets import GPU_TARGETS, gpu_target
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.planning.program import Program, Sent
from glm_jax.sharding import rules_named
from tests import processes

ROOT = Path(__file__).parents[2]
LAYERS = 3
LARGEST_EXCHANGE = 2**23  # tokens and routing; a part of any weight or cache is more

SCRIPT = """
import dataclasses, json, sys
from glm_jax import configs
from glm_jax.planning import Job, choose_cluster
from glm_jax.planning.compile import compile_job, mesh_for
from glm_jax.sharding import rules_named

case = json.loads(sys.argv[1])
config = configs.get(case["model"])
config = dataclasses.replace(config, num_layers=case["layers"], num_dense_layers=1)
job = Job(config=config, kind="decode", batch=case["batch"], length=case["length"], weights=case["weights"],
          rules=rules_named(case["rules"]))
mesh = mesh_for(choose_cluster(case["device"], count=case["count"], topology=None), tuple(case["mesh"]))
report = compile_job(job, mesh)[1]
print(json.dumps({**dataclasses.asdict(report), "total": report.total}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    device: str
    count: int
    mesh: tuple[int, int, int]
    batch: int
    length: int = 4096
    rules: str = "default"
    weights: str = "fp8"
    layers: int = LAYERS

    def job(self) -> Job:
        """The job at the depth that is compiled."""
        config = dataclasses.replace(configs.get(self.model), num_layers=self.layers, num_dense_layers=1)
        return self._job(config)

    def whole_job(self) -> Job:
        """The job of all layers."""
        return self._job(configs.get(self.model))

    def _job(self, config: configs.ModelConfig) -> Job:
        options = {"batch": self.batch, "length": self.length, "weights": self.weights}
        return Job(config=config, kind="decode", rules=rules_named(self.rules), **options)


ROWS = {
    "GLM-4.5": Case(model="glm-4.5", device="h200", count=8, mesh=(1, 1, 8), batch=64),
    "Air": Case(model="glm-4.5-air", device="h200", count=1, mesh=(1, 1, 1), batch=32),
    "Air at 128K": Case(model="glm-4.5-air", device="h100", count=4, mesh=(1, 1, 4), batch=8, length=131_072),
    "DeepSeek-V3": Case(
        model="deepseek-v3", device="h200", count=16, mesh=(1, 2, 8), batch=64, rules="serve_throughput"
    ),
    "Kimi K2": Case(model="kimi-k2", device="h200", count=16, mesh=(1, 2, 8), batch=64, rules="serve_throughput"),
}


def _compiler() -> str | None:
    """The interpreter of an environment with the CUDA compiler: this one, or that of `make aot`."""
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return sys.executable
    found = ROOT / ".venv-aot-cuda" / "bin" / "python"
    return str(found) if found.is_file() else None


needs_compiler = pytest.mark.skipif(_compiler() is None, reason="no environment with the CUDA compiler; make aot")


@functools.cache
def compiled(case: Case) -> dict:
    """The report of a case."""
    command = [_compiler(), "-c", SCRIPT, json.dumps(dataclasses.asdict(case))]
    done = processes.run(command)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp8", "int8", "bfloat16"])
@pytest.mark.parametrize("row", ROWS)
def test_decode_is_in_place(row, weights):
    case = dataclasses.replace(ROWS[row], weights=weights)
    report, mesh = compiled(case), abstract_mesh(case.mesh)
    assert report["moved"] == []
    planned = estimate(case.job(), mesh)
    assert report["aliased"] >= planned.cache
    assert report["temporaries"] < 0.1 * estimate(case.whole_job(), mesh).cache
    assert abs(report["arguments"] - planned.arguments) < 0.01 * planned.arguments
    assert max((sent["nbytes"] for sent in report["sent"]), default=0) < LARGEST_EXCHANGE


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("row", ["GLM-4.5", "DeepSeek-V3"])
def test_temporaries_do_not_grow_with_the_layers(row):
    deeper = dataclasses.replace(ROWS[row], layers=LAYERS + 2)
    assert compiled(deeper)["temporaries"] < 1.1 * compiled(ROWS[row])["temporaries"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_a_few_sequences_read_the_experts_that_they_chose(batch):
    """Fewer choices than experts: no part of the experts is gathered into a copy."""
    case = dataclasses.replace(ROWS["Air"], batch=batch, layers=2)
    report = compiled(case)
    assert [moved for moved in report["moved"] if "exp" in moved["where"] or moved["kind"] == "gather"] == []


# In a GPU's form: fusions that run beside others, exchanges whose result names what they read.
STARTED = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_sum (p: f32[8,1024]) -> f32[8,1024] {
  %p = f32[8,1024]{1,0} parameter(0)
  ROOT %psum = f32[8,1024]{1,0} all-reduce(%p), replica_groups=mesh['data'=1,'tensor'=4] {'tensor'}, to_apply=%add
}

%fused_slice (q: f32[3,8,1024]) -> f32[1,8,1024] {
  %q = f32[3,8,1024]{2,1,0} parameter(0)
  ROOT %part = f32[1,8,1024]{2,1,0} slice(%q), slice={[1:2], [0:8], [0:1024]}
}

ENTRY %main (stack: f32[3,8,1024], x: f32[8,1024]) -> f32[2,1024] {
  %stack = f32[3,8,1024]{2,1,0} parameter(0)
  %x = f32[8,1024]{1,0} parameter(1)
  %sum-start = ((f32[8,1024]{1,0}), f32[8,1024]{1,0}) fusion-start(%x), kind=kCustom, calls=%fused_sum
  %sum-done = f32[8,1024]{1,0} fusion-done(%sum-start)
  %part-start = ((f32[3,8,1024]{2,1,0}), f32[1,8,1024]{2,1,0}) fusion-start(%stack), kind=kLoop, calls=%fused_slice
  %part-done = f32[1,8,1024]{2,1,0} fusion-done(%part-start)
  %rs = (f32[8,1024]{1,0}, f32[2,1024]{1,0}) reduce-scatter-start(%sum-done), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %rs-done = f32[2,1024]{1,0} reduce-scatter-done(%rs)
}
"""


def test_what_only_starts_is_counted_once_and_by_what_it_writes():
    program, nbytes = Program(STARTED), 8 * 1024 * 4
    assert program.sent() == tuple(
        Sent(kind=kind, group=4, nbytes=nbytes, times=1) for kind in ("all-reduce", "reduce-scatter")
    )
    assert [(moved.kind, moved.nbytes) for moved in program.moved(nbytes)] == [("slice", nbytes)]


@pytest.mark.parametrize("kind", GPU_TARGETS)
def test_a_description_names_the_device(kind):
    text = gpu_target(kind)
    assert text.count("{") == text.count("}")
    assert f"device_memory_size: {GPU_TARGETS[kind].memory}" in text
    assert GPU_TARGETS[kind].memory >= choose_cluster(kind, count=1, topology=None).device.memory


def test_a_kind_without_description_is_refused():
    with pytest.raises(InputError, match="no description of v5e to compile for; there is one of h100, h200, b200"):
        gpu_target("v5e")
