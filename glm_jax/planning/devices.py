"""Kinds of accelerators: memory that a program may use, peak speeds, links; and the shapes that TPU slices come in.

A device is what jax counts: a TPU7x chip is two. Sources, all as published by the makers:

    h100, h200, b200   NVIDIA's datasheets of H100 SXM, H200 SXM and HGX B200, dense rates. NVLink joins the eight of
                       a host, at half the datasheet's figure each way; an adapter of 400 Gb/s for each joins hosts.
    v5e v5p v6e tpu7x  Google Cloud's page of each ("System architecture"); int8 of tpu7x is not given there, and taken
                       as its bfloat16 rate. One axis of the torus has two links a chip: a third (3-D) or half (2-D) of
                       the published interconnect bandwidth, both ways.
    cpu                nominal: a socket of a server, to have an order of magnitude.

Usable memory: of GPUs 95% of what the driver reports (81,559, 143,771 and 183,359 MiB), the rest being the context,
the libraries and fragmentation; of TPUs what the compiler allows a program. Float32 runs at full precision: six passes
of bfloat16 on a TPU. The latency of a collective is an assumption, of the order that NCCL and ICI show for small ones.
"""

from __future__ import annotations

import dataclasses
import math
import re

from glm_jax.errors import InputError

GIB = 2**30
MIB = 2**20
MAX_DEVICES = 100_000
NVLINK_DOMAIN = 8
_TERA = 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What a device does in a second, at best.

    Attributes:
        bfloat16: operations of matrix products with bfloat16 operands. So run 8-bit and 4-bit weights, too: they are
            widened inside the product.
        float32: with float32 operands, at full precision.
        fp8: with both operands in 8-bit floats, where a kernel does that.
        int8: with both operands in 8-bit integers.
        memory: bytes to and from the device's memory.
        link: bytes that a device sends, and receives, in a collective among devices that are joined directly.
        network: the same across hosts that are joined by a network only.
        latency: seconds of the smallest collective, among devices that are joined directly.
        network_latency: seconds of the smallest collective across hosts.
    """

    bfloat16: float
    float32: float
    fp8: float
    int8: float
    memory: float
    link: float
    network: float
    latency: float
    network_latency: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device.

    Attributes:
        name: as users write it.
        memory: bytes that a program may use.
        speed: None where only the memory is known.
        per_chip: devices of a chip.
        domain: how many devices are joined directly; None if all of a slice are.
        dimensions: of the torus; 0 if the kind comes in no slices.
        largest: chips of the largest slice.
    """

    name: str
    memory: int
    speed: Speed | None
    per_chip: int = 1
    domain: int | None = None
    dimensions: int = 0
    largest: int = 0

    @property
    def platform(self) -> str:
        """As jax names it: `cpu`, `gpu` or `tpu`."""
        return "tpu" if self.dimensions else "cpu" if self.domain == 1 else "gpu"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """So many devices of a kind; of TPUs in a slice of a shape, counted in chips."""

    device: Device
    count: int
    topology: tuple[int, ...] | None = None


def _gpu(name: str, driver_mib: int, *, tera: tuple[float, float, float], memory: float, link: float) -> Device:
    """A GPU; `tera` are the rates in bfloat16, 8 bits and float32, in 10^12 a second."""
    bfloat16, eight, float32 = (rate * _TERA for rate in tera)
    speed = Speed(
        bfloat16=bfloat16,
        float32=float32,
        fp8=eight,
        int8=eight,
        memory=memory * _TERA,
        link=link,
        network=50e9,
        latency=8e-6,
        network_latency=20e-6,
    )
    return Device(name=name, memory=driver_mib * MIB * 95 // 100, speed=speed, domain=NVLINK_DOMAIN)


def _tpu(name: str, memory: float, *, tera: tuple[float, float, float], traffic: float, link: float) -> Device:
    """A TPU, `tera` its rates in bfloat16, fp8 and int8, in 10^12 a second; all but the memory are of a whole chip."""
    cores = 2 if name == "tpu7x" else 1
    flat = name in ("v5e", "v6e")
    bfloat16, fp8, int8 = (rate * _TERA / cores for rate in tera)
    speed = Speed(
        bfloat16=bfloat16,
        float32=bfloat16 / 6,
        fp8=fp8,
        int8=int8,
        memory=traffic * 1e9 / cores,
        link=link / cores,
        network=link / cores,
        latency=5e-6,
        network_latency=5e-6,
    )
    largest = {"v5e": 256, "v6e": 256, "v5p": 6144, "tpu7x": 9216}[name]
    return Device(
        name=name,
        memory=int(memory * GIB),
        speed=speed,
        per_chip=cores,
        dimensions=2 if flat else 3,
        largest=largest,
    )


_CPU_SPEED = Speed(
    bfloat16=2e12,
    float32=2e12,
    fp8=2e12,
    int8=2e12,
    memory=200e9,
    link=20e9,
    network=10e9,
    latency=20e-6,
    network_latency=50e-6,
)
_ALL = (
    _gpu("h100", 81_559, tera=(989.4, 1978.9, 66.9), memory=3.35, link=450e9),
    _gpu("h200", 143_771, tera=(989.4, 1978.9, 66.9), memory=4.8, link=450e9),
    _gpu("b200", 183_359, tera=(2250, 4500, 75), memory=8.0, link=900e9),
    _tpu("v5e", 15.75, tera=(197, 197, 394), traffic=819, link=100e9),
    _tpu("v5p", 95.74, tera=(459, 459, 918), traffic=2765, link=200e9),
    _tpu("v6e", 31.25, tera=(918, 918, 1836), traffic=1638, link=200e9),
    _tpu("tpu7x", 94.75, tera=(2307, 4614, 2307), traffic=7380, link=200e9),
    Device(name="cpu", memory=64 * GIB, speed=_CPU_SPEED, domain=1),
)
DEVICES = {device.name: device for device in _ALL}


def choose_cluster(
    device: str | None, *, count: int | None = None, topology: str | None = None, memory: int | None = None
) -> Cluster:
    """Return the devices that a user describes.

    Args:
        device: a name of `DEVICES`, or None for one of which only the memory is known.
        count: of devices; of TPUs without `topology`, of chips.
        topology: of a TPU slice, in chips: `4x4x4`.
        memory: bytes of each device, instead of the kind's.

    Raises:
        InputError: the kind is not known, or there is no such slice, or too little is said.
    """
    if device is not None and device not in DEVICES:
        raise InputError(f"no device is called {device!r}; known: {', '.join(DEVICES)}")
    for name, value in (("memory", memory), ("count", count)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if device is None and memory is None:
        raise InputError(f"--device or --memory must be given; devices: {', '.join(DEVICES)}")
    kind = Device(name="any", memory=0, speed=None) if device is None else DEVICES[device]
    if memory is not None:
        kind = dataclasses.replace(kind, memory=memory)
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
        raise InputError(f"--count, the number of {kind.name} devices, must be given")
    if count > MAX_DEVICES:
        raise InputError(f"--count must be at most {MAX_DEVICES}, not {count}")
    return Cluster(kind, count, shape)


def parse_topology(device: Device, text: str) -> tuple[int, ...]:
    """The shape of a slice of TPUs, `4x4x4`.

    Raises:
        InputError: the kind has no such slice; the message says which it has.
    """
    if re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})*", text):
        shape = tuple(int(size) for size in text.split("x"))
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
