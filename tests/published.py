"""Checkpoints as they are published, written with numpy and the `safetensors` package: the names spelled out here.

Independent of the package's own table of names and of its writer, so that the two can be held against each other. A
shape is given as the keys of config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

COPIES = ("embed_tokens.weight", "shared_head.head.weight")
BIAS = "mlp.gate.e_score_correction_bias"
ROUTER = "mlp.gate.weight"

BASE: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 128,
}


_NOT_MLA = ("head_dim", "partial_rotary_factor", "use_qk_norm", "num_key_value_heads")
_MLA: dict[str, Any] = {
    **{key: value for key, value in BASE.items() if key not in _NOT_MLA},
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "kv_lora_rank": 24,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "n_group": 4,
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "v_head_dim": 12,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": BASE,
    "deepseek_v3": _MLA,
    "kimi_k2": {
        **_MLA,
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
        "rope_scaling": {**_MLA["rope_scaling"], "beta_fast": 1, "factor": 32},
        "routed_scaling_factor": 2.827,
    },
    "glm4_moe_lite": {
        **_MLA,
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "n_group": 1,
        "topk_group": 1,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.8,
    },
}


def config_json(*, model_type: str = "glm4_moe", **changes: Any) -> dict[str, Any]:
    """The content of a small config.json of a family, with changes."""
    return {**FAMILIES[model_type], **changes}


def tensors(config: Mapping[str, Any], *, seed: int = 0, copies: Iterable[str] = COPIES) -> dict[str, np.ndarray]:
    """Random float32 tensors of every published name: no norm is 1, no bias 0, most of the routers' biases negative."""
    rng = np.random.default_rng(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        found[name] = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    def norm(name: str, size: int = hidden) -> None:
        found[name] = rng.normal(1, 0.2, size).astype(np.float32)

    def mlp(prefix: str, width: int) -> None:
        for part in ("gate_proj", "up_proj"):
            matrix(f"{prefix}.{part}.weight", width, hidden)
        matrix(f"{prefix}.down_proj.weight", hidden, width)

    def grouped_attention(prefix: str) -> None:
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}
        for part, key in heads.items():
            rows = config[key] * config["head_dim"]
            matrix(f"{prefix}self_attn.{part}_proj.weight", rows, hidden)
            if config["attention_bias"]:
                found[f"{prefix}self_attn.{part}_proj.bias"] = rng.normal(0, 0.3, rows).astype(np.float32)
        matrix(f"{prefix}self_attn.o_proj.weight", hidden, config["num_attention_heads"] * config["head_dim"])
        for part in ("q_norm", "k_norm") if config["use_qk_norm"] else ():
            norm(f"{prefix}self_attn.{part}.weight", config["head_dim"])

    def latent_attention(prefix: str) -> None:
        heads, rank, queries = config["num_attention_heads"], config["kv_lora_rank"], config["q_lora_rank"]
        nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        if queries is None:
            matrix(f"{prefix}self_attn.q_proj.weight", heads * (nope + rope), hidden)
        else:
            matrix(f"{prefix}self_attn.q_a_proj.weight", queries, hidden)
            norm(f"{prefix}self_attn.q_a_layernorm.weight", queries)
            matrix(f"{prefix}self_attn.q_b_proj.weight", heads * (nope + rope), queries)
        matrix(f"{prefix}self_attn.kv_a_proj_with_mqa.weight", rank + rope, hidden)
        norm(f"{prefix}self_attn.kv_a_layernorm.weight", rank)
        matrix(f"{prefix}self_attn.kv_b_proj.weight", heads * (nope + value), rank)
        matrix(f"{prefix}self_attn.o_proj.weight", hidden, heads * value)

    def layer(prefix: str, *, experts: bool) -> None:
        norm(f"{prefix}input_layernorm.weight")
        norm(f"{prefix}post_attention_layernorm.weight")
        (latent_attention if "kv_lora_rank" in config else grouped_attention)(prefix)
        if not experts:
            return mlp(f"{prefix}mlp", config["intermediate_size"])
        count, width = config["n_routed_experts"], config["moe_intermediate_size"]
        matrix(prefix + ROUTER, count, hidden)
        found[prefix + BIAS] = rng.normal(-0.3, 0.2, count).astype(np.float32)
        for expert in range(count):
            mlp(f"{prefix}mlp.experts.{expert}", width)
        if config["n_shared_experts"]:
            mlp(f"{prefix}mlp.shared_experts", width * config["n_shared_experts"])

    matrix("model.embed_tokens.weight", vocab, hidden)
    found["model.embed_tokens.weight"] *= hidden**0.5
    for number in range(config["num_hidden_layers"]):
        layer(f"model.layers.{number}.", experts=number >= config["first_k_dense_replace"])
    norm("model.norm.weight")
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", vocab, hidden)
    if config["num_nextn_predict_layers"]:
        prefix = f"model.layers.{config['num_hidden_layers']}."
        layer(prefix, experts=True)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            norm(f"{prefix}{name}.weight")
        matrix(f"{prefix}eh_proj.weight", hidden, 2 * hidden)
        mains = {COPIES[0]: "model.embed_tokens.weight", COPIES[1]: "lm_head.weight"}
        found.update({prefix + copy: found[mains[copy]].copy() for copy in copies})
    return found


def stored(arrays: Mapping[str, np.ndarray], dtype: str, *, float32: Iterable[str] = (BIAS,)) -> dict[str, np.ndarray]:
    """The tensors in a dtype, but for those whose name ends with one of `float32`."""
    target = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    keep = tuple(float32)
    return {name: array if name.endswith(keep) else array.astype(target) for name, array in arrays.items()}


def write(
    directory: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, shards: int | None = None
) -> Path:
    """Write the directory: one file, or `shards` of them with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards is None:
        save_file(dict(arrays), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(arrays.items())[number::shards])
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shards: int | None = None,
    copies: Iterable[str] = COPIES,
    **changes: Any,
) -> Path:
    """Write a random checkpoint of the small shape, with changes to its config.json."""
    config = config_json(dtype=dtype, **changes)
    return write(directory, config, stored(tensors(config, seed=seed, copies=copies), dtype), shards=shards)


def tokens(batch: int, length: int, seed: int = 0, *, vocab: int = BASE["vocab_size"]) -> np.ndarray:
    """Random tokens int32 [batch, length]."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def read(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory, by the `safetensors` package."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def fused(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with all experts of a layer in one, gate before up, as transformers 5 holds them in memory."""
    result = {name: array for name, array in arrays.items() if ".mlp.experts." not in name}
    layers = sorted({name.split(".mlp.experts.")[0] for name in arrays if ".mlp.experts." in name})
    for layer in layers:
        count = sum(name.startswith(f"{layer}.mlp.experts.") for name in arrays) // 3

        def all_experts(part: str, layer: str = layer, count: int = count) -> np.ndarray:
            return np.stack([arrays[f"{layer}.mlp.experts.{e}.{part}.weight"] for e in range(count)])

        gate_up = [all_experts("gate_proj"), all_experts("up_proj")]
        result[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate(gate_up, axis=1)
        result[f"{layer}.mlp.experts.down_proj"] = all_experts("down_proj")
    return result
