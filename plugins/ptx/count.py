"""What a call of FNA issues, launch by launch, beside exact attention: instructions, memory, tensor cycles, critical paths.

A CTA's cycles on a multiprocessor are bounded by three resources, each counted here:

- `tensor`: mma instructions times 2 (m16n8k16 are 2,048 multiply-adds, of which an Ampere multiprocessor does 1,024 a cycle;
  m16n8k8 in tf32 likewise at half of both: NVIDIA A100 white paper),
- `issue`: instructions of all warps over its 4 schedulers, without moves, which the assembler mostly removes,
- `memory`: shared-memory wavefronts, one a cycle, and global sectors, four a cycle.

The three overlap at best (their maximum) and not at all at worst (their sum). A launch's critical path is that of its CTAs in
order on the multiprocessors, one at a time each, and LAUNCH_CYCLES. Latencies, caches and the limit of global memory are left
out: these are counts, not times.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps
from fna.errors import MissingCapabilityError
from fna.plugins.launch_plan import Dtype, attention_plan
from fna.plugins.ptx.calls import bytes_of, make_memory
from fna.plugins.ptx.cases import PLAIN, TORCH_TYPES
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.kernel import Kernel
from fna.plugins.ptx.memory import GlobalMemory
from fna.plugins.ptx.profile import Profile, Requests
from fna.plugins.torch_ops import attention_shape

MMA_CYCLES, SCHEDULERS, SECTORS_A_CYCLE = 2, 4, 4
LAUNCH_CYCLES = 1500
"""From one kernel of a stream to the next: start, prologue and drain (an assumption, the same for FNA and exact attention)."""

SAMPLED_ROWS = (0, 1, 2, 4, 8, 16, 32)
"""Rows of the grid whose CTAs are run; a row between two behaves as the one before it."""


@dataclass(frozen=True)
class CtaCount:
    """Cycles of one CTA on each resource, and what they were counted from."""

    tensor: float
    issue: float
    wavefronts: float
    ideal_wavefronts: float
    sectors: float
    instructions: float
    """Of one warp."""

    @property
    def memory(self) -> float:
        """Cycles of shared and global memory."""
        return self.wavefronts + self.sectors / SECTORS_A_CYCLE

    @property
    def overlapped(self) -> float:
        """Cycles if the resources overlap."""
        return max(self.tensor, self.issue, self.memory)

    @property
    def serial(self) -> float:
        """Cycles if none overlap."""
        return self.tensor + self.issue + self.memory


@dataclass(frozen=True)
class LaunchCount:
    """One launch: its kinds of CTAs with how many of each, instructions by class, and the critical path."""

    name: str
    warps: int
    kinds: list[tuple[int, CtaCount]]
    classes: dict[str, float]
    """Instructions of a warp of the costliest kind of CTA."""
    overlapped: float
    serial: float

    @property
    def ctas(self) -> int:
        """In the grid."""
        return sum(count for count, _ in self.kinds)

    @property
    def costliest(self) -> CtaCount:
        """The CTA that takes longest."""
        return max((cta for _, cta in self.kinds), key=lambda cta: cta.serial)


@dataclass(frozen=True)
class CallSize:
    """Sizes of one call, and the GPU it is for."""

    tokens: int
    heads: int
    landmarks: int
    multiprocessors: int
    dtype: Dtype = "fp16"
    head_size: int = 64
    iterations: int = NEWTON_SCHULZ_ITERATIONS
    chebyshev: ChebyshevSteps | None = None


def count_attention(images: PtxImages, sm: int, size: CallSize) -> list[LaunchCount]:
    """Count one call of FastNystromAttention with exact rows."""
    shape = 1, size.heads, size.tokens, size.head_size
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(TORCH_TYPES[size.dtype]) for name in ("query", "key", "value")
    }
    landmarks = torch.randperm(size.tokens, generator=generator)[: size.landmarks].int()[None]
    bias = torch.zeros(1, size.landmarks)
    plan = attention_plan(
        attention_shape(tensors["query"], landmarks, bias, None), scale=size.head_size**-0.5, iterations=size.iterations,
        exact_rows=True, multiprocessors=size.multiprocessors, chebyshev=size.chebyshev,
    )  # fmt: skip
    every = {**tensors, "landmarks": landmarks, "bias": bias}
    out_bytes = bytes_of(tensors["query"]).size
    memory = _filled_memory([*(bytes_of(t).size for t in every.values()), out_bytes, plan.workspace_bytes * 2])
    addresses = {name: memory.allocate(name, bytes_of(tensor)) for name, tensor in every.items()}
    addresses |= {"key_mask": 0, "out": memory.allocate("out", out_bytes)}
    addresses |= {name: memory.allocate(name, buffer.size) for name, buffer in plan.buffers.items()}
    memory.initialised[:] = True
    return [
        count_launch(
            images.kernel(launch.variant, sm, profile=True), memory, launch.grid,
            [addresses[a] if isinstance(a, str) else a for a in launch.arguments], size.multiprocessors,
        )
        for launch in plan.launches
    ]  # fmt: skip


def count_exact(kernel: Kernel, size: CallSize, block_queries: int) -> LaunchCount:
    """Count one call of the exact kernel."""
    elements = size.heads * size.tokens * size.head_size
    memory = _filled_memory([elements * 2] * 4)
    content = torch.randn(elements, generator=torch.Generator().manual_seed(0)).half()
    addresses = [memory.allocate(name, bytes_of(content)) for name in ("query", "key", "value", "out")]
    grid = -(-size.tokens // block_queries), size.heads, 1
    return count_launch(kernel, memory, grid, [*addresses, size.tokens, 0.18], size.multiprocessors)


def _filled_memory(sizes: list[int]) -> GlobalMemory:
    return make_memory([*sizes, *[0] * 16], PLAIN)


def count_launch(
    kernel: Kernel,
    memory: GlobalMemory,
    grid: tuple[int, int, int],
    arguments: Sequence[int | float],
    multiprocessors: int,
) -> LaunchCount:
    """Run one CTA of each kind that the grid may have, and count."""
    kind_of = _kinds(grid)
    sampled = sorted(set(kind_of))
    profile = kernel.launch(memory, grid, arguments, only=sampled)
    counted = {cta: _count_cta(kernel, profile, cta) for cta in sampled}
    kinds = [(kind_of.count(cta), counted[cta]) for cta in sampled]
    costliest = max(sampled, key=lambda cta: counted[cta].serial)
    classes = kernel.instructions_by_class(profile, [costliest])
    in_order = [counted[kind] for kind in kind_of]
    return LaunchCount(
        kernel.name, kernel.program.threads // 32, kinds, {name: float(n) for name, n in classes.most_common()},
        critical_path([cta.overlapped for cta in in_order], multiprocessors),
        critical_path([cta.serial for cta in in_order], multiprocessors),
    )  # fmt: skip


def _kinds(grid: tuple[int, int, int]) -> list[int]:
    """For each CTA, in order, the CTA that stands for it: first or last of its row, in a row that is run."""
    x, y, _ = grid
    rows = sorted({row for row in SAMPLED_ROWS if row < y} | {y - 1})
    standing = [max(row for row in rows if row <= index) for index in range(y)]
    return [standing[row] * x + (column if column in (0, x - 1) else 0) for row in range(y) for column in range(x)]


def _count_cta(kernel: Kernel, profile: Profile, cta: int) -> CtaCount:
    warps = kernel.program.threads // 32
    classes = kernel.instructions_by_class(profile, [cta])
    runs = kernel.instruction_runs(profile, [cta])
    issued = sum(classes.values())

    def total(table: dict[int, Requests], what: str) -> float:
        return sum(
            runs.get(instruction, 0) * warps * getattr(requests, what) / requests.count
            for instruction, requests in table.items()
            if requests.count
        )

    return CtaCount(
        tensor=classes["mma"] * warps * MMA_CYCLES,
        issue=(issued - classes["mov"]) * warps / SCHEDULERS,
        wavefronts=total(profile.shared, "moved"),
        ideal_wavefronts=total(profile.shared, "ideal"),
        sectors=total(profile.sectors, "moved"),
        instructions=issued,
    )


def critical_path(cycles: Sequence[float], multiprocessors: int) -> float:
    """Cycles until the last CTA ends: each goes, in order, to the multiprocessor that is free first."""
    free = [0.0] * multiprocessors
    for cta in cycles:
        heapq.heapreplace(free, free[0] + cta)
    return max(free) + LAUNCH_CYCLES


def compile_exact(sm: int, head_size: int = 64) -> Kernel:
    """The yardstick, compiled as the build compiles FNA's kernels."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise MissingCapabilityError("exact attention is compiled with Triton: pip install triton") from error
    from fna.plugins.ptx import yardstick

    signature = dict.fromkeys(("query", "key", "value", "out"), "*fp16") | {"tokens": "i32", "scale2": "fp32"}
    blocks = {
        "BLOCK_M": yardstick.BLOCK_QUERIES, "BLOCK_N": yardstick.BLOCK_KEYS, "D": head_size, "NUM_STAGES": yardstick.STAGES,
    }  # fmt: skip
    signature |= dict.fromkeys(blocks, "constexpr")
    names = list(signature)
    source = ASTSource(
        yardstick.exact_kernel,
        signature,
        constexprs={(names.index(name),): number for name, number in blocks.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    options = {"num_warps": yardstick.WARPS, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", sm or 80, 32), options=options)
    return Kernel(built.asm["ptx"], built.metadata.shared, "exact", profile=True)
