"""Taking a config.json apart: every key is read, or known to carry no architecture, or an error.

A silently ignored key is how a checkpoint runs with the wrong arithmetic. Here stands what the families share: the
reader, which applies the lists of `hf_keys` and `hf_defaults` and collects every problem; the rotary keys in both of
their layouts; the experts.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from glm_jax.configs.hf_defaults import DEFAULTS, OFTEN_LEFT_OUT, ROPE_THETA
from glm_jax.configs.hf_keys import ADDED_BY_TOOLS, ONE_VALUE, PASSED_OVER, REFUSED
from glm_jax.configs.model_config import ModelConfig, MoeConfig, RopeConfig, YarnConfig
from glm_jax.errors import ConfigError

MISSING = object()


class ConfigReader:
    """Takes keys out of a config.json, collecting every problem, so that one error can name them all.

    Args:
        content: the keys and values.
        allow_unknown: keys that are passed over although they may change what the model computes.
    """

    def __init__(self, content: Mapping[str, Any], allow_unknown: Collection[str] = ()):
        self.model_type = str(content["model_type"])
        self._content = content
        self._left = {key: value for key, value in content.items() if key != "model_type"}
        self._allowed = allow_unknown
        self._defaults, self._defaulted = DEFAULTS[self.model_type], dict[str, Any]()
        self._problems: list[str] = []

    def take(self, key: str, kind: type, default: Any = MISSING, *, nullable: bool = False) -> Any:
        """The value of `key`.

        A missing key stands for `default`, or without one for transformers' default, which is noted. Null is legal if
        the key is `nullable`, or if `default` is None. Any other value of another type is a problem, and stands as
        kind().
        """
        value = self._left.pop(key, MISSING)
        if value is MISSING:
            return self._default(key, kind) if default is MISSING else default
        if value is None and (nullable or default is None):
            return None
        if kind is float and _is_number(value):
            value = float(value)
        elif kind is float and isinstance(value, float):
            self._problems.append(f"{key} is {value}, not a finite number")
            return kind()
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self._problems.append(f"{key} is {_shown(value)}, not of type {kind.__name__}")
            return kind()
        return value

    def take_alias(self, key: str, alias: str, kind: type) -> Any:
        """The value of `key`, or of `alias`, another name of it; both may stand there if they agree."""
        if self._left.get(alias) is None:
            self._left.pop(alias, None)
            return self.take(key, kind)
        other = self.take(alias, kind)
        value = self.take(key, kind, other)
        if value != other:
            self._problems.append(f"{key} is {value!r} but {alias} is {other!r}")
        return value

    def has(self, key: str) -> bool:
        """Whether the file has a key that nobody took."""
        return key in self._left

    def peek(self, key: str) -> Any:
        """The value of a key that somebody else takes, or its default."""
        return self._content.get(key, self.default(key))

    def default(self, key: str) -> Any:
        """transformers' default for a key; None if its class has no such key."""
        return self._defaults.get(key)

    def put_back(self, keys: Mapping[str, Any]) -> None:
        """Treat keys of a nested object, which nobody takes, as those of the file."""
        self._left.update(keys)

    def require(self, key: str, value: Any, *legal: Any) -> None:
        """Note a problem unless `value` is one of `legal`."""
        if not _is_one_of(value, legal):
            self._problems.append(f"{key} is {_shown(value)}; supported: {', '.join(repr(item) for item in legal)}")

    def problem(self, problem: str) -> None:
        """Note a problem."""
        self._problems.append(problem)

    def note_default(self, key: str, value: Any) -> None:
        """Note that a missing key stands for a value."""
        self._defaulted[key] = value

    def finish(self) -> tuple[str, ...]:
        """Return a note for each kind of key that was passed over, or raise one ConfigError with every problem."""
        added, empty, allowed, unknown = [], [], [], []
        for key, value in sorted(self._left.items()):
            if key in PASSED_OVER:
                continue
            if key in REFUSED:
                self._problems.append(f"{key} is {REFUSED[key]}")
            elif key in ONE_VALUE and _is_one_of(value, ONE_VALUE[key][0]):
                continue
            elif key in self._allowed:
                allowed.append(f"{key} ({_shown(value)})")
            elif key in ONE_VALUE:
                legal, meaning = ONE_VALUE[key]
                shown = ", ".join(_shown(item) for item in legal)
                advice = f"--allow_unknown={key} passes over it"
                self._problems.append(f"{key} is {_shown(value)}, which means {meaning}; supported: {shown} ({advice})")
            elif key in ADDED_BY_TOOLS or key.startswith("_"):
                added.append(key)
            elif value is None or value is False or value in ({}, [], ""):
                empty.append(key)
            else:
                unknown.append(key)
        if unknown:
            names = ", ".join(unknown)
            advice = f"--allow_unknown={','.join(unknown)} passes over them"
            self._problems.append(f"unknown keys, which may change what the model computes: {names} ({advice})")
        if self._problems:
            raise ConfigError("config.json: " + "; ".join(self._problems))
        defaulted = [f"{key}={value!r}" for key, value in self._defaulted.items() if key not in OFTEN_LEFT_OUT]
        found = {
            "keys that other tools add are passed over": added,
            "unknown keys that are null, false or empty are passed over": empty,
            "passed over as allowed, though they may change what the model computes": allowed,
            f"left out, so that transformers' defaults for {self.model_type} hold": defaulted,
        }
        return tuple(f"config.json: {what}: {', '.join(keys)}" for what, keys in found.items() if keys)

    def _default(self, key: str, kind: type) -> Any:
        value = self._defaults.get(key, MISSING)
        if value is MISSING:
            self._problems.append(f"{key} is missing")
            return kind()
        self.note_default(key, value)
        return value


def _is_one_of(value: Any, legal: Collection[Any]) -> bool:
    """Whether a value is among others, and of the same type: 0 is not False."""
    return any(type(value) is type(item) and value == item for item in legal)


def _shown(value: Any) -> str:
    """A value in one line of bounded length, null as it is written in JSON."""
    return "null" if value is None else f"{value!r:.200}"


def read_rope(
    reader: ConfigReader, *, head_dim: int, interleaved: bool, kinds: Collection[str], passed_over: Collection[str] = ()
) -> RopeConfig:
    """Read the rotary keys: beside the others and in `rope_scaling`, or nested in `rope_parameters`.

    Args:
        reader: the config.json.
        head_dim: values of a head; `partial_rotary_factor` is the fraction of them that is rotated.
        interleaved: how values are paired.
        kinds: the supported types: "default", or "yarn" as well.
        passed_over: keys that change nothing.
    """
    nested, scaling = (_renamed(reader.take(key, dict, None) or {}) for key in ("rope_parameters", "rope_scaling"))
    if nested and scaling and nested != scaling:
        reader.problem(f"rope_scaling is {_shown(scaling)} but rope_parameters is {_shown(nested)}")
    keys = {key: value for key, value in {**nested, **scaling}.items() if key not in passed_over}
    kind = keys.pop("rope_type", "default")
    theta = _read_rope_number(reader, keys, "rope_theta", default=ROPE_THETA)
    factor = _read_rope_number(reader, keys, "partial_rotary_factor", default=reader.default("partial_rotary_factor"))
    yarn = _read_yarn(reader, keys) if kind == "yarn" and kind in kinds else None
    if kind not in kinds:
        where, given = ("rope_scaling", scaling) if scaling else ("rope_parameters", nested)
        reader.problem(f"{where} is {_shown(given)}; supported types for this architecture: {', '.join(kinds)}")
    else:
        reader.put_back({f"rope_parameters.{key}": value for key, value in keys.items()})
    return RopeConfig(theta=theta, rotary_dim=int(head_dim * factor), interleaved=interleaved, yarn=yarn)


def _renamed(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary keys with the type under its newer name, which counts where both stand."""
    return {**({"rope_type": rope["type"]} if "type" in rope else {}), **{k: v for k, v in rope.items() if k != "type"}}


def _read_rope_number(reader: ConfigReader, keys: dict[str, Any], key: str, *, default: float | None) -> float:
    """A number that stands at the top of the file, or among the rotary keys, or at both places alike."""
    found = {"at the top": reader.take(key, float)} if reader.has(key) else {}
    found |= {"in rope_parameters": keys.pop(key)} if key in keys else {}
    wrong = [where for where, value in found.items() if not _is_number(value)]
    if wrong:
        reader.problem(f"{key} is not a number {wrong[0]}")
    elif len(set(found.values())) > 1:
        reader.problem(f"{key} is " + " but ".join(f"{value} {where}" for where, value in found.items()))
    elif found:
        return float(next(iter(found.values())))
    elif default is None:
        return 1.0
    else:
        reader.note_default(key, default)
        return default
    return 1.0


def _read_yarn(reader: ConfigReader, keys: dict[str, Any]) -> YarnConfig:
    """Take YaRN's keys out of the rotary ones. The defaults are transformers'."""

    def number(key: str, default: float | None) -> float:
        value = keys.pop(key, None)
        if value is None and default is not None:
            return default
        if not _is_number(value):
            what = "missing" if value is None else f"{_shown(value)}, not a number"
            reader.problem(f"rope_parameters.{key} is {what}")
            return 1.0
        return float(value)

    reader.require("rope_parameters.attention_factor", keys.pop("attention_factor", None), None)
    reader.require("rope_parameters.truncate", keys.pop("truncate", True), True)
    if "original_max_position_embeddings" not in keys:
        positions = reader.peek("max_position_embeddings")
        reader.note_default("original_max_position_embeddings", positions)
        keys["original_max_position_embeddings"] = positions
    return YarnConfig(
        factor=number("factor", None),
        original_positions=int(number("original_max_position_embeddings", None)),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        mscale=number("mscale", 0.0),
        mscale_all_dim=number("mscale_all_dim", 0.0),
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds: JSON has integers of any length, and Python's reader NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def write_rope(rope: RopeConfig, *, partial: float | None, nested: bool) -> dict[str, Any]:
    """The rotary keys of a config.json, the inverse of `read_rope`, in either layout."""
    keys: dict[str, Any] = {"rope_theta": rope.theta}
    if partial is not None:
        keys["partial_rotary_factor"] = partial
    scaling: dict[str, Any] = {}
    if rope.yarn is not None:
        yarn = rope.yarn
        scaling = {
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            **({"mscale": yarn.mscale} if yarn.mscale else {}),
            **({"mscale_all_dim": yarn.mscale_all_dim} if yarn.mscale_all_dim else {}),
        }
    if nested:
        return {"rope_parameters": {"rope_type": "yarn" if scaling else "default", **keys, **scaling}}
    return {**keys, "rope_scaling": {"type": "yarn", **scaling} if scaling else None}


def read_moe(reader: ConfigReader) -> MoeConfig:
    """Read the keys of the routed and shared experts, which the families share."""
    num_experts = reader.take_alias("n_routed_experts", "num_local_experts", int)
    reader.require("num_experts", reader.take("num_experts", int, num_experts), num_experts)
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=reader.take("num_experts_per_tok", int),
        expert_width=reader.take("moe_intermediate_size", int),
        num_shared_experts=reader.take("n_shared_experts", int),
        num_groups=reader.take("n_group", int),
        num_groups_per_token=reader.take("topk_group", int),
        normalize_weights=reader.take("norm_topk_prob", bool),
        routed_scaling=reader.take("routed_scaling_factor", float),
    )


def write_moe(moe: MoeConfig) -> dict[str, Any]:
    """The keys of the experts, the inverse of `read_moe`."""
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "moe_intermediate_size": moe.expert_width,
        "n_shared_experts": moe.num_shared_experts,
        "n_group": moe.num_groups,
        "topk_group": moe.num_groups_per_token,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.routed_scaling,
    }


def read_shape(reader: ConfigReader, *, dense_layers: int | None) -> dict[str, Any]:
    """Read what every decoder has, as the arguments of `ModelConfig`.

    `dense_layers` is their number where `first_k_dense_replace` does not tell it.
    """
    num_layers = reader.take("num_hidden_layers", int)
    _check_layer_types(reader, num_layers)
    return {
        "model_type": reader.model_type,
        "vocab_size": reader.take("vocab_size", int),
        "embed_dim": reader.take("hidden_size", int),
        "num_layers": num_layers,
        # More dense layers than there are layers make all of them dense.
        "num_dense_layers": min(num_layers, reader.take("first_k_dense_replace", int))
        if dense_layers is None
        else dense_layers,
        "mlp_width": reader.take("intermediate_size", int),
        "num_mtp_layers": reader.take_alias("num_nextn_predict_layers", "num_mtp_layers", int),
        "mtp_copies": (),
        "tie_embeddings": reader.take("tie_word_embeddings", bool),
        "norm_eps": reader.take("rms_norm_eps", float),
        "max_positions": reader.take("max_position_embeddings", int),
        "initializer_range": reader.take("initializer_range", float),
    }


def _check_layer_types(reader: ConfigReader, num_layers: int) -> None:
    """`layer_types` names the attention of each layer: full attention is the only one here."""
    types = reader.take("layer_types", list, None)
    if types is not None and (len(types) != num_layers or any(each != "full_attention" for each in types)):
        reader.problem(f"layer_types is {_shown(types)}; supported: 'full_attention' for each of {num_layers} layers")


def write_shape(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The keys that every decoder has, the inverse of `read_shape`."""
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "first_k_dense_replace": config.num_dense_layers,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "dtype": dtype,
    }
