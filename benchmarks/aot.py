"""Compile the models at real size for TPU and GPU topologies, on a machine that has none, and write docs/scale.md.

    python benchmarks/aot.py                          every row that this environment has a compiler for
    python benchmarks/aot.py --rows 'air-*,glm-4.5-v5p-decode'
    python benchmarks/aot.py --list

One row runs at a time, in a process of its own, so that its memory is its own and one that fails stops none. Results
are kept in benchmarks/results/aot/, one file a row: a row that is there, for the same job and the same compiler, is not
compiled again unless --again is given. So the rows of the environment with the TPU compiler and of the one with the
CUDA compiler come together in one document (`make aot` runs both).
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Run as a script, python looks beside it, not in the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._aot_document import write_document
from benchmarks._aot_rows import ROWS, Row

RESULTS = Path(__file__).parent / "results" / "aot"
LIMIT = 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--again", action="store_true", help="compile rows that there are results of, too")
    parser.add_argument("--list", action="store_true", help="only list the rows")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one row")
    parser.add_argument("--one", metavar="ROW", help="compile one row in this process and print its result")
    parser.add_argument("--text", type=Path, help="with --one: a file to write the optimised program to")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(compile_row(next(row for row in ROWS if row.name == options.one), options.text)))
        return 0
    chosen = [row for row in ROWS if any(fnmatch.fnmatch(row.name, p) for p in options.rows.split(","))]
    if not chosen:
        parser.error(f"no row is called {options.rows}; the rows are {', '.join(row.name for row in ROWS)}")
    if options.list:
        print("\n".join(row.name for row in chosen))
        return 0
    failed = sum([not run_row(row, again=options.again, limit=options.limit) for row in chosen])
    write_document(results())
    return 1 if failed else 0


def run_row(row: Row, *, again: bool, limit: float) -> bool:
    """Compile a row in a process of its own and keep the result, an error included; False if it failed."""
    compiler = compiler_of(row)
    if compiler is None:
        print(f"{row.name}: skipped, no compiler for {row.device} is installed here", flush=True)
        return True
    kept = RESULTS / f"{row.name}.json"
    if not again and kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["row"] == row.to_json() and before["compiler"] == compiler and "error" not in before:
            print(f"{row.name}: there already", flush=True)
            return True
    print(f"{row.name}: compiling", flush=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--one", row.name]
    began = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        result = json.loads(done.stdout) if done.returncode == 0 else {"error": _last_line(done.stderr)}
    except subprocess.TimeoutExpired:
        result = {"error": f"not done in {limit:.0f} s"}
    result = {"row": row.to_json(), "compiler": compiler, "wall_seconds": time.monotonic() - began, **result}
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(kept)
    print(f"{row.name}: {result.get('error') or _summary(result)}", flush=True)
    return "error" not in result


def compile_row(row: Row, text: Path | None = None) -> dict[str, Any]:
    """Compile a row in this process: the report, the plan beside it, seconds of processors, and peak memory."""
    from glm_jax.planning.compile import compile_job, estimate, mesh_for

    job, mesh = row.job(), mesh_for(row.cluster(), row.mesh)
    compiled, report = compile_job(job, mesh)
    if text is not None:
        text.write_text(compiled.as_text(), encoding="utf-8")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "report": dataclasses.asdict(report),
        "plan": estimate(job, mesh).to_json(),
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss": usage.ru_maxrss * 1024,
    }


def compiler_of(row: Row) -> dict[str, str] | None:
    """The versions of what compiles a row, or None where it is not installed."""
    names = ("libtpu",) if row.topology else ("jax-cuda13-plugin", "jax-cuda12-plugin")
    for name in names:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return {"jax": importlib.metadata.version("jax"), name: found}
    return None


def results() -> dict[str, dict[str, Any]]:
    """What is kept, by the names of the rows, in their order."""
    files = {row.name: RESULTS / f"{row.name}.json" for row in ROWS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def _last_line(text: str) -> str:
    """What a failed process said last, or of a compiler that gave up for lack of memory, first."""
    notes = ("For simplicity, JAX", "-----")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(notes)]
    return next((line for line in lines if "RESOURCE_EXHAUSTED" in line), lines[-1] if lines else "it died")[:500]


def _summary(result: dict[str, Any]) -> str:
    report = result["report"]
    total = report["arguments"] + report["outputs"] - report["aliased"] + report["temporaries"]
    return f"{total / 2**30:.2f} GiB a device, compiled in {report['compile_seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
