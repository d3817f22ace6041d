"""What a call of FNA issues, launch by launch, beside exact attention: instructions, memory, tensor cycles, critical paths.

A program's cycles on each resource (`fna.plugins.programs` says what bounds it) are counted so:

- `tensor`: mma instructions times 2 (m16n8k16 are 2,048 multiply-adds; m16n8k8 in tf32 half of them at half the rate),
- `issue`: instructions of all warps over its 4 schedulers, without moves, which the assembler mostly removes,
- `memory`: shared-memory wavefronts, one a cycle, and global sectors, four a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps
from fna.errors import MissingCapabilityError
from fna.plugins.launch_plan import AttentionShape, Dtype, Launch, LaunchPlan, attention_plan, padded_head_size
from fna.plugins.programs import CtaCount, Multiprocessors, critical_path, exact_blocks
from fna.plugins.ptx.calls import bytes_of, make_memory
from fna.plugins.ptx.cases import PLAIN, TORCH_TYPES
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.kernel import Kernel
from fna.plugins.ptx.memory import GlobalMemory
from fna.plugins.ptx.profile import Profile, Requests
from fna.plugins.table.chips import FALLBACK_TARGET
from fna.plugins.torch_ops import attention_shape

MMA_CYCLES, SCHEDULERS = 2, 4

SAMPLED_ROWS = (0, 1, 2, 4, 8, 16, 32)
"""Rows of the grid whose CTAs are run; a row between two behaves as the one before it."""


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
    on: Multiprocessors
    dtype: Dtype = "fp16"
    head_size: int = 64
    iterations: int = NEWTON_SCHULZ_ITERATIONS
    chebyshev: ChebyshevSteps | None = None


@dataclass(frozen=True)
class PlacedCall:
    """A call whose tensors lie in the machine's memory."""

    shape: AttentionShape
    plan: LaunchPlan
    memory: GlobalMemory
    addresses: dict[str, int]

    def arguments(self, launch: Launch) -> list[int | float]:
        """What a launch is given."""
        return [self.addresses[a] if isinstance(a, str) else a for a in launch.arguments]


def place_attention(size: CallSize) -> PlacedCall:
    """One call of FastNystromAttention with exact rows, on random tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn((1, size.heads, size.tokens, size.head_size), generator=generator).to(TORCH_TYPES[size.dtype])
        for name in ("query", "key", "value")
    }
    landmarks = torch.randperm(size.tokens, generator=generator)[: size.landmarks].int()[None]
    bias = torch.zeros(1, size.landmarks)
    shape = attention_shape(tensors["query"], landmarks, bias, None)
    plan = attention_plan(
        shape, scale=size.head_size**-0.5, iterations=size.iterations, exact_rows=True,
        multiprocessors=size.on.count, chebyshev=size.chebyshev,
    )  # fmt: skip
    every = {**tensors, "landmarks": landmarks, "bias": bias}
    return PlacedCall(shape, plan, *place(plan, every))


def place(plan: LaunchPlan, tensors: dict[str, Tensor]) -> tuple[GlobalMemory, dict[str, int]]:
    """Memory with the tensors and the plan's scratch, all initialised, and where each lies."""
    out_bytes = bytes_of(tensors["query"]).size
    memory = _filled_memory([*(bytes_of(t).size for t in tensors.values()), out_bytes, plan.workspace_bytes * 2])
    addresses = {name: memory.allocate(name, bytes_of(tensor)) for name, tensor in tensors.items()}
    addresses |= {"key_mask": 0, "out": memory.allocate("out", out_bytes)}
    addresses |= {name: memory.allocate(name, buffer.size) for name, buffer in plan.buffers.items()}
    memory.initialised[:] = True
    return memory, addresses


def count_attention(images: PtxImages, sm: int, size: CallSize) -> list[LaunchCount]:
    """Count one call of FastNystromAttention with exact rows."""
    call = place_attention(size)
    return [
        count_launch(
            images.kernel(launch.variant, sm, profile=True), call.memory, launch.grid, call.arguments(launch), size.on
        )
        for launch in call.plan.launches
    ]


def place_exact(size: CallSize) -> tuple[GlobalMemory, tuple[int, int, int], list[int | float]]:
    """Memory, grid and arguments of one call of the exact kernel."""
    elements = size.heads * size.tokens * padded_head_size(size.head_size)
    content = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(TORCH_TYPES[size.dtype])
    memory = _filled_memory([bytes_of(content).size] * 4)
    addresses = [memory.allocate(name, bytes_of(content)) for name in ("query", "key", "value", "out")]
    blocks = exact_blocks(size.dtype, padded_head_size(size.head_size))
    return memory, (-(-size.tokens // blocks.queries), size.heads, 1), [*addresses, size.tokens, 0.18]


def count_exact(kernel: Kernel, size: CallSize) -> LaunchCount:
    """Count one call of the exact kernel."""
    memory, grid, arguments = place_exact(size)
    return count_launch(kernel, memory, grid, arguments, size.on)


def _filled_memory(sizes: list[int]) -> GlobalMemory:
    return make_memory([*sizes, *[0] * 16], PLAIN)


def count_launch(
    kernel: Kernel,
    memory: GlobalMemory,
    grid: tuple[int, int, int],
    arguments: Sequence[int | float],
    on: Multiprocessors,
    kind_of: Sequence[int] | None = None,
) -> LaunchCount:
    """Run one CTA of each kind that the grid may have, and count; `kind_of` names for each CTA, in order, one that stands for it."""
    kind_of = _kinds(grid) if kind_of is None else list(kind_of)
    sampled = sorted(set(kind_of))
    profile = kernel.launch(memory, grid, arguments, only=sampled)
    counted = {cta: count_cta(kernel, profile, cta).at_rate(on.multiply_adds) for cta in sampled}
    kinds = [(kind_of.count(cta), counted[cta]) for cta in sampled]
    costliest = max(sampled, key=lambda cta: counted[cta].serial)
    classes = kernel.instructions_by_class(profile, [costliest])
    in_order = [counted[kind] for kind in kind_of]
    return LaunchCount(
        kernel.name, kernel.program.threads // 32, kinds, {name: float(n) for name, n in classes.most_common()},
        critical_path([(1, cta.overlapped) for cta in in_order], on.count),
        critical_path([(1, cta.serial) for cta in in_order], on.count),
    )  # fmt: skip


def _kinds(grid: tuple[int, int, int]) -> list[int]:
    """For each CTA, in order, the CTA that stands for it: first or last of its row, in a row that is run."""
    x, y, _ = grid
    rows = sorted({row for row in SAMPLED_ROWS if row < y} | {y - 1})
    standing = [max(row for row in rows if row <= index) for index in range(y)]
    return [standing[row] * x + (column if column in (0, x - 1) else 0) for row in range(y) for column in range(x)]


def count_cta(kernel: Kernel, profile: Profile, cta: int) -> CtaCount:
    """What one of the CTAs that a profile is of issued."""
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


def compile_exact(sm: int, head_size: int = 64, dtype: Dtype = "fp16") -> Kernel:
    """The yardstick, compiled as the build compiles FNA's kernels."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise MissingCapabilityError("exact attention is compiled with Triton: pip install triton") from error
    from fna.plugins.ptx import yardstick

    signature = dict.fromkeys(("query", "key", "value", "out"), f"*{dtype}") | {"tokens": "i32", "scale2": "fp32"}
    block_d = padded_head_size(head_size)
    blocks = exact_blocks(dtype, block_d)
    constants = {"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "D": block_d, "NUM_STAGES": blocks.stages}
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(signature)
    source = ASTSource(
        yardstick.exact_kernel,
        signature,
        constexprs={(names.index(name),): number for name, number in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    options = {"num_warps": blocks.warps, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", sm or FALLBACK_TARGET, 32), options=options)
    return Kernel(built.asm["ptx"], built.metadata.shared, "exact", profile=True)
