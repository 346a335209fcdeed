"""Convert a checkpoint of GLM-4.5-Air's layer shapes, beside `cp` of the same bytes and beside Orbax's own save.

Each contender is a process of its own, so that its peak resident memory is its own; they take turns, with the source
out of the page cache before each. What they write is made durable within the time that counts. The source is made once
under `--directory` (random bytes, several shards) and the outputs are removed after each turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from glm_jax import configs  # noqa: E402
from glm_jax.checkpoint.names import canonical_mappings  # noqa: E402
from glm_jax.checkpoint.safetensors import TensorSpec  # noqa: E402
from glm_jax.checkpoint.safetensors_writer import SafetensorsWriter  # noqa: E402
from glm_jax.configs.hf import write_config_json  # noqa: E402

GB = 1e9
BLOCK = 64 * 2**20
CONVERT = "import sys, glm_jax; glm_jax.convert(sys.argv[1], sys.argv[2])"
EXPORT = "import sys, glm_jax; glm_jax.export(sys.argv[1], sys.argv[2])"
# What the naive way is: read every tensor, stack the experts of all layers, let Orbax save the tree.
ORBAX = """
import sys, pathlib
import numpy as np
import orbax.checkpoint as ocp
from glm_jax.checkpoint.source import HfSource
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name
source = HfSource(sys.argv[1])
tree = {}
for name, weight in weights_by_name(Transformer(source.config)).items():
    tree[name] = np.array(source.read(name, tuple(slice(0, size) for size in weight.get_raw_value().shape)))
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path(sys.argv[2]).absolute(), tree)
"""
# The kernel's own high-water mark of this process, which wait4's figure is not: that begins with the parent's.
PEAK = """
with open("/proc/self/status") as file:
    print(next(line for line in file if line.startswith("VmHWM")).split()[1])
"""
COPY = """
import os, subprocess, sys
subprocess.check_call(["cp", "-r", sys.argv[1], sys.argv[2]])
for entry in os.scandir(sys.argv[2]):
    with open(entry.path, "rb") as file:
        os.fsync(file.fileno())
"""


def main() -> None:
    """Make the source, let the contenders take turns, print and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "glm_jax_convert")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers, one of them dense")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--orbax", action="store_true", help="also Orbax's own save of the tree: it holds it all")
    parser.add_argument("--export", action="store_true", help="also the way back")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the source")
    options = parser.parse_args()
    source = options.directory / f"hf-{options.layers}"
    nbytes = make_source(source, options.layers)
    contenders = {"cp": COPY, "convert": CONVERT} | ({"orbax": ORBAX} if options.orbax else {})
    rows: list[dict[str, Any]] = []
    for turn in range(options.turns):
        for name, program in contenders.items():
            rows.append(run(name, program, source, options.directory / f"out-{name}", keep=options.export))
            print(f"turn {turn + 1}: " + shown(rows[-1], nbytes), flush=True)
        if options.export:
            converted = options.directory / "out-convert"
            rows.append(run("export", EXPORT, converted, options.directory / "out-export", keep=False))
            print(f"turn {turn + 1}: " + shown(rows[-1], nbytes), flush=True)
        for name in contenders:
            remove(options.directory / f"out-{name}")
    report(rows, nbytes, options.json)
    if not options.keep:
        shutil.rmtree(source)


def make_source(directory: Path, layers: int) -> int:
    """Write the checkpoint if it is not there yet; return the bytes of its tensors."""
    air = configs.get("glm-4.5-air")
    config = dataclasses.replace(air, num_layers=layers, num_mtp_layers=0, mtp_copies=())
    plan = [
        TensorSpec(name, "F32" if name.endswith("correction_bias") else "BF16", mapping.shape)
        for name, mapping in canonical_mappings(config).items()
    ]
    if not (directory / "model.safetensors.index.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        # Finite numbers whatever the dtype: no exponent of all ones.
        block = np.frombuffer(np.random.default_rng(0).bytes(BLOCK), np.uint16) & 0xBFFF
        with SafetensorsWriter(directory, plan, max_shard_bytes=3_000_000_000) as writer:
            for number, spec in enumerate(plan):
                writer.write(spec.name, content(block, spec, number))
        write_config_json(directory, configs.to_hf(config, dtype="bfloat16"))
    return sum(spec.nbytes for spec in plan)


def content(block: np.ndarray, spec: TensorSpec, number: int) -> np.ndarray:
    """A tensor out of a block of random numbers, another part of it for each tensor."""
    from glm_jax.checkpoint.safetensors import NUMPY_DTYPES

    turned = np.roll(block, 8 * number)
    repeated = np.resize(turned, spec.nbytes // 2)
    return repeated.view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)


def run(name: str, program: str, source: Path, target: Path, *, keep: bool) -> dict[str, Any]:
    """Time one contender in a process of its own."""
    remove(target)
    forget(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    load = os.getloadavg()[0]
    started = time.monotonic()
    command = [sys.executable, "-c", program + PEAK, str(source), str(target)]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    seconds, failed = time.monotonic() - started, child.returncode != 0
    if not keep or failed:
        remove(target)
    peak = None if failed else int(child.stdout.split()[-1]) * 1024
    why = {0: None, -signal.SIGKILL: "killed, as the kernel does where memory ends"}
    failure = why.get(child.returncode, f"exit status {child.returncode}")
    return {"name": name, "seconds": seconds, "peak_rss": peak, "load": load, "failure": failure}


def remove(target: Path) -> None:
    """Remove what a contender wrote, under its final name or one that it began with."""
    for path in target.parent.glob(f"{target.name}*"):
        shutil.rmtree(path, ignore_errors=True)


def forget(directory: Path) -> None:
    """Take the files of a directory out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shown(row: dict[str, Any], nbytes: int) -> str:
    """A row for people."""
    state = f"{nbytes / GB / row['seconds']:.2f} GB/s  peak {(row['peak_rss'] or 0) / 2**30:.2f} GiB"
    return f"{row['name']:8} {row['seconds']:6.1f} s  {row['failure'] or state}  (load {row['load']:.1f})"


def report(rows: list[dict[str, Any]], nbytes: int, path: Path | None) -> None:
    """Medians and least times, and each contender's rate as a ratio to cp's."""
    print(f"\n{nbytes / GB:.2f} GB of tensors, {len(os.sched_getaffinity(0))} cores")
    names = list(dict.fromkeys(row["name"] for row in rows))
    summary = {}
    for name in names:
        mine = [row for row in rows if row["name"] == name and row["failure"] is None]
        if not mine:
            continue
        seconds = [row["seconds"] for row in mine]
        peak = max(row["peak_rss"] for row in mine)
        summary[name] = {"median": statistics.median(seconds), "least": min(seconds), "peak_rss": peak}
    for name, figures in summary.items():
        ratio = summary["cp"]["median"] / figures["median"]
        print(
            f"{name:8} median {figures['median']:6.1f} s, least {figures['least']:6.1f} s, "
            f"peak {figures['peak_rss'] / 2**30:.2f} GiB, rate {ratio:.2f} of cp's"
        )
    if path is not None:
        path.write_text(json.dumps({"bytes": nbytes, "rows": rows, "summary": summary}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
