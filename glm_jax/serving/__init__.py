"""Models behind interfaces that people and programs use: so far, text in and text out in process."""

from __future__ import annotations

from glm_jax.serving.chat import Chat, ChatEvent, Finished, Reply, collect
from glm_jax.serving.generation import Generation, Usage
from glm_jax.serving.text_processor import TextProcessor, text_directory

__all__ = [
    "Chat",
    "ChatEvent",
    "Finished",
    "Generation",
    "Reply",
    "TextProcessor",
    "Usage",
    "collect",
    "text_directory",
]
