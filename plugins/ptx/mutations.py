"""Does the machine notice a missing barrier or wait? Take them out one at a time and see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fna.errors import CheckFailedError
from fna.plugins.ptx.calls import Chip
from fna.plugins.ptx.cases import AttentionCase, Case, SamplingCase
from fna.plugins.ptx.images import PtxImage
from fna.plugins.ptx.kernel import Kernel
from fna.plugins.ptx.parsing import Instruction, parse_program

SYNCHRONISATIONS = ("bar.sync", "cp.async.wait")


@dataclass(frozen=True)
class Mutation:
    """A kernel without some of its synchronisation, and how that was noticed: a fault, a wrong result, or not at all."""

    variant: str
    removed: tuple[Instruction, ...]
    fault: str
    differs: bool

    @property
    def noticed(self) -> bool:
        """Whether a fault was reported or the result changed."""
        return bool(self.fault) or self.differs

    def __str__(self) -> str:
        how = self.fault or ("the result changes" if self.differs else "NOT noticed")
        what = ", ".join(f"{' '.join(i.text.split())} of line {i.line}" for i in self.removed)
        return f"{self.variant} without {what}: {how}"


def synchronisations(image: PtxImage) -> list[Instruction]:
    """The barriers and waits of a kernel."""
    return [i for i in parse_program(image.text()).instructions if i.operation.startswith(SYNCHRONISATIONS)]


def without(image: PtxImage, removed: Sequence[Instruction]) -> Kernel:
    """The kernel without some instructions, each of which has a line of its own."""
    lines = image.text().split("\n")
    for instruction in removed:
        lines[instruction.line - 1] = ""
    return Kernel("\n".join(lines), image.shared, image.variant)


def mutate(cases: Sequence[Case], chip: Chip, *, step: int = 1, first: int = 0) -> Iterator[Mutation]:
    """Take every `step`-th synchronisation out, one at a time, from the `first` on; then those together that nothing noticed.

    The cases run the same kernels: one synchronisation orders something in this call, another in that, so each is tried on
    one case after the other until it is noticed. What is noticed only together stands in for one another.
    """
    right = [case.run(chip).out for case in cases]
    for variant in cases[0].variants:
        image = chip.images.image(variant, chip.sm)
        unnoticed: list[Instruction] = []
        for removed in synchronisations(image)[first::step]:
            mutation = _try(image, (removed,), cases, right, chip)
            unnoticed += [] if mutation.noticed else [removed]
            yield mutation
        if len(unnoticed) > 1:
            yield _try(image, tuple(unnoticed), cases, right, chip)


def _try(
    image: PtxImage, removed: tuple[Instruction, ...], cases: Sequence[Case], right: list[Tensor], chip: Chip
) -> Mutation:
    mutated = replace(chip, images=chip.images.with_kernel(image, without(image, removed)))
    for case, wanted in zip(cases, right, strict=True):
        try:
            call = case.run(mutated)
        except CheckFailedError as error:
            return Mutation(image.variant, removed, str(error), True)
        faults, differs = call.memory.reports.faults, not torch.equal(call.out, wanted)
        if faults or differs:
            return Mutation(image.variant, removed, str(faults[0].kind) if faults else "", differs)
    return Mutation(image.variant, removed, "", False)


def mutation_cases() -> list[list[Case]]:
    """Groups of calls of the same kernels, in which together every synchronisation has something to order."""
    return [
        [
            AttentionCase("fp16", 64, 64, 131),
            AttentionCase("fp16", 64, 64, 150, heads=8, iterations=2),
            AttentionCase("fp16", 64, 64, 261, heads=8, iterations=2),
        ],
        [SamplingCase("fps", "fp16", 1100, 48, 4)],
        [SamplingCase("fps", "fp32", 261, 48, 4)],
        [SamplingCase("norm-grid", "fp16", 261, 48, 12)],
        [
            AttentionCase("fp16", 128, 64, 131, iterations=2),
            AttentionCase("fp16", 128, 64, 150, heads=8, iterations=2),
            AttentionCase("fp16", 128, 64, 261, heads=8, iterations=1),
        ],
    ]
