"""Each config.json is read as transformers reads it, or refused by name; what is passed over is said."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax import configs
from glm_jax.configs.hf import read_hf
from glm_jax.configs.hf_defaults import DEFAULTS, OFTEN_LEFT_OUT, ROPE_THETA
from glm_jax.configs.hf_keys import ADDED_BY_TOOLS, ONE_VALUE, PASSED_OVER, REFUSED
from glm_jax.configs.hf_nested import text_config
from glm_jax.configs.model_config import ModelConfig, YarnConfig
from glm_jax.errors import ConfigError
from tests import published

transformers = pytest.importorskip("transformers")

FAMILIES = ("glm4_moe", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
NESTED = {"kimi_k25": ("kimi_k2", "deepseek_v3"), "glm4v_moe": ("glm4v_moe_text",)}
# Keys that transformers' class has under another name, and those of which the package computes one value.
RENAMED = {"num_nextn_predict_layers": "num_mtp_layers"}
ROPE = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}


def theirs(content: dict[str, Any]) -> Any:
    """The configuration as transformers reads it; Kimi K2's model type by the class that transformers has for it."""
    content = copy.deepcopy(content)
    model_type = {"kimi_k2": "deepseek_v3"}.get(content["model_type"], content["model_type"])
    return transformers.CONFIG_MAPPING[model_type].from_dict({**content, "model_type": model_type})


def described(config: Any, model_type: str, *, tied: bool) -> ModelConfig:
    """A `ModelConfig` written down from the attributes of transformers' configuration, independent of our reader."""
    rope = config.rope_parameters
    yarn = None
    if rope["rope_type"] == "yarn":
        yarn = YarnConfig(
            factor=rope["factor"],
            original_positions=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            mscale=rope.get("mscale") or 0.0,
            mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
        )
    gqa = model_type in ("glm4_moe", "glm4v_moe_text")
    if gqa:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention: Any = configs.GqaConfig(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rope=configs.RopeConfig(
                theta=rope["rope_theta"], rotary_dim=int(head_dim * rope["partial_rotary_factor"]), yarn=yarn
            ),
            qkv_bias=config.attention_bias,
            qk_norm=model_type == "glm4_moe" and config.use_qk_norm,
        )
    else:
        attention = configs.MlaConfig(
            num_heads=config.num_attention_heads,
            q_rank=config.q_lora_rank,
            kv_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            value_dim=config.v_head_dim,
            rope=configs.RopeConfig(
                theta=rope["rope_theta"],
                rotary_dim=int(config.head_dim * rope.get("partial_rotary_factor", 1.0)),
                interleaved=config.rope_interleave,
                yarn=yarn,
            ),
        )
    layers, by_name = config.num_hidden_layers, getattr(config, "mlp_layer_types", None)
    dense = config.first_k_dense_replace if by_name is None else by_name.count("dense")
    return ModelConfig(
        model_type="glm4_moe" if gqa else model_type,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        num_layers=layers,
        num_dense_layers=min(dense, layers),
        mlp_width=config.intermediate_size,
        attention=attention,
        moe=configs.MoeConfig(
            num_experts=config.n_routed_experts,
            num_experts_per_token=config.num_experts_per_tok,
            expert_width=config.moe_intermediate_size,
            num_shared_experts=config.n_shared_experts,
            num_groups=config.n_group,
            num_groups_per_token=config.topk_group,
            normalize_weights=config.norm_topk_prob,
            routed_scaling=config.routed_scaling_factor,
        ),
        num_mtp_layers=getattr(config, "num_mtp_layers", getattr(config, "num_nextn_predict_layers", 0)),
        mtp_copies=(),
        tie_embeddings=tied,
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        initializer_range=config.initializer_range,
    )


def expect_as_transformers(content: dict[str, Any]) -> None:
    """Our reading is theirs, whatever of the keys the file leaves out."""
    outer = theirs(content)
    inner = getattr(outer, "text_config", outer)
    text = text_config(content)
    assert configs.from_hf(content) == described(inner, text["model_type"], tied=outer.tie_word_embeddings)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_the_defaults_are_transformers(model_type):
    if model_type == "glm4v_moe_text":
        defaults = theirs({"model_type": "glm4v_moe"}).text_config
    else:
        defaults = theirs({"model_type": model_type})
    expected = dict(DEFAULTS[model_type])
    partial = expected.pop("partial_rotary_factor", None)
    assert defaults.rope_parameters.get("partial_rotary_factor") == partial
    assert defaults.rope_parameters["rope_theta"] == ROPE_THETA
    unknown = {"num_nextn_predict_layers", "use_qk_norm"}  # of classes without MTP layers, or without these norms
    for key, value in expected.items():
        found = getattr(defaults, RENAMED.get(key, key), getattr(defaults, key, None))
        assert found == value or (found is None and key in unknown and not value), key


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_may_be_left_out(model_type):
    """One at a time: what is then read is what transformers reads, and the default is noted."""
    content = published.config_json(model_type=model_type)
    del content["rope_scaling"]
    if model_type != "glm4_moe":
        del content["num_key_value_heads"]  # which must be num_attention_heads, and follows it if it is left out
    for key in sorted(set(content) - {"model_type", "head_dim", *PASSED_OVER}):
        changed = {name: value for name, value in content.items() if name != key}
        try:
            notes = read_hf(changed).notes
        except ConfigError as error:  # the default is too large, or too small, for the other values
            assert "the model configuration is not possible" in str(error), key
            continue
        expect_as_transformers(changed)
        noted = f"{key}=" in " ".join(notes)
        assert noted == (key in DEFAULTS[model_type] or key == "rope_theta") - (key in OFTEN_LEFT_OUT), key


@pytest.mark.parametrize("outer", NESTED)
@pytest.mark.parametrize("printed", ["as published", "with every default"])
def test_the_language_model_of_a_multimodal_config(outer, printed):
    for model_type in NESTED[outer]:
        shapes = {"model_type": model_type, "num_hidden_layers": 3, "vocab_size": 128, "first_k_dense_replace": 1}
        shapes |= {"head_dim": 16} if outer == "glm4v_moe" else {}
        content = {"model_type": outer, "text_config": shapes, "tie_word_embeddings": False, "vision_config": {}}
        if printed == "with every default":
            content = json.loads(json.dumps(theirs(content).to_dict(), default=str))
        expect_as_transformers(content)
        alone = text_config(content)
        assert configs.from_hf(content) == configs.from_hf(alone)


@pytest.mark.parametrize("outer", NESTED)
@pytest.mark.parametrize("tied", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_whether_a_multimodal_model_ties_its_head(outer, tied, inner):
    text = {"head_dim": 128} if outer == "glm4v_moe" else {}
    text |= {} if inner is None else {"tie_word_embeddings": inner}
    expect_as_transformers(
        {"model_type": outer, "text_config": text, **({} if tied is None else {"tie_word_embeddings": tied})}
    )


def test_positions_of_pictures_change_nothing_for_text():
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12]}
    text = {"model_type": "glm4v_moe_text", "head_dim": 128, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    content = {"model_type": "glm4v_moe", "text_config": {**text, "rope_scaling": rope}}
    expect_as_transformers(content)
    assert configs.from_hf(content) == configs.from_hf({"model_type": "glm4v_moe", "text_config": text})


# Keys that tools were seen to add, with the values that they give them.
ADDED = {
    "_attn_implementation": "sdpa",
    "_comment": "made on a Tuesday",
    "kv_cache_scheme": {"num_bits": 8},
    "layer_types": ["full_attention"] * 3,
    "name_or_path": "models/x",
    "num_experts": 8,
    "pruned_heads": {},
    "sliding_window": None,
    "temperature": 0.6,
    "torchscript": False,
    "unheard_of": None,
    "unheard_of_too": False,
    "unheard_of_as_well": [],
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "use_bfloat16": True,
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", ADDED)
def test_keys_that_tools_add_are_passed_over_and_those_not_in_every_file_noted(model_type, key):
    content = published.config_json(model_type=model_type)
    read = read_hf({**content, key: ADDED[key]})
    assert read.config == configs.from_hf(content)
    silent = key in ("layer_types", "num_experts", *ONE_VALUE)
    assert [key in note for note in read.notes] == [] if silent else any(key in note for note in read.notes)


def test_an_old_configuration_written_with_every_default_of_transformers_4():
    """As `to_dict` of transformers 4 gave it: the common keys, those of generation, those of classifiers."""
    common = {"add_cross_attention": False, "is_decoder": False, "is_encoder_decoder": False, "finetuning_task": None}
    common |= {"tie_encoder_decoder": False, "cross_attention_hidden_size": None, "pruned_heads": {}, "prefix": None}
    common |= {"torchscript": False, "use_bfloat16": False, "tf_legacy_loss": False, "tokenizer_class": None}
    common |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0}, "problem_type": None}
    generation = {"max_length": 20, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}
    generation |= {"do_sample": False, "early_stopping": False, "bad_words_ids": None, "remove_invalid_values": False}
    content = published.config_json()
    assert configs.from_hf({**content, **common, **generation}) == configs.from_hf(content)


@pytest.mark.parametrize("key", sorted(set(ONE_VALUE)))
def test_a_key_of_one_value_is_refused_with_another_and_may_be_allowed(key):
    content = {**published.config_json(), key: "something else"}
    with pytest.raises(ConfigError, match=f"{key} is 'something else', which means .*--allow_unknown={key}"):
        configs.from_hf(content)
    read = read_hf(content, allow_unknown=[key])
    assert read.config == configs.from_hf(published.config_json())
    assert any("passed over as allowed" in note and key in note for note in read.notes)


def test_an_unknown_key_is_refused_with_all_others_and_may_be_allowed():
    content = {**published.config_json(), "logit_scale": 2.0, "alibi": True}
    with pytest.raises(ConfigError, match=r"alibi, logit_scale \(--allow_unknown=alibi,logit_scale passes over them"):
        configs.from_hf(content)
    assert configs.from_hf(content, allow_unknown=("alibi", "logit_scale")) == configs.from_hf(published.config_json())


def test_an_unknown_rotary_key_is_refused_and_may_be_allowed():
    content = published.config_json()
    nested = {**content, "rope_scaling": {"type": "default", "low_freq_factor": 1.0}}
    with pytest.raises(ConfigError, match=r"rope_parameters\.low_freq_factor"):
        configs.from_hf(nested)
    allowed = ["rope_parameters.low_freq_factor"]
    assert configs.from_hf(nested, allow_unknown=allowed) == configs.from_hf(content)


def test_the_lists_of_keys_do_not_overlap_and_every_key_has_its_reason():
    lists = [PASSED_OVER, ADDED_BY_TOOLS, ONE_VALUE, REFUSED]
    assert sum(map(len, lists)) == len({key for each in lists for key in each})
    assert all(each[key] for each in lists for key in each)


def test_more_dense_layers_than_layers_are_all_of_them():
    content = published.config_json(first_k_dense_replace=9, num_nextn_predict_layers=0)
    expect_as_transformers(content)
    assert configs.from_hf(content).num_moe_layers == 0


SIZES = st.sampled_from([1, 2, 4, 8, 16, 64])
NUMBERS = st.sampled_from([1e-6, 0.5, 1.0, 2.5, 1e4])
ODD = st.sampled_from([None, True, False, 0, -1, 3, 1.5, "x", [], {}, [1], {"a": 1}])


def values(key: str) -> st.SearchStrategy[Any]:
    """Values for a key: of its type, and now and then of another."""
    default = next(d[key] for d in DEFAULTS.values() if key in d)
    if key == "partial_rotary_factor":
        return st.sampled_from([0.5, 1.0])
    if key == "num_nextn_predict_layers":
        return st.sampled_from([0, 1])
    kinds = {bool: st.booleans(), int: SIZES, float: NUMBERS, str: st.just(default)}
    return st.one_of(kinds[type(default)], kinds[type(default)], kinds[type(default)], ODD)


@st.composite
def contents(draw) -> dict[str, Any]:
    """A config.json: of a small published one some keys left out, some changed, some added, the rotary ones moved."""
    model_type = draw(st.sampled_from(FAMILIES))
    content = published.config_json(model_type=model_type)
    for key in draw(st.sets(st.sampled_from(sorted(DEFAULTS[model_type])), max_size=3)):
        content[key] = draw(values(key))
    for key in draw(st.sets(st.sampled_from(sorted(content)), max_size=3)) - {"model_type"}:
        del content[key]
    for key in draw(st.sets(st.sampled_from(sorted({*ADDED, *ONE_VALUE, *ADDED_BY_TOOLS})), max_size=2)):
        content[key] = ADDED[key] if key in ADDED and draw(st.booleans()) else draw(ODD)
    scaling = draw(st.sampled_from(["as it is", "none", "yarn", "nested", "nested yarn", "odd"]))
    if scaling == "none":
        content.pop("rope_scaling", None)
    elif scaling == "yarn":
        content["rope_scaling"] = {"type": "yarn", **YARN}
    elif scaling.startswith("nested"):
        rope = {key: content.pop(key) for key in ROPE[:2] if key in content}
        content.pop("rope_scaling", None)
        content["rope_parameters"] = rope | ({"rope_type": "yarn", **YARN} if "yarn" in scaling else {})
    elif scaling == "odd":
        content[draw(st.sampled_from(ROPE))] = draw(ODD)
    return content


@settings(max_examples=400, deadline=None)
@given(contents())
def test_any_config_is_read_as_transformers_reads_it_or_refused_by_name(content):
    try:
        ours = configs.from_hf(content)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    # Their checks refuse an integer for a float, which ours takes for one.
    as_floats = {key: float(value) if _is_float(content, key, value) else value for key, value in content.items()}
    reading = theirs(as_floats)
    assert ours == described(reading, content["model_type"], tied=reading.tie_word_embeddings)
    assert configs.from_hf(configs.to_hf(ours)) == ours


def _is_float(content: dict[str, Any], key: str, value: Any) -> bool:
    return type(value) is int and isinstance(DEFAULTS[content["model_type"]].get(key), float)


def test_what_is_read_does_not_change_the_content():
    content = published.config_json(model_type="deepseek_v3")
    before = copy.deepcopy(content)
    configs.from_hf(content)
    assert content == before
