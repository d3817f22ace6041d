"""The devices that engines are built for: one table.

Rates are the vendor's peak figures, which no engine reaches; they are there to compare devices and to bound estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fna.errors import InvalidArgumentError

Flavour = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Target:
    """A device, or the representative of a family.

    Attributes:
        name: as given to `--target`.
        capabilities: CUDA compute capabilities times ten, 86 for 8.6.
        devices: which products these are, for people; where it is a family, the numbers are those of the one named first.
        memory_gib: of the GPU, or shared with the CPU on a Jetson.
        bandwidth_gb_s: of that memory, 1e9 bytes a second.
        fp16_tflops: dense tensor-core rate with fp32 accumulation, 1e12 operations a second.
        fp32_tflops: rate without tensor cores.
        multiprocessors: streaming multiprocessors.
        flavours: which TensorRT exists there, with the lowest version that does: `{"tensorrt": "10.3"}`.
        systems: on a Jetson, the TensorRT that each JetPack brings.
        precisions: that its tensor cores compute in, among those that `fna` writes.
        lowering: `plugin` where the plugin has kernels for the device; what else a runtime is given, `engines.lowerings` says.
        limits: what does not work there, for people.
    """

    name: str
    capabilities: tuple[int, ...]
    devices: str
    memory_gib: int
    bandwidth_gb_s: float
    fp16_tflops: float
    fp32_tflops: float
    multiprocessors: int
    flavours: Mapping[Flavour, str]
    systems: Mapping[str, str]
    precisions: tuple[str, ...]
    lowering: Literal["plugin", "portable"]
    limits: str = ""

    @property
    def is_jetson(self) -> bool:
        """Whether it runs JetPack."""
        return bool(self.systems)

    @property
    def clock_ghz(self) -> float:
        """The clock at which its cores reach `fp32_tflops`: two operations a cycle of each."""
        cores = next(count for capability, count in _CORES if self.capabilities[0] >= capability)
        return self.fp32_tflops * 1e3 / (_OPERATIONS * cores * self.multiprocessors)

    @property
    def multiply_adds_a_cycle(self) -> float:
        """Of one multiprocessor's tensor cores, as `fp16_tflops` and the clock imply."""
        return self.fp16_tflops * 1e3 / (_OPERATIONS * self.clock_ghz * self.multiprocessors)


_OPERATIONS = 2
"""Of a multiply-add."""

_CORES = ((86, 128), (0, 64))
"""fp32 cores of a multiprocessor from a compute capability on (CUDA C++ Programming Guide, throughput of arithmetic instructions)."""

_TENSORRT_ONLY: Mapping[Flavour, str] = {"tensorrt": "10.3"}
_BOTH: Mapping[Flavour, str] = {"tensorrt": "10.3", "tensorrt-rtx": "1.3"}
_AMPERE_ON = ("fp32", "fp16", "bf16", "int8")
# fp8 (E4M3) in tensor cores: compute capability 8.9 and up, by TensorRT's support matrix; TensorRT-RTX refuses 8.6.
_ADA_ON = (*_AMPERE_ON, "fp8")
_TURING = ("fp32", "fp16", "int8")
_TURING_LIMITS = (
    "TensorRT-RTX refuses fp32 matrix products on Turing, and FNA computes in fp32 inside; the plugin's kernels start at "
    "compute capability 8.0"
)
_HOPPER_LIMITS = "TensorRT-RTX does not name compute capability 9.0"

# Sources. Compute capabilities: NVIDIA's CUDA GPU list. TensorRT: 10.3 is what JetPack 6 brings, 10.13 what JetPack 7.0
# brings (Thor alone), 10.16 with CUDA 13.2 and Python 3.12 what JetPack 7.2 brings on AGX Orin; "Migrating
# TensorRT from 10.x to 11.x on Jetson/JetPack" in the 11.4.1 documentation takes AGX Orin and Thor from JetPack 7.2.2 on, and names no
# other Orin. TensorRT-RTX: its support matrices 1.0 to 1.5 name 7.5, 8.6, 8.9, 12.0 (and 12.1
# from 1.5); the 1.7 builder also takes 8.0 (tried). On 7.5 it refuses FNA: "FP32 GEMM is not supported" (tried).
TARGETS = (
    # Jetson Orin Nano series data sheet, 8 GB module in its Super modes (JetPack 6.2): 1024 cores at 1020 MHz, 102 GB/s, 17
    # dense fp16 TFLOPS; fp32 = 2 x 1024 x 1.02 GHz. Without Super: 625 MHz and 68 GB/s, so about 0.6 of everything.
    Target(
        "jetson-orin-nano", (87,), "Jetson Orin Nano 8 GB, Super modes", 8, 102, 17, 2.09, 8,
        _TENSORRT_ONLY, {"JetPack 6": "10.3"}, _AMPERE_ON, "plugin",
    ),
    # Jetson Orin NX series data sheet, 16 GB module: 1024 cores at 918 MHz, 102.4 GB/s, 60 sparse int8 TOPS on the GPU, of which
    # fp16 dense is a quarter; fp32 = 2 x 1024 x 0.918 GHz.
    Target(
        "jetson-orin-nx", (87,), "Jetson Orin NX 16 GB", 16, 102.4, 15, 1.88, 8,
        _TENSORRT_ONLY, {"JetPack 6": "10.3"}, _AMPERE_ON, "plugin",
    ),
    # Jetson AGX Orin technical brief and data sheet, 64 GB module: 2048 cores at 1.3 GHz, 204.8 GB/s, 5.3 fp32 TFLOPS, 170
    # sparse int8 TOPS on the GPU, of which fp16 dense is a quarter.
    Target(
        "jetson-agx-orin", (87,), "Jetson AGX Orin 64 GB", 64, 204.8, 42.5, 5.3, 16,
        _TENSORRT_ONLY, {"JetPack 6": "10.3", "JetPack 7.2": "10.16"}, _AMPERE_ON, "plugin",
    ),
    # Jetson Thor data sheet, T5000 module: 2560 cores (20 SMs) at 1.575 GHz, 273 GB/s, 2070 sparse fp4 TFLOPS, of which fp16
    # dense is an eighth; fp32 = 2 x 2560 x 1.575 GHz. Capability 11.0 since CUDA 13 (10.1 before).
    Target(
        "jetson-thor", (110,), "Jetson Thor T5000", 128, 273, 258, 8.06, 20,
        {"tensorrt": "10.13"}, {"JetPack 7": "10.13"}, _ADA_ON, "plugin",
    ),
    # NVIDIA Turing architecture white paper, GeForce RTX 2080 Ti, reference clocks.
    Target(
        "rtx-turing", (75,), "GeForce RTX 2080 Ti; RTX 20, Quadro RTX", 11, 616, 53.8, 13.4, 68,
        _TENSORRT_ONLY, {}, _TURING, "portable", _TURING_LIMITS,
    ),
    # NVIDIA Ampere GA102 architecture white paper, GeForce RTX 3090.
    Target(
        "rtx-ampere", (86,), "GeForce RTX 3090; RTX 30, RTX A-series, A10", 24, 936, 71, 35.6, 82,
        _BOTH, {}, _AMPERE_ON, "plugin",
    ),
    # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090.
    Target(
        "rtx-ada", (89,), "GeForce RTX 4090; RTX 40, RTX Ada, L40", 24, 1008, 165.2, 82.6, 128,
        _BOTH, {}, _ADA_ON, "plugin",
    ),
    # NVIDIA RTX Blackwell GPU architecture white paper, GeForce RTX 5090.
    Target(
        "rtx-blackwell", (120,), "GeForce RTX 5090; RTX 50, RTX PRO Blackwell", 32, 1792, 209.5, 104.8, 170,
        {"tensorrt": "10.8", "tensorrt-rtx": "1.3"}, {}, _ADA_ON, "plugin",
    ),
    # NVIDIA DGX Spark data sheet, GB10: 6144 cores (48 SMs), 128 GB at 273 GB/s, 1000 sparse fp4 TFLOPS, of which fp16 dense is an
    # eighth; fp32 = 2 x 6144 x 2.4 GHz.
    Target(
        "dgx-spark", (121,), "DGX Spark (GB10)", 128, 273, 125, 29.5, 48,
        {"tensorrt": "10.13"}, {}, _ADA_ON, "plugin", "TensorRT-RTX names compute capability 12.1 only from 1.5 on",
    ),
    # L4 data sheet: 242 fp16 TFLOPS with sparsity, dense is half.
    Target("l4", (89,), "L4", 24, 300, 121, 30.3, 58, _BOTH, {}, _ADA_ON, "plugin"),
    # T4 data sheet; 320 GB/s is 256 bits at 10 Gbit/s ("300+" in the sheet).
    Target("t4", (75,), "T4", 16, 320, 65, 8.1, 40, _TENSORRT_ONLY, {}, _TURING, "portable", _TURING_LIMITS),
    # A100 data sheet, 80 GB SXM.
    Target("a100", (80,), "A100 80 GB SXM; A30", 80, 2039, 312, 19.5, 108, _BOTH, {}, _AMPERE_ON, "plugin"),
    # H100 data sheet, SXM: 1979 fp16 TFLOPS with sparsity, dense is half.
    Target(
        "h100", (90,), "H100 80 GB SXM", 80, 3350, 989, 67, 132,
        _TENSORRT_ONLY, {}, _ADA_ON, "plugin", _HOPPER_LIMITS,
    ),
    # H200 data sheet, SXM: the H100's GPU with more and faster memory.
    Target(
        "h200", (90,), "H200 141 GB SXM", 141, 4800, 989, 67, 132,
        _TENSORRT_ONLY, {}, _ADA_ON, "plugin", _HOPPER_LIMITS,
    ),
    # HGX B300 data sheet, a GPU's eighth: 18 dense fp16 PFLOPS and 0.6 fp32 PFLOPS in all, 288 GB at 8 TB/s; 148 SMs as the B200.
    Target(
        "b300", (103,), "B300 288 GB", 288, 8000, 2250, 75, 148,
        {"tensorrt": "10.13"}, {}, _ADA_ON, "plugin", "TensorRT-RTX does not name compute capability 10.3",
    ),
)  # fmt: skip
TARGET_NAMES = (*(target.name for target in TARGETS), "all")


def capability_text(*capabilities: int) -> str:
    """Write compute capabilities, which are kept times ten, as people do: `8.6, 8.9`."""
    return ", ".join(f"{capability / 10:.1f}" for capability in capabilities)


def find_targets(name: str) -> tuple[Target, ...]:
    """Return the targets of one name, or of several as in `rtx-ampere,rtx-ada`; `all` is every one that TensorRT-RTX builds for.

    Raises:
        InvalidArgumentError: for a name that is not in the table.
    """
    if name == "all":
        return tuple(target for target in TARGETS if "tensorrt-rtx" in target.flavours)
    return tuple(find_target(part.strip()) for part in name.split(","))


def find_target(name: str) -> Target:
    """Return one target.

    Raises:
        InvalidArgumentError: for a name that is not in the table.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    raise InvalidArgumentError(f"target {name!r} is not known; choose one of {', '.join(TARGET_NAMES)}")
