"""Count what the programs of each kernel cost, for `fna.plugins.programs`: calls that differ in every length, run and fitted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from fna.chebyshev import ChebyshevSteps
from fna.plugins.launch_plan import HEAD_PADDINGS, LANDMARK_PADDINGS, Dtype
from fna.plugins.programs import (
    CtaCount,
    Multiprocessors,
    ProgramCost,
    Programs,
    attention_programs,
    core_length,
    exact_blocks,
    exact_programs,
)
from fna.plugins.ptx import count_focal
from fna.plugins.ptx.count import CallSize, compile_exact, count_cta, place_attention, place_exact
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.kernel import Kernel
from fna.plugins.ptx.memory import GlobalMemory

COUNTED_DTYPES: tuple[Dtype, ...] = ("fp16", "fp32")

_PROBES = ((1, 1000, 1, 6), (1, 1400, 16, 6), (1, 600, 2, 3), (2, 2000, 1, 8))
"""(heads, tokens, multiprocessors, core's length) of calls that differ in every length that a program's cost grows with."""
_EXACT_BLOCKS = (4, 12)

Wanted = Callable[[str], object]
Samples = dict[str, list[tuple[dict[str, int], CtaCount]]]


def count_programs(images: PtxImages, sm: int, only: str = "") -> Iterator[tuple[str, ProgramCost]]:
    """Count every program of every kernel of FastNystromAttention, of FocalAttention and of exact attention.

    Args:
        images: the compiled kernels.
        sm: whose.
        only: regular expression on the programs' keys.
    """
    wanted = re.compile(only).search
    if not only or wanted("focal"):
        yield from count_focal_programs(images, sm)
    for dtype, block_d in product(COUNTED_DTYPES, HEAD_PADDINGS):
        yield from fit(_exact_samples(sm, dtype, block_d, wanted)).items()
        for s_pad, chebyshev in product(LANDMARK_PADDINGS, (False, True)):
            yield from fit(_attention_samples(images, sm, dtype, s_pad, block_d, chebyshev, wanted)).items()


def count_focal_programs(images: PtxImages, sm: int) -> Iterator[tuple[str, ProgramCost]]:
    """Count every program of every kernel of FocalAttention."""
    for dtype, block_d in product(COUNTED_DTYPES, HEAD_PADDINGS):
        samples: Samples = {}
        for call in count_focal.probes(dtype, block_d):
            for number, (launch, parts) in enumerate(zip(call.plan.launches, call.programs, strict=True)):
                kernel = images.kernel(launch.variant, sm, profile=True)
                if number + 1 < len(call.plan.launches):
                    # What the launches after it read.
                    kernel.launch(call.memory, launch.grid, call.arguments(number))
                lengths = set()
                for programs in parts:
                    if tuple(programs.lengths.items()) not in lengths:
                        lengths.add(tuple(programs.lengths.items()))
                        _add(samples, programs, kernel, call.memory, launch.grid, call.arguments(number))
        yield from fit(samples).items()


def fit(samples: Samples) -> dict[str, ProgramCost]:
    """The base and the slopes that give the counts, by least squares; what did not vary has no slope."""
    return {key: _fit_one(found) for key, found in samples.items()}


def _fit_one(found: list[tuple[dict[str, int], CtaCount]]) -> ProgramCost:
    varied = [name for name in found[0][0] if len({lengths[name] for lengths, _ in found}) > 1]
    system = np.array([[1.0, *(lengths[name] for name in varied)] for lengths, _ in found])
    fields = list(CtaCount.__dataclass_fields__)
    counts = np.array([[getattr(count, name) for name in fields] for _, count in found])
    solved = np.linalg.lstsq(system, counts, rcond=None)[0]
    base, *slopes = (CtaCount(*map(float, row)) for row in solved)
    return ProgramCost(base, dict(zip(varied, slopes, strict=True)))


def _exact_samples(sm: int, dtype: Dtype, head_size: int, wanted: Wanted) -> Samples:
    if not wanted(f"exact-{dtype}-d{head_size}"):
        return {}
    kernel = compile_exact(sm, head_size, dtype)
    samples: Samples = {}
    for count in _EXACT_BLOCKS:
        # The last block is ragged, as it is at nearly every N.
        tokens = count * exact_blocks(dtype, head_size).keys - 1
        size = CallSize(tokens, 1, 1, Multiprocessors(1), dtype, head_size)
        memory, grid, arguments = place_exact(size)
        (programs,) = exact_programs(dtype, tokens, 1, head_size)
        _add(samples, programs, kernel, memory, grid, arguments)
    return samples


def _attention_samples(
    images: PtxImages, sm: int, dtype: Dtype, s_pad: int, block_d: int, chebyshev: bool, wanted: Wanted
) -> Samples:
    samples: Samples = {}
    for heads, tokens, multiprocessors, length in _PROBES:
        steps = ChebyshevSteps(length, 0.05) if chebyshev else None
        size = CallSize(tokens, heads, s_pad, Multiprocessors(multiprocessors), dtype, block_d, length, steps)
        call = place_attention(size)
        launches = attention_programs(call.plan, call.shape, multiprocessors, core_length(length, steps))
        seen: set[str] = set()
        for launch, parts in zip(call.plan.launches, launches, strict=True):
            for programs in parts:
                if programs.key not in seen and wanted(programs.key):
                    seen.add(programs.key)
                    kernel = images.kernel(launch.variant, sm, profile=True)
                    _add(samples, programs, kernel, call.memory, launch.grid, call.arguments(launch))
    return samples


def _add(
    samples: Samples,
    programs: Programs,
    kernel: Kernel,
    memory: GlobalMemory,
    grid: tuple[int, int, int],
    arguments: list[int | float],
) -> None:
    profile = kernel.launch(memory, grid, arguments, only=[programs.first])
    found = dict(programs.lengths), count_cta(kernel, profile, programs.first)
    samples.setdefault(programs.key, []).append(found)
