"""The independent reference: transformers on torch. It makes random checkpoints, saves them and runs them.

Everything goes through files: transformers writes the directory with `save_pretrained` and reads it back as any user
would, its MTP layer included, so that names and layouts are compared along with the arithmetic. Importing this skips
the tests that do where torch or transformers is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.cache_utils import MtpCache  # noqa: E402
from transformers.modeling_layers import MtpModel  # noqa: E402

from tests import published  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: threads would wait for each other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save(
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_size: str | None = None,
    copies: Iterable[str] = published.COPIES,
    float32_routers: bool = False,
    beside: bool = False,
    **changes: Any,
) -> Path:
    """Let transformers save a random model; `changes` are keys of config.json.

    Args:
        directory: where it goes.
        seed: of the weights.
        dtype: of all tensors but the routers' correction bias, which stays float32.
        shard_size: "200KB" makes shards and an index; by default there is one file.
        copies: the MTP layer's optional copies of embedding and head to write.
        float32_routers: keep the routers' weights in float32.
        beside: rewrite config.json in the published layout (rope_theta beside the other keys).
        changes: to the small shape of `published`.
    """
    content = published.config_json(**changes)
    config = transformers.AutoConfig.for_model(**_as_transformers_names_it(content))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(model, generator)
    mtp = _mtp_tensors(model, generator, copies) if content["num_nextn_predict_layers"] else {}
    kind = getattr(torch, dtype)

    def cast(name: str, tensor: Any) -> Any:
        keep = name.endswith(published.BIAS) or (float32_routers and name.endswith(published.ROUTER))
        return tensor if keep else tensor.to(kind)

    for name, parameter in model.named_parameters():
        parameter.data = cast(name, parameter.data)
    model.config.dtype = kind
    model.save_pretrained(directory, **({} if shard_size is None else {"max_shard_size": shard_size}))
    _append(directory, {name: cast(name, tensor).contiguous() for name, tensor in mtp.items()})
    if beside:
        _rope_beside(directory / "config.json")
    _rename(directory / "config.json", content["model_type"])
    return directory


def load(directory: Path, dtype: str = "float32") -> Any:
    """The model as transformers loads it."""
    content = json.loads((directory / "config.json").read_text())
    config = transformers.AutoConfig.for_model(**_as_transformers_names_it(content))
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, config=config, **options).eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of tokens [B, T], float32 [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def mtp_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of the MTP layer that transformers finds in the model's own directory, [B, T - 1, V].

    It gets the hidden states after the final norm and the tokens shifted by one, at the tokens' own positions.
    """
    layers = model.config.num_hidden_layers
    _name_mtp_layers(model.config)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}\..*"]
    mtp = MtpModel.from_pretrained(model).eval()
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state
        positions = torch.arange(1, ids.shape[1])[None].expand(ids.shape[0], -1)
        cache = MtpCache(config=model.config.get_mtp_config())
        states = mtp.forward_layer(0, hidden[:, :-1], positions, cache, input_ids=ids[:, 1:])
        return mtp._project_to_logits(states).float().numpy()


def greedy(model: Any, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """The new tokens of transformers' own generate, on the prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=steps, eos_token_id=None, pad_token_id=0
        )
    return out[:, longest:].tolist()


def greedy_with_mtp(model: Any, prompt: Sequence[int], steps: int) -> list[int]:
    """The new tokens of transformers' generate with the MTP layer that it finds in the model's own directory.

    It drafts one token a round and takes one prompt at a time.
    """
    _name_mtp_layers(model.config)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]
    options = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(torch.tensor([list(prompt)]), use_mtp=True, **options)
    return out[0, len(prompt) :].tolist()


def _as_transformers_names_it(content: dict[str, Any]) -> dict[str, Any]:
    """Kimi's model type is DeepSeek's architecture under a name that transformers does not know by itself."""
    return {**content, "model_type": "deepseek_v3"} if content["model_type"] == "kimi_k2" else content


def _name_mtp_layers(config: Any) -> None:
    """Tell a configuration class that knows no MTP layer (GLM-4.7-Flash's) what `MtpModel` asks of it."""
    if getattr(config, "num_mtp_layers", None) is None:
        config.num_mtp_layers = 1
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mtp_mlp_layer_types = ["sparse"]


def _rename(path: Path, model_type: str) -> None:
    """Undo in a saved config.json what `_as_transformers_names_it` and `_name_mtp_layers` did."""
    content = json.loads(path.read_text())
    content.pop("mtp_mlp_layer_types", None)
    path.write_text(json.dumps({**content, "model_type": model_type}))


def randomize(module: Any, generator: Any) -> None:
    """Weights that keep activations at order 1, norms around 1, biases, and mostly negative correction biases."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            values = -0.3 + 0.2 * values
        elif name.endswith("inv_freq"):
            continue
        elif name.endswith("bias"):
            values = 0.3 * values
        elif tensor.ndim == 1:
            values = 1 + 0.2 * values
        elif "embed_tokens" not in name:
            values = values * tensor.shape[-1] ** -0.5
        tensor.data.copy_(values)


def _mtp_tensors(model: Any, generator: Any, copies: Iterable[str]) -> dict[str, Any]:
    """A random MTP layer under the published names, one tensor an expert."""
    _name_mtp_layers(model.config)
    mtp = MtpModel(model, 1)
    randomize(mtp.layers, generator)
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    found: dict[str, Any] = {}
    for name, tensor in mtp.layers[0].state_dict().items():
        name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if name == "mlp.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            for part, experts in (("gate_proj", gate), ("up_proj", up)):
                found |= {f"{prefix}mlp.experts.{e}.{part}.weight": w.clone() for e, w in enumerate(experts)}
        elif name == "mlp.experts.down_proj":
            found |= {f"{prefix}mlp.experts.{e}.down_proj.weight": w.clone() for e, w in enumerate(tensor)}
        else:
            found[prefix + name] = tensor
    mains = {published.COPIES[0]: model.model.embed_tokens.weight, published.COPIES[1]: model.lm_head.weight}
    found |= {prefix + copy: mains[copy].detach().clone() for copy in copies}
    return found


def _append(directory: Path, extra: dict[str, Any]) -> None:
    """Add tensors to a saved directory: to its one file, or as one more shard that the index names."""
    if not extra:
        return
    index = directory / INDEX
    if not index.exists():
        save_file({**load_file(directory / SINGLE), **extra}, directory / SINGLE, metadata={"format": "pt"})
        return
    save_file(extra, directory / "mtp.safetensors", metadata={"format": "pt"})
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    index.write_text(json.dumps(content))


def _rope_beside(path: Path) -> None:
    content = json.loads(path.read_text())
    rope = content.pop("rope_parameters")
    content |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    content["rope_scaling"] = None if rope.pop("rope_type") == "default" else {"type": "yarn", **rope}
    path.write_text(json.dumps(content))
