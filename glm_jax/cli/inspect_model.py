"""Show the architecture and size of a preset, a Hugging Face checkpoint or an Orbax checkpoint.

Only headers are read: no weight is loaded. Counts and bytes of a preset are those of the published checkpoint in
bfloat16, its MTP layer and copies included; those of a checkpoint are what it stores. Of a directory that has
no more than a config.json yet they are those that it declares, and what is missing is said.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.cli.shared_flags import define_allow_unknown, define_json, define_processes, need
from glm_jax.configs import GqaConfig

if TYPE_CHECKING:
    from glm_jax.configs import MlaConfig, ModelConfig
    from glm_jax.model import ParameterCounts

PRESET, CONFIG, HUGGING_FACE, ORBAX = "preset", "config", "huggingface", "orbax"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""
    text = "a known model such as glm-4.5-air, or the directory of a checkpoint"
    absl_flags.DEFINE_string("model", None, text, flag_values=flags)
    define_allow_unknown(flags)
    define_processes(flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Describe --model."""
    need(flags, "model")
    from glm_jax.cli.loading import named_preset
    from glm_jax.model import count_parameters

    preset = named_preset(flags.model)
    kind, quantization = PRESET, None
    if preset is None:
        kind, config, stored, quantization = _open(flags.model, flags.allow_unknown)
    else:
        config = preset.config
        stored = _declared_bytes(config)
    counts = count_parameters(config)
    nbytes = sum(stored.values())
    if not flags.json:
        print(f"{flags.model} ({kind})")
        source = [("source quantisation", quantization)] if quantization else []
        print(printing.columns([*_architecture(config), *_sizes(counts, stored, nbytes), *source], indent="  "))
    return {
        "model": flags.model,
        "kind": kind,
        "config": dataclasses.asdict(config),
        "parameters": dataclasses.asdict(counts),
        "bytes": nbytes,
        "bytes_by_dtype": dict(stored),
        "source_quantization": quantization,
    }


def _open(directory: str, allow_unknown: list[str]) -> tuple[str, ModelConfig, Counter[str], str | None]:
    """Kind, configuration, stored bytes by dtype and the source's quantisation in words of a checkpoint directory."""
    from glm_jax.checkpoint import open_source
    from glm_jax.checkpoint.safetensors import NUMPY_DTYPES
    from glm_jax.checkpoint.source import HfSource
    from glm_jax.cli.loading import config_alone

    declared = config_alone(directory, allow_unknown)
    if declared is not None:
        for note in declared.notes:
            printing.notice(f"note: {note}")
        what = "no *.safetensors: parameters and bytes are those that config.json declares, in bfloat16"
        printing.notice(f"note: {directory} has {what}")
        return CONFIG, declared.config, _declared_bytes(declared.config), None
    source = open_source(directory, allow_unknown=allow_unknown)
    for note in source.notes:
        printing.notice(f"note: {note}")
    stored: Counter[str] = Counter()
    if isinstance(source, HfSource):
        for tensor in source.files.tensors.values():
            stored[NUMPY_DTYPES[tensor.dtype].name] += tensor.nbytes
        quantized = source.plan.quantized
        said = " and ".join(layout.describe() for layout in dict.fromkeys(quantized.values()))
        words = f"{said}, {len(quantized):,} of {len(source.plan.mappings):,} tensors" if quantized else None
        return HUGGING_FACE, source.config, stored, words
    for spec in source.arrays.specs().values():
        stored[spec.dtype] += spec.nbytes
    said = " and ".join(layout.describe() for layout in source.manifest.source_layouts)
    became = "kept" if source.manifest.kept else "dequantised to bfloat16"
    return ORBAX, source.config, stored, f"{said}, {became}" if said else None


def _declared_bytes(config: ModelConfig) -> Counter[str]:
    """Bytes by dtype of the weights as declared: bfloat16, but for those whose dtype is pinned."""
    from glm_jax.model import Transformer
    from glm_jax.sharding import weights_by_name

    declared: Counter[str] = Counter()
    for weight in weights_by_name(Transformer(config)).values():
        value = weight.get_raw_value()
        declared[value.dtype.name] += value.size * value.dtype.itemsize
    return declared


def _architecture(config: ModelConfig) -> list[tuple[str, str]]:
    moe = config.moe
    copies = f", with its own copy of {' and '.join(config.mtp_copies)}" if config.mtp_copies else ""
    groups = f", from the best {moe.num_groups_per_token} of {moe.num_groups} groups" if moe.num_groups > 1 else ""
    return [
        ("architecture", config.model_type),
        ("layers", f"{config.num_layers}: {config.num_dense_layers} dense, {config.num_moe_layers} with experts"),
        ("MTP layers", f"{config.num_mtp_layers}{copies}"),
        ("embedding width", f"{config.embed_dim}"),
        *_attention(config.attention),
        ("dense width", f"{config.mlp_width}"),
        ("experts", f"{moe.num_experts}, {moe.num_experts_per_token} active{groups}, {moe.num_shared_experts} shared"),
        ("expert width", f"{moe.expert_width}"),
        ("routed scaling", f"{moe.routed_scaling:g}"),
        ("vocabulary", f"{config.vocab_size:,}" + (" (output head tied)" if config.tie_embeddings else "")),
        ("positions", f"{config.max_positions:,}"),
    ]


def _attention(attention: GqaConfig | MlaConfig) -> list[tuple[str, str]]:
    rope = attention.rope
    traits = [f"{rope.rotary_dim} rotated at base {rope.theta:,.0f}"]
    if rope.yarn is not None:
        traits.append(f"YaRN {rope.yarn.factor:g} x {rope.yarn.original_positions:,}")
    if not isinstance(attention, GqaConfig):
        queries = "full" if attention.q_rank is None else f"{attention.q_rank}"
        return [
            (
                "heads",
                f"{attention.num_heads} of {attention.qk_dim} ({', '.join(traits)}), values {attention.value_dim}",
            ),
            ("latent sizes", f"queries {queries}, keys and values {attention.kv_rank}"),
            ("cache", f"{attention.latent_dim} values a token and layer"),
        ]
    traits += ["bias"] * attention.qkv_bias + ["QK norm"] * attention.qk_norm
    return [
        ("heads", f"{attention.num_heads} of {attention.head_dim} ({', '.join(traits)})"),
        ("kv heads", f"{attention.num_kv_heads}"),
        ("cache", f"{2 * attention.num_kv_heads * attention.head_dim} values a token and layer"),
    ]


def _sizes(counts: ParameterCounts, stored: Counter[str], nbytes: int) -> list[tuple[str, str]]:
    dtypes = ", ".join(f"{dtype} {printing.format_bytes(size)}" for dtype, size in stored.most_common())
    return [
        ("parameters", f"{counts.total:,}; without MTP {counts.without_mtp:,}, as DeepSeek and Kimi count"),
        ("  as GLM counts", f"{counts.report:,}: with MTP, without embedding and head"),
        ("  active", f"{counts.active_with_embeddings:,} a token without MTP, as DeepSeek and Kimi count"),
        ("  as GLM counts", f"{counts.active:,}; {counts.active_without_mtp:,} without MTP"),
        ("bytes", f"{nbytes:,} ({dtypes})"),
    ]
