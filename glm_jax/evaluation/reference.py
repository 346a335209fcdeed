"""The independent implementation: transformers on torch, reading the same kind of directory by itself.

Neither is needed to install or to import this package. The class is the one that config.json names in `architectures`,
taken from transformers; code that lies in the checkpoint is never run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.configs import read_config_json
from glm_jax.errors import CheckpointError, Error
from glm_jax.evaluation.trace import EMBEDDING, FINAL_NORM, MTP, Trace, layer_name
from glm_jax.sharding import short_repr

HOW_TO_INSTALL = "pip install 'torch>=2.6' 'transformers>=5.0' into the Python that runs glm-jax"


@dataclasses.dataclass(frozen=True)
class Rope:
    """What decides the rotation.

    Attributes:
        frequencies: angle of each pair between two positions, float32 [rotary_dim / 2].
        rotation_scale: the factor on cosines and sines.
        softmax_scale: the factor on the scores.
    """

    frequencies: np.ndarray
    rotation_scale: float
    softmax_scale: float


@dataclasses.dataclass(frozen=True)
class ReferenceTrace(Trace):
    """A trace of the reference, with what else it is compared by.

    Attributes:
        choice: for each place with a router the scores by which experts are chosen, bias included, [B, T, E].
        first_attention: what the first layer's attention adds to the stream, [B, T, D].
        logits: float32 [B, T, V].
        mtp_logits: float32 [B, T - 1, V], None without an MTP layer.
    """

    choice: dict[str, np.ndarray]
    first_attention: np.ndarray
    logits: np.ndarray
    mtp_logits: np.ndarray | None

    __repr__ = short_repr


class TransformersReference:
    """A Hugging Face directory as transformers loads and runs it, on the CPU.

    Attributes:
        versions: of torch and transformers.
        rope: the rotation of its attention.
        mtp: whether `trace` runs the MTP layer.

    Args:
        directory: the Hugging Face directory.
        dtype: `float32`, `bfloat16` or `float16`.
        layers: load the first so many decoder layers only, and no MTP layer.
        mtp: also load the MTP layer.

    Raises:
        Error: torch or transformers is not installed, or transformers has no such architecture.
        CheckpointError: transformers cannot load the directory, or does not find all weights in it.
    """

    def __init__(self, directory: str | os.PathLike[str], *, dtype: str, layers: int | None = None, mtp: bool = False):
        self._torch, transformers = _import_libraries()
        self.versions = {"torch": str(self._torch.__version__), "transformers": str(transformers.__version__)}
        self._directory = Path(directory)
        with _quiet(transformers):
            self._model = self._load(transformers, getattr(self._torch, dtype), layers)
            self._mtp = self._load_mtp(self._model) if mtp else None
        self.mtp = self._mtp is not None
        decoder = self._model.model
        self.rope = Rope(
            decoder.rotary_emb.inv_freq.float().numpy(),
            float(decoder.rotary_emb.attention_scaling),
            float(decoder.layers[0].self_attn.scaling),
        )

    def trace(self, tokens: np.ndarray) -> ReferenceTrace:
        """Run tokens [B, T]; the MTP layer too, if it is loaded and there is more than one token."""
        recorded = ReferenceTrace({}, {}, {}, np.empty(0), np.empty(0), None)
        decoder, ids = self._model.model, self._torch.from_numpy(tokens.astype(np.int64))
        handles: list[Any] = []

        def record(place: str) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                recorded.stream[place] = _numpy(output)

            return hook

        try:
            handles.append(decoder.embed_tokens.register_forward_hook(record(EMBEDDING)))
            for number, layer in enumerate(decoder.layers):
                handles.append(layer.register_forward_hook(record(layer_name(number))))
                handles += _watch_router(layer, layer_name(number), recorded)
            handles.append(decoder.norm.register_forward_hook(record(FINAL_NORM)))
            attention: list[np.ndarray] = []
            first = decoder.layers[0].self_attn
            handles.append(first.register_forward_hook(lambda _m, _i, output: attention.append(_numpy(output[0]))))
            with self._torch.no_grad():
                logits = _numpy(self._model(ids, use_cache=False).logits)
        finally:
            for handle in handles:
                handle.remove()
        mtp_logits = self._trace_mtp(self._mtp, ids, recorded) if self.mtp and tokens.shape[1] > 1 else None
        return dataclasses.replace(recorded, first_attention=attention[0], logits=logits, mtp_logits=mtp_logits)

    def _trace_mtp(self, mtp: Any, ids: Any, recorded: ReferenceTrace) -> np.ndarray:
        """Run the MTP layer on the states after the final norm and the next tokens; returns its logits."""
        torch = self._torch
        from transformers.cache_utils import MtpCache

        hidden = torch.from_numpy(recorded.stream[FINAL_NORM][:, :-1]).to(self._model.dtype)
        positions = torch.arange(1, ids.shape[1])[None].expand(ids.shape[0], -1)
        handles = _watch_router(mtp.layers[0].mtp_block, MTP, recorded)
        try:
            with torch.no_grad():
                cache = MtpCache(config=self._model.config.get_mtp_config())
                states = mtp.forward_layer(0, hidden, positions, cache, input_ids=ids[:, 1:])
                recorded.stream[MTP] = _numpy(states)
                return _numpy(mtp._project_to_logits(states))
        finally:
            for handle in handles:
                handle.remove()

    def _load(self, transformers: Any, dtype: Any, layers: int | None) -> Any:
        content = read_config_json(self._directory)
        cls = _model_class(transformers, content, self._directory)
        # A model type that transformers does not know (Kimi's) stands for the class named beside it.
        described = {key: value for key, value in content.items() if key != "model_type"}
        if layers is not None:
            described["num_hidden_layers"] = layers
            if isinstance(described.get("mlp_layer_types"), list):
                described["mlp_layer_types"] = described["mlp_layer_types"][:layers]
        try:
            config = cls.config_class.from_dict(described)
            model, info = cls.from_pretrained(
                self._directory,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:  # from every corner of torch, transformers and safetensors
            raise self._failure(error) from error
        if info["missing_keys"]:
            names = sorted(info["missing_keys"])
            raise CheckpointError(
                f"{self._directory}: transformers finds no weights for {', '.join(names[:8])}"
                + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            )
        return model.eval()

    def _load_mtp(self, model: Any) -> Any:
        """The MTP layer, or None where this transformers has none."""
        try:
            from transformers.modeling_layers import MtpModel
        except ImportError:
            return None
        config = model.config
        if getattr(config, "num_mtp_layers", None) is None:  # classes that know nothing of the layer
            config.num_mtp_layers = 1
        if getattr(config, "mlp_layer_types", None) is not None:
            config.mtp_mlp_layer_types = ["sparse"]
        # Which tensors are the layer's, transformers knows for published numbers of layers only.
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\..*"]
        try:
            return MtpModel.from_pretrained(model).eval()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> CheckpointError:
        words = " ".join(str(error).split())[:300]
        return CheckpointError(f"{self._directory}: transformers cannot load it: {type(error).__name__}: {words}")


def _import_libraries() -> tuple[Any, Any]:
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise Error(
            f"a comparison needs torch and transformers, and {error.name or 'one of them'} is not installed here: "
            f"{HOW_TO_INSTALL}"
        ) from None


def _model_class(transformers: Any, content: dict[str, Any], directory: Path) -> Any:
    named = content.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    found = getattr(transformers, name, None) if name is not None and name.endswith("ForCausalLM") else None
    if found is None or not hasattr(found, "config_class"):
        shown = json.dumps(named)
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers {transformers.__version__} has no model class for "
            f'architectures {shown}; right would be one such as ["Glm4MoeForCausalLM"]'
        )
    return found


def _watch_router(layer: Any, place: str, recorded: ReferenceTrace) -> list[Any]:
    """Record what the router of a layer chooses, if it has one; returns the hooks."""
    gate = getattr(layer.mlp, "gate", None)
    if gate is None:
        return []

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        logits, _, chosen = output
        batch, length = next(iter(recorded.stream.values())).shape[:2]
        length -= place == MTP
        scores = logits.float().sigmoid() + gate.e_score_correction_bias.float()
        recorded.choice[place] = _numpy(scores).reshape(batch, length, -1)
        recorded.experts[place] = chosen.numpy().reshape(batch, length, -1)

    return [gate.register_forward_hook(hook)]


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().float().numpy())


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bars and warnings: what matters of them (missing weights) is checked."""
    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
