"""Calls that bring every compiled kernel to run in the machine, and what each has to give."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fna.attention import NEWTON_SCHULZ_ITERATIONS, nystrom_attention_reference
from fna.chebyshev import ChebyshevSteps
from fna.focal import focal_attention
from fna.focal_keys import Levels, focal_keys
from fna.plugins.focal_plan import LIST_BLOCK
from fna.plugins.launch_plan import DTYPES, Dtype, padded_head_size, padded_landmarks
from fna.plugins.ptx.calls import Call, Chip, Surroundings, run_attention, run_focal, run_norm_grid, run_sampling
from fna.plugins.torch_ops import DTYPE_NAMES
from fna.samplers.common.roles import norm_grid_count
from fna.samplers.fps import farthest_points_reference
from fna.samplers.norm_grid import norm_grid_reference

TOLERANCES: dict[Dtype, float] = {"fp16": 8e-4, "bf16": 4e-3, "fp32": 2e-6}
"""Largest relative 2-norm of a whole call's error against the definition in fp64."""

PLAIN = Surroundings()
UNUSUAL = Surroundings(poison=0x7F, shuffle_seed=1, packed=True)
SHUFFLED = Surroundings(shuffle_seed=2)
ZEROS = Surroundings(poison=0)

TORCH_TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def attention_variants(dtype: Dtype, landmarks: int, head_size: int, chebyshev: ChebyshevSteps | None) -> list[str]:
    """Names of the kernels that one call runs."""
    s_pad, block_d = padded_landmarks(landmarks), padded_head_size(head_size)
    sizes, core = f"{dtype}-s{s_pad}", "" if chebyshev is None else "_chebyshev"
    return [f"landmark{core}-{sizes}-d{block_d}", f"finish{core}-{sizes}", f"output-{sizes}-d{block_d}"]


@dataclass(frozen=True)
class Outcome:
    """What a case showed: its error (landmarks: how many differ), what is allowed, and faults in words."""

    error: float
    tolerance: float
    faults: list[str]
    complete: bool
    seconds: float

    @property
    def passed(self) -> bool:
        """Right, whole and without a fault."""
        return self.error <= self.tolerance and self.complete and not self.faults


@dataclass(frozen=True)
class AttentionCase:
    """One call of FastNystromAttention."""

    dtype: Dtype
    landmarks: int
    head_size: int
    tokens: int = 131
    batch: int = 1
    heads: int = 1
    mask: Literal["none", "keys", "sinks"] = "none"
    exact_rows: bool = True
    iterations: int = NEWTON_SCHULZ_ITERATIONS
    chebyshev: ChebyshevSteps | None = None
    hostile_landmarks: bool = False
    """Indices that are no token's, in the places where padding would be read; they are clamped, so what they give is known."""
    surroundings: Surroundings = PLAIN
    spread: float = 1.0
    """Standard deviation of query, key and value: wide ones attend to few tokens."""

    @property
    def name(self) -> str:
        """Readable."""
        size = f"{self.batch}x{self.heads}x{self.tokens}x{self.head_size}"
        marks = ["packed"] * self.surroundings.packed + ["hostile"] * self.hostile_landmarks
        marks += ["chebyshev"] * (self.chebyshev is not None) + ["wide"] * (self.spread > 1)
        return " ".join([f"attention {self.dtype} {size} S={self.landmarks} mask={self.mask}", *marks])

    @property
    def variants(self) -> list[str]:
        """The kernels that it runs."""
        return attention_variants(self.dtype, self.landmarks, self.head_size, self.chebyshev)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value, landmarks, bias and mask, the same at every call."""
        generator = torch.Generator().manual_seed(self.landmarks * 1000 + self.tokens)
        shape = self.batch, self.heads, self.tokens, self.head_size
        query, key, value = (
            (self.spread * torch.randn(shape, generator=generator)).to(TORCH_TYPES[self.dtype]) for _ in range(3)
        )
        rows = [torch.randperm(self.tokens, generator=generator)[: self.landmarks] for _ in range(self.batch)]
        landmarks = torch.stack(rows).int()
        if self.hostile_landmarks:
            landmarks[:, -3:] = torch.tensor([-1, self.tokens, 2**31 - 1], dtype=torch.int32)
        bias = torch.rand(self.batch, self.landmarks, generator=generator)
        mask = (torch.rand(1, self.tokens, generator=generator) < 0.2).int()
        return query, key, value, landmarks, bias, None if self.mask == "none" else mask

    def run(self, chip: Chip) -> Call:
        """Run it in the machine."""
        query, key, value, landmarks, bias, mask = self.inputs()
        return run_attention(
            chip, query, key, value, landmarks, bias, key_mask=mask, sink=self.mask == "sinks", iterations=self.iterations,
            exact_rows=self.exact_rows, chebyshev=self.chebyshev, surroundings=self.surroundings,
        )  # fmt: skip

    def error(self, call: Call) -> float:
        """Relative 2-norm against the definition in fp64."""
        query, key, value, landmarks, bias, mask = self.inputs()
        wanted = nystrom_attention_reference(
            query.double(), key.double(), value.double(), landmarks.clamp(0, self.tokens - 1), bias.double(),
            self.head_size**-0.5, self.iterations, self.exact_rows, mask, self.mask == "sinks", self.chebyshev,
        )  # fmt: skip
        return _relative_error(call.out, wanted)

    @property
    def tolerance(self) -> float:
        """The largest error that passes."""
        return TOLERANCES[self.dtype]


@dataclass(frozen=True)
class SamplingCase:
    """One call of a landmark operator on features in which tokens occur twice, so that ties have to be broken."""

    sampler: Literal["fps", "norm-grid"]
    dtype: Dtype
    tokens: int
    channels: int
    landmarks: int = 12
    surroundings: Surroundings = PLAIN
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """Readable."""
        return f"{self.sampler} {self.dtype} {self.tokens}x{self.channels} S={self.landmarks}"

    @property
    def variants(self) -> list[str]:
        """The kernels that it runs."""
        aligned = "-d16" if self.channels % 16 == 0 else ""
        if self.sampler == "norm-grid":
            return [f"norms-{self.dtype}{aligned}", "norm_grid-fp32"]
        return [f"{'fps' if self.tokens <= 1024 else 'fps_step'}-{self.dtype}{aligned}"]

    def features(self) -> Tensor:
        """[2, N, C], the same at every call."""
        generator = torch.Generator().manual_seed(self.tokens + self.channels)
        features = torch.randn(2, self.tokens, self.channels, generator=generator)
        half = self.tokens // 2
        features[:, half : 2 * half] = features[:, :half]
        return features.to(TORCH_TYPES[self.dtype])

    def run(self, chip: Chip) -> Call:
        """Run it in the machine."""
        if self.sampler == "fps":
            return run_sampling(chip, self.features(), self.landmarks, surroundings=self.surroundings)
        by_norm = norm_grid_count(self.landmarks, 1)
        return run_norm_grid(
            chip, self.features(), self.landmarks, prefix=1, by_norm=by_norm, surroundings=self.surroundings
        )

    def error(self, call: Call) -> float:
        """How many landmarks differ from the definition's."""
        if self.sampler == "fps":
            wanted = farthest_points_reference(self.features(), self.landmarks)
        else:
            wanted = norm_grid_reference(self.features(), self.landmarks, 1)
        return float((call.out != wanted).sum())


@dataclass(frozen=True)
class FocalCase:
    """One call of FocalAttention."""

    dtype: Dtype
    patches: tuple[int, int]
    head_size: int = 64
    tile: int = 8
    levels: Levels = ((1, 0), (2, 2))
    hot: int = 16
    prefix_tokens: int = 1
    batch: int = 1
    heads: int = 1
    masked: bool = False
    surroundings: Surroundings = PLAIN

    @property
    def name(self) -> str:
        """Readable."""
        size = f"{self.batch}x{self.heads}x{self.patches[0]}*{self.patches[1]}+{self.prefix_tokens}x{self.head_size}"
        marks = ["masked"] * self.masked + ["packed"] * self.surroundings.packed
        return " ".join([f"focal {self.dtype} {size} tile={self.tile} hot={self.hot}", *marks])

    @property
    def variants(self) -> list[str]:
        """The kernels that it runs."""
        size = f"{self.dtype}-d{padded_head_size(self.head_size)}"
        return [f"focal_hot-{size}"] * (self.hot > 0 or self.masked) + [f"focal-{size}"]

    def inputs(self) -> tuple[list[Tensor], Tensor | None]:
        """Query, key and value, and the mask, the same at every call."""
        tokens = self.prefix_tokens + self.patches[0] * self.patches[1]
        generator = torch.Generator().manual_seed(tokens)
        shape = self.batch, self.heads, tokens, self.head_size
        tensors = [torch.randn(shape, generator=generator).to(TORCH_TYPES[self.dtype]) for _ in range(3)]
        mask = (torch.rand(self.batch, tokens, generator=generator) < 0.2).int()
        return tensors, mask if self.masked else None

    def run(self, chip: Chip) -> Call:
        """Run it in the machine."""
        (query, key, value), mask = self.inputs()
        lists = focal_keys(self.patches, self.prefix_tokens, self.tile, self.levels).tensors()[:3]
        return run_focal(
            chip, query, key, value, lists, prefix_tokens=self.prefix_tokens, hot=self.hot, key_mask=mask,
            surroundings=self.surroundings,
        )  # fmt: skip

    def error(self, call: Call) -> float:
        """Relative 2-norm against the definition in fp64."""
        (query, key, value), mask = self.inputs()
        wanted = focal_attention(
            query.double(), key.double(), value.double(), patches=self.patches, prefix_tokens=self.prefix_tokens,
            tile=self.tile, levels=self.levels, hot=self.hot, key_mask=mask,
        )  # fmt: skip
        return _relative_error(call.out, wanted)

    @property
    def tolerance(self) -> float:
        """The largest error that passes."""
        return TOLERANCES[self.dtype]


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    found = found.double()
    return float((found - wanted).norm() / wanted.norm()) if found.isfinite().all() else float("inf")


Case = AttentionCase | FocalCase | SamplingCase


def judge(case: Case, chip: Chip) -> Outcome:
    """Run a case and compare."""
    start = time.monotonic()
    call = case.run(chip)
    seconds = time.monotonic() - start
    faults = [str(report) for report in call.memory.reports.faults]
    return Outcome(case.error(call), case.tolerance, faults, call.complete, seconds)


def all_cases() -> Iterator[Case]:
    """Every kernel at least twice: once plain, once with all that is unusual; each number of padded landmarks with its edges."""
    for dtype in DTYPES:
        for head_size, wide in ((64, 128), (48, 80)):
            for small, large in ((33, 64), (65, 128), (129, 256)):
                # The iterations are a loop or as many launches: two show as much as six where six take minutes.
                iterations = NEWTON_SCHULZ_ITERATIONS if large == 64 or dtype == "fp16" else 2
                tokens = 131 if large < 256 else 271
                yield AttentionCase(dtype, large, head_size, tokens, batch=2, iterations=iterations, surroundings=ZEROS)
                yield AttentionCase(
                    dtype, small, wide, tokens, heads=2, mask="sinks", iterations=iterations, surroundings=UNUSUAL
                )
                yield AttentionCase(
                    dtype, small, head_size, tokens + 64, mask="keys", exact_rows=False, iterations=3, hostile_landmarks=True,
                    surroundings=UNUSUAL,
                )  # fmt: skip
                yield AttentionCase(
                    dtype, large, head_size, tokens, batch=2, chebyshev=ChebyshevSteps(8, 0.05), surroundings=ZEROS
                )
                yield AttentionCase(
                    dtype, small, wide, tokens, heads=2, mask="sinks", chebyshev=ChebyshevSteps(3, 0.1),
                    hostile_landmarks=True, surroundings=UNUSUAL,
                )  # fmt: skip
        yield AttentionCase(dtype, 1, 16, 1, iterations=1)
        yield AttentionCase(dtype, 1, 16, 1, chebyshev=ChebyshevSteps(1, 0.3))
        yield from focal_cases(dtype)
        for channels in (37, 48):
            yield SamplingCase("fps", dtype, 261, channels, surroundings=SHUFFLED)
            yield SamplingCase("fps", dtype, 1100, channels, surroundings=SHUFFLED)
            yield SamplingCase("norm-grid", dtype, 261, channels, surroundings=SHUFFLED)


def focal_cases(dtype: Dtype) -> Iterator[FocalCase]:
    """Ragged edges, registers, tiles of several programs, one program a head for the hot keys and several, masks, no hot keys."""
    three = ((1, 0), (2, 2), (4, 6))
    for head_size, wide in ((64, 128), (48, 80)):
        yield FocalCase(dtype, (21, 19), head_size, levels=three, prefix_tokens=5, batch=2, surroundings=ZEROS)
        yield FocalCase(dtype, (30, 27), head_size, levels=three, hot=20, masked=True, surroundings=UNUSUAL)
        yield FocalCase(
            dtype, (13, 10), wide, tile=9, hot=64, prefix_tokens=0, heads=2, masked=True, surroundings=UNUSUAL
        )
        yield FocalCase(dtype, (9, 9), wide, tile=4, hot=0, surroundings=SHUFFLED)
    yield FocalCase(dtype, (1, 1), 16, tile=1, hot=1)


def quick_cases() -> Iterator[Case]:
    """A part of them for every day: each kernel, type and number of padded landmarks."""
    yield AttentionCase("fp16", 64, 64, 261, heads=2, surroundings=ZEROS)
    yield AttentionCase("fp16", 33, 48, 131, mask="sinks", hostile_landmarks=True, surroundings=UNUSUAL)
    yield AttentionCase("fp16", 33, 64, 131, spread=3.0)
    yield AttentionCase("bf16", 128, 64, 131, iterations=2, mask="keys", surroundings=UNUSUAL)
    yield AttentionCase("fp32", 33, 64, 131, mask="keys", hostile_landmarks=True, surroundings=UNUSUAL)
    yield AttentionCase("fp16", 200, 64, 203, iterations=1, exact_rows=False)
    yield AttentionCase("fp16", 128, 64, 331, heads=2, chebyshev=ChebyshevSteps(8, 0.05), surroundings=ZEROS)
    yield AttentionCase("bf16", 96, 64, 131, mask="keys", chebyshev=ChebyshevSteps(10, 0.03), surroundings=UNUSUAL)
    yield AttentionCase(
        "fp32", 33, 64, 131, mask="sinks", chebyshev=ChebyshevSteps(8, 0.05), hostile_landmarks=True, surroundings=UNUSUAL,
    )  # fmt: skip
    yield FocalCase("fp16", (30, 27), levels=((1, 0), (2, 2), (4, 6)), hot=20, masked=True, surroundings=UNUSUAL)
    # With the hot keys, a list as long as what is prepared at a time: the last step reads past it.
    yield FocalCase("fp16", (8, LIST_BLOCK // 8 - 2), levels=((1, 0),), prefix_tokens=0)
    yield FocalCase("bf16", (13, 10), tile=9, prefix_tokens=5, heads=2, surroundings=ZEROS)
    yield FocalCase("fp32", (11, 9), 48, tile=4, hot=64, masked=True, surroundings=UNUSUAL)
    for channels in (37, 48):
        yield SamplingCase("fps", "fp32", 261, channels, surroundings=SHUFFLED)
        yield SamplingCase("fps", "fp16", 1100, channels, landmarks=4, surroundings=SHUFFLED)
        yield SamplingCase("norm-grid", "bf16", 261, channels, surroundings=SHUFFLED)
