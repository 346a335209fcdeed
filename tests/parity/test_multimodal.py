"""The language models of multimodal checkpoints, as transformers saves them: its logits for text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glm_jax
from tests import oracle, published

LIMIT = 1e-4  # in standard deviations of the logits
VISION = {
    "glm4v_moe": {"depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 8, "patch_size": 2},
    "kimi_k25": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "patch_size": 2},
}
VISION["glm4v_moe"] |= {"out_hidden_size": 64, "intermediate_size": 16}
VISION["kimi_k25"] |= {"pos_emb_height": 4, "pos_emb_width": 4, "intermediate_size": 16}
PARTS = {"glm4v_moe": "model.visual.", "kimi_k25": "vision_tower."}


def content(outer: str, **changes: Any) -> dict[str, Any]:
    """A small multimodal config.json."""
    if outer == "glm4v_moe":
        text = published.config_json(rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1]})
        text |= {"model_type": "glm4v_moe_text"}
        del text["use_qk_norm"], text["num_nextn_predict_layers"]
        more = {}
    else:
        text = published.config_json(model_type="deepseek_v3", num_nextn_predict_layers=0, rms_norm_eps=1e-5)
        more = {"projection_hidden_size": 16}
    whole = {"model_type": outer, "text_config": text, "vision_config": VISION[outer], "tie_word_embeddings": False}
    return {**whole, **more, **changes}


def save(directory: Path, outer: str, **changes: Any) -> Any:
    """Let transformers save a random multimodal model; returns it."""
    config = oracle.transformers.CONFIG_MAPPING[outer].from_dict(content(outer, **changes))
    model = oracle.transformers.AutoModelForImageTextToText.from_config(config).eval()
    oracle.randomize(model, oracle.torch.Generator().manual_seed(1))
    model.save_pretrained(directory)
    return model


def check(model: Any, ours: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, 100, (2, 24)).astype(np.int32)
    reference = oracle.logits(model, tokens)
    assert np.abs(np.asarray(ours(tokens).logits) - reference).max() <= LIMIT * reference.std()


@pytest.mark.parametrize("outer", VISION)
def test_text_gives_the_logits_of_transformers(tmp_path, one_device, outer):
    model = save(tmp_path / "hf", outer)
    ours = glm_jax.load(tmp_path / "hf", mesh=one_device)
    check(model, ours)
    (note,) = [note for note in ours.notes if "multimodal" in note]
    assert f"of {PARTS[outer]}*" in note


@pytest.mark.parametrize("outer", VISION)
def test_an_export_of_it_stands_alone(tmp_path, one_device, outer):
    """transformers reads the exported text model as one of the plain architecture."""
    model = save(tmp_path / "hf", outer)
    glm_jax.convert(tmp_path / "hf", tmp_path / "orbax")
    glm_jax.export(tmp_path / "orbax", tmp_path / "out")
    alone = oracle.load(tmp_path / "out")
    assert type(alone).__name__ in ("Glm4MoeForCausalLM", "DeepseekV3ForCausalLM")
    tokens = np.random.default_rng(0).integers(0, 100, (2, 24)).astype(np.int32)
    np.testing.assert_allclose(oracle.logits(alone, tokens), oracle.logits(model, tokens), atol=1e-4)
    check(model, glm_jax.load(tmp_path / "out", mesh=one_device))


def test_the_names_of_the_published_files(tmp_path, one_device):
    """Kimi K2.5's files call the layers `layers`, where transformers saves `blocks`."""
    model = save(tmp_path / "hf", "kimi_k25")
    arrays = {name.replace("model.blocks.", "model.layers."): a for name, a in published.read(tmp_path / "hf").items()}
    published.write(tmp_path / "published", json.loads((tmp_path / "hf" / "config.json").read_text()), arrays)
    check(model, glm_jax.load(tmp_path / "published", mesh=one_device))


@pytest.mark.parametrize("outer", VISION)
def test_a_stored_head_is_used_whatever_the_config_says_of_tying(tmp_path, one_device, outer):
    """Kimi K2.5's class in transformers ties the head where config.json does not say; it unties one that differs."""
    model = save(tmp_path / "hf", outer)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    ours = glm_jax.load(tmp_path / "hf", mesh=one_device)
    assert not ours.config.tie_embeddings
    assert any(
        "config.json ties the head to the embedding, but lm_head.weight is stored" in note for note in ours.notes
    )
    check(model, ours)
