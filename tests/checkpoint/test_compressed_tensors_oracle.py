"""compressed-tensors itself as the reference: what its tensors stand for, which module is of which group."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import glm_jax
from glm_jax.checkpoint.compressed_tensors import read_compressed
from glm_jax.checkpoint.names import canonical_mappings
from glm_jax.checkpoint.source import HfSource
from glm_jax.errors import ConfigError
from tests.checkpoint import quantized_sources as sources
from tests.checkpoint.quantized_sources import BF16, FP8

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def library() -> SimpleNamespace:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.utils.match import is_match, match_targets

    return SimpleNamespace(
        compressor=BaseCompressor.get_value_from_registry,
        dequantizer=CompressedTensorsDequantizer,
        Config=QuantizationConfig,
        Scheme=QuantizationScheme,
        is_match=is_match,
        match_targets=match_targets,
    )


VIEWS = {BF16: (np.int16, "bfloat16"), FP8: (np.uint8, "float8_e4m3fn")}


def to_torch(array: np.ndarray) -> Any:
    for dtype, (bits, name) in VIEWS.items():
        if array.dtype == dtype:
            return torch.from_numpy(array.view(bits).copy()).view(getattr(torch, name))
    return torch.from_numpy(array.copy())


def to_numpy(tensor: Any) -> np.ndarray:
    for dtype, (bits, name) in VIEWS.items():
        if tensor.dtype == getattr(torch, name):
            return tensor.contiguous().view(getattr(torch, np.dtype(bits).name)).numpy().view(dtype)
    return tensor.contiguous().numpy()


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal bit for bit, but for the sign of what is no number, which torch drops."""
    nan = np.isnan(ours.astype(np.float32))
    equal = (ours.view(np.uint8) == theirs.view(np.uint8)).reshape(*ours.shape, ours.itemsize).all(-1)
    return ours.dtype == theirs.dtype and bool(
        np.all(np.isnan(theirs.astype(np.float32)) == nan) and np.all(equal | nan)
    )


def config(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    return sources.compressed(form, weights, [])


INTEGERS = {
    "pack-quantized": [
        {"num_bits": bits, "symmetric": symmetric, **groups}
        for bits in range(1, 9)
        for symmetric in (True, False)
        for groups in ({"strategy": "group", "group_size": 32}, {"strategy": "channel"})
    ],
    "int-quantized": [
        {"num_bits": bits, "symmetric": symmetric, **strategy}
        for bits in (4, 8)
        for symmetric in (True, False)
        for strategy in (
            {"strategy": "tensor"},
            {"strategy": "channel"},
            {"strategy": "group", "group_size": 32},
            {"strategy": "block", "block_structure": [16, 24]},
        )
    ],
}
INTEGERS["naive-quantized"] = INTEGERS["int-quantized"]
FLOATS = [
    {"num_bits": 8, "type": "float", **strategy}
    for strategy in (
        {"strategy": "tensor"},
        {"strategy": "channel"},
        {"strategy": "group", "group_size": 32},
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "block", "block_structure": [16, 24]},
    )
]
CASES = [
    *((form, {"type": "int", **weights}) for form, several in INTEGERS.items() for weights in several),
    *((form, weights) for form in ("float-quantized", "naive-quantized") for weights in FLOATS),
]


def quantized_by(
    library: SimpleNamespace, form: str, weights: dict[str, Any], *, shape: tuple[int, int], scale: Any
) -> Any:
    """The library's tensors of a random weight, by their names in a module, and the weight that it reads from them.

    The scales are small, so that values of all codes occur, clipped ones too.
    """
    scheme = library.Scheme(targets=["Linear"], weights=weights)
    arguments = scheme.weights
    rows, columns = {
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, arguments.group_size),
        "block": tuple(arguments.block_structure or (0, 0)),
    }[arguments.strategy]
    generator = torch.Generator().manual_seed(0)
    state = {"weight": torch.randn(shape, generator=generator).to(torch.bfloat16) * 2}
    of_scale = sources.scale_shape(shape, rows, columns)
    factor = 0.01 if arguments.type == "float" else 2.0 / 2 ** (arguments.num_bits - 1)
    state["weight_scale"] = ((0.5 + torch.rand(of_scale, generator=generator)) * factor).to(getattr(torch, scale))
    half = 1 << arguments.num_bits - 1
    if not arguments.symmetric:
        zero = torch.randint(-half, half, of_scale, generator=generator)
        state["weight_zero_point"] = zero.to(torch.int8)
    compressor = library.compressor(form)
    stored = compressor.compress(state, scheme)
    return stored, lambda tensors: compressor.decompress(tensors, scheme)["weight"]


@pytest.mark.parametrize("scale", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    ("form", "weights"), CASES, ids=["-".join(map(str, [form, *weights.values()])) for form, weights in CASES]
)
def test_its_tensors_are_read_to_its_weights(library, form, weights, scale):
    shape = (20, 96)
    stored, read = quantized_by(library, form, weights, shape=shape, scale=scale)
    parts = {name.removeprefix("weight"): to_numpy(tensor) for name, tensor in stored.items()}
    layouts = read_compressed(config(form, weights)).layouts
    (layout,) = (
        layout
        for layout in layouts
        if {suffix: part.shape for suffix, part in parts.items()} == layout.shapes(shape)
        and all(sources.dtype_name(parts[part.suffix].dtype) in part.dtypes for part in layout.parts)
    )
    assert layout == layouts[0]
    out = np.empty(shape, BF16)
    layout.dequantize(parts, np.arange(shape[0]), np.arange(shape[1]), out=out)
    if scale == "float16":  # in which the library multiplies
        stored["weight_scale"] = stored["weight_scale"].float()
    assert out.tobytes() == to_numpy(read(stored).to(torch.bfloat16)).tobytes()
    assert len(np.unique(parts[layout.parts[0].suffix])) > 1


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_zero_points_of_symmetric_values_are_subtracted_where_they_are_stored(library, strategy):
    rng, shape = np.random.default_rng(0), (32, 64)
    parts, expected = sources.bytes_of(rng, shape, *sources.EXTENTS[strategy], asymmetric=True, dtype=np.float32)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, **sources.strategies()[strategy]}
    state = {f"weight{suffix}": to_torch(part) for suffix, part in parts.items()}
    theirs = library.compressor("int-quantized").decompress(state, library.Scheme(targets=["Linear"], weights=weights))
    layout = read_compressed(config("int-quantized", weights)).layouts[1]
    out = np.empty(shape, BF16)
    layout.dequantize(parts, np.arange(shape[0]), np.arange(shape[1]), out=out)
    assert out.tobytes() == expected.tobytes() == to_numpy(theirs["weight"].to(torch.bfloat16)).tobytes()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(CASES), st.integers(1, 70), st.integers(1, 5), st.sampled_from(["bfloat16", "float32"]))
def test_any_shape_is_read_to_its_weights(library, case, rows, groups, scale):
    form, weights = case
    group = weights.get("group_size", 1)
    shape = (rows, groups * 32 if group != 1 else groups * 19)
    try:
        stored, read = quantized_by(library, form, weights, shape=shape, scale=scale)
        theirs = read(stored)
    except RuntimeError as error:  # torch refuses the library's view of the zero points of a single group
        assume("stride(-1) must be 1" not in str(error))
        raise
    parts = {name.removeprefix("weight"): to_numpy(tensor) for name, tensor in stored.items()}
    layout, out = read_compressed(config(form, weights)).layouts[0], np.empty(shape, BF16)
    assert {suffix: part.shape for suffix, part in parts.items()} == layout.shapes(shape)
    layout.dequantize(parts, np.arange(shape[0]), np.arange(shape[1]), out=out)
    assert out.tobytes() == to_numpy(theirs.to(torch.bfloat16)).tobytes()


# --- names ----------------------------------------------------------------------------------------------------------

NAMES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.experts.0.gate_proj",
    "model.layers.1.mlp.experts.10.down_proj",
    "model.layers.1.mlp.shared_experts.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.o_proj",
]
TARGETS = [
    *NAMES,
    "Linear",
    "Embedding",
    "Module",
    "q_proj",
    "model.layers.1",
    "re:.*self_attn.*",
    "re:.*mlp.gate",
    "re:.*experts.*",
    r"re:model\.layers\.1\..*",
    "re:.*experts.*down_proj$",
    "re:lm_head",
    "re:^(?!.*experts).*",
    "re:q_proj",
]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(TARGETS), st.integers(0, 3), min_size=1, max_size=8),
    st.lists(st.sampled_from(TARGETS), max_size=3),
)
def test_a_module_is_of_the_group_that_the_library_takes(library, chosen, ignore):
    sizes = [16, 32, 64, 128]
    groups = {
        str(number): {
            "targets": [target for target, own in chosen.items() if own == number],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": sizes[number]},
        }
        for number in set(chosen.values())
    }
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ignore}
    ours, theirs = read_compressed(said), library.Config.model_validate(said)
    scheme_of = {target: scheme for scheme in theirs.config_groups.values() for target in scheme.targets}
    for name in NAMES:
        embedding = name.endswith("embed_tokens")
        module = torch.nn.Embedding(1, 1) if embedding else torch.nn.Linear(1, 1)
        found = library.match_targets(name, module, scheme_of)
        expected = scheme_of[found[0]].weights.group_size if found else None
        own = ours.layouts_of(f"{name}.weight")
        if embedding and expected is None and own:  # what quantises files, not modules, takes it for a linear layer
            assert {"Linear", "LinearBase"} & scheme_of.keys()
        else:
            assert (own[0].group if own else None) == expected
            assert embedding or ours.exempts(f"{name}.weight") == library.is_match(name, module, ignore)


# --- whole checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sources.COMPRESSED)
def test_a_checkpoint_is_converted_to_what_the_library_dequantises_it_to(library, tmp_path, kind):
    made = sources.checkpoint(sources.COMPRESSED[kind], seed=2)
    source = made.write(tmp_path / "hf", shards=2)
    # It takes whatever is not ignored for quantised, an embedding and a plain MTP layer, too.
    dequantizer = library.dequantizer(source, ignore=["model.embed_tokens", r"re:model\.layers\.3\."])
    theirs = dequantizer.process({name: to_torch(part) for name, part in made.tensors.items()})
    glm_jax.convert(source, tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    ours = sources.read(tmp_path / "back")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert same_bits(array, to_numpy(theirs[name])), name


# --- what we write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["int8", "fp8", "int4"])
def test_what_is_exported_is_read_by_the_library(library, tmp_path, method):
    source = sources.checkpoint(sources.COMPRESSED["int4"]).write_plain(tmp_path / "hf")
    glm_jax.convert(source, tmp_path / "orbax", quantize=method)
    glm_jax.export(tmp_path / "orbax", tmp_path / "back")
    stored = sources.read(tmp_path / "back")
    said = library.Config.model_validate(
        json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    )
    ours, seen = HfSource(tmp_path / "back"), 0
    for name, mapping in canonical_mappings(ours.config).items():
        if name not in ours.plan.quantized:
            continue
        scheme_of = {target: scheme for scheme in said.config_groups.values() for target in scheme.targets}
        module = name.removesuffix(".weight")
        targets = library.match_targets(module, torch.nn.Linear(1, 1), scheme_of)
        assert not library.is_match(module, torch.nn.Linear(1, 1), said.ignore)
        state = {
            "weight" + part.suffix: to_torch(stored[name + part.suffix]) for part in ours.plan.quantized[name].parts
        }
        form = scheme_of[targets[0]].format or said.format
        theirs = library.compressor(form).decompress(state, scheme_of[targets[0]])["weight"]
        box = (*(slice(at, at + 1) for at in mapping.index), *(slice(0, size) for size in mapping.part_shape))
        own = ours.read(mapping.weight, box).reshape(mapping.shape)
        assert own.tobytes() == to_numpy(theirs.to(torch.bfloat16)).tobytes(), name
        seen += 1
    assert seen > 20


def test_what_the_library_refuses_is_refused(library):
    """Arguments that no tensors can have."""
    for weights in (
        {"num_bits": 4, "strategy": "group"},
        {"num_bits": 4, "strategy": "group", "group_size": -1},
        {"num_bits": 4, "strategy": "channel", "group_size": 32},
        {"num_bits": 8, "strategy": "block"},
        {"num_bits": 8, "strategy": "channel", "block_structure": [8, 8]},
        {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"},
        {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": True},
        {"num_bits": 4, "strategy": "rows"},
        {"num_bits": 4, "group_size": 0},
        {"num_bits": 4, "group_size": 32, "shuffle": True},
    ):
        with pytest.raises(ValueError):
            library.Scheme(targets=["Linear"], weights=weights)
        with pytest.raises(ConfigError, match=r"quantization_config: config_groups\.group_0\.weights"):
            read_compressed(config("pack-quantized", weights))


def test_dtypes_of_torch_and_numpy_have_the_same_bytes():
    for dtype in (BF16, FP8):
        array = np.arange(256, dtype=np.uint16 if dtype is BF16 else np.uint8).view(dtype)
        assert to_numpy(to_torch(array)).tobytes() == array.tobytes() and ml_dtypes.finfo(dtype).bits
