"""Attention on a GPU that is not here: the compiled kernels run in the PTX machine, and what they issue is counted, not timed.

FNA's launches and a plain exact flash kernel beside them, one block, batch 1. What is counted, and what a critical path is:
`fna.plugins.ptx.count`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps, usual_steps
from fna.engines.targets import Target
from fna.errors import InvalidArgumentError
from fna.plugins.launch_plan import TILE, AttentionShape, Dtype, all_variants, check_attention_shape
from fna.plugins.programs import Multiprocessors
from fna.plugins.ptx.cases import attention_variants
from fna.plugins.ptx.count import CallSize, LaunchCount, compile_exact, count_attention, count_exact
from fna.plugins.ptx.images import load_images
from fna.plugins.table.build import build_table
from fna.plugins.table.chips import OLDEST_CHIP
from fna.validate.bench.models import BlockSize
from fna.validate.budget.chain import Say

COUNTED_CHIPS = (80, 86, 87, 89, 120)
"""Whose kernels use the tensor-core instructions that have a known rate here; other chips' are counted in their form for sm_80."""

NOT_TIMED = "counted on the compiled kernels in the PTX machine, not timed: no latencies, caches or limit of memory"


class CountedLaunch(BaseModel):
    """One launch. Cycles and sectors are of its costliest program; critical paths are of the launch.

    Attributes:
        name: the kernel.
        programs: CTAs of the grid.
        warps: of a program.
        instructions: that a warp of the costliest program issues, by class.
        wavefronts: of shared memory.
        ideal_wavefronts: without bank conflicts.
        sectors: of global memory, 32 bytes each.
        tensor_cycles: of the tensor cores.
        issue_cycles: of the schedulers.
        memory_cycles: wavefronts, and four sectors a cycle.
        cycles: critical path, the three overlapping.
        serial_cycles: critical path, the three taking turns.
        microseconds: that `cycles` take at the target's clock.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    programs: int
    warps: int
    instructions: dict[str, float]
    wavefronts: float
    ideal_wavefronts: float
    sectors: float
    tensor_cycles: float
    issue_cycles: float
    memory_cycles: float
    cycles: float
    serial_cycles: float
    microseconds: float


class CountedCall(BaseModel):
    """One block's attention.

    Attributes:
        kind: `exact`, or `FNA`.
        landmarks: S; 0 for exact attention.
        core: what FNA's core is.
        launches: in stream order.
        cycles: their critical paths together.
        serial_cycles: the same, resources taking turns.
        microseconds: that `cycles` take at the target's clock.
        over_exact: `cycles` over exact attention's.
        serial_over_exact: the same of `serial_cycles`.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    landmarks: int
    core: str
    launches: tuple[CountedLaunch, ...]
    cycles: float
    serial_cycles: float
    microseconds: float
    over_exact: float
    serial_over_exact: float


class CountedSize(BaseModel):
    """Exact attention and FNA at one number of tokens."""

    model_config = ConfigDict(frozen=True)

    height: int
    width: int
    tokens: int
    heads: int
    head_size: int
    exact: CountedCall
    fna: tuple[CountedCall, ...]


class CountedBench(BaseModel):
    """What `fna bench --count` writes.

    Attributes:
        model: whose blocks they are.
        target: the device.
        multiprocessors: it has.
        clock_ghz: the clock that the vendor's peak rates imply.
        multiply_adds: a cycle of one multiprocessor's tensor cores, fp16, as those rates imply.
        chip: whose compiled kernels were counted, as in sm_87.
        precision: of the inputs.
        counted: that these are counts, in words.
        sizes: one for each resolution.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    target: str
    multiprocessors: int
    clock_ghz: float
    multiply_adds: float
    chip: str
    precision: str
    counted: str = NOT_TIMED
    sizes: tuple[CountedSize, ...]


def count_cycles(
    model: str,
    target: Target,
    sizes: Sequence[BlockSize],
    landmarks: Sequence[tuple[int, ChebyshevSteps | None]],
    *,
    dtype: Dtype = "fp16",
    cache: Path,
    on_step: Say = lambda *_progress: None,
) -> CountedBench:
    """Count one block's attention, exact and FNA.

    Args:
        model: its name.
        target: the device.
        sizes: of the block at each resolution.
        landmarks: S, and the core's steps; None is Newton-Schulz.
        dtype: of the inputs.
        cache: folder of compiled kernels.
        on_step: called with what is being done.

    Raises:
        InvalidArgumentError: for a target on which the plugin's kernels do not run.
        InvalidLandmarksError, InvalidShapeError: for sizes that the kernels do not take.
        MissingCapabilityError: without Triton, which compiles the kernels.
    """
    if target.lowering != "plugin":
        raise InvalidArgumentError(
            f"target {target.name} runs FNA in standard operators, so there are no kernels to count; choose one with the plugin"
        )
    chip = next((sm for sm in target.capabilities if sm in COUNTED_CHIPS), OLDEST_CHIP)
    on = multiprocessors_of(target)

    def call_size(size: BlockSize, count: int = 1, steps: ChebyshevSteps | None = None) -> CallSize:
        return CallSize(size.tokens, size.heads, count, on, dtype, size.head_size, NEWTON_SCHULZ_ITERATIONS, steps)

    for size, (count, _) in product(sizes, landmarks):
        check_attention_shape(AttentionShape(dtype, 1, size.heads, size.tokens, size.head_size, count))
    on_step("compiling kernels")
    names = {
        name for size, (count, steps) in product(sizes, landmarks) for name in _kernels(call_size(size, count, steps))
    }
    build_table(cache, chips=(chip,), variants=[variant for variant in all_variants() if variant.name in names])
    images = load_images(cache)
    counted = []
    for size in sizes:
        on_step(f"counting exact attention of {size.tokens} tokens")
        kernel = compile_exact(chip, size.head_size, dtype)
        exact = _call("exact", 0, "", [count_exact(kernel, call_size(size))], target, None)
        calls = []
        for count, steps in landmarks:
            on_step(f"counting FNA of {size.tokens} tokens, S = {count}")
            launches = count_attention(images, chip, call_size(size, count, steps))
            calls.append(_call("FNA", count, describe_core(steps), launches, target, exact))
        counted.append(CountedSize(**size._asdict(), exact=exact, fna=tuple(calls)))
    return CountedBench(
        model=model, target=target.name, multiprocessors=on.count, clock_ghz=target.clock_ghz, multiply_adds=on.multiply_adds,
        chip=f"sm_{chip}", precision=dtype, sizes=tuple(counted),
    )  # fmt: skip


def _kernels(size: CallSize) -> list[str]:
    return attention_variants(size.dtype, size.landmarks, size.head_size, size.chebyshev)


def usual_cores(landmarks: int) -> tuple[ChebyshevSteps | None, ...]:
    """The cores that are worth a look: Newton-Schulz, and above one tile of landmarks the cheaper one before it."""
    return (None,) if landmarks <= TILE else (usual_steps(landmarks), None)


def multiprocessors_of(target: Target) -> Multiprocessors:
    """How many a target has, and the rate of their tensor cores."""
    return Multiprocessors(target.multiprocessors, target.multiply_adds_a_cycle)


def describe_core(steps: ChebyshevSteps | None) -> str:
    """In words."""
    return "Newton-Schulz" if steps is None else f"Chebyshev, {steps.steps} steps from {steps.low:g}"


def _call(
    kind: str, landmarks: int, core: str, launches: list[LaunchCount], target: Target, exact: CountedCall | None
) -> CountedCall:
    cycles, serial = sum(launch.overlapped for launch in launches), sum(launch.serial for launch in launches)
    return CountedCall(
        kind=kind, landmarks=landmarks, core=core, launches=tuple(_launch(launch, target) for launch in launches), cycles=cycles,
        serial_cycles=serial, microseconds=_microseconds(cycles, target), over_exact=cycles / exact.cycles if exact else 1.0,
        serial_over_exact=serial / exact.serial_cycles if exact else 1.0,
    )  # fmt: skip


def _launch(launch: LaunchCount, target: Target) -> CountedLaunch:
    cta = launch.costliest
    return CountedLaunch(
        name=launch.name, programs=launch.ctas, warps=launch.warps, instructions=launch.classes, wavefronts=cta.wavefronts,
        ideal_wavefronts=cta.ideal_wavefronts, sectors=cta.sectors, tensor_cycles=cta.tensor, issue_cycles=cta.issue,
        memory_cycles=cta.memory, cycles=launch.overlapped, serial_cycles=launch.serial,
        microseconds=_microseconds(launch.overlapped, target),
    )  # fmt: skip


def _microseconds(cycles: float, target: Target) -> float:
    return cycles / target.clock_ghz / 1e3
