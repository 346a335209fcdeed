"""What speculation with the MTP layer gains on a CPU: plain decoding against 1 to 4 drafts a round, interleaved.

    python benchmarks/speculative.py [--quick] [--json=FILE] [--repeats=N] [--model=DIR]

The model is the bundled one and the prompts are questions of its own tasks that it has not seen, in thinking mode,
through its chat template. Answered one at a time and eight at a time, greedily, to the stop token. All rivals answer
the same questions, taking turns on each; their answers must be the same, token by token. Timed are the whole answer
and its part after the first token (`decode`), in which speculation works.

Starting a program costs so small a model more than running it. Plain decoding with four steps a program shows how much
that alone would give, its tokens coming four at a time.

Single times on a shared machine mean little: what counts is the ratio of medians, or of minima, of the same run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the demo's tasks, which are no part of the package

import jax  # noqa: E402
from absl import app, flags  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import glm_jax  # noqa: E402
from glm_jax import Transformer  # noqa: E402
from glm_jax.inference import Acceptance, Sampling, stream  # noqa: E402
from glm_jax.serving import TextProcessor  # noqa: E402
from scripts import demo_tasks  # noqa: E402
from scripts.demo_eval import unseen  # noqa: E402

QUICK = flags.DEFINE_bool("quick", False, "few questions and repeats, one task of each length")
JSON = flags.DEFINE_string("json", None, "also write all times to this file")
REPEATS = flags.DEFINE_integer("repeats", 7, "rounds over all questions", lower_bound=2)
MODEL = flags.DEFINE_string("model", str(ROOT / "examples" / "demo_model"), "a checkpoint trained on the demo's tasks")


class Rival(NamedTuple):
    """A way to answer: drafts a round, and steps a program where these are not as the platform has them."""

    drafts: int
    steps: int | None = None

    def __str__(self) -> str:
        return str(self.drafts) if self.steps is None else f"{self.drafts}, {self.steps} steps a program"


PLAIN = Rival(0)
RIVALS = (PLAIN, *map(Rival, (1, 2, 3, 4)), Rival(0, 4))
BATCHES = (1, 8)
QUESTIONS = {"sum": 8, "cups": 8, "tool": 8, "no_tool": 8, "chat": 8}
QUICK_QUESTIONS = {"sum": 8, "cups": 8}
MAX_NEW_TOKENS = 96

Answers = list[list[int]]


@dataclasses.dataclass
class Phase:
    """All questions in batches of one size.

    Attributes:
        batch: questions at a time.
        tokens: of all answers.
        whole: seconds for all answers, by rival, one value a repeat.
        decode: likewise, without the time to the first token of each answer.
        acceptance: of the drafts, by rival; the same in every repeat.
    """

    batch: int
    tokens: int
    whole: dict[Rival, list[float]]
    decode: dict[Rival, list[float]]
    acceptance: dict[Rival, Acceptance]

    def faster(self, rival: Rival, part: str, of: Any) -> float:
        """How many times faster than plain decoding, by medians or minima of the whole answers or of `decode`."""
        times = getattr(self, part)
        return of(times[PLAIN]) / of(times[rival])

    def round_cost(self, rival: Rival) -> float:
        """What a round costs, in steps of plain decoding."""
        acceptance = self.acceptance[rival]
        tokens_a_round = 1 + sum(acceptance.accepted) / acceptance.rounds
        return tokens_a_round / self.faster(rival, "decode", statistics.median)

    def to_json(self) -> dict[str, Any]:
        """Times, acceptance and ratios as JSON values."""
        rivals = {
            str(rival): {
                "whole_seconds": self.whole[rival],
                "decode_seconds": self.decode[rival],
                "acceptance": self.acceptance[rival].to_json(),
                "faster_by": {
                    f"{part}_{of.__name__}": self.faster(rival, part, of)
                    for part in ("whole", "decode")
                    for of in (statistics.median, min)
                },
            }
            for rival in self.whole
        }
        return {"batch": self.batch, "tokens": self.tokens, "rivals": rivals}


def answer(
    model: Transformer, prompts: list[list[int]], rival: Rival, stop: tuple[int, ...]
) -> tuple[Answers, tuple[float, float], Any]:
    """The answers, the seconds for the whole and after the first tokens, and the acceptance."""
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, stop=stop, speculative=rival.drafts)
    began = first = time.perf_counter()
    answers: Answers = [[] for _ in prompts]
    batches = stream(model, prompts, sampling, steps_per_call=rival.steps)
    for number, batch in enumerate(batches):
        first = first if number else time.perf_counter()
        for tokens, more in zip(answers, batch, strict=True):
            tokens += more
    ended = time.perf_counter()
    return answers, (ended - began, ended - first), batches.acceptance


def measure(model: Transformer, prompts: list[list[int]], *, stop: tuple[int, ...], batch: int, repeats: int) -> Phase:
    """Let all rivals answer all questions, `batch` at a time; each turn begins with another rival.

    Raises:
        RuntimeError: speculation changed an answer.
    """
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    expected, acceptance = [], {rival: Acceptance.none(rival.drafts) for rival in RIVALS}
    for group in groups:  # compiles, and says what is right
        answers = {rival: answer(model, group, rival, stop) for rival in RIVALS}
        expected.append(answers[PLAIN][0])
        for rival, (said, _, counted) in answers.items():
            acceptance[rival] += counted
            if said != expected[-1]:
                raise RuntimeError(f"drafts {rival} give other tokens than plain decoding")
    whole: dict[Rival, list[float]] = {rival: [] for rival in RIVALS}
    decode: dict[Rival, list[float]] = {rival: [] for rival in RIVALS}
    for _ in range(repeats):
        totals = {rival: [0.0, 0.0] for rival in RIVALS}
        for number, group in enumerate(groups):
            turn = number % len(RIVALS)
            for rival in (*RIVALS[turn:], *RIVALS[:turn]):
                _, seconds, _ = answer(model, group, rival, stop)
                totals[rival] = [total + more for total, more in zip(totals[rival], seconds, strict=True)]
        for rival, (all_of_it, after_first) in totals.items():
            whole[rival].append(all_of_it)
            decode[rival].append(after_first)
    return Phase(batch, sum(len(tokens) for group in expected for tokens in group), whole, decode, acceptance)


def questions(text: TextProcessor, counts: dict[str, int]) -> list[list[int]]:
    """Prompts of the tasks, so many of each, in thinking mode."""
    samples = [sample for task, count in counts.items() for sample in unseen(task, demo_tasks.THINKING, None, count)]
    return [demo_tasks.prompt(sample, text.tokenizer, text.template) for sample in samples]


def environment() -> dict[str, Any]:
    """What the times depend on."""
    return {
        "cores": os.cpu_count(),
        "load average before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }


def show(phases: list[Phase], around: dict[str, Any]) -> None:
    """Print times, ratios and acceptance."""
    console = Console(width=120)
    for phase in phases:
        title = f"batch {phase.batch}, {phase.tokens} tokens"
        head = ("drafts", "decode, ms a token", "faster by", "whole answer", "round costs", "accepted, by place")
        table = Table(*head, title=f"{title}: median (min)")
        for rival, times in phase.decode.items():
            milliseconds = [1e3 * of(times) / phase.tokens for of in (statistics.median, min)]
            ratios = [
                [phase.faster(rival, part, of) for of in (statistics.median, min)] for part in ("decode", "whole")
            ]
            rates = ", ".join("-" if rate is None else f"{100 * rate:.1f}%" for rate in phase.acceptance[rival].rates)
            cost = f"{phase.round_cost(rival):.2f} steps" if rival.drafts else ""
            cells = (
                f"{a:.{digits}f} ({b:.{digits}f})" for (a, b), digits in ((milliseconds, 3), *((r, 2) for r in ratios))
            )
            table.add_row(str(rival), *cells, cost, rates)
        console.print(table)
    console.print(", ".join(f"{key}: {value}" for key, value in around.items()), soft_wrap=True, highlight=False)
    if around["load average before"][0] > around["cores"] / 4:
        console.print("The machine was busy with other work: run it again before quoting these ratios.")


def main(arguments: list[str]) -> None:
    """Measure, print, and write the times where asked to."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    around = environment()
    model, text = glm_jax.load(MODEL.value, mesh=glm_jax.make_mesh()), TextProcessor.load(MODEL.value)
    prompts = questions(text, QUICK_QUESTIONS if QUICK.value else QUESTIONS)
    repeats = min(REPEATS.value, 4) if QUICK.value else REPEATS.value
    phases = []
    for batch in BATCHES:
        print(f"batch {batch}", file=sys.stderr)
        phases.append(measure(model, prompts, stop=text.defaults.stop_ids, batch=batch, repeats=repeats))
    around["load average after"] = [round(load, 2) for load in os.getloadavg()]
    show(phases, around)
    if JSON.value:
        report = {"environment": around, "phases": [phase.to_json() for phase in phases]}
        Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
