"""compressed-tensors' tensors and configs that do not add up: one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import glm_jax
from glm_jax.checkpoint import dry_run
from glm_jax.checkpoint.compressed_tensors import read_compressed, without_static_scales
from glm_jax.checkpoint.source import HfSource
from glm_jax.errors import CheckpointError, ConfigError
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, COMPRESSED, FP8

DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"  # [64, 32]


def changed(tmp_path: Path, kind: str, change: Any) -> str:
    """The line with which a source is refused that was changed."""
    made = sources.checkpoint(COMPRESSED[kind])
    tensors = dict(made.tensors)
    change(tensors)
    lines = set()
    source = sources.write(tmp_path / "hf", made.config, tensors)
    for quantized in ("dequantize", "keep"):
        with pytest.raises(CheckpointError) as caught:
            glm_jax.convert(source, tmp_path / "out", quantized=quantized)
        lines.add(str(caught.value))
        (problem,) = dry_run(source).problems
        lines.add(problem)
    assert not (tmp_path / "out").exists()
    (line,) = lines
    return line


CORRUPTED: dict[str, tuple[str, Any, str]] = {
    "no zero points": (
        "int4-asymmetric",
        lambda t: t.pop(f"{DOWN}_zero_point"),
        f"1 missing of a quantised matrix: {DOWN}_zero_point (there is {DOWN}_packed, {DOWN}_scale, {DOWN}_shape)",
    ),
    "no zero points of bytes": (
        "int8-asymmetric",
        lambda t: t.pop(f"{DOWN}_zero_point"),
        f"1 missing of a quantised matrix: {DOWN}_zero_point (there is {DOWN}, {DOWN}_scale)",
    ),
    "zero points that are not packed": (
        "int4-asymmetric",
        lambda t: t.update({f"{DOWN}_zero_point": np.zeros((64, 2), np.int8)}),
        f"{DOWN}_zero_point is [64, 2], should be [8, 2]; 1 of the wrong dtype for its part: {DOWN}_zero_point is I8",
    ),
    "zero points packed the other way": (
        "int4-asymmetric",
        lambda t: t.update({f"{DOWN}_zero_point": np.zeros((64, 1), np.int32)}),
        f"{DOWN}_zero_point is [64, 1], should be [8, 2]",
    ),
    "zero points of symmetric values": (
        "int4",
        lambda t: t.update({f"{DOWN}_zero_point": np.zeros((8, 1), np.int32)}),
        f"1 not known to this architecture: {DOWN}_zero_point",
    ),
    "another width": (
        "int4",
        lambda t: t.update({f"{DOWN}_packed": np.zeros((64, 8), np.int32)}),
        f"{DOWN}_packed is [64, 8], should be [64, 4]",
    ),
    "scales of other groups": (
        "int4-static",
        lambda t: t.update({f"{DOWN}_scale": np.ones((64, 1), BF16)}),
        f"{DOWN}_scale is [64, 1], should be [64, 2]",
    ),
    "one scale where channels have their own": (
        "fp8-channel",
        lambda t: t.update({f"{DOWN}_scale": np.ones(1, BF16)}),
        f"{DOWN}_scale is [1], should be [64, 1]",
    ),
    "a scale for each channel where there is one": (
        "fp8-tensor",
        lambda t: t.update({f"{DOWN}_scale": np.ones((64, 1), BF16)}),
        f"{DOWN}_scale is [64, 1], should be [1]",
    ),
    "values of another type": (
        "int8",
        lambda t: t.update({DOWN: np.zeros((64, 32), FP8)}),
        f"1 of the wrong dtype for its part: {DOWN} is F8_E4M3, not I8",
    ),
    "values without scales": (
        "fp8-block",
        lambda t: t.pop(f"{DOWN}_scale"),
        f"1 missing of a quantised matrix: {DOWN}_scale (there is {DOWN})",
    ),
    "scales under another name": (
        "fp8-tensor",
        lambda t: t.update({DOWN.removesuffix("weight") + "scale": t.pop(f"{DOWN}_scale")}),
        f"1 missing of a quantised matrix: {DOWN}_scale (there is {DOWN}); 1 not known to this architecture: ",
    ),
    "scales of powers of two": (
        "int8",
        lambda t: t.update({f"{DOWN}_scale": np.ones((64, 1), np.uint8)}),
        f"1 of the wrong dtype for its part: {DOWN}_scale is U8, not BF16, F16, F32",
    ),
    "an order of the inputs": (
        "int4-static",
        lambda t: t.update({f"{DOWN}_g_idx": np.zeros(32, np.int32)}),
        f"1 not known to this architecture: {DOWN}_g_idx",
    ),
}


@pytest.mark.parametrize("case", CORRUPTED)
def test_tensors_that_do_not_fit(tmp_path, case):
    kind, change, words = CORRUPTED[case]
    assert words in changed(tmp_path, kind, change)


def test_what_no_target_names_is_refused(tmp_path):
    for targets in ([], ["re:.*somewhere_else.*"], ["Embedding"], ["shared_experts"]):
        made, said = sources.mixed()
        said["config_groups"]["shared"]["targets"] = targets
        if not targets:
            del said["config_groups"]["shared"]
        with pytest.raises(CheckpointError, match=r"6 quantised although no target of .* names it: model\.layers\.1\."):
            HfSource(made.write(tmp_path / "hf"))


def test_float8_whose_scale_has_another_name_is_no_number(tmp_path):
    """It would be some thousand times too large."""
    made = sources.checkpoint(COMPRESSED["fp8-block"])
    name = DOWN.removesuffix("weight") + "scale"
    for said in (made.config["quantization_config"], None):
        tensors = {**made.plain, DOWN: np.ones((64, 32), FP8), name: np.ones((1, 1), np.float32)}
        config = {**made.config, "quantization_config": said}
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            HfSource(sources.write(tmp_path / "hf", config, tensors))


# --- configs ---------------------------------------------------------------------------------------------------------


def test_groups_that_contradict_each_other():
    said = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "a": sources.group(["Linear"], sources.GROUP4),
            "b": sources.group(["re:x", "Linear"], {**sources.GROUP4, "group_size": 64}),
        },
    }
    with pytest.raises(ConfigError) as caught:
        read_compressed(said)
    words = (
        "has groups of different formats (int4 in groups of 32, int4 in groups of 64) for the target 'Linear', a and b"
    )
    assert words in str(caught.value)


scalars = st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.text(max_size=4))
words = st.sampled_from(
    ["int", "float", "group", "channel", "tensor", "block", "pack-quantized", "re:(", "re:.*", "8x8"]
)
values = st.recursive(
    scalars | words, lambda some: st.lists(some, max_size=3) | st.dictionaries(words, some, max_size=3), max_leaves=6
)
KEYS = [
    "num_bits",
    "type",
    "symmetric",
    "dynamic",
    "strategy",
    "group_size",
    "block_structure",
    "actorder",
    "scale_dtype",
]
weights = st.dictionaries(st.sampled_from(KEYS), values, max_size=5)
groups = st.fixed_dictionaries(
    {"targets": st.just(["Linear"]) | values, "weights": weights | values}, optional={"format": values}
)
configs = st.fixed_dictionaries(
    {"format": st.sampled_from(["pack-quantized", "mixed-precision", "naive-quantized"]) | values},
    optional={
        "config_groups": st.dictionaries(st.text(max_size=2), groups | values, max_size=3) | values,
        "ignore": values,
        "kv_cache_scheme": values,
        "transform_config": values,
        "sparsity_config": values,
    },
)


@settings(max_examples=400, deadline=None)
@given(configs)
def test_any_config_is_read_or_refused_in_one_line(content):
    try:
        said = read_compressed(content)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("config.json: quantization_config: ")
        return
    for name in ("model.layers.1.mlp.experts.0.down_proj.weight", "model.embed_tokens.weight"):
        assert set(said.layouts_of(name)) <= set(said.layouts) and said.exempts(name) in (True, False)
    assert json.loads(json.dumps(without_static_scales(content))) is not None
