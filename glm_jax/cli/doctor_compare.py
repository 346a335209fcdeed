"""`glm-jax doctor --compare`: a checkpoint against a Hugging Face directory, its files and what it computes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.cli.generate import parse_tokens
from glm_jax.cli.shared_flags import DTYPES, define_integer
from glm_jax.errors import CheckpointError, InputError, TextError

if TYPE_CHECKING:
    import numpy as np

    from glm_jax.checkpoint.orbax_source import OrbaxSource
    from glm_jax.checkpoint.source import HfSource
    from glm_jax.configs import ModelConfig
    from glm_jax.evaluation import Parity
    from glm_jax.evaluation.parity import Logits, RopeParity

    Source = HfSource | OrbaxSource

OK, WARNING, ERROR = "ok", "warning", "error"
ONLY_HERE = ("layers", "tokens", "prompt", "mesh", "dtype")
SHOWN = 8  # names of a long list
HF_FILES = "in the Hugging Face files"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The flags of a comparison."""

    def text_flag(name: str, text: str) -> None:
        absl_flags.DEFINE_string(name, None, text, flag_values=flags)

    text_flag("compare", "a Hugging Face directory: compare --model with what transformers makes of it, layer by layer")
    define_integer(flags, "layers", None, "with --compare: only the first so many decoder layers of both, without MTP")
    text_flag("tokens", "with --compare: the tokens to run, 5,6,7; by default two random sequences, always the same")
    text_flag("prompt", "with --compare: the text to run")
    text_flag("mesh", "with --compare: devices along each axis, as data=1,expert=4,tensor=2")
    text = "with --compare: of both models; by default float32, in which the tolerance is narrow"
    absl_flags.DEFINE_enum("dtype", None, DTYPES, text, case_sensitive=False, flag_values=flags)


def check_flags(flags: absl_flags.FlagValues) -> None:
    """Refuse what makes no sense together.

    Raises:
        InputError: a flag of the comparison without --compare, or two that exclude each other.
    """
    if flags.compare is None:
        given = [name for name in ONLY_HERE if flags[name].value is not None]
        if given:
            raise InputError(f"--{given[0]} needs --compare=HF_DIR")
        return
    if not flags.model:
        raise InputError("--compare needs --model, the checkpoint to compare")
    if flags.tokens is not None and flags.prompt is not None:
        raise InputError("give the tokens either as --tokens or as --prompt")


def run(flags: absl_flags.FlagValues, source: Source) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Compare the open checkpoint of --model with --compare: the report, and one check for each thing looked at."""
    from glm_jax.evaluation import SIZES, config_differences

    reference = _open_reference(flags.compare, flags.allow_unknown)
    limit = source.config.num_layers
    if flags.layers is not None and not 1 <= flags.layers <= limit:
        raise InputError(f"--layers={flags.layers} is not within 1..{limit}, the layers of the model")
    dtype = flags.dtype or "float32"
    differences = config_differences(source.config, reference.config)
    tokens = _tokens(flags, source.config)
    comparison: dict[str, Any] = {
        "reference": str(flags.compare),
        "dtype": dtype,
        "tokens": list(tokens.shape),
        "layers": flags.layers,
    }
    checks = [_configuration(differences), *_text(flags, source, reference)]
    stored, weights = _files(flags, source, reference)
    checks.append(weights.pop("check"))
    comparison["weights"] = weights
    if set(SIZES) & set(differences):
        checks.append(_bias_dtypes(stored))
        checks.append(_check("residual stream", ERROR, "not compared: the models have different sizes"))
        return {**comparison, "parity": None}, checks
    parity, versions, in_memory = _run_both(flags, source, reference, tokens=tokens, dtype=dtype)
    checks.append(_bias_dtypes({**stored, "in memory": in_memory}))
    checks += _parity_checks(parity, dtype)
    return {**comparison, "versions": versions, "parity": _parity_json(parity, dtype)}, checks


def _open_reference(directory: str, allow_unknown: list[str]) -> HfSource:
    from glm_jax.checkpoint import open_source
    from glm_jax.checkpoint.source import HfSource

    reference = open_source(directory, allow_unknown=allow_unknown)
    if not isinstance(reference, HfSource):
        raise CheckpointError(f"--compare={directory} is an Orbax checkpoint; transformers reads Hugging Face ones")
    return reference


def _tokens(flags: absl_flags.FlagValues, config: ModelConfig) -> np.ndarray:
    from glm_jax.evaluation import default_tokens
    from glm_jax.model.transformer import check_tokens
    from glm_jax.serving import text_directory
    from glm_jax.text import load_tokenizer

    if flags.tokens is not None:
        return check_tokens([parse_tokens(flags.tokens)], config)
    if flags.prompt is not None:
        return check_tokens([load_tokenizer(text_directory(flags.model)).encode(flags.prompt)], config)
    return default_tokens(config)


def _configuration(differences: dict[str, tuple[Any, Any]]) -> dict[str, str]:
    if not differences:
        return _check("configuration", OK, "equal")
    told = [f"{name} is {ours}, the reference's {theirs}" for name, (ours, theirs) in differences.items()]
    return _check("configuration", ERROR, "; ".join(told))


def _text(flags: absl_flags.FlagValues, source: Source, reference: HfSource) -> list[dict[str, str]]:
    from glm_jax.serving import text_directory
    from glm_jax.text.compatibility import compare_stop_ids, compare_vocabularies

    ours, theirs = text_directory(flags.model), text_directory(flags.compare)
    sizes = {"model_size": source.config.vocab_size, "reference_size": reference.config.vocab_size}
    checks = []
    for name, look in {
        "stop ids": lambda: compare_stop_ids(ours, theirs),
        "vocabulary": lambda: compare_vocabularies(ours, theirs, **sizes),
    }.items():
        try:
            result = look()
        except TextError as error:
            checks.append(_check(name, ERROR, str(error)))
            continue
        status = ERROR if result.problems else WARNING if result.notes else OK
        told = "; ".join([*result.problems, *result.notes]) or result.found
        checks.append(_check(name, status, told))
    return checks


def _files(
    flags: absl_flags.FlagValues, source: Source, reference: HfSource
) -> tuple[dict[str, set[str]], dict[str, Any]]:
    """The stored dtypes of the routers' bias, and the comparison of all tensors with its check."""
    from glm_jax.checkpoint.compare import compare_weights, router_bias_dtypes
    from glm_jax.checkpoint.source import HfSource

    files = HF_FILES if isinstance(source, HfSource) else "in the Orbax checkpoint"
    stored = {files: router_bias_dtypes(source)}
    stored[HF_FILES] = stored.get(HF_FILES, set()) | router_bias_dtypes(reference)
    printing.notice("comparing the tensors of the files")
    found = compare_weights(source, reference, layers=flags.layers)
    problems = []
    if found.differing:
        problems.append(f"{len(found.differing)} differ: {_some(list(found.differing))}")
    if found.only_ours:
        problems.append(f"{len(found.only_ours)} only in --model: {_some(list(found.only_ours))}")
    if found.only_theirs:
        problems.append(f"{len(found.only_theirs)} only in --compare: {_some(list(found.only_theirs))}")
    told = "; ".join([f"{found.compared} tensors compared", *problems]) + ("" if problems else ", all equal")
    return stored, {**dataclasses.asdict(found), "check": _check("weights", ERROR if problems else OK, told)}


def _run_both(
    flags: absl_flags.FlagValues, source: Source, reference: HfSource, *, tokens: np.ndarray, dtype: str
) -> tuple[Parity, dict[str, str], set[str]]:
    """Load and run both: the comparison, the reference's versions, and the dtypes of the router's bias in memory."""
    import jax.numpy as jnp

    from glm_jax.checkpoint.compare import first_layers
    from glm_jax.checkpoint.load import load_source
    from glm_jax.cli.loading import chosen_mesh
    from glm_jax.evaluation import TOLERANCES, TransformersReference, compare
    from glm_jax.sharding import weights_by_name

    config = first_layers(source.config, flags.layers)
    mesh = chosen_mesh(flags, config)
    mtp = bool(config.num_mtp_layers and first_layers(reference.config, flags.layers).num_mtp_layers)
    printing.notice("loading the reference")
    theirs = TransformersReference(flags.compare, dtype=dtype, layers=flags.layers, mtp=mtp)
    printing.notice("loading the model")
    # The reference computes with dequantised weights.
    layers = None if flags.layers is None else slice(0, flags.layers)
    model = load_source(source, mesh=mesh, dtype=jnp.dtype(dtype), quantized="dequantize", layers=layers)
    printing.notice(f"running both over tokens {list(tokens.shape)}")
    parity = compare(model, theirs, tokens, TOLERANCES[dtype])
    biases = {
        weight.get_raw_value().dtype.name
        for name, weight in weights_by_name(model).items()
        if name.endswith("router.bias")
    }
    return parity, theirs.versions, biases


def _bias_dtypes(dtypes: dict[str, set[str]]) -> dict[str, str]:
    wrong = {where: sorted(found - {"float32"}) for where, found in dtypes.items() if found - {"float32"}}
    if not wrong:
        return _check("router bias dtype", OK, f"float32 {', '.join(dtypes)}")
    told = [f"{', '.join(found)} {where}" for where, found in wrong.items()]
    # What is rounded in Hugging Face files was rounded before, and is the same for both models.
    status = WARNING if set(wrong) <= {HF_FILES} else ERROR
    return _check("router bias dtype", status, f"{'; '.join(told)}; rounded, it chooses other experts")


def _parity_checks(parity: Parity, dtype: str) -> list[dict[str, str]]:
    from glm_jax.evaluation import TOLERANCES

    tolerance = TOLERANCES[dtype]
    stream = f"{len(parity.places)} places within {tolerance.stream:g}, each layer alone within {tolerance.alone:g}"
    if parity.first_departure is not None:
        alone = f"by itself: {_some(parity.faulty)}" if parity.faulty else "no layer does by itself"
        stream = f"departs first at {parity.first_departure}; {alone}"
    checks = [_check("residual stream", ERROR if parity.first_departure else OK, stream), *_router(parity)]
    checks.append(_logits("logits", parity.logits))
    if parity.mtp_logits is not None:
        checks.append(_logits("MTP logits", parity.mtp_logits))
    return [*checks, _rope_order(parity.rope), _rope_angles(parity.rope)]


def _router(parity: Parity) -> list[dict[str, str]]:
    agreements = {place.name: place.router_agreement for place in parity.places if place.router_agreement is not None}
    if not agreements:
        return []
    ties = sum(place.ties for place in parity.places)
    wrong = [place.name for place in parity.places if place.router_departs]
    least = min(agreements.values())
    told = f"the same set of experts for {least:.2f}% of the tokens or more, in {len(agreements)} layers"
    told += f", {ties} ties" if ties else ""
    if wrong:
        return [_check("router", ERROR, f"{told}; other experts in {_some(wrong)}")]
    return [_check("router", OK, told)]


def _logits(name: str, logits: Logits) -> dict[str, str]:
    if not logits.positions:
        return _check(name, WARNING, "not compared: ties of the router reached every position; give other tokens")
    told = f"largest difference {_number(logits.difference)} standard deviations, "
    told += f"likeliest token equal at {logits.greedy_agreement:.2f}% of the positions"
    return _check(name, ERROR if logits.departs else OK, told)


def _rope_order(rope: RopeParity) -> dict[str, str]:
    errors = ", ".join(f"{order} {_number(error)}" for order, error in rope.relative.items())
    if len(rope.agreeing) == len(rope.relative):
        return _check("rope order", WARNING, f"{rope.configured}; on these tokens both orders are the same")
    if not rope.order_departs:
        return _check("rope order", OK, f"{rope.configured}, as configured (differences: {errors})")
    agreeing = ", ".join(rope.agreeing) or "neither order"
    told = f"configured {rope.configured}, but the first attention agrees with {agreeing} (differences: {errors})"
    return _check("rope order", ERROR, told)


def _rope_angles(rope: RopeParity) -> dict[str, str]:
    told = f"frequencies differ by {_number(rope.frequencies)} of theirs, scales by {_number(rope.scales)}"
    return _check("rope angles", ERROR if rope.angles_depart else OK, told)


def _parity_json(parity: Parity, dtype: str) -> dict[str, Any]:
    """The whole comparison; a number that is not finite is null."""
    from glm_jax.evaluation import TOLERANCES

    whole = {
        "tolerance": dataclasses.asdict(TOLERANCES[dtype]),
        "first_departure": parity.first_departure,
        "departing_alone": list(parity.faulty),
        **dataclasses.asdict(parity),
    }
    found: dict[str, Any] = _finite(whole)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_places(comparison: dict[str, Any]) -> None:
    """The table of the residual stream, for people."""
    parity = comparison["parity"]
    if parity is None:
        return
    versions = ", ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    print(f"\nresidual stream against {comparison['reference']} ({versions}; {comparison['dtype']})")
    head = ("place", "cosine", "difference", "of its size", "alone", "same experts", "")
    rows = [head]
    for place in parity["places"]:
        agreement = place["router_agreement"]
        rows.append(
            (
                place["name"],
                "not finite" if place["cosine"] is None else f"{place['cosine']:.9f}",
                _number(place["difference"]),
                _number(place["relative"]),
                "" if place["name"] == "embedding" else _number(place["alone"]),
                "" if agreement is None else f"{agreement:.2f}%",
                "departs" if place["departs"] else "",
            )
        )
    print(printing.columns(rows, indent="  "))


def _number(value: float | None) -> str:
    return f"{value:.1e}" if value is not None and math.isfinite(value) else "not finite"


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check(name: str, status: str, detail: str) -> dict[str, str]:
    return {"check": name, "status": status, "detail": detail}
