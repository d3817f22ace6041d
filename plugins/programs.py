"""What the programs (CTAs) of a call cost by count, and from that how long a call takes on a GPU. Pure arithmetic.

A program's cycles on a multiprocessor are bounded by three resources: its tensor cores, the slots in which its instructions issue,
and its shared and global memory. They overlap at best (their maximum) and not at all at worst (their sum). What a program takes
grows by the same amount with each block of keys, split, tile or step that it works on: a base and a slope per length, which
`fna.plugins.ptx.programs` counted by running the compiled kernels, and `counted_programs.json` holds. A launch's critical path is
that of its programs in order on the multiprocessors, one at a time each, and LAUNCH_CYCLES. Latencies, caches, registers and
several programs on one multiprocessor are left out; programs of two warps are taken to share one with another, since a warp uses a
quarter of its tensor cores. These are counts, not times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

from fna.chebyshev import ChebyshevSteps
from fna.plugins.launch_plan import (
    AttentionShape,
    Dtype,
    LaunchPlan,
    call_blocks,
    core_programs,
    end_of_programs,
    padded_head_size,
    query_tiles,
    split_keys,
)

MULTIPLY_ADDS_A_CYCLE = 1024
"""Of an Ampere multiprocessor's tensor cores in fp16 (NVIDIA A100 white paper); tensor cycles are counted at this rate."""
SECTORS_A_CYCLE = 4
LAUNCH_CYCLES = 1500
"""From one kernel of a stream to the next: start, prologue and drain (an assumption, the same for FNA and exact attention)."""

COUNTED_PROGRAMS = Path(__file__).with_name("counted_programs.json")


@dataclass(frozen=True)
class CtaCount:
    """What one program issues, in cycles of each resource but for `sectors` and `instructions`; sums and multiples of such."""

    tensor: float = 0.0
    """At MULTIPLY_ADDS_A_CYCLE."""
    issue: float = 0.0
    wavefronts: float = 0.0
    ideal_wavefronts: float = 0.0
    sectors: float = 0.0
    instructions: float = 0.0
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

    def at_rate(self, multiply_adds: float) -> CtaCount:
        """The same where tensor cores do so many multiply-adds a cycle."""
        return replace(self, tensor=self.tensor * MULTIPLY_ADDS_A_CYCLE / multiply_adds)

    def plus(self, other: CtaCount, times: float) -> CtaCount:
        """With `times` another added."""
        return CtaCount(*(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Programs:
    """Programs of a launch that cost alike.

    Attributes:
        key: kernel and part of it, as in the table of counts.
        count: how many there are.
        first: linear index of one of them in the grid.
        lengths: what their cost grows with, by name.
    """

    key: str
    count: int
    first: int
    lengths: Mapping[str, int]


@dataclass(frozen=True)
class ProgramCost:
    """The cost of a program: `base`, and what each unit of a length adds."""

    base: CtaCount
    per: Mapping[str, CtaCount]

    def of(self, lengths: Mapping[str, int]) -> CtaCount:
        """The cost at some lengths."""
        total = self.base
        for name, slope in self.per.items():
            total = total.plus(slope, lengths[name])
        return total


@dataclass(frozen=True)
class ExactBlocks:
    """Block sizes of the yardstick, `fna.plugins.ptx.yardstick`."""

    queries: int
    keys: int
    warps: int
    stages: int


def exact_blocks(dtype: Dtype, block_d: int) -> ExactBlocks:
    """The blocks for a type and a padded head size."""
    if dtype == "fp32":
        return ExactBlocks(64, 32 if block_d == 64 else 16, 4, 1)
    return ExactBlocks(128, 64, 4 if block_d == 64 else 8, 3)


def exact_programs(dtype: Dtype, tokens: int, heads: int, head_size: int) -> list[Programs]:
    """The one launch of exact attention."""
    block_d = padded_head_size(head_size)
    blocks = exact_blocks(dtype, block_d)
    count = heads * -(-tokens // blocks.queries)
    return [Programs(f"exact-{dtype}-d{block_d}", count, 0, {"keys": -(-tokens // blocks.keys)})]


def attention_programs(
    plan: LaunchPlan, shape: AttentionShape, multiprocessors: int, core_length: int
) -> list[list[Programs]]:
    """The programs of each launch of a plan of FastNystromAttention.

    Args:
        plan: from `attention_plan`.
        shape: that it was made for.
        multiprocessors: that it was made for.
        core_length: Newton-Schulz iterations, or Chebyshev steps.
    """
    chebyshev = plan.launches[0].variant.kernel.endswith("_chebyshev")
    splits, split_tokens = split_keys(shape, multiprocessors, chebyshev=chebyshev)
    blocks, tiles = call_blocks(shape), query_tiles(shape, multiprocessors)
    long, last = split_tokens // blocks.key_block, -(-(shape.tokens - (splits - 1) * split_tokens) // blocks.key_block)
    launches = []
    step = job = 0
    for launch in plan.launches:
        kernel, name = launch.variant.kernel, launch.variant.name
        heads, jobs, _ = launch.grid
        if kernel.startswith("landmark"):
            cores = core_programs(blocks.landmarks, step)
            part = "core" if step == 0 else f"product {(step - 1) % 3}"
            found = [Programs(f"{name} {part}", heads * cores, 0, {"core": core_length if cores == 1 else 0})]
            rows = jobs - cores
            job += rows
            short = max(0, min(rows, job - (splits - 1) * blocks.row_tiles))  # the last split's jobs come last
            found += _if_any(f"{name} split", heads * (rows - short), heads * cores, {"keys": long})
            found += _if_any(f"{name} split", heads * short, heads * (jobs - 1), {"keys": last})
            step += 1
        elif kernel.startswith("finish"):
            steps = {"core": core_length} if kernel.endswith("chebyshev") else {}
            found = [Programs(name, heads * jobs, 0, {"splits": splits, **steps})]
        else:
            found = [Programs(name, heads * jobs, 0, {"tiles": tiles})]
        launches.append(found)
    return launches


def _if_any(key: str, count: int, first: int, lengths: Mapping[str, int]) -> list[Programs]:
    return [Programs(key, count, first, lengths)] if count > 0 else []


def critical_path(ctas: Iterable[tuple[int, float]], multiprocessors: int) -> float:
    """Cycles until the last of some CTAs ends, in order so many that take so many cycles."""
    return end_of_programs(ctas, multiprocessors) + LAUNCH_CYCLES


@dataclass(frozen=True)
class Multiprocessors:
    """How many, and the multiply-adds a cycle of each one's tensor cores in fp16."""

    count: int
    multiply_adds: float = MULTIPLY_ADDS_A_CYCLE


def launch_cycles(launch: Sequence[Programs], costs: Mapping[str, ProgramCost], on: Multiprocessors) -> float:
    """The critical path of a launch, resources overlapping."""
    each = [
        (programs.count, costs[programs.key].of(programs.lengths).at_rate(on.multiply_adds).overlapped)
        for programs in launch
    ]
    return critical_path(each, on.count)


def core_length(iterations: int, chebyshev: ChebyshevSteps | None) -> int:
    """What the core's cost grows with."""
    return iterations if chebyshev is None else chebyshev.steps


@cache
def counted_programs(path: Path = COUNTED_PROGRAMS) -> Mapping[str, ProgramCost]:
    """Read the table of counts."""
    rows = json.loads(path.read_text())["programs"]
    return {
        key: ProgramCost(CtaCount(**row["base"]), {name: CtaCount(**slope) for name, slope in row["per"].items()})
        for key, row in rows.items()
    }


def dump_programs(costs: Mapping[str, ProgramCost], about: str) -> str:
    """The table of counts as JSON, a line a program."""
    rows = {
        key: _rounded({"base": asdict(c.base), "per": {n: asdict(s) for n, s in c.per.items()}})
        for key, c in costs.items()
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
    return f'{{"about": {json.dumps(about)},\n"programs": {{\n{lines}\n}}}}\n'


def _rounded(data: object) -> object:
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return round(data, 1) if isinstance(data, float) else data
