"""The flags of the command line as the settings of a generation; what they leave open the checkpoint recommends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.inference import Sampling
from glm_jax.inference.config import check_speculative
from glm_jax.serving import text_directory
from glm_jax.text import GenerationDefaults

if TYPE_CHECKING:
    from glm_jax.configs import ModelConfig
    from glm_jax.inference import Acceptance


def chosen_sampling(
    flags: absl_flags.FlagValues, config: ModelConfig, files: Path, *, ignore_eos: bool = False, told: bool = True
) -> Sampling:
    """The settings of --model's generation, whose text files are in `files`, checked before its weights are loaded.

    With `told` the user is told what the checkpoint's settings ask for that is not done; a chat tells it by itself.

    Raises:
        InputError: a setting is out of its range, or drafts are asked of a model that cannot make any.
    """
    defaults = GenerationDefaults.load(text_directory(files))
    for note in defaults.notes if told else ():
        printing.notice(f"note: {note}")
    given = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p")}
    settings = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
    sampling = Sampling(
        max_new_tokens=1 if flags.max_new_tokens is None else flags.max_new_tokens,
        seed=flags.seed,
        stop=() if ignore_eos else defaults.stop_ids,
        speculative=flags.speculative,
        **{name: value for name, value in settings.items() if value is not None},
    )
    check_speculative(sampling, config)
    return sampling


def describe_acceptance(acceptance: Acceptance) -> str:
    """One line: the share of drafts that was right, by place in the round."""
    rates = ", ".join("none" if rate is None else f"{100 * rate:.1f}%" for rate in acceptance.rates)
    return f"drafts accepted, by place: {rates} of {acceptance.rounds} rounds"
