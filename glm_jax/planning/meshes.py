"""Every mesh of a number of devices, abstract: only the names and the sizes of its axes are real."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from glm_jax.sharding.mesh import AXIS_NAMES


def meshes(devices: int, platform: str | None = None) -> Iterator[Mesh]:
    """Every mesh of exactly that many devices of a platform."""
    for first in _divisors(devices):
        for second in _divisors(devices // first):
            yield abstract_mesh((first, second, devices // first // second), platform)


def abstract_mesh(sizes: tuple[int, int, int], platform: str | None = None) -> Mesh:
    """The mesh of these sizes without devices. It stands where a mesh is asked for its shape and platform only."""
    device = None if platform is None else AbstractDevice(platform, None, platform)
    return cast(Mesh, AbstractMesh(sizes, AXIS_NAMES, axis_types=(AxisType.Explicit,) * 3, abstract_device=device))


def span(mesh: Mesh, axes: Sequence[str]) -> int:
    """How far apart in the order of the devices the members of a group over `axes` are: 1 is a device by itself.

    The last axis changes fastest, so a group over it is of neighbours.
    """
    reach = stride = 1
    for axis in reversed(AXIS_NAMES):
        size = mesh.shape[axis]
        if axis in axes:
            reach += (size - 1) * stride
        stride *= size
    return reach


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
