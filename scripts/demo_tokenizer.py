"""Builds the demo model's text side: `python -m scripts.demo_tokenizer examples/demo_model`.

A byte-level BPE of 512 ids, laid out like GLM's: 256 bytes, merges learnt from the demo's own conversations, and GLM's
36 added tokens, last and in GLM's order, with its flags. Digits are never merged, so that numbers are read digit by
digit. The same files come out, byte for byte, on every run.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from glm_jax.text import ChatTemplate
from scripts import demo_tasks

VOCAB_SIZE = 512
CORPUS_SAMPLES = 3000
CORPUS_SEED = 4500
REPEATS = 3  # of what the model is to write: shorter answers for a slightly longer tool prompt
TEMPLATE = Path(__file__).with_name("demo_chat_template.jinja")
END_OF_TEXT = "<|endoftext|>"
STOP_TOKENS = (END_OF_TEXT, "<|user|>", "<|observation|>")
SPECIAL_TOKENS = (
    END_OF_TEXT, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
)  # fmt: skip
# Added tokens that are text: skip_special keeps them, and the parsers look for them.
TEXT_TOKENS = (
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip
ADDED_TOKENS = SPECIAL_TOKENS + TEXT_TOKENS
# Merges stay inside one of these: a digit; a word and the space before it; line ends; other white space.
PIECES = r"\p{N}| ?[^\s\p{N}]+|[\r\n]+|[^\S\r\n]+"


def corpus() -> list[str]:
    """Returns the text between the added tokens of many demo conversations, and again what the model is to write."""
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"), origin=str(TEMPLATE))
    between = re.compile("|".join(re.escape(token) for token in sorted(ADDED_TOKENS, key=len, reverse=True)))
    texts: list[str] = []
    for sample in itertools.islice(demo_tasks.samples(CORPUS_SEED), CORPUS_SAMPLES):
        rendered = template.render(
            sample.messages,
            tools=sample.tools,
            enable_thinking=sample.mode == demo_tasks.THINKING,
            add_generation_prompt=False,
        )
        texts += filter(None, between.split(rendered))
        for turn in sample.turns:
            texts += [sample.messages[turn]["content"], sample.messages[turn].get("reasoning_content", "")] * REPEATS
    return texts


def train() -> Tokenizer:
    """Returns the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    for token in ADDED_TOKENS:
        tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL_TOKENS, normalized=False)])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the corpus is too small for the merges"
    return tokenizer


def build(directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    tokenizer = train()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in ADDED_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(i): {"content": token, **flags, "special": token in SPECIAL_TOKENS} for token, i in ids.items()
        },
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    generation = {"eos_token_id": [ids[token] for token in STOP_TOKENS], "pad_token_id": ids[END_OF_TEXT]}
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.demo_tokenizer DIRECTORY")
    build(Path(sys.argv[1]))
