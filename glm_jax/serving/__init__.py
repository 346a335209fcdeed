"""Models behind interfaces that people and programs use: so far, text in and text out in process."""

from __future__ import annotations

from glm_jax.serving.chat import Chat, ChatEvent, Finished, Reply, text_directory
from glm_jax.serving.generation import Generation, Usage

__all__ = ["Chat", "ChatEvent", "Finished", "Generation", "Reply", "Usage", "text_directory"]
