"""Text in and out of the models: tokenizers, chat templates, generation defaults, and the parser of what models write.

Imports no jax, so that a server's front end or a data worker can use it alone.
"""

from glm_jax.text.answer_format import AnswerFormat
from glm_jax.text.chat_template import ChatTemplate
from glm_jax.text.events import ContentDelta, Event, MalformedToolCall, ReasoningDelta, ToolCall
from glm_jax.text.families import Family, family_of
from glm_jax.text.generation_config import GenerationDefaults
from glm_jax.text.messages import normalize_messages
from glm_jax.text.prompt import Prompt, encode_chat
from glm_jax.text.stream_decoder import StreamDecoder
from glm_jax.text.stream_parser import StreamParser
from glm_jax.text.tiktoken_tokenizer import TiktokenTokenizer
from glm_jax.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, beginning_ids, load_tokenizer
from glm_jax.text.tokenizer_protocol import Tokenizer

__all__ = [
    "AnswerFormat",
    "ChatTemplate",
    "ContentDelta",
    "Event",
    "Family",
    "GenerationDefaults",
    "JsonTokenizer",
    "MalformedToolCall",
    "Prompt",
    "ReasoningDelta",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "StreamParser",
    "TiktokenTokenizer",
    "Tokenizer",
    "ToolCall",
    "beginning_ids",
    "encode_chat",
    "family_of",
    "load_tokenizer",
    "normalize_messages",
]
