"""What a compiled program does, read off its text: what it sends between devices, what it moves in memory for nothing.

The text is that of the optimised HLO (`compiled.as_text()`), in which an instruction that is not inside a fusion is a
kernel that reads its operands from memory and writes its result there. An instruction in the body of a loop counts as
often as the loop runs. The text does not tell in which trips of a loop a condition in its body holds: an instruction
under one counts once for the whole loop, and the trips of the loop are its `rounds`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

SENT = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
MOVING = ("copy", "transpose", "slice", "dynamic-slice", "concatenate", "pad", "reverse", "convert", "gather")
_RENAMING = ("bitcast", "reshape", "tuple", "get-tuple-element", "copy-done", "optimization-barrier")
_FUSIONS = ("fusion", "fusion-start")  # GPUs run some beside others

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"(?:calls|branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'known_trip_count"?:\{"n":"?(\d+)')
_SPACE = re.compile(r"S\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=(?:mesh|@\w+)\[([^\]]*)\] \{([^}]*)\}")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([0-9,]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result: its dtype, its dimensions, and whether it lies in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    in_memory: bool

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    root: bool
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """One exchange between devices, `times` in a run of the program.

    Attributes:
        kind: one of `SENT`.
        group: devices that take part together; 0 where the text does not tell.
        nbytes: of the whole array: what a gather makes, what a reduction sums, what an all-to-all exchanges. Of a
            ragged exchange these are its buffers, of which only the rows that are filled are sent.
        times: how often the program comes to it, all trips of a loop with a condition around it as one.
        rounds: of an exchange under a condition in a loop the trips of the loop, which are the most that it may run
            each time (so the experts' exchange skips the rounds that no device needs); 1 of any other.
    """

    kind: str
    group: int
    nbytes: int
    times: int
    rounds: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """A kernel that writes an array to memory without computing: a copy, a transpose, a slice, a conversion.

    `times` is the most that it runs: as if every condition around it held.
    """

    kind: str
    array: str
    nbytes: int
    times: int
    where: str


@dataclasses.dataclass(frozen=True)
class _Runs:
    """How often a computation runs.

    Attributes:
        times: the runs, all trips of a loop with a condition in it as one.
        rounds: as `Sent.rounds`.
        trips: of the innermost loop around the computation, if no condition stands between; they are part of `times`.
    """

    times: int
    rounds: int = 1
    trips: int = 1

    def looped(self, trips: int) -> _Runs:
        """The runs of a loop's body."""
        return _Runs(self.times * trips, self.rounds, trips)

    def conditional(self) -> _Runs:
        """The runs of a branch, if its condition holds once in a loop."""
        return _Runs(self.times // self.trips, self.rounds * self.trips)


class Program:
    """A parsed program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if (found := _COMPUTATION.match(line)) is not None:
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif current is not None and (instruction := _parse(line)) is not None:
                current[instruction.name] = instruction

    def sent(self) -> tuple[Sent, ...]:
        """Every exchange between devices, equal ones added up."""
        found: dict[tuple[str, int, int, int], int] = {}
        for instruction, runs in self._executed(self.entry, _Runs(1), fused=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind not in SENT:
                continue
            group = _group(instruction.text)
            nbytes = max((array.nbytes for array in instruction.arrays), default=0)
            if len(instruction.arrays) > 1 and kind == instruction.opcode:
                nbytes = sum(array.nbytes for array in instruction.arrays)  # several arrays in one exchange
            # What only starts a reduction names the whole array, too.
            if kind in ("all-to-all", "ragged-all-to-all") or instruction.opcode == "reduce-scatter":
                nbytes *= max(1, group)
            if group != 1 and nbytes:
                key = kind, group, nbytes, runs.rounds
                found[key] = found.get(key, 0) + runs.times
        return tuple(
            Sent(kind=kind, group=group, nbytes=nbytes, times=times, rounds=rounds)
            for (kind, group, nbytes, rounds), times in sorted(found.items())
        )

    def moved(self, at_least: int) -> tuple[Moved, ...]:
        """Every kernel that only moves an array of `at_least` bytes within the device's memory.

        Updates in place are none, nor is what is read into a cache of the processor.
        """
        found = []
        for instruction, runs in self._executed(self.entry, _Runs(1), fused=False):
            large = [a for a in self._written(instruction) if a.in_memory and a.nbytes >= at_least]
            kind = self._kind(instruction)
            if large and kind is not None:
                where = re.search(r'op_name="([^"]*)"', instruction.text)
                array = max(large, key=lambda each: each.nbytes)
                label = "" if where is None else where[1]
                times = runs.times * runs.rounds
                found.append(Moved(kind=kind, array=str(array), nbytes=array.nbytes, times=times, where=label))
        return tuple(found)

    def _executed(self, computation: str, runs: _Runs, *, fused: bool) -> Iterator[tuple[Instruction, _Runs]]:
        """Each instruction that runs, with how often; those inside of fusions if `fused`."""
        for instruction in self.computations.get(computation, {}).values():
            yield instruction, runs
            if instruction.opcode in _FUSIONS and not fused:
                continue
            inside = runs
            if instruction.opcode == "while":
                inside = runs.looped(self._trips(instruction))
            elif instruction.opcode == "conditional":
                inside = runs.conditional()
            elif instruction.opcode not in ("call", *_FUSIONS) and "async" not in instruction.opcode:
                continue
            for called in instruction.called:
                yield from self._executed(called, inside, fused=fused)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler notes it, or the constant that its condition compares with."""
        known = _KNOWN_TRIPS.search(loop.text)
        if known is not None:
            return int(known[1])
        condition = _CONDITION.search(loop.text)
        constants = [] if condition is None else self._integers(condition[1])
        return max(constants, default=1)

    def _integers(self, computation: str) -> list[int]:
        found = []
        for instruction in self.computations.get(computation, {}).values():
            number = re.match(r"\s*(\d+)\)", instruction.text)
            if instruction.opcode == "constant" and instruction.arrays[0].dims == () and number is not None:
                found.append(int(number[1]))
            for called in instruction.called:
                found += self._integers(called)
        return found

    def _kind(self, instruction: Instruction) -> str | None:
        """How an instruction moves its operand, or None if it computes, or updates in place, or makes nothing."""
        if instruction.opcode not in _FUSIONS:
            kind = instruction.opcode.removesuffix("-start")
            return kind if kind in MOVING else None
        root, inside = self._fused(instruction)
        return None if root is None else _moves(root, inside)

    def _fused(self, fusion: Instruction) -> tuple[Instruction | None, dict[str, Instruction]]:
        """The result of a fusion and all that is inside."""
        inside = self.computations.get(fusion.called[0], {}) if fusion.called else {}
        return next((each for each in inside.values() if each.root), None), inside

    def _written(self, instruction: Instruction) -> tuple[Array, ...]:
        """The arrays that an instruction writes; what only starts names those that it reads, too."""
        if instruction.opcode == "copy-start":
            return instruction.arrays[:1]
        if instruction.opcode == "fusion-start":
            root, _ = self._fused(instruction)
            return () if root is None else root.arrays
        return instruction.arrays


def _moves(instruction: Instruction, inside: dict[str, Instruction]) -> str | None:
    """The first kind of movement between an instruction of a fusion and its parameter; None if it computes."""
    kind = None
    while instruction.opcode != "parameter":
        if instruction.opcode in MOVING:
            kind = kind or instruction.opcode
        elif instruction.opcode not in _RENAMING:
            return None
        following = next((inside[name] for name in instruction.operands if name in inside), None)
        if following is None:
            return None
        instruction = following
    return kind


def _parse(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    root, name, result, opcode, rest = found.groups()
    listed = (each.strip("% ") for group in _CALLED_LIST.findall(rest) for each in group.split(","))
    called = (*_CALLED.findall(rest), *listed)
    operands = tuple(_OPERAND.findall(rest.split("), ")[0]))
    return Instruction(name, opcode, tuple(_arrays(result)), operands, called, bool(root), rest)


def _arrays(result: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(result):
        space = _SPACE.search(layout)
        yield Array(dtype, tuple(int(n) for n in dims.split(",") if n), space is None or space[1] == "0")


@functools.lru_cache(maxsize=64)
def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)  # of f8e4m3fn the 8
    return 0 if digits is None else int(digits[0])


def _group(text: str) -> int:
    """The devices of one group of an exchange."""
    if (found := _GROUPS.search(text)) is not None:
        return int(found[1])
    if (found := _MESH_GROUPS.search(text)) is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]) if axis in sizes)
    if (found := _LISTED_GROUPS.search(text)) is not None:
        return len(found[1].split(","))
    return 0
