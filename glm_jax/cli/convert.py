"""Turn a Hugging Face checkpoint into an Orbax checkpoint.

The target appears when it is complete; a conversion that was interrupted goes on with the same command. Dtypes are
kept, but for quantised weights (FP8, integers), which become bfloat16 unless --quantized=keep, and for what --quantize
says; the MTP layer, tokenizer and template files go along. With --dry_run nothing is written, and all that would be is
said, along with all that is wrong. With --verify both sides are read again and compared: a target that is there already
is compared only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.cli.shared_flags import define_allow_unknown, define_json, need

if TYPE_CHECKING:
    from glm_jax.checkpoint import DryRun, Report


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""
    text = "directory with config.json and *.safetensors, or its URL (gs://...); for --dry_run also a list of tensors"
    absl_flags.DEFINE_string("source", None, text, flag_values=flags)
    absl_flags.DEFINE_string("target", None, "directory to make; absent or empty", flag_values=flags)
    choices, text = (
        ("dequantize", "keep"),
        "what becomes of quantised weights: bfloat16, or values and scales as they are",
    )
    absl_flags.DEFINE_enum("quantized", choices[0], choices, text, case_sensitive=False, flag_values=flags)
    methods, text = ("int8", "fp8", "int4", "fp8-blocks"), "quantise experts and dense projections on the way"
    absl_flags.DEFINE_enum("quantize", None, methods, text, case_sensitive=False, flag_values=flags)
    text = "this process among those that share the conversion, such as 0/4 to 3/4; the last to end completes it"
    absl_flags.DEFINE_string("shard", "0/1", text, flag_values=flags)
    absl_flags.DEFINE_bool("verify", False, "compare both sides, byte by byte, before it is done", flag_values=flags)
    absl_flags.DEFINE_bool("dry_run", False, "say what would be done, and what is wrong", flag_values=flags)
    text = "for --dry_run, in place of the source's: a known model's name or a config.json"
    absl_flags.DEFINE_string("config", None, text, flag_values=flags)
    define_allow_unknown(flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Convert --source to --target, or plan it, or compare the two."""
    need(flags, *(("source",) if flags.dry_run else ("source", "target")))
    from glm_jax import checkpoint

    if flags.dry_run:
        options = {name: getattr(flags, name) for name in ("config", "quantized", "quantize", "allow_unknown")}
        return _show_plan(checkpoint.dry_run(flags.source, flags.target, **options))
    if flags.verify and (Path(flags.target) / "glm_jax.json").is_file():
        return _verify(flags)
    with printing.progress("converting") as progress:
        report = checkpoint.convert(
            flags.source,
            flags.target,
            quantized=flags.quantized,
            quantize=flags.quantize,
            allow_unknown=flags.allow_unknown,
            shard=flags.shard,
            verified=flags.verify,
            progress=progress,
        )
    result = summarize("converted", report, flags.target)
    if not report.complete:
        print(f"shard {flags.shard} is done; {flags.target} appears when the others are")
    result["complete"] = report.complete
    return result | (_show_losses(report, flags) if report.losses else {})


def summarize(done: str, report: Report, target: str) -> dict[str, Any]:
    """Print what a conversion or an export did, and return it as JSON values."""
    for note in report.notes:
        printing.notice(f"note: {note}")
    rate = printing.format_bytes(report.nbytes / max(report.seconds, 1e-9))
    size = printing.format_bytes(report.nbytes)
    print(f"{done} {report.tensors} tensors, {size} in {report.seconds:.1f} s ({rate}/s), to {target}")
    return {
        "target": target,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "notes": list(report.notes),
    }


def _show_losses(report: Report, flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Print what quantising changed: of each weight, and, where two models fit the machine, of what they predict."""
    from glm_jax.checkpoint import divergence, open_source

    print("relative error of what was quantised (root mean square):")
    for weight, lost in report.losses.items():
        print(f"  {weight:32} {lost.relative:.2%}")
    result: dict[str, Any] = {"relative_errors": {weight: lost.relative for weight, lost in report.losses.items()}}
    if report.complete and divergence.fits(open_source(flags.target).config):
        options = {"allow_unknown": flags.allow_unknown}
        result["divergence"] = divergence.divergence(flags.source, flags.target, **options)
        print(f"KL divergence from the source: {result['divergence']:.2g} nats a token, on a random sample")
    return result


def _show_plan(plan: DryRun) -> dict[str, Any]:
    """Print a plan; `ok` is False if the conversion would not go through."""
    for note in plan.notes:
        printing.notice(f"note: {note}")
    if plan.tensors:
        sizes = printing.format_bytes(plan.bytes_in), printing.format_bytes(plan.bytes_out)
        print(f"{plan.tensors:,} tensors, {plan.bytes_in:,} bytes ({sizes[0]}) to read")
        print(f"{plan.arrays:,} arrays in {plan.files:,} files, {plan.bytes_out:,} bytes ({sizes[1]}) to write")
    if plan.free is not None:
        print(f"{printing.format_bytes(plan.free)} free there")
    if plan.seconds is not None and plan.rate is not None:
        print(f"about {plan.seconds:,.0f} s at {printing.format_bytes(plan.rate)}/s, as measured there now")
    for problem in plan.problems:
        print(f"problem: {problem}")
    return {
        "ok": not plan.problems,
        "tensors": plan.tensors,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "arrays": plan.arrays,
        "files": plan.files,
        "free": plan.free,
        "seconds": plan.seconds,
        "notes": list(plan.notes),
        "problems": list(plan.problems),
    }


def _verify(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Compare a finished conversion with its source and print every difference; `ok` is False if there is one."""
    from glm_jax import checkpoint

    with printing.progress("comparing") as progress:
        options = {"progress": progress, "allow_unknown": flags.allow_unknown}
        found = checkpoint.verify(flags.source, flags.target, **options)
    for problem in found.problems:
        print(f"problem: {problem}")
    size, count = printing.format_bytes(found.nbytes), len(found.problems)
    verdict = f"{count} differences" if count else "equal on both sides"
    print(f"{found.tensors} tensors, {size}: {verdict} ({found.seconds:.1f} s)")
    return {
        "ok": not found.problems,
        "target": flags.target,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "seconds": found.seconds,
        "problems": list(found.problems),
    }
