"""Models behind interfaces that people and programs use: so far, text in and text out in process."""

from __future__ import annotations

from glm_jax.serving.chat import Chat, ChatEvent, Finished, Reply, collect
from glm_jax.serving.generation import Generation, Usage
from glm_jax.serving.text_side import TextSide, text_directory

__all__ = [
    "Chat",
    "ChatEvent",
    "Finished",
    "Generation",
    "Reply",
    "TextSide",
    "Usage",
    "collect",
    "text_directory",
]
