"""Text in and out of the models: tokenizers, chat templates, generation defaults, and the parser of what models write.

Imports no jax, so that a server's front end or a data worker can use it alone.
"""

from glm_jax.text.chat_template import ChatTemplate, normalize_messages
from glm_jax.text.generation_config import GenerationDefaults
from glm_jax.text.stream_parser import BrokenCall, ContentDelta, Event, ReasoningDelta, StreamParser, ToolCall
from glm_jax.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "BrokenCall",
    "ChatTemplate",
    "ContentDelta",
    "Event",
    "GenerationDefaults",
    "JsonTokenizer",
    "ReasoningDelta",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "StreamParser",
    "Tokenizer",
    "ToolCall",
    "load_tokenizer",
    "normalize_messages",
]
