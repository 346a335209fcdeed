"""Hugging Face's config.json <-> `ModelConfig`.

Every key is accounted for: it is architecture and read, or it is on the list of keys that carry none, or it is an
error. A silently ignored key is how a checkpoint runs with the wrong arithmetic. Both layouts are read: `rope_theta`
and `partial_rotary_factor` beside the other keys (as published), and nested in `rope_parameters` (as transformers 5
saves it).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm_jax.configs.model_config import GqaConfig, ModelConfig, MoeConfig, RopeConfig
from glm_jax.errors import ConfigError

# Keys that say nothing about shapes or arithmetic of inference: token ids stand in generation_config.json and the
# tokenizer, the rest describes the file, the training run or transformers' own behaviour.
_NO_ARCHITECTURE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_SUPPORTED = ("glm4_moe",)
_MISSING = object()


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """Return the config.json of an HF directory as a dict.

    Raises:
        ConfigError: the file is absent, not JSON, or not an object.
    """
    path = Path(directory) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a Hugging Face checkpoint directory has one") from None
    except RecursionError:
        raise ConfigError(f"{path} is not readable JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def write_config_json(directory: str | Path, content: Mapping[str, Any]) -> None:
    """Write the config.json of an HF directory."""
    (Path(directory) / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def from_hf(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` of a config.json, given as its directory or as its content.

    `mtp_copies` is not in any config.json: it is empty here, and the checkpoint reader sets it from the tensors.

    Raises:
        ConfigError: the architecture is not supported, a key is missing, of the wrong type or unknown.
    """
    content = source if isinstance(source, Mapping) else read_config_json(source)
    model_type = content.get("model_type", _MISSING)
    if model_type not in _SUPPORTED:
        shown = "is missing" if model_type is _MISSING else f"{model_type!r} is not supported"
        raise ConfigError(f"config.json: model_type {shown}; supported: {', '.join(_SUPPORTED)}")
    reader = _Reader(content)
    build = _read_glm4_moe(reader)
    reader.finish()
    return build()


class _Reader:
    """Takes keys out of a config.json, collecting every problem, so that one error can name them all."""

    def __init__(self, content: Mapping[str, Any]):
        self._left = dict(content)
        self._problems: list[str] = []

    def take(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """The value of `key`; a missing key without a default, or a wrong type, is noted and stands as kind()."""
        value = self._left.pop(key, _MISSING)
        if value is _MISSING or (value is None and default is not _MISSING):
            if default is not _MISSING:
                return default
            self._problems.append(f"{key} is missing")
            return kind()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self._problems.append(f"{key} is {value!r}, not of type {kind.__name__}")
            return kind()
        return value

    def require(self, key: str, value: Any, *legal: Any) -> None:
        """Note a problem unless `value` is one of `legal`."""
        if value not in legal:
            self._problems.append(f"{key} is {value!r}; supported: {', '.join(repr(item) for item in legal)}")

    def note(self, problem: str) -> None:
        """Note a problem."""
        self._problems.append(problem)

    def finish(self) -> None:
        """Raise one ConfigError with every problem and every key that nobody took."""
        unknown = sorted(set(self._left) - _NO_ARCHITECTURE)
        if unknown:
            self._problems.append(f"unknown keys: {', '.join(unknown)}")
        if self._problems:
            raise ConfigError("config.json: " + "; ".join(self._problems))


def _read_rope(reader: _Reader, head_dim: int) -> RopeConfig:
    nested = reader.take("rope_parameters", dict, {})
    scaling = reader.take("rope_scaling", dict, None)
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
        reader.note(f"rope_scaling is {scaling!r}; supported for this architecture: null")
    unknown = sorted(set(nested) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if unknown:
        reader.note(f"rope_parameters: unknown keys: {', '.join(unknown)}")
    reader.require("rope_parameters.rope_type", nested.get("rope_type", nested.get("type", "default")), "default")

    def either_layout(key: str) -> float:
        found = {"at the top": reader.take(key, float, None), "in rope_parameters": nested.get(key)}
        values = {where: value for where, value in found.items() if value is not None}
        wrong = [
            where for where, value in values.items() if isinstance(value, bool) or not isinstance(value, int | float)
        ]
        if wrong or not values:
            reader.note(
                f"{key} is {'not a number ' + wrong[0] if wrong else 'missing (at the top or in rope_parameters)'}"
            )
            return 1.0
        if len(set(values.values())) > 1:
            reader.note(f"{key} is " + " but ".join(f"{value} {where}" for where, value in values.items()))
        return float(next(iter(values.values())))

    return RopeConfig(
        theta=either_layout("rope_theta"), rotary_dim=int(head_dim * either_layout("partial_rotary_factor"))
    )


def _read_head_dim(reader: _Reader, embed_dim: int, num_heads: int) -> int:
    head_dim = reader.take("head_dim", int, None)
    if head_dim is not None:
        return head_dim
    # transformers falls back to hidden_size / heads, which is wrong for both published models; only an exact
    # quotient can be what was meant.
    if num_heads < 1 or embed_dim % num_heads:
        reader.note(f"head_dim is missing (hidden_size {embed_dim} / num_attention_heads {num_heads} is no integer)")
        return 2
    return embed_dim // num_heads


def _read_glm4_moe(reader: _Reader) -> Callable[[], ModelConfig]:
    reader.take("model_type", str)
    embed_dim = reader.take("hidden_size", int)
    num_heads = reader.take("num_attention_heads", int)
    head_dim = _read_head_dim(reader, embed_dim, num_heads)
    reader.require("hidden_act", reader.take("hidden_act", str), "silu")
    if reader.take("quantization_config", dict, None) is not None:
        reader.note("quantization_config is set; supported: unquantised checkpoints (bfloat16, float16, float32)")
    attention = GqaConfig(
        num_heads=num_heads,
        num_kv_heads=reader.take("num_key_value_heads", int),
        head_dim=head_dim,
        rope=_read_rope(reader, head_dim),
        qkv_bias=reader.take("attention_bias", bool),
        qk_norm=reader.take("use_qk_norm", bool),
    )
    moe = MoeConfig(
        num_experts=reader.take("n_routed_experts", int),
        num_experts_per_token=reader.take("num_experts_per_tok", int),
        expert_width=reader.take("moe_intermediate_size", int),
        num_shared_experts=reader.take("n_shared_experts", int),
        num_groups=reader.take("n_group", int),
        num_groups_per_token=reader.take("topk_group", int),
        normalize_weights=reader.take("norm_topk_prob", bool),
        routed_scaling=reader.take("routed_scaling_factor", float),
    )
    return functools.partial(
        ModelConfig,
        model_type="glm4_moe",
        vocab_size=reader.take("vocab_size", int),
        embed_dim=embed_dim,
        num_layers=reader.take("num_hidden_layers", int),
        num_dense_layers=reader.take("first_k_dense_replace", int),
        mlp_width=reader.take("intermediate_size", int),
        attention=attention,
        moe=moe,
        num_mtp_layers=reader.take("num_nextn_predict_layers", int),
        mtp_copies=(),
        tie_embeddings=reader.take("tie_word_embeddings", bool, False),
        norm_eps=reader.take("rms_norm_eps", float),
        max_positions=reader.take("max_position_embeddings", int),
        initializer_range=reader.take("initializer_range", float, 0.02),
    )


def _rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """The fraction of the head that is rotated, such that a reader who truncates its product gets `rotary_dim`."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, 1.0)


def to_hf(config: ModelConfig, *, nested_rope: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the config.json content of `config`, as published, or with `rope_parameters` as transformers 5 saves it.

    `from_hf(to_hf(config))` is `config` again, but for `mtp_copies`, which config.json does not carry.
    """
    attention, moe = config.attention, config.moe
    factor = _rotary_factor(attention.rope.rotary_dim, attention.head_dim)
    rope: dict[str, Any] = {"rope_theta": attention.rope.theta, "partial_rotary_factor": factor}
    if nested_rope:
        rope = {"rope_parameters": {"rope_type": "default", **rope}}
    else:
        rope["rope_scaling"] = None
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "first_k_dense_replace": config.num_dense_layers,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "attention_dropout": 0.0,
        "use_qk_norm": attention.qk_norm,
        **rope,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "moe_intermediate_size": moe.expert_width,
        "n_shared_experts": moe.num_shared_experts,
        "n_group": moe.num_groups,
        "topk_group": moe.num_groups_per_token,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.routed_scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "dtype": dtype,
    }
