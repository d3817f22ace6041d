"""Which kernels run, in which order, with which grids, arguments and scratch: the one description of a launch sequence.

`attention_plan` is pure arithmetic, as are `sampling_plan.py` and `focal_plan.py`. The ahead-of-time build enumerates its variants
from here, PyTorch's CUDA path and the tests execute these plans, and `plugins/src/` has the same arithmetic in C++ (a test runs both
and compares every launch). The numbers stand here only: the build of the table writes them into a C++ header.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from fna.chebyshev import ChebyshevSteps, chebyshev_interval
from fna.errors import InvalidArgumentError, InvalidLandmarksError, InvalidShapeError

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

MAX_LANDMARKS = 256
MAX_HEAD_SIZE = 128
HEAD_SIZE_STEP = 16
MAX_GRID_Y = 65535
MAX_STRIDE = 2**31 - 1
ALIGNMENT = 256
POINTER_ALIGNMENT = 16
"""Bytes; the kernels read rows of their tensors in vectors."""

TILE = 64
LANDMARK_PADDINGS = (TILE, 2 * TILE, 4 * TILE)
HEAD_PADDINGS = (64, 128)
FINISH_COLUMNS = 16
CHEBYSHEV_COLUMNS = 16
"""Columns of the values per program of the last launch before the output: fewer are more programs that each read the matrices."""
MAX_QUERY_TILES = 8

MAX_ITERATIONS = 64

NO_MASK, MASK_ALL, MASK_BUT_SINKS = 0, 1, 2
"""The kernels' `mask_mode`; without a mask they do not read `key_mask`, so any address stands for it."""

WAVES = 2
"""Programs per multiprocessor of the largest GPU: no split of the keys makes more."""

MAX_MULTIPROCESSORS = 256
"""The split of the keys counts no more, so that scratch can be sized without knowing the GPU."""

SPLIT_JOINED = 2
"""What a split adds to a program of the launch after it: in tenths of a block of keys, by count."""

SPLIT_SIZES = 32
"""Sizes of a split that are weighed against one another."""

FPS_ONE_LAUNCH_TOKENS = 1024
FPS_ONE_LAUNCH_BYTES = 256 * 1024
"""One program per image rereads its tokens at every step: worth it while they stay in the cache beside it (estimate)."""
FPS_TILE = 64

MAX_HOT = 64
"""Hot keys of focal attention."""

NORM_GRID_TOKENS = 16384
NORM_GRID_BY_NORM = 32


@dataclass(frozen=True)
class KernelVariant:
    """One compiled form of a kernel: its name, the type of its tensors, padded landmarks and padded head size.

    `landmarks` and `head_size` are 0 where the kernel does not depend on them. For the sampling kernels `head_size` is 16
    where the number of channels is a multiple of 16, so that rows are read in vectors.
    """

    kernel: str
    dtype: Dtype
    landmarks: int = 0
    head_size: int = 0

    @property
    def name(self) -> str:
        """Readable and unique, such as `output-fp16-s64-d64`."""
        sizes = [f"s{self.landmarks}"] * bool(self.landmarks) + [f"d{self.head_size}"] * bool(self.head_size)
        return "-".join([self.kernel, self.dtype, *sizes])


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Arguments are in the kernel's order: a string names a tensor or a buffer, a number is itself."""

    variant: KernelVariant
    grid: tuple[int, int, int]
    arguments: tuple[str | int | float, ...]


@dataclass(frozen=True)
class Buffer:
    """A piece of scratch: `offset` and `size` in bytes from the start of the workspace."""

    offset: int
    size: int


@dataclass(frozen=True)
class LaunchPlan:
    """Launches in stream order, and the scratch that they share."""

    launches: tuple[Launch, ...]
    buffers: dict[str, Buffer] = field(default_factory=dict)

    @property
    def workspace_bytes(self) -> int:
        """Scratch needed, a multiple of 256."""
        return max((aligned(b.offset + b.size) for b in self.buffers.values()), default=0)


@dataclass(frozen=True)
class Strides:
    """Element strides of `[B, H, N, D]` over batch, head and token; the last dimension is contiguous."""

    batch: int
    head: int
    token: int


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one call: B, H, N, D, S; whether landmarks, bias and mask are per batch item or shared; if there is a mask."""

    dtype: Dtype
    batch: int
    heads: int
    tokens: int
    head_size: int
    landmarks: int
    shared_landmarks: bool = False
    shared_bias: bool = False
    masked: bool = False
    shared_mask: bool = False


def chebyshev_arguments(chebyshev: ChebyshevSteps) -> tuple[int, float, float, float]:
    """What the kernel takes: the steps; middle of the spectrum, its ratio to half the width, and half the width.

    `low` counts as a file holds it, in fp32.
    """
    middle, half_width = chebyshev_interval(chebyshev.steps, _as_fp32(chebyshev.low))
    return chebyshev.steps, _as_fp32(middle), _as_fp32(middle / half_width), _as_fp32(half_width)


def _as_fp32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def aligned(size: int) -> int:
    """Round up to the alignment of the scratch buffers."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def padded_landmarks(count: int) -> int:
    """S_PAD: the smallest padding that holds `count` landmarks."""
    return next(padding for padding in LANDMARK_PADDINGS if count <= padding)


def padded_head_size(head_size: int) -> int:
    """BLOCK_D: the smallest padding that holds `head_size` channels."""
    return next(padding for padding in HEAD_PADDINGS if head_size <= padding)


@dataclass(frozen=True)
class CoreBlocks:
    """How a core is kept: fp32 matrices [S_PAD, S_PAD] of scratch for a head (two of fp16 count as one), and whether it is worked
    on in registers, where it fits, or through that scratch.

    `length` is what its program of the first launch takes, in tenths of a block of keys: by count (`fna.plugins.programs`), at D =
    64 and six iterations. It is 0 where the core takes more than one launch. `split_start` is what a split beside it takes besides
    its keys, likewise: nothing where tensor cores bound it.
    """

    matrices: int
    in_registers: bool
    length: int
    split_start: int = 8


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the attention kernels for one type, padded number of landmarks and padded head size.

    Attributes:
        landmarks: S_PAD.
        head_size: BLOCK_D.
        key_block: keys per step of the landmark kernel; a split is a multiple of it.
        landmark_rows: landmark queries per program of the landmark kernel.
        query_block: queries per tile of the output kernel.
        query_prologue: what a program of the output kernel takes beside its tiles, in halves of a tile, by count.
        landmark_block: landmarks per step of the output kernel; kp and vp stay on chip where it is S_PAD.
        newton_schulz: Z and W, and through scratch also A, T and Y.
        chebyshev: A and T.
    """

    landmarks: int
    head_size: int
    key_block: int
    landmark_rows: int
    query_block: int
    query_prologue: int
    landmark_block: int
    newton_schulz: CoreBlocks
    chebyshev: CoreBlocks

    @property
    def row_tiles(self) -> int:
        """Programs of the landmark kernel that share the landmarks of one stretch of keys."""
        return self.landmarks // self.landmark_rows


def blocks_of(dtype: Dtype, s_pad: int, block_d: int) -> Blocks:
    """Choose the blocks: as large as registers and shared memory allow."""
    if dtype == "fp32":
        step = 32 if block_d == 64 else 16
        lengths = {TILE: (230, 20), 2 * TILE: (1900, 120)}.get(s_pad, (0, 0))
        cores = CoreBlocks(5, False, lengths[0]), CoreBlocks(2, False, lengths[1])
        return Blocks(s_pad, block_d, step, TILE, 64, 1, step, *cores)
    # Where a program's registers hold only half of the scores at once, landmarks come in tiles of 64.
    held = s_pad if block_d > 64 and s_pad <= 2 * TILE else TILE
    lengths = {TILE: (93, 22), 2 * TILE: (1390, 46)}.get(s_pad, (0, 0))
    newton_schulz = CoreBlocks(2, True, lengths[0]) if s_pad == TILE else CoreBlocks(5, False, lengths[0])
    if s_pad == block_d == TILE:
        newton_schulz = CoreBlocks(2, True, 115, 0)  # `landmark_tiles`
    chebyshev = CoreBlocks(1, True, lengths[1]) if s_pad <= 2 * TILE else CoreBlocks(2, False, 0)
    # Four warps hold keys and values of 64 landmarks beside 64 queries, not beside 128.
    queries, prologue = (TILE, 4) if s_pad == block_d == TILE else (2 * TILE if block_d == TILE else TILE, 1)
    return Blocks(s_pad, block_d, 64, min(s_pad, 2 * TILE), queries, prologue, held, newton_schulz, chebyshev)


def all_blocks(dtype: Dtype) -> tuple[Blocks, ...]:
    """Every choice for a type, smallest paddings first."""
    return tuple(blocks_of(dtype, s_pad, block_d) for s_pad in LANDMARK_PADDINGS for block_d in HEAD_PADDINGS)


def call_blocks(shape: AttentionShape) -> Blocks:
    """Return the blocks for one call."""
    return blocks_of(shape.dtype, padded_landmarks(shape.landmarks), padded_head_size(shape.head_size))


def check_attention_shape(shape: AttentionShape) -> None:
    """Refuse, naming the value, what the kernels do not cover."""
    if shape.dtype not in DTYPES:
        raise InvalidArgumentError(f"the kernels take fp32, fp16 and bf16, but {shape.dtype} was given")
    for name, value in (("B", shape.batch), ("H", shape.heads), ("N", shape.tokens)):
        if value < 1:
            raise InvalidShapeError(f"{name} is {value}, but at least 1 is needed")
    if shape.head_size < 1 or shape.head_size > MAX_HEAD_SIZE or shape.head_size % HEAD_SIZE_STEP:
        raise InvalidShapeError(
            f"head size D is {shape.head_size}, but the kernels take multiples of {HEAD_SIZE_STEP} up to {MAX_HEAD_SIZE}"
        )
    if shape.landmarks < 1 or shape.landmarks > min(MAX_LANDMARKS, shape.tokens):
        raise InvalidLandmarksError(
            f"{shape.landmarks} landmarks were given for {shape.tokens} tokens, but the kernels take 1 to "
            f"{min(MAX_LANDMARKS, shape.tokens)}"
        )
    elements = shape.heads * shape.tokens * shape.head_size
    if elements > MAX_STRIDE:
        raise InvalidShapeError(f"H * N * D is {elements} elements, but the kernels take at most {MAX_STRIDE}")
    if shape.batch * shape.heads > MAX_GRID_Y:
        raise InvalidShapeError(f"B * H is {shape.batch * shape.heads}, but the kernels take at most {MAX_GRID_Y}")


def end_of_programs(programs: Iterable[tuple[int, float]], multiprocessors: int) -> float:
    """When the last program of a launch ends: each goes, in order, to the multiprocessor that is free first.

    Args:
        programs: in order, how many take how long.
        multiprocessors: how many there are.
    """
    free = [0.0] * multiprocessors
    for count, length in programs:
        left = count
        while left:
            if left >= multiprocessors and max(free) - free[0] <= length:
                # All take their turn before any takes two: whole rounds.
                free = [until + left // multiprocessors * length for until in free]
                left %= multiprocessors
            else:
                heapq.heapreplace(free, free[0] + length)
                left -= 1
    return max(free)


def split_keys(shape: AttentionShape, multiprocessors: int, *, chebyshev: bool = False) -> tuple[int, int]:
    """(splits, tokens per split), every split holding at least one token: the fewest splits of those that end soonest."""
    blocks = call_blocks(shape)
    key_blocks = -(-shape.tokens // blocks.key_block)
    there = min(multiprocessors, MAX_MULTIPROCESSORS)
    heads = shape.batch * shape.heads
    core = blocks.chebyshev if chebyshev else blocks.newton_schulz
    most = -(-WAVES * (MAX_MULTIPROCESSORS if core.length else there) // (heads * blocks.row_tiles))
    joining = -(-heads * (blocks.head_size // (CHEBYSHEV_COLUMNS if chebyshev else FINISH_COLUMNS)) // there)

    def end(per_split: int) -> float:
        splits = -(-key_blocks // per_split)
        whole, last = (core.split_start + 10 * keys for keys in (per_split, key_blocks - (splits - 1) * per_split))
        programs = heads * blocks.row_tiles
        launch = ((heads, core.length), (programs * (splits - 1), whole), (programs, last))
        return end_of_programs(launch, there) + SPLIT_JOINED * splits * joining

    shortest = -(-key_blocks // min(key_blocks, max(1, most)))
    step = -(-key_blocks // SPLIT_SIZES)
    per_split = min(range(key_blocks, shortest - 1, -step), key=end) if core.length else shortest
    return -(-key_blocks // per_split), per_split * blocks.key_block


def core_programs(s_pad: int, step: int) -> int:
    """Programs per head that form A or iterate: one up to S_PAD = 128; above, one a row tile of A, then one a tile of a product."""
    tiles = s_pad // TILE
    return 1 if tiles <= 2 else tiles if step == 0 else tiles**2


def query_tiles(shape: AttentionShape, multiprocessors: int) -> int:
    """Query tiles per program of the output kernel: the number that takes the fewest rounds of the multiprocessors, in tiles."""
    blocks = call_blocks(shape)
    tiles = -(-shape.tokens // blocks.query_block)
    heads, there = shape.batch * shape.heads, min(multiprocessors, MAX_MULTIPROCESSORS)

    def half_tiles(share: int) -> int:
        programs = -(-tiles // share) * heads
        rounds = -(-programs // there)
        return rounds * (2 * share + blocks.query_prologue)

    return min(range(1, MAX_QUERY_TILES + 1), key=half_tiles)


def attention_buffers(shape: AttentionShape, splits: int, *, chebyshev: bool = False) -> dict[str, Buffer]:
    """Scratch of one call, each buffer aligned to 256 bytes; see `fna.plugins.kernels.attention` for the layouts."""
    return _attention_buffers(shape, shape.batch * shape.heads * splits, chebyshev)


def workspace_bound(shape: AttentionShape, *, chebyshev: bool = False) -> int:
    """Scratch that is enough for `shape`, every smaller B, H, N, D and S of it, and every GPU, in bytes.

    B * H * splits is at most WAVES * MAX_MULTIPROCESSORS / (row tiles) + B * H, however B * H is made up.
    """
    most = -(-WAVES * MAX_MULTIPROCESSORS // call_blocks(shape).row_tiles) + shape.batch * shape.heads
    buffers = _attention_buffers(shape, most, chebyshev)
    return max(aligned(b.offset + b.size) for b in buffers.values())


def _attention_buffers(shape: AttentionShape, head_splits: int, chebyshev: bool) -> dict[str, Buffer]:
    blocks = call_blocks(shape)
    core = blocks.chebyshev if chebyshev else blocks.newton_schulz
    s_pad, block_d = blocks.landmarks, blocks.head_size
    rows = shape.batch * shape.heads * s_pad
    sizes = {
        "partial": head_splits * s_pad * block_d * 4,
        "stats": head_splits * s_pad * 2 * 4,
        "matrices": rows * core.matrices * s_pad * 4,
        "colsum": rows * (s_pad // TILE) * 4,
        "exact": rows * block_d * 4,
        "mixed": rows * block_d * ELEMENT_BYTES[shape.dtype],
        "mixed_scale": shape.batch * shape.heads * block_d * 4,
        "between": rows * (3 if chebyshev else 2) * block_d * 4,
    }
    return lay_out(sizes)


def attention_plan(
    shape: AttentionShape,
    *,
    scale: float,
    iterations: int,
    exact_rows: bool,
    multiprocessors: int,
    strides: Strides | None = None,
    out_strides: Strides | None = None,
    sink: bool = False,
    chebyshev: ChebyshevSteps | None = None,
) -> LaunchPlan:
    """Plan one call of FastNystromAttention.

    Args:
        shape: the sizes; checked.
        scale: factor on the scores.
        iterations: Newton-Schulz iterations, at least 1; without meaning where `chebyshev` is given.
        exact_rows: write Bv over the landmarks' rows.
        multiprocessors: of the GPU, which decides the split of the keys.
        strides: of query, key and value (one for all three); linear `[B, H, N, D]` if None.
        out_strides: of the output; linear if None.
        sink: masked queries see masked keys; means nothing without a mask.
        chebyshev: the cheaper core instead of Newton-Schulz.
    """
    check_attention_shape(shape)
    if iterations < 1 or iterations > MAX_ITERATIONS:
        raise InvalidArgumentError(f"iterations is {iterations}, but the kernels take 1 to {MAX_ITERATIONS}")
    linear = Strides(shape.heads * shape.tokens * shape.head_size, shape.tokens * shape.head_size, shape.head_size)
    taken, written = strides or linear, out_strides or linear
    blocks = call_blocks(shape)
    s_pad, block_d = blocks.landmarks, blocks.head_size
    bh = shape.batch * shape.heads
    splits, split_tokens = split_keys(shape, multiprocessors, chebyshev=chebyshev is not None)
    landmark_stride = 0 if shape.shared_landmarks else shape.landmarks
    bias_stride = 0 if shape.shared_bias else shape.landmarks
    mask_stride = shape.tokens if shape.masked and not shape.shared_mask else 0
    mask_mode = (MASK_BUT_SINKS if sink else MASK_ALL) if shape.masked else NO_MASK
    sizes = (shape.heads, shape.tokens, shape.landmarks, shape.head_size, taken.batch, taken.head, taken.token)

    jobs = splits * blocks.row_tiles
    core = "" if chebyshev is None else "_chebyshev"
    dependent_products = 3 * (iterations - 1) + 1 if chebyshev is None else 1
    steps = 1 + dependent_products if s_pad > 2 * TILE else 1
    launches = []
    for step in range(steps):
        first_job, end_job = jobs * step // steps, jobs * (step + 1) // steps
        launches.append(
            Launch(
                KernelVariant("landmark" + core, shape.dtype, s_pad, block_d),
                (bh, core_programs(s_pad, step) + end_job - first_job, 1),
                ("query", "key", "value", "landmarks", "bias", "key_mask", "partial", "stats", "matrices", "colsum")
                + (*sizes, landmark_stride, bias_stride, mask_stride, mask_mode)
                + (splits, split_tokens, first_job, step, iterations - 1, scale),
            )
        )
    joined = ("partial", "stats", "matrices", "colsum", "exact", "mixed", "mixed_scale", "between")
    columns = FINISH_COLUMNS if chebyshev is None else CHEBYSHEV_COLUMNS
    joining: tuple[str | int | float, ...]
    if chebyshev is None:
        joining = (*joined, splits, shape.landmarks, block_d, int(iterations == 1))
    else:
        sizes_and_strides = (*sizes[:4], block_d, *sizes[4:], landmark_stride)
        joining = (*joined, "value", "landmarks", *sizes_and_strides, splits, *chebyshev_arguments(chebyshev))
    launches.append(Launch(KernelVariant("finish" + core, shape.dtype, s_pad), (bh, block_d // columns, 1), joining))
    tiles = query_tiles(shape, multiprocessors)
    per_program = tiles * blocks.query_block
    # Sinks: all rows without the masked keys, then the rows of the masked queries with them.
    for mode in (MASK_ALL, MASK_BUT_SINKS) if mask_mode == MASK_BUT_SINKS else (mask_mode,):
        launches.append(
            Launch(
                KernelVariant("output", shape.dtype, s_pad, block_d),
                (-(-shape.tokens // per_program), bh, 1),
                ("query", "key", "landmarks", "bias", "key_mask", "exact", "mixed", "mixed_scale", "out", *sizes)
                + (written.batch, written.head, written.token, landmark_stride, bias_stride, mask_stride, mode)
                + (tiles, int(exact_rows), scale),
            )
        )
    return LaunchPlan(tuple(launches), attention_buffers(shape, splits, chebyshev=chebyshev is not None))


def all_variants() -> tuple[KernelVariant, ...]:
    """Every variant that a plan can name: what the ahead-of-time build compiles."""
    return (
        *(
            KernelVariant(kernel, dtype, s_pad, block_d)
            for kernel in ("landmark", "landmark_chebyshev", "output")
            for dtype in DTYPES
            for s_pad in LANDMARK_PADDINGS
            for block_d in HEAD_PADDINGS
        ),
        *(KernelVariant(k, t, 0, d) for k in ("focal_hot", "focal") for t in DTYPES for d in HEAD_PADDINGS),
        *(KernelVariant(k, t, s) for k in ("finish", "finish_chebyshev") for t in DTYPES for s in LANDMARK_PADDINGS),
        *(KernelVariant(name, t, 0, c) for name in ("fps", "fps_step", "norms") for t in DTYPES for c in (0, 16)),
        KernelVariant("norm_grid", "fp32"),
    )


def lay_out(sizes: dict[str, int]) -> dict[str, Buffer]:
    """Buffers of these sizes in bytes, each aligned, one after the other."""
    buffers, offset = {}, 0
    for name, size in sizes.items():
        buffers[name] = Buffer(offset, size)
        offset = aligned(offset + size)
    return buffers
