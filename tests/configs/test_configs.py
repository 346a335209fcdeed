"""The presets hold the published numbers, config.json goes both ways, and describing the largest model is cheap."""

from __future__ import annotations

import dataclasses
import math

import pytest

from glm_jax import configs, count_parameters
from glm_jax.errors import ConfigError
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name
from tests import processes, published

# What the published checkpoints add up to; the first row is the total that the Hugging Face hub shows for them.
COUNTS = {
    "total": (358_337_791_296, 110_468_824_832),
    "without_mtp": (352_797_829_024, 106_852_251_264),
    "report": (355_234_006_336, 107_985_796_864),
    "report_without_mtp": (351_245_936_544, 105_610_737_280),
    "active": (32_482_299_136, 12_481_488_896),
    "active_without_mtp": (32_080_359_424, 12_182_609_920),
    "active_with_embeddings": (33_632_251_904, 13_424_123_904),
}
# Parts of the model by the prefixes of their weights' names; per layer where there are several.
PARTS = {
    "attention": ("moe.attention.", (136_329_472, 109_066_240)),
    "mtp": ("mtp.", (5_539_962_272, 3_616_573_568)),
    "dense mlp": ("dense.mlp.", (188_743_680, 134_479_872)),
    "experts": ("moe.moe.", (3_799_285_920, 2_232_418_432)),
    "embedding": ("embedding.", (775_946_240, 620_756_992)),
    "head": ("head.", (775_946_240, 620_756_992)),
}
PUBLISHED = {  # the keys of both config.json that differ from each other, and some that trip readers
    "glm-4.5": {"hidden_size": 5120, "num_hidden_layers": 92, "first_k_dense_replace": 3, "intermediate_size": 12288}
    | {"moe_intermediate_size": 1536, "n_routed_experts": 160, "routed_scaling_factor": 2.5, "use_qk_norm": True},
    "glm-4.5-air": {
        "hidden_size": 4096,
        "num_hidden_layers": 46,
        "first_k_dense_replace": 1,
        "intermediate_size": 10944,
    }
    | {"moe_intermediate_size": 1408, "n_routed_experts": 128, "routed_scaling_factor": 1.0, "use_qk_norm": False},
}
SHARED = {
    "attention_bias": True,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "vocab_size": 151552,
}


@pytest.mark.parametrize("row", COUNTS)
@pytest.mark.parametrize(("column", "name"), [(0, "glm-4.5"), (1, "glm-4.5-air")])
def test_parameter_counts(column, name, row):
    assert getattr(count_parameters(configs.get(name)), row) == COUNTS[row][column]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("column", "name"), [(0, "glm-4.5"), (1, "glm-4.5-air")])
def test_parameter_counts_of_parts(column, name, part):
    prefix, expected = PARTS[part]
    config = configs.get(name)
    layers = {"moe": config.num_moe_layers, "dense": config.num_dense_layers}.get(prefix.split(".")[0], 1)
    sizes = [
        math.prod(w.get_raw_value().shape)
        for n, w in weights_by_name(Transformer(config)).items()
        if n.startswith(prefix)
    ]
    assert sum(sizes) == layers * expected[column]


@pytest.mark.parametrize(("name", "expected"), [("glm-4.5", 3_988_069_792), ("glm-4.5-air", 2_375_059_584)])
def test_parameter_counts_without_the_copies(name, expected):
    config = configs.get(name)
    without = dataclasses.replace(config, mtp_copies=())
    assert count_parameters(without).total - count_parameters(without).without_mtp == expected
    assert count_parameters(without).without_mtp == count_parameters(config).without_mtp


def test_a_single_expert_is_as_wide_as_the_shared_one():
    for name, expected in (("glm-4.5", 23_592_960), ("glm-4.5-air", 17_301_504)):
        weights = weights_by_name(Transformer(configs.get(name)))
        shapes = {
            n.removeprefix("mtp.layer.moe."): w.get_raw_value().shape
            for n, w in weights.items()
            if n.startswith("mtp.layer.moe.")
        }
        assert math.prod(shapes["shared.gate_up"]) + math.prod(shapes["shared.down"]) == expected
        assert math.prod(shapes["experts.gate_up"][1:]) + math.prod(shapes["experts.down"][1:]) == expected


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("nested", [False, True], ids=["beside", "nested"])
def test_presets_are_the_published_config_json(name, nested):
    content = published.config_json(**SHARED, **PUBLISHED[name])
    if nested:
        rope = {key: content.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
        content["rope_parameters"] = {"rope_type": "default", **rope}
        del content["rope_scaling"]
    preset = configs.get(name)
    assert configs.from_hf(content) == dataclasses.replace(preset, mtp_copies=())
    assert configs.get(f"{name}-base") == preset


@pytest.mark.parametrize("name", configs.names())
@pytest.mark.parametrize("nested", [False, True], ids=["beside", "nested"])
def test_config_json_goes_both_ways(name, nested):
    config = dataclasses.replace(configs.get(name), mtp_copies=())
    content = configs.to_hf(config, nested_rope=nested)
    assert configs.from_hf(content) == config
    assert ("rope_parameters" in content) is nested
    assert configs.to_hf(configs.from_hf(content), nested_rope=nested) == content


@pytest.mark.parametrize("rotary_dim", range(2, 130, 2))
def test_every_rotary_size_survives_its_fraction(rotary_dim):
    """The file holds a fraction of the head: 2/3 of 96 values must come back as 64, not 63."""
    for head_dim in range(max(rotary_dim, 96), 129):
        preset = configs.get("glm-4.5")
        rope = dataclasses.replace(preset.attention.rope, rotary_dim=rotary_dim)
        attention = dataclasses.replace(preset.attention, head_dim=head_dim, rope=rope)
        config = dataclasses.replace(preset, attention=attention, mtp_copies=())
        assert configs.from_hf(configs.to_hf(config)) == config


def test_keys_that_carry_no_architecture_are_passed_over():
    extra = {"_name_or_path": "x", "transformers_version": "4.54.0", "torch_dtype": "bfloat16", "eos_token_id": [1, 2]}
    assert configs.from_hf(published.config_json(**extra)) == configs.from_hf(published.config_json())


def test_head_dim_may_be_left_out_only_where_it_can_be_told():
    content = published.config_json()
    del content["head_dim"]
    assert configs.from_hf(content).attention.head_dim == 8
    with pytest.raises(ConfigError, match=r"head_dim is missing \(hidden_size 100 / num_attention_heads 8"):
        configs.from_hf({**content, "hidden_size": 100})


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("glm-4.5", "glm-4.5"),
        ("GLM-4.5-Air", "glm-4.5-air"),
        ("zai-org/GLM-4.5-Air", "glm-4.5-air"),
        ("ZAI-ORG/glm-4.5-air-base", "glm-4.5-air-base"),
        ("THUDM/GLM-4.5", "glm-4.5"),
        ("hf://zai-org/GLM-4.6", "glm-4.6"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("GLM-4.7-Flash", "glm-4.7-flash"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("DeepSeek-V3-BF16", "deepseek-v3"),
        ("moonshotai/Kimi-K2-Instruct", "kimi-k2"),
        ("kimi-k2-instruct-0905", "kimi-k2-0905"),
    ],
)
def test_presets_have_their_names_on_the_hub_in_any_case(written, name):
    found = configs.find(written)
    assert found is not None and found.name == name
    assert found.config is configs.get(name) is configs.get(written)


@pytest.mark.parametrize(
    "written", ["", "glm", "fp8", "-fp8", "ckpt/glm-4.5", "/glm-4.5", "zai-org/", "a/zai-org/glm-4.5"]
)
def test_other_paths_are_no_presets(written):
    assert configs.find(written) is None


@pytest.mark.parametrize(
    ("written", "method", "key", "value"),
    [
        ("deepseek-v3", "fp8", "weight_block_size", [128, 128]),
        ("kimi-k2", "fp8", "weight_block_size", [128, 128]),
        ("zai-org/GLM-4.5-FP8", "compressed-tensors", "format", "float-quantized"),
    ],
)
def test_presets_say_how_they_are_published(written, method, key, value):
    found = configs.find(written)
    assert found is not None and found.quantization is not None
    assert (found.quantization["quant_method"], found.quantization[key]) == (method, value)


@pytest.mark.parametrize("written", ["glm-4.5", "zai-org/GLM-4.5-Air", "tiny-glm", "DeepSeek-V3-BF16"])
def test_others_are_published_in_bfloat16(written):
    found = configs.find(written)
    assert found is not None and found.quantization is None


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no model is called 'glm-5'; known: .*glm-4\.5-air"):
        configs.get("glm-5")


@pytest.mark.parametrize(
    "change", [{"num_layers": 0}, {"num_mtp_layers": 0}, {"mtp_copies": ("other",)}, {"num_dense_layers": 93}]
)
def test_contradictions_are_refused(change):
    with pytest.raises(ConfigError, match="the model configuration is not possible"):
        dataclasses.replace(configs.get("glm-4.5"), **change)


def test_the_largest_model_is_described_in_50_mb():
    kilobytes = processes.said("""
        import resource
        from glm_jax import configs
        from glm_jax.model import Transformer
        Transformer(configs.get("tiny-glm"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Transformer(configs.get("glm-4.5"))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    assert int(kilobytes) < 50 * 1024


def test_configs_need_no_jax():
    program = "import sys, glm_jax; glm_jax.configs.get('glm-4.5'); print(int('jax' in sys.modules))"
    assert processes.said(program) == "0\n"
