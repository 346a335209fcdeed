"""What XLA's compiler for GPUs asks about a GPU, so that it compiles for one on a machine that has none.

The numbers are facts of the devices, as the OpenXLA authors publish them with the compiler: openxla/xla,
xla/backends/gpu/target_config/specs/, h100_sxm.txtpb at 0774019d97e7, h200.txtpb at 4336d12e0706 and b200.txtpb at
300ec95ab85f (Apache License 2.0). The description that is made of them here is a `stream_executor.GpuTargetConfigProto`
in text form; a real machine's own, of `jax.experimental.topologies`, can stand in its place.
"""

from __future__ import annotations

import dataclasses

from glm_jax.errors import InputError

# Element types by their numbers in XLA: those of the vector units, and of the matrix units by what they cost.
_INT32, _UINT32, _FLOAT16, _FLOAT32, _FLOAT64, _BFLOAT16 = 4, 8, 10, 11, 12, 16
_EIGHT_BITS = (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36)  # integers and every 8-bit float
_FOUR_BITS = (32,)
_VECTOR_UNITS, _HALF_OF_THEM, _MATRIX_UNITS = 128, 64, 4  # of each multiprocessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """One kind of GPU.

    Attributes:
        name: as the driver reports it.
        capability: compute capability, major; the minor is 0 and the features those of the kind alone ("a").
        cores: multiprocessors.
        clock: GHz of the vector units.
        matrix_clock: GHz of the matrix units at full load.
        memory: bytes.
        bandwidth: bytes a second.
        cache: bytes of the second-level cache.
        bus: bytes a second to the host.
        half: operations of a vector unit in a clock in 16-bit floats.
        double: operations of a matrix unit in a clock in 64-bit floats.
        matrix: the same in 16-bit floats; 32-bit ones take twice as long, 8-bit ones half.
        four_bits: whether its matrix units know 4-bit floats.
        libraries: version of cuDNN.
    """

    name: str
    capability: int
    cores: int
    clock: float
    matrix_clock: float
    memory: int
    bandwidth: int
    cache: int
    bus: int
    half: int
    double: int
    matrix: int
    four_bits: bool
    libraries: tuple[int, int, int]

    def text(self) -> str:
        """The description that the compiler reads."""
        device = (
            _field("threads_per_block_limit", 1024),
            _field("threads_per_warp", 32),
            _field("shared_memory_per_block", 49_152),
            _field("shared_memory_per_core", 233_472),
            _field("shared_memory_per_block_optin", 232_448),
            _field("threads_per_core_limit", 2048),
            _field("registers_per_core_limit", 65_536),
            _field("registers_per_block_limit", 65_536),
            _field("core_count", self.cores),
            _field("fpus_per_core", _VECTOR_UNITS),
            *(_field(f"block_dim_limit_{axis}", n) for axis, n in zip("xyz", (2**31 - 1, 65_535, 65_535), strict=True)),
            *(_field(f"thread_dim_limit_{axis}", n) for axis, n in zip("xyz", (1024, 1024, 64), strict=True)),
            _field("memory_bandwidth", self.bandwidth),
            _field("l2_cache_size", self.cache),
            _field("clock_rate_ghz", self.clock),
            _field("device_memory_size", self.memory),
            _group("cuda_compute_capability", f"major: {self.capability}", "feature_extension: ACCELERATED_FEATURES"),
            _group("scalar_unit_description", *self._vector_rates()),
            _group("matrix_unit_description", *self._matrix_rates()),
            _field("device_vendor", "NVIDIA Corporation"),
            _field("platform_version", f"Compute Capability {self.capability}.0a"),
            _field("device_address_bits", 64),
            _field("pcie_bandwidth", self.bus),
            "ecc_enabled: true",
            _field("name", self.name),
            _field("driver_version", "13.0.0"),
            _field("runtime_version", "12.8.0"),
            _field("compile_time_toolkit_version", "12.8.0"),
            _field("dnn_version", "9.10.0"),
            _group("device_interconnect_info", "active_links: 18"),
        )
        versions = (_field(part, n) for part, n in zip(("major", "minor", "patch"), self.libraries, strict=True) if n)
        return "\n".join(
            (
                _group("gpu_device_info", *device),
                _field("platform_name", "CUDA"),
                _group("dnn_version_info", *versions),
                _field("device_description_str", self.name),
            )
        )

    def _vector_rates(self) -> list[str]:
        whole = {_FLOAT16: self.half, _FLOAT32: 1, _BFLOAT16: self.half}
        rates = {dtype: (_HALF_OF_THEM, 1) for dtype in (_INT32, _UINT32, _FLOAT64)}
        rates |= {dtype: (_VECTOR_UNITS, operations) for dtype, operations in whole.items()}
        return [_rate(dtype, self.clock, *rates[dtype]) for dtype in sorted(rates)]

    def _matrix_rates(self) -> list[str]:
        operations = {_FLOAT16: self.matrix, _BFLOAT16: self.matrix, _FLOAT32: self.matrix // 2, _FLOAT64: self.double}
        operations |= dict.fromkeys(_EIGHT_BITS, 2 * self.matrix)
        operations |= dict.fromkeys(_FOUR_BITS if self.four_bits else (), 4 * self.matrix)
        clocks = {_FLOAT64: self.clock}
        return [
            _rate(dtype, clocks.get(dtype, self.matrix_clock), _MATRIX_UNITS, operations[dtype])
            for dtype in sorted(operations)
        ]


def gpu_target(kind: str) -> str:
    """The description of a kind of GPU, in text form.

    Raises:
        InputError: this package has none of that kind.
    """
    if kind not in GPU_TARGETS:
        raise InputError(f"there is no description of {kind} to compile for; there is one of {', '.join(GPU_TARGETS)}")
    return GPU_TARGETS[kind].text()


def _field(name: str, value: str | float) -> str:
    return f'{name}: "{value}"' if isinstance(value, str) else f"{name}: {value}"


def _group(name: str, *fields: str) -> str:
    return f"{name} {{ {' '.join(fields)} }}"


def _rate(dtype: int, clock: float, units: int, operations: int) -> str:
    value = _group("value", f"clock_rate_ghz: {clock}", f"units_per_core: {units}", f"ops_per_clock: {operations}")
    return _group("rate_infos", f"key: {dtype}", value)


_H100 = GpuTarget(
    name="NVIDIA H100 80GB HBM3",
    capability=9,
    cores=132,
    clock=1.98,
    matrix_clock=1.8295201,
    memory=84_942_979_072,
    bandwidth=3_352_320_000_000,
    cache=52_428_800,
    bus=34_359_738_368,
    half=2,
    double=32,
    matrix=512,
    four_bits=False,
    libraries=(8, 9, 4),
)
GPU_TARGETS = {
    "h100": _H100,
    "h200": dataclasses.replace(
        _H100,
        name="NVIDIA H200 141GB HBM3e",
        memory=151_397_597_184,
        bandwidth=4_800_000_000_000,
        libraries=(9, 10, 0),
    ),
    "b200": GpuTarget(
        name="NVIDIA B200",
        capability=10,
        cores=148,
        clock=1.965,
        matrix_clock=1.8353101,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        cache=132_644_864,
        bus=68_719_476_736,
        half=1,
        double=16,
        matrix=1024,
        four_bits=True,
        libraries=(9, 7, 0),
    ),
}
