"""The presets with latent attention and the later GLM models: published values and what their weights add up to."""

from __future__ import annotations

import dataclasses

import pytest

from glm_jax import configs, count_parameters
from tests import published

# The main model of DeepSeek-V3 and Kimi K2 as counted from the complete lists of their published tensors; with the MTP
# layer DeepSeek-V3 adds its unique 11,610,068,224 and two copies of 926,679,040 that the files repeat.
TOTALS = {
    "deepseek-v3": (671_026_419_200 + 11_610_068_224 + 2 * 926_679_040, 671_026_419_200),
    "kimi-k2": (1_026_408_232_448, 1_026_408_232_448),
    "glm-4.6": (356_785_898_816, 352_797_829_024),
    "glm-4.7-flash": (30_587_100_096, 29_943_393_920),
}
# Active for one token with embedding and head, in the facts' counting, which has the routers' biases among them: one
# value an expert and layer.
ACTIVE = {"deepseek-v3": 37_552_297_472 - 58 * 256, "kimi-k2": 32_861_500_928 - 60 * 384}
SAME = {
    "deepseek-v3": ("deepseek-v3-base", "deepseek-v3.1", "deepseek-v3.1-base", "deepseek-r1"),
    "kimi-k2": ("kimi-k2-base",),
    "glm-4.6": ("glm-4.7",),
}
DEEPSEEK = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI = {
    **DEEPSEEK,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**DEEPSEEK["rope_scaling"], "beta_fast": 1, "factor": 32},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
FILES = {
    "deepseek-v3": {**DEEPSEEK, "model_type": "deepseek_v3"},
    "kimi-k2": KIMI,
    "kimi-k2-0905": {
        **KIMI,
        "max_position_embeddings": 262144,
        "rope_scaling": {**KIMI["rope_scaling"], "factor": 64},
    },
}


THINKING = {**FILES["kimi-k2-0905"], "rms_norm_eps": 1e-5}
FILES |= {
    # What config.json of V3.1 has beside V3's, and of K2-Thinking beside the 0905 release's.
    "deepseek-v3.1": {**FILES["deepseek-v3"], "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}},
    "kimi-k2-thinking": {**THINKING, "quantization_config": {"quant_method": "compressed-tensors"}},
}


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_counts(name):
    counts = count_parameters(configs.get(name))
    assert (counts.total, counts.without_mtp) == TOTALS[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    assert count_parameters(configs.get(name)).active_with_embeddings == ACTIVE[name]


@pytest.mark.parametrize(("name", "other"), [(name, other) for name, others in SAME.items() for other in others])
def test_variants_of_the_same_shape(name, other):
    assert configs.get(other) == configs.get(name)


@pytest.mark.parametrize("name", FILES)
def test_presets_are_the_published_config_json(name):
    preset = dataclasses.replace(configs.get(name), mtp_copies=())
    assert configs.from_hf(published.config_json(**FILES[name])) == preset


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "n_routed_experts"])
def test_the_newer_spellings_are_read(key):
    newer = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}[key]
    content = published.config_json(model_type="deepseek_v3")
    expected = configs.from_hf(content)
    assert configs.from_hf({newer if name == key else name: value for name, value in content.items()}) == expected


def test_the_latent_norms_keep_the_published_codes_epsilon():
    """A model of another epsilon (Kimi K2.5's 1e-5) keeps 1e-6 there: that is what the published code computes."""
    config = configs.from_hf(published.config_json(model_type="deepseek_v3", rms_norm_eps=1e-5))
    assert (config.norm_eps, config.attention.norm_eps) == (1e-5, 1e-6)


def test_later_glm_models_share_the_architecture_with_longer_positions():
    earlier = configs.get("glm-4.5")
    later = dataclasses.replace(earlier, max_positions=202752, mtp_copies=())
    assert configs.get("glm-4.6") == later
