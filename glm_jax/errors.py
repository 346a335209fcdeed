"""The errors that a user can cause, each one line that says what is wrong, where, and what would be right.

The command line prints them without a traceback and exits with 2. Everything else that is raised is a bug.
"""

from __future__ import annotations


class Error(Exception):
    """Base of every error that bad input or a bad environment can cause."""


class ConfigError(Error):
    """A model configuration that is incomplete, contradictory or of an architecture that is not supported."""


class CheckpointError(Error):
    """A checkpoint that is missing, truncated, inconsistent or does not fit the model."""


class ShardingError(Error):
    """A mesh, a set of rules or a shape that cannot be partitioned as asked."""


class InputError(Error):
    """A request that the model cannot serve: tokens out of range, too many positions, a bad sampling setting."""


class TextError(Error):
    """A tokenizer, chat template or message list that cannot be used."""
