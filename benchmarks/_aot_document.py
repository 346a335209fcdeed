"""The tables of docs/scale.md, from the results of `benchmarks/aot.py`; the text around them is written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._aot_rows import ROWS

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- from here on written by make aot -->\n", "<!-- to here -->\n"
GIB, MIB = 2**30, 2**20


def write_document(results: dict[str, dict[str, Any]]) -> None:
    """Put the tables of the results between the two marks of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    lines = "\n".join([*_memory(results), "", *_plan(results), "", *_sent(results), "", *_moved(results)])
    partial = DOCUMENT.with_suffix(".partial")
    partial.write_text(f"{before}{BEGIN}\n{lines}\n\n{END}{after}", encoding="utf-8")
    partial.replace(DOCUMENT)


def total(report: dict[str, Any]) -> int:
    """What a step takes."""
    return report["arguments"] + report["outputs"] - report["aliased"] + report["temporaries"]


def _done(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, result) for name, result in results.items() if "error" not in result)


def _memory(results: dict[str, dict[str, Any]]) -> list[str]:
    bounds = {row.name: (row.gib, row.seconds) for row in ROWS}
    lines = [
        "## What the compiler says",
        "",
        "GiB a device. Compile is seconds of the compiler by the clock; in brackets those of processors, of the whole "
        "process. `asked` is the bound of the row, in GiB and seconds.",
        "",
        "| row | devices | mesh, rules | job | arguments | outputs | aliased | temporaries | total | asked "
        "| compile | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        row, (gib, seconds) = result["row"], bounds[name]
        where = f"{row['device']} {row['topology']}" if row["topology"] else f"{row['count']} {row['device']}"
        placed = f"{','.join(map(str, row['mesh']))} {row['rules']}"
        job = f"{row['kind']} {row['batch']} x {row['length']} {row['weights']}"
        asked = "" if gib is None else f"{gib:g}, {seconds:g} s"
        if "error" in result:
            lines.append(f"| {name} | {where} | {placed} | {job} | failed: {result['error']} | | | | | {asked} | | |")
            continue
        report = result["report"]
        sizes = [report[key] / GIB for key in ("arguments", "outputs", "aliased", "temporaries")]
        numbers = " | ".join(f"{size:.2f}" for size in (*sizes, total(report) / GIB))
        took = f"{report['compile_seconds']:.0f} s ({result['processor_seconds']:.0f} s)"
        rss = f"{result['peak_rss'] / GIB:.1f}"
        lines.append(f"| {name} | {where} | {placed} | {job} | {numbers} | {asked} | {took} | {rss} |")
    return lines


def _plan(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "## The plan beside it",
        "",
        "GiB a device as `glm-jax plan` says without compiling, and as a multiple of what the compiler says.",
        "",
        "| row | arguments, planned | of the compiler's | total, planned | of the compiler's |",
        "|---|---|---|---|---|",
    ]
    for name, result in _done(results):
        plan, report = result["plan"], result["report"]
        both = [(plan["arguments"], report["arguments"]), (plan["total"], total(report))]
        lines.append(f"| {name} | " + " | ".join(f"{p / GIB:.2f} | {p / c:.3f}" for p, c in both) + " |")
    return lines


def _sent(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "## What is sent",
        "",
        "Exchanges of one step, by kind and by the devices that take part in one: how many, and MiB of the arrays that "
        "are gathered, summed or exchanged, all of a group together.",
        "",
        "Tokens are sent to their experts, and the results back, in rounds. A round that no device needs is skipped "
        "when the program runs, so all rounds of a layer count as one exchange here, with one round's buffers: even "
        "routing takes one. `rounds` is how many the program has, for routing that sends all tokens to one device. A "
        "`ragged-all-to-all` sends only the rows of its buffers that are filled, and each row in one round only. Its "
        "MiB are therefore an upper bound for any routing, about a quarter above what is sent.",
        "",
        "| row | kind | devices | exchanges | rounds | MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in _done(results):
        found: dict[tuple[str, int, int], list[int]] = {}
        for each in result["report"]["sent"]:
            entry = found.setdefault((each["kind"], each["group"], each["rounds"]), [0, 0])
            entry[0] += each["times"]
            entry[1] += each["times"] * each["nbytes"]
        for (kind, group, rounds), (times, nbytes) in sorted(found.items()):
            shown = "1" if rounds == 1 else f"up to {rounds}"
            lines.append(f"| {name} | {kind} | {group} | {times} | {shown} | {nbytes / MIB:.1f} |")
    return lines


def _moved(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "## What is moved for nothing",
        "",
        "Of decode: temporaries as a part of the cache, and kernels of the program that only copy, transpose, cut or "
        "convert an array at least half as large as the smallest array of a layer's cache or experts.",
        "",
        "| row | temporaries, of the cache | kernels |",
        "|---|---|---|",
    ]
    for name, result in _done(results):
        if result["row"]["kind"] != "decode":
            continue
        report = result["report"]
        kernels = [f"{each['times']} x {each['kind']} {each['array']}" for each in report["moved"]]
        share = report["temporaries"] / result["plan"]["cache"]
        lines.append(f"| {name} | {share:.1%} | {', '.join(kernels) or 'none'} |")
    return lines
