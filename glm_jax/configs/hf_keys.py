"""The keys of a config.json that say nothing about the architecture, and those that may say one thing only: as data.

Each key stands with the reason why it may be passed over, or why another value is refused. A key that stands in no list
here and that no reader takes is passed over, with a note, if its value is null, false or empty; any other is an error,
because it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FILE = "describes the file, or the program that wrote it"
_TOKENS = "token ids, which the tokenizer and generation_config.json have"
_TRAINING = "of training only"
_RUN = "how a program runs the model, which is the run's own choice here"
_OUTPUTS = "what transformers returns from a call"
_LABELS = "of models that classify"
_GENERATION = "a setting of generation, which generation_config.json has"
_OWN_READER = "read where the tensors are"

# Keys of published files and of files that transformers writes: passed over without a note.
PASSED_OVER: Mapping[str, str] = {
    "_name_or_path": _FILE,
    "architectures": _FILE,
    "auto_map": _FILE,
    "transformers_version": _FILE,
    "bos_token_id": _TOKENS,
    "decoder_start_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "pad_token_id": _TOKENS,
    "sep_token_id": _TOKENS,
    "image_end_token_id": _TOKENS,
    "image_start_token_id": _TOKENS,
    "image_token_id": _TOKENS,
    "video_end_token_id": _TOKENS,
    "video_start_token_id": _TOKENS,
    "video_token_id": _TOKENS,
    "attention_dropout": _TRAINING,
    "aux_loss_alpha": _TRAINING,
    "output_router_logits": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "seq_aux": _TRAINING,
    "chunk_size_feed_forward": _RUN,
    "dtype": _RUN,
    "ep_size": _RUN,
    "experts_implementation": _RUN,
    "pretraining_tp": _RUN,
    "torch_dtype": _RUN,
    "use_cache": _RUN,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "return_dict": _OUTPUTS,
    "id2label": _LABELS,
    "label2id": _LABELS,
    "num_labels": _LABELS,
    "problem_type": _LABELS,
    "quantization_config": _OWN_READER,
}

# Keys that other tools add, or that older versions of transformers wrote: passed over with a note. So is every key that
# begins with an underscore, by which these tools mark comments and private state.
ADDED_BY_TOOLS: Mapping[str, str] = {
    "name_or_path": _FILE,
    "unsloth_fixed": _FILE,
    "unsloth_version": _FILE,
    "finetuning_task": _FILE,
    "is_decoder": "every model here is one",
    "tokenizer_class": _FILE,
    "attn_implementation": _RUN,
    "max_window_layers": "of a sliding window, which is refused where it is on",
    "kv_cache_scheme": "how a serving engine stores its cache",
    "tf_legacy_loss": _RUN,
    "torchscript": _RUN,
    "use_bfloat16": _RUN,
    "task_specific_params": _GENERATION,
    "prefix": _GENERATION,
    "begin_suppress_tokens": _GENERATION,
    "bad_words_ids": _GENERATION,
    "diversity_penalty": _GENERATION,
    "do_sample": _GENERATION,
    "early_stopping": _GENERATION,
    "encoder_no_repeat_ngram_size": _GENERATION,
    "exponential_decay_length_penalty": _GENERATION,
    "forced_bos_token_id": _GENERATION,
    "forced_eos_token_id": _GENERATION,
    "length_penalty": _GENERATION,
    "max_length": _GENERATION,
    "max_new_tokens": _GENERATION,
    "min_length": _GENERATION,
    "min_new_tokens": _GENERATION,
    "min_p": _GENERATION,
    "no_repeat_ngram_size": _GENERATION,
    "num_beam_groups": _GENERATION,
    "num_beams": _GENERATION,
    "num_return_sequences": _GENERATION,
    "output_scores": _GENERATION,
    "remove_invalid_values": _GENERATION,
    "repetition_penalty": _GENERATION,
    "return_dict_in_generate": _GENERATION,
    "suppress_tokens": _GENERATION,
    "temperature": _GENERATION,
    "top_k": _GENERATION,
    "top_p": _GENERATION,
    "typical_p": _GENERATION,
}

# Keys of which the package computes one case: the legal values, and what another one would mean.
ONE_VALUE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "add_cross_attention": ((False, None), "layers that attend to an encoder"),
    "cross_attention_hidden_size": ((None,), "layers that attend to an encoder"),
    "hidden_act": (("silu", "swish"), "another activation in every MLP"),
    "is_encoder_decoder": ((False, None), "an encoder"),
    "mlp_bias": ((False, None), "biases in every MLP"),
    "moe_layer_freq": ((1, None), "dense layers among those with experts"),
    "moe_router_dtype": (("float32", "fp32", None), "a router that rounds its scores"),
    "per_layer_config": (({}, None), "layers of different shapes"),
    "pruned_heads": (({}, None), "heads left out"),
    "scoring_func": (("sigmoid", None), "another scoring of the experts"),
    "sliding_window": ((None,), "attention to the last tokens only"),
    "tie_encoder_decoder": ((False, None), "an encoder"),
    "topk_method": (("noaux_tc", None), "another choice of the experts"),
    "use_sliding_window": ((False, None), "attention to the last tokens only"),
}

# Keys that are refused by name, because they say that the directory is of a kind that is not read.
REFUSED: Mapping[str, str] = {
    "quantization": "MLX's own quantisation, which is not supported: use the checkpoint that it was made of",
}
