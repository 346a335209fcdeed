"""Continue a prompt, given as token ids or as text.

Token ids need no tokenizer and come back as token ids. A text goes to the model as it is, after the beginning of
sequence if the checkpoint wants one (DeepSeek); `glm-jax chat` is the verb that applies the chat template. With --json
the compiled programs run once before they are timed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.cli.shared_flags import define_integer, define_json, define_loading, define_sampling, need
from glm_jax.errors import InputError

if TYPE_CHECKING:
    from glm_jax.inference import Sampling
    from glm_jax.model import Transformer
    from glm_jax.serving import Generation, Usage
    from glm_jax.text import Tokenizer


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""
    define_loading(flags)
    absl_flags.DEFINE_string("tokens", None, "the prompt as token ids: 5,6,7", flag_values=flags)
    absl_flags.DEFINE_string("prompt", None, "the prompt as text", flag_values=flags)
    define_integer(flags, "max_new_tokens", 128, "at most this many new tokens")
    define_sampling(flags)
    text = "go on after the checkpoint's stop tokens"
    absl_flags.DEFINE_boolean("ignore_eos", False, text, flag_values=flags)
    text = "run once before the timed run, so that the rates are without compilation; by default with --json"
    absl_flags.DEFINE_boolean("warmup", None, text, flag_values=flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Generate from --tokens or --prompt."""
    need(flags, "model")
    if (flags.tokens is None) == (flags.prompt is None):
        raise InputError("give the prompt either as --tokens or as --prompt")
    prompt = None if flags.tokens is None else parse_tokens(flags.tokens)

    from glm_jax.checkpoint import open_source
    from glm_jax.checkpoint.text_files import text_files
    from glm_jax.cli.loading import load_model, loading_options
    from glm_jax.cli.sampling import chosen_sampling, describe_acceptance
    from glm_jax.inference.config import check_prompts
    from glm_jax.serving import Generation, text_directory
    from glm_jax.sharding import describe
    from glm_jax.text import beginning_ids, load_tokenizer

    # Everything that can be refused is, before the weights are loaded.
    source = open_source(flags.model, allow_unknown=flags.allow_unknown)
    config = source.config
    tokenizer = None
    with text_files(flags.model) as files:
        sampling = chosen_sampling(flags, config, files, ignore_eos=flags.ignore_eos)
        if prompt is None:
            directory = text_directory(files)
            tokenizer = load_tokenizer(directory)
            beginning, prompt = beginning_ids(directory, tokenizer), tokenizer.encode(flags.prompt)
            prompt = prompt if prompt[: len(beginning)] == beginning else beginning + prompt
    check_prompts([prompt], config, sampling.max_new_tokens)
    model = load_model(source, loading_options(flags, config))
    warm = flags.json if flags.warmup is None else flags.warmup
    if warm:
        _warm_up(model, prompt, sampling)
    generation = Generation(model, prompt, sampling)
    text = _generate(generation, tokenizer, show=not flags.json)
    _print_rates(generation.usage, warm=warm)
    if generation.usage.acceptance is not None:
        printing.notice(describe_acceptance(generation.usage.acceptance))
    result = {
        "tokens": generation.tokens,
        "finish_reason": "stop" if generation.stopped else "length",
        **generation.usage.to_json(),
        "warm": warm,
        "mesh": describe(model.mesh),
        "dtype": model.weights_dtype.name,
        "operations": model.ops.to_json(),
    }
    return result if tokenizer is None else {**result, "text": text}


def parse_tokens(text: str) -> list[int]:
    """Token ids from `5,6,7`.

    Raises:
        InputError: something between the commas is no integer.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not re.fullmatch(r"-?[0-9]{1,18}", part)), None)
    if wrong is not None:
        raise InputError(f"--tokens {text!r}: {wrong!r} is no token id; right would be --tokens=5,6,7")
    return [int(part) for part in parts]


def _warm_up(model: Transformer, prompt: list[int], sampling: Sampling) -> None:
    """Compile and run prefill and a first decode call, in the shapes of the run to come."""
    from glm_jax.inference import stream

    batches = stream(model, [prompt], sampling)
    for _, _ in zip(range(2), batches, strict=False):
        pass


def _generate(generation: Generation, tokenizer: Tokenizer | None, *, show: bool) -> str:
    """Run it, and print the new tokens as they come (as text if there is a tokenizer); returns what was printed."""
    from glm_jax.text import StreamDecoder

    decoder = None if tokenizer is None else StreamDecoder(tokenizer)
    pieces: list[str] = []
    for tokens in generation:
        if decoder is None:
            piece = "," * bool(pieces) + ",".join(map(str, tokens))
        else:
            piece = "".join(decoder.push(token) for token in tokens)
        pieces.append(piece)
        if show:
            print(piece, end="", flush=True)
    pieces.append("" if decoder is None else decoder.flush())
    if show:
        print(pieces[-1])
    return "".join(pieces)


def _print_rates(usage: Usage, *, warm: bool) -> None:
    prefill, decode = usage.prefill_tokens_per_second, usage.decode_tokens_per_second
    rates = [f"prefill {prefill:.1f} tokens/s"] if prefill else []
    rates += [f"decode {decode:.1f} tokens/s"] if decode else []
    included = "" if warm else " (compilation included)"
    tokens = f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} new"
    printing.notice(f"{tokens}; {', '.join(rates)}{included}")
