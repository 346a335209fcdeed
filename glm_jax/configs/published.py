"""What the publishers call the models of the presets, and in which format they publish the weights.

Names are in lower case and without their owner. A format is what config.json has under `quantization_config`; a preset
without one is published in bfloat16. Sources: the config.json of deepseek-ai/DeepSeek-V3 (blocks; Kimi K2 likewise) and
of moonshotai/Kimi-K2-Thinking (int4 of the routed experts); of zai-org's FP8 repositories that weights are
compressed-tensors with a scale for each output is known, which modules they exempt is not, nor whether the MTP layer is
among them: here all projections are quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWNERS = ("zai-org", "thudm", "zhipuai", "deepseek-ai", "moonshotai")
HUB = "hf://"

_FP8_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_FP8_CHANNELS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
        }
    },
    "ignore": ["lm_head"],
}
_INT4_EXPERTS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
}
QUANTIZATION: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v3": _FP8_BLOCKS,
    "deepseek-v3-base": _FP8_BLOCKS,
    "deepseek-v3.1": _FP8_BLOCKS,
    "deepseek-v3.1-base": _FP8_BLOCKS,
    "deepseek-r1": _FP8_BLOCKS,
    "kimi-k2": _FP8_BLOCKS,
    "kimi-k2-base": _FP8_BLOCKS,
    "kimi-k2-0905": _FP8_BLOCKS,
    "kimi-k2-thinking": _INT4_EXPERTS,
}
# Behind a model's name where one is published in more than one format; None is bfloat16.
SUFFIXES: Mapping[str, Mapping[str, Any] | None] = {"-fp8": _FP8_CHANNELS, "-bf16": None}
ALIASES: Mapping[str, str] = {
    "deepseek-v3-0324": "deepseek-v3",
    "deepseek-r1-0528": "deepseek-r1",
    "kimi-k2-instruct": "kimi-k2",
    "kimi-k2-instruct-0905": "kimi-k2-0905",
}


def without_owner(name: str) -> str:
    """A model's name in lower case, without the publisher's in front of it; other paths stay whole."""
    owner, slash, rest = name.removeprefix(HUB).lower().rpartition("/")
    return rest if not slash or owner in OWNERS else f"{owner}/{rest}"
