"""The devices of a plan: so many of a kind, of TPUs in a slice of a shape."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from glm_jax.errors import InputError
from glm_jax.planning.kinds import DEVICES, Device, Speed, find_device, speed_of

MAX_DEVICES = 100_000
HOST = 8  # GPUs: fewer are part of a host, more are whole ones

__all__ = ["DEVICES", "Cluster", "Device", "Speed", "choose_cluster", "choose_device", "clusters", "topologies"]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """So many devices of a kind; of TPUs in a slice of a shape, counted in chips."""

    device: Device
    count: int
    topology: tuple[int, ...] | None = None


def choose_device(
    name: str | None,
    *,
    memory: int | None = None,
    bandwidth: int | None = None,
    tflops: float | None = None,
    link: int | None = None,
) -> Device:
    """Return the kind of device that a user describes.

    Args:
        name: of a kind, or None for one that is known by its figures only.
        memory: bytes of each device, instead of the kind's.
        bandwidth: bytes a second of its memory.
        tflops: 10^12 operations a second of matrix products in bfloat16, without sparsity.
        link: bytes a second that a device sends to others of its host, each way.

    Raises:
        InputError: the kind is not known, or too little is said.
    """
    kind = None if name is None else find_device(name)
    for flag, value in (("memory", memory), ("bandwidth", bandwidth), ("tflops", tflops), ("link", link)):
        if value is not None and value <= 0:
            raise InputError(f"--{flag} must be more than 0, not {value}")
    if kind is None:
        if memory is None:
            raise InputError(f"--device or --memory must be given; devices: {', '.join(DEVICES)}")
        kind = Device(name="any", memory=memory, speed=None, source="as given", domain=HOST)
    elif memory is not None:
        kind = dataclasses.replace(kind, memory=memory)
    if (bandwidth, tflops, link) == (None, None, None):
        return kind
    return dataclasses.replace(kind, speed=speed_of(kind.speed, bandwidth=bandwidth, tflops=tflops, link=link))


def choose_cluster(
    device: str | Device | None, *, count: int | None = None, topology: str | None = None, memory: int | None = None
) -> Cluster:
    """Return the devices that a user describes.

    Args:
        device: a kind, or the name of one, or None for one of which only the memory is known.
        count: of devices; of TPUs without `topology`, of chips.
        topology: of a TPU slice, in chips: `4x4x4`.
        memory: bytes of each device, instead of the kind's.

    Raises:
        InputError: the kind is not known, or there is no such slice, or too little is said.
    """
    kind = device if isinstance(device, Device) else choose_device(device, memory=memory)
    if count is not None and count < 1:
        raise InputError(f"--count must be at least 1, not {count}")
    shape = None
    if kind.dimensions:
        shape = _slice_of(kind, count) if topology is None else parse_topology(kind, topology)
        chips = math.prod(shape)
        if topology is not None and count not in (None, chips):
            raise InputError(f"--topology {topology} has {chips} chips, --count says {count}; one of them is enough")
        count = chips * kind.per_chip
    elif topology is not None:
        raise InputError(f"{kind.name} comes in no topologies; right would be --count and a number")
    if count is None:
        raise InputError("--count must be given: a number of devices, or auto for the fewest that hold the job")
    if count > MAX_DEVICES:
        raise InputError(f"--count must be at most {MAX_DEVICES}, not {count}")
    return Cluster(kind, count, shape)


def clusters(device: Device) -> Iterator[Cluster]:
    """The clusters of a kind that one would rent, smallest first.

    Of TPUs the most compact slice of each number of chips. Of the others any number within a host, then whole hosts: to
    8 of them each number, from there each power of two and one and a half times it.
    """
    if device.dimensions:
        for chips in sorted({math.prod(shape) for shape in topologies(device)}):
            yield choose_cluster(device, count=chips)
        return
    hosts = [1, 2, 3, 4, 5, 6, 7, 8]
    while hosts[-1] * HOST < MAX_DEVICES // 2:
        hosts += [hosts[-1] * 3 // 2, hosts[-1] * 2]
    for count in (*range(1, HOST), *(HOST * number for number in hosts)):
        yield Cluster(device, count)


def parse_topology(device: Device, text: str) -> tuple[int, ...]:
    """The shape of a slice of TPUs, `4x4x4`.

    Raises:
        InputError: the kind has no such slice; the message says which it has.
    """
    if re.fullmatch(r"[1-9][0-9]{0,5}([xX][1-9][0-9]{0,5})*", text):
        shape = tuple(int(size) for size in text.lower().split("x"))
        if shape in topologies(device):
            return shape
    raise InputError(f"{device.name} has no topology {text!r}; those of up to 256 chips: {_written(device)}")


def topologies(device: Device) -> tuple[tuple[int, ...], ...]:
    """The shapes of a kind's slices, smallest first.

    In two dimensions powers of two at most twice as long as wide. In three dimensions, parts of a cube of 4 x 4 x 4, or
    such cubes in a box whose sides do not fall.
    """
    if device.dimensions == 2:
        sides = [2**power for power in range(5)]
        shapes = [(a, b) for a in sides for b in sides if a <= b <= 2 * a and (a, b) != (1, 2)]
        return tuple(sorted(shapes, key=math.prod))
    if device.dimensions == 3:
        cubes = device.largest // 64
        boxes = [
            (4 * a, 4 * b, 4 * c)
            for a in range(1, cubes + 1)
            if a**3 <= cubes
            for b in range(a, cubes // a + 1)
            for c in range(b, cubes // (a * b) + 1)
        ]
        return ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *sorted(boxes, key=math.prod))
    return ()


def _slice_of(device: Device, chips: int | None) -> tuple[int, ...]:
    """The most compact slice of so many chips."""
    if chips is None:
        raise InputError(f"--topology or --count must be given for {device.name}; topologies: {_written(device)}, ...")
    shapes = [shape for shape in topologies(device) if math.prod(shape) == chips]
    if not shapes:
        raise InputError(f"{device.name} has no slice of {chips} chips; those of up to 256: {_written(device)}")
    return min(shapes, key=max)


def _written(device: Device) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in topologies(device) if math.prod(shape) <= 256)
