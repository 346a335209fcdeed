"""Kinds of accelerators as data: the memory that a program may use, peak speeds, links, and where the figures stand.

A device is what jax counts: a TPU7x chip is two. All figures are as published by the makers (`Device.source`), rates
without sparsity. What is not published, and assumed:

    memory     of NVIDIA's and AMD's GPUs 95% of what their drivers report, the rest being the context, the libraries
               and fragmentation; of TPUs what the compiler allows a program.
    link       half the published bandwidth of NVLink, Infinity Fabric or PCI Express, which counts both directions. Of
               a TPU one axis of the torus has two links a chip: a third (3-D) or half (2-D) of the published
               interconnect bandwidth, both ways. A bridge that joins two cards of a workstation is left out.
    network    an adapter for each GPU: 400 Gb/s in a server of NVLink or Infinity Fabric (800 Gb/s with B300), 100 Gb/s
               in one of cards.
    latency    of the order that NCCL and ICI show for small collectives.
    float32    at full precision: six passes of bfloat16 on a TPU.
    8 bits     where a kind has no such unit, or a slower one, the rate in bfloat16: the operands are widened first.
    cpu        nominal: a socket of a server, to have an order of magnitude.
"""

from __future__ import annotations

import dataclasses
import re

from glm_jax.errors import InputError

GIB = 2**30
MIB = 2**20
_TERA = 1e12
_SERVER, _CARD = 8, 8  # GPUs of a host
_PCIE4, _PCIE5 = 32e9, 64e9  # bytes a second each way, 16 lanes
_NVIDIA = "nvidia.com, "
_CLOUD = "cloud.google.com/tpu/docs, "


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
        name: as users write it, in lower case.
        memory: bytes that a program may use.
        speed: None where only the memory is known.
        source: where the figures are published.
        aliases: other names.
        per_chip: devices of a chip.
        domain: how many devices are joined directly; None if all of a slice are.
        dimensions: of the torus; 0 if the kind comes in no slices.
        largest: chips of the largest slice.
    """

    name: str
    memory: int
    speed: Speed | None
    source: str = ""
    aliases: tuple[str, ...] = ()
    per_chip: int = 1
    domain: int | None = None
    dimensions: int = 0
    largest: int = 0

    @property
    def platform(self) -> str:
        """As jax names it: `cpu`, `gpu` or `tpu`."""
        return "tpu" if self.dimensions else "cpu" if self.domain == 1 else "gpu"


def _gpu(
    name: str,
    driver_mib: int,
    *,
    tera: tuple[float, float, float, float],
    memory: float,
    link: float,
    source: str,
    domain: int = _SERVER,
    network: float = 50e9,
    aliases: tuple[str, ...] = (),
) -> Device:
    """A GPU; `tera` are the rates in bfloat16, fp8, int8 and float32, in 10^12 a second, `memory` in 10^12 bytes."""
    bfloat16, fp8, int8, float32 = (rate * _TERA for rate in tera)
    speed = Speed(
        bfloat16=bfloat16,
        float32=float32,
        fp8=fp8,
        int8=int8,
        memory=memory * _TERA,
        link=link,
        network=network,
        latency=8e-6,
        network_latency=20e-6,
    )
    usable = driver_mib * MIB * 95 // 100
    return Device(name=name, memory=usable, speed=speed, source=source, aliases=aliases, domain=domain)


def _card(
    name: str,
    driver_mib: int,
    *,
    tera: tuple[float, float, float, float],
    memory: float,
    link: float,
    source: str,
    aliases: tuple[str, ...] = (),
) -> Device:
    """A GPU that PCI Express joins to the others of its host."""
    options = {"link": link, "source": source, "domain": _CARD, "network": 12.5e9, "aliases": aliases}
    return _gpu(name, driver_mib, tera=tera, memory=memory, **options)  # type: ignore[arg-type]


def _tpu(
    name: str,
    memory: float,
    *,
    tera: tuple[float, float, float],
    traffic: float,
    link: float,
    source: str,
    aliases: tuple[str, ...] = (),
) -> Device:
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
    return Device(
        name=name,
        memory=int(memory * GIB),
        speed=speed,
        source=source,
        aliases=aliases,
        per_chip=cores,
        dimensions=2 if flat else 3,
        largest={"v5e": 256, "v6e": 256, "v5p": 6144, "tpu7x": 9216}[name],
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
_HOPPER = (989.4, 1978.9, 1978.9, 66.9)
_AMPERE = (312.0, 312.0, 624.0, 19.5)
_ALL = (
    _gpu(
        "h100", 81_559, tera=_HOPPER, memory=3.35, link=450e9,
        source=_NVIDIA + "H100 datasheet (SXM)", aliases=("h100-sxm", "h100-80gb", "h100-80gb-hbm3"),
    ),
    _gpu(
        "h200", 143_771, tera=_HOPPER, memory=4.8, link=450e9,
        source=_NVIDIA + "H200 datasheet (SXM)", aliases=("h200-sxm", "h200-141gb"),
    ),
    _gpu("b200", 183_359, tera=(2250, 4500, 4500, 75), memory=8.0, link=900e9, source=_NVIDIA + "HGX B200 datasheet"),
    _gpu(
        "b300", 275_040, tera=(2250, 4500, 2250, 75), memory=8.0, link=900e9, network=100e9,
        source=_NVIDIA + "HGX B300 datasheet",
    ),
    _gpu(
        "gb200", 189_471, tera=(2500, 5000, 5000, 80), memory=8.0, link=900e9, domain=72,
        source=_NVIDIA + "GB200 NVL72 datasheet, a 72nd of the rack",
    ),
    _gpu(
        "a100", 81_920, tera=_AMPERE, memory=2.039, link=300e9,
        source=_NVIDIA + "A100 datasheet (SXM, 80 GB)", aliases=("a100-80gb", "a100-sxm", "a100-sxm4-80gb"),
    ),
    _gpu(
        "a100-40gb", 40_960, tera=_AMPERE, memory=1.555, link=300e9,
        source=_NVIDIA + "A100 datasheet (SXM, 40 GB)", aliases=("a100-sxm4-40gb",),
    ),
    _gpu(
        "mi300x", 196_592, tera=(1307.4, 2614.9, 2614.9, 163.4), memory=5.3, link=448e9,
        source="amd.com, Instinct MI300X data sheet",
    ),
    _card("l40s", 46_068, tera=(362.05, 733, 733, 91.6), memory=0.864, link=_PCIE4, source=_NVIDIA + "L40S datasheet"),
    _card(
        "a6000", 49_140, tera=(154.8, 154.8, 309.7, 38.7), memory=0.768, link=_PCIE4,
        source=_NVIDIA + "RTX A6000 datasheet and Ampere GA102 white paper", aliases=("rtx-a6000",),
    ),
    _card(
        "rtx4090", 24_564, tera=(165.2, 330.3, 660.6, 82.6), memory=1.008, link=_PCIE4,
        source=_NVIDIA + "Ada GPU architecture white paper (sums in float32)", aliases=("4090",),
    ),
    _card(
        "rtx5090", 32_607, tera=(209.5, 419, 838, 104.8), memory=1.792, link=_PCIE5,
        source=_NVIDIA + "RTX Blackwell GPU architecture white paper (sums in float32)", aliases=("5090",),
    ),
    _card(
        "rtxpro6000", 97_887, tera=(503.8, 1007.6, 1007.6, 125), memory=1.792, link=_PCIE5,
        source=_NVIDIA + "RTX PRO Blackwell GPU architecture white paper (Workstation Edition)",
        aliases=("rtx-pro-6000-blackwell", "rtx-pro-6000-blackwell-workstation-edition"),
    ),
    _tpu(
        "v5e", 15.75, tera=(197, 197, 394), traffic=819, link=100e9,
        source=_CLOUD + "TPU v5e: system architecture", aliases=("v5litepod", "v5lite"),
    ),
    _tpu("v5p", 95.74, tera=(459, 459, 918), traffic=2765, link=200e9, source=_CLOUD + "TPU v5p: system architecture"),
    _tpu(
        "v6e", 31.25, tera=(918, 918, 1836), traffic=1638, link=200e9,
        source=_CLOUD + "TPU v6e: system architecture", aliases=("trillium",),
    ),
    _tpu(
        "tpu7x", 94.75, tera=(2307, 4614, 2307), traffic=7380, link=200e9,
        source=_CLOUD + "TPU7x: system architecture", aliases=("v7x", "ironwood"),
    ),
    Device(name="cpu", memory=64 * GIB, speed=_CPU_SPEED, source="nominal: a socket of a server", domain=1),
)  # fmt: skip
DEVICES = {device.name: device for device in _ALL}
_MAKERS = ("nvidia", "geforce", "amd", "instinct", "google", "cloud", "tpu")


def speed_of(known: Speed | None, *, bandwidth: int | None, tflops: float | None, link: int | None) -> Speed:
    """The speed of a kind with some figures replaced, or of a kind of which only these are known.

    Of an unknown kind 8-bit products are taken at the rate of bfloat16, float32 at a sixteenth of it, and links as PCI
    Express 5 among 8 devices where `link` does not say better.

    Raises:
        InputError: nothing is known but a part of what a step takes.
    """
    if known is None:
        if bandwidth is None or tflops is None:
            missing = "bandwidth" if bandwidth is None else "tflops"
            raise InputError(f"--{missing} must be given, too: the time of a step is of its arithmetic and its memory")
        known = dataclasses.replace(_CPU_SPEED, link=_PCIE5, network=12.5e9, latency=8e-6, network_latency=20e-6)
    changes: dict[str, float] = {}
    if tflops is not None:
        rate = tflops * _TERA
        changes = {"bfloat16": rate, "fp8": rate, "int8": rate, "float32": rate / 16}
    if bandwidth is not None:
        changes["memory"] = bandwidth
    if link is not None:
        changes["link"] = link
    return dataclasses.replace(known, **changes)


def find_device(name: str) -> Device:
    """The kind of that name, in any case, with or without its maker, blanks, `-` and `_`: `NVIDIA RTX PRO 6000`.

    Raises:
        InputError: there is none; the message lists them, and says how another one is described.
    """
    key = _squeezed(name)
    for device in DEVICES.values():
        if key in {_squeezed(known) for known in (device.name, *device.aliases)}:
            return device
    raise InputError(
        f"no device is called {name!r}; known: {', '.join(DEVICES)}; another one is described by "
        "--memory 96GB --bandwidth 4TB/s --tflops 800 without --device"
    )


def _squeezed(name: str) -> str:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    kept = [word for word in words if word not in _MAKERS]
    return "".join(kept)
