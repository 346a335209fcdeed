"""The mesh: always three named, explicit axes.

`data` replicates the model and splits the batch, `expert` splits the routed experts and the batch, `tensor` splits
heads and the width of the MLPs. One device is the mesh 1, 1, 1: there is no code path without a mesh. With explicit
axis types a layout that does not fit fails when the program is traced, instead of becoming a silent all-gather.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from glm_jax.configs import ModelConfig
from glm_jax.errors import ShardingError
from glm_jax.sharding.devices import find_devices

DATA = "data"
EXPERT = "expert"
TENSOR = "tensor"
AXIS_NAMES = (DATA, EXPERT, TENSOR)


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of data x expert x tensor devices, the first ones of `devices` (default: all that jax sees).

    Raises:
        ShardingError: a size is not positive, or there are not enough devices.
        Error: jax has no devices at all; the message says what to install.
    """
    sizes = (data, expert, tensor)
    if min(sizes) < 1:
        raise ShardingError(f"mesh {describe_sizes(sizes)}: every axis must be at least 1")
    available = find_devices() if devices is None else list(devices)
    needed = math.prod(sizes)
    if needed > len(available):
        raise ShardingError(f"mesh {describe_sizes(sizes)} needs {needed} devices; there are {len(available)}")
    # Not jax.make_mesh: on most TPUs it refuses axes that are no products of whole axes of the torus, as 8 x 8 over
    # 4 x 4 x 4. Here such a mesh splits one of these, and one that need not does not.
    arranged = mesh_utils.create_device_mesh(sizes, available[:needed], allow_split_physical_axes=True)
    return Mesh(arranged, AXIS_NAMES, axis_types=(AxisType.Explicit,) * 3)


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh that `text` describes: `data=1,expert=4,tensor=2`, axes left out being 1.

    Raises:
        ShardingError: an unknown axis, a size that is no number, or too few devices.
    """
    data, expert, tensor = mesh_sizes(text)
    return make_mesh(data=data, expert=expert, tensor=tensor, devices=devices)


def mesh_sizes(text: str) -> tuple[int, int, int]:
    """The sizes of data, expert and tensor that `text` describes.

    Raises:
        ShardingError: an unknown axis, or a size that is no number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.lower().partition("=")
        if name not in AXIS_NAMES or name in sizes or not re.fullmatch("[0-9]{1,9}", size):
            raise ShardingError(
                f"mesh {text!r:.100}: {part!r:.100} is wrong; right would be 'data=1,expert=4,tensor=2'"
            )
        sizes[name] = int(size)
    data, expert, tensor = (sizes.get(name, 1) for name in AXIS_NAMES)
    return data, expert, tensor


def default_mesh(config: ModelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over as many of the devices as the model can be split over: experts first, then heads."""
    available = find_devices() if devices is None else list(devices)
    count = len(available)
    heads, widths = config.attention.split_heads, math.gcd(config.mlp_width, config.moe.expert_width)

    def fits(expert: int, tensor: int) -> bool:
        return config.moe.num_experts % expert == 0 and math.gcd(heads, widths, config.vocab_size) % tensor == 0

    for size in range(count, 0, -1):
        for tensor in (divisor for divisor in range(1, size + 1) if size % divisor == 0):
            if fits(size // tensor, tensor):
                return make_mesh(expert=size // tensor, tensor=tensor, devices=available)
    raise AssertionError("a mesh of one device always fits")


def platform(mesh: Mesh | None = None) -> str:
    """The platform of a mesh, `cpu`, `gpu` or `tpu`, abstract or not; by default of the mesh that is set.

    Of a mesh that does not know it, and without one, jax's own. They differ where a program is compiled, or planned,
    for devices that are elsewhere.
    """
    abstract = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    device = abstract.abstract_device
    name = find_devices()[0].platform if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def describe_sizes(sizes: Sequence[int]) -> str:
    """The sizes of the three axes, as a user writes them."""
    return ",".join(f"{name}={size}" for name, size in zip(AXIS_NAMES, sizes, strict=True))


def describe(mesh: Mesh) -> str:
    """The mesh as a user writes it: `data=1,expert=4,tensor=2`."""
    return describe_sizes([mesh.shape[name] for name in AXIS_NAMES])
