"""The language model of a multimodal checkpoint is read as if it stood alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint import dry_run, verify
from tests.checkpoint import quantized_sources as sources

PICTURES = {
    "vision_tower.patch_embed.proj.weight": np.ones((4, 3), np.float32),
    "mm_projector.proj.0.weight": np.ones((2, 2), np.float32),
}


def multimodal(directory: Path, made: sources.Checkpoint, *, outside: bool = False, **more: np.ndarray) -> Path:
    """A checkpoint with a language model and other parts; its quantization_config in the text's part, or outside."""
    tensors = {f"language_model.{name}": array for name, array in made.tensors.items()} | PICTURES | more
    text = dict(made.config)
    moved = {"quantization_config": text.pop("quantization_config")} if outside else {}
    config = {"model_type": "some_vl", "architectures": ["SomeVL"], "vision_config": {}, "text_config": text, **moved}
    return sources.write(directory, config, tensors, shards=2)


def arrays(directory: Path) -> dict[str, bytes]:
    root = directory / "default"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("c.*")}


@pytest.mark.parametrize("outside", [False, True])
def test_it_is_converted_as_it_would_be_alone(tmp_path, outside):
    made = sources.checkpoint(sources.KINDS["kimi-32"])
    source = multimodal(tmp_path / "hf", made, outside=outside)
    report = glm_jax.convert(source, tmp_path / "out", quantized="keep")
    glm_jax.convert(made.write(tmp_path / "alone"), tmp_path / "expected", quantized="keep")
    assert arrays(tmp_path / "out") == arrays(tmp_path / "expected")
    parts = "1 of mm_projector.*, 1 of vision_tower.*"
    note = f"a multimodal checkpoint, of which only the language model is taken: 2 tensors are passed over ({parts})"
    assert note in report.notes
    assert verify(source, tmp_path / "out").problems == ()
    assert dry_run(source).problems == ()
    glm_jax.export(tmp_path / "out", tmp_path / "back")
    back = sources.read(tmp_path / "back")
    assert back.keys() == made.tensors.keys()
    assert all(back[name].tobytes() == array.tobytes() for name, array in made.tensors.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "kimi_k2"


def test_it_is_loaded_directly(tmp_path):
    made = sources.checkpoint(sources.KINDS["glm-bf16"])
    ours, alone = (glm_jax.load(place) for place in (multimodal(tmp_path / "hf", made), made.write(tmp_path / "alone")))
    tokens = np.arange(6, dtype=np.int32)[None]
    np.testing.assert_array_equal(ours(tokens).logits, alone(tokens).logits)


def test_parts_that_are_not_known_are_refused(tmp_path):
    made = sources.checkpoint(sources.KINDS["glm-bf16"])
    extra = {"taste_tower.x": np.ones(3, np.float32), "model.norm.weight": np.ones(64, np.float32)}
    source = multimodal(tmp_path / "hf", made, **extra)
    with pytest.raises(glm_jax.CheckpointError, match="2 not known to this architecture") as caught:
        glm_jax.convert(source, tmp_path / "out")
    assert "taste_tower.x" in str(caught.value) and "language_model.model.norm.weight" in str(caught.value)


def test_an_unknown_language_model_is_named(tmp_path):
    made = sources.checkpoint(sources.KINDS["glm-bf16"])
    source = multimodal(tmp_path / "hf", made)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["model_type"] = "other_text"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(glm_jax.ConfigError, match="model_type 'other_text' is not supported"):
        glm_jax.convert(source, tmp_path / "out")


def test_quantised_experts_in_one_tensor_are_named(tmp_path):
    made = sources.checkpoint(sources.KINDS["deepseek-128"])
    name = "model.layers.1.mlp.experts.down_proj_scale_inv"
    source = sources.write(tmp_path / "hf", made.config, {**made.tensors, name: np.ones((8, 1, 1), np.float32)})
    with pytest.raises(glm_jax.CheckpointError, match=f"1 of quantised experts in one tensor, .*one for each.*{name}"):
        glm_jax.convert(source, tmp_path / "out")
