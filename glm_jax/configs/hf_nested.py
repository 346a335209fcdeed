"""The language model within the config.json of a multimodal model, which has it under `text_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The language model of multimodal model types, where `text_config` does not name it.
_LANGUAGE_MODELS = {"kimi_k25": "deepseek_v3", "glm4v_moe": "glm4v_moe_text"}
# Whether such a model type ties its head where the file does not say so: transformers' defaults.
_TIES = {"kimi_k25": True, "glm4v_moe": False}


def text_config(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config.json of the language model, which is `content` itself if it is no multimodal model's.

    Two keys of the language model may stand outside of its part: its quantisation, and whether its head is tied.
    """
    outer = content.get("model_type")
    outer = outer if isinstance(outer, str) else None
    inner = content.get("text_config")
    if inner is None and outer in _LANGUAGE_MODELS:
        inner = {}
    if not isinstance(inner, Mapping):
        return content
    found = dict(inner)
    if outer in _LANGUAGE_MODELS:
        found.setdefault("model_type", _LANGUAGE_MODELS[outer])
        tied = content.get("tie_word_embeddings", _TIES[outer])
        found["tie_word_embeddings"] = tied or (outer == "glm4v_moe" and found.get("tie_word_embeddings", False))
    elif "tie_word_embeddings" in content:
        found["tie_word_embeddings"] = content["tie_word_embeddings"]
    if content.get("quantization_config") is not None:
        found.setdefault("quantization_config", content["quantization_config"])
    return found
