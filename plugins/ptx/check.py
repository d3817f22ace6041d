"""Run cases on the PTX of every chip; PTX that two chips share runs once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fna.plugins.launch_plan import all_variants
from fna.plugins.ptx.calls import Chip
from fna.plugins.ptx.cases import Case, Outcome, judge
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.parsing import UnmodelledInstructionError


@dataclass(frozen=True)
class Checked:
    """A case on the chips whose PTX is the same but for its header."""

    case: Case
    chips: list[int]
    outcome: Outcome


@dataclass(frozen=True)
class Unmodelled:
    """A compiled kernel that the machine cannot run, and why."""

    variant: str
    sm: int
    reason: str


def body_digest(text: str) -> str:
    """Of the PTX without what names its chip and version; equal bodies behave alike in the machine."""
    return hashlib.sha256(re.sub(r"^\.(version|target)[^\n]*$", "", text, flags=re.M).encode()).hexdigest()


class Digests:
    """Digests of the PTX of variants and chips, each read once."""

    def __init__(self, images: PtxImages) -> None:
        self._images = images
        self._known: dict[tuple[str, int], str] = {}

    def of(self, variant: str, sm: int) -> str:
        """The digest of one."""
        if (variant, sm) not in self._known:
            self._known[variant, sm] = body_digest(self._images.image(variant, sm).text())
        return self._known[variant, sm]


def unmodelled_kernels(images: PtxImages, chips: Iterable[int]) -> list[Unmodelled]:
    """Translate every kernel of the chips; the ones that cannot be."""
    variants = {variant.name: variant for variant in all_variants()}
    reasons: list[Unmodelled] = []
    for name, sm in sorted(images.by_name):
        if sm in chips:
            try:
                images.kernel(variants[name], sm)
            except UnmodelledInstructionError as error:
                reasons.append(Unmodelled(name, sm, str(error)))
    return reasons


def check(images: PtxImages, chips: list[int], cases: Iterable[Case], skipped: list[Unmodelled]) -> Iterator[Checked]:
    """Run cases whose kernels are all in the build and modelled, once for each group of chips with the same PTX."""
    missing = {(kernel.variant, kernel.sm) for kernel in skipped}
    digests = Digests(images)
    for case in cases:
        groups: dict[tuple[str, ...], list[int]] = {}
        for sm in chips:
            needed = [(variant, sm) for variant in case.variants]
            if all(key in images.by_name and key not in missing for key in needed):
                groups.setdefault(tuple(digests.of(*key) for key in needed), []).append(sm)
        for alike in groups.values():
            yield Checked(case, alike, judge(case, Chip(images, alike[0])))


def covered_kernels(checked: Iterable[Checked]) -> set[tuple[str, int]]:
    """The compiled kernels that some case ran."""
    return {(variant, sm) for result in checked for sm in result.chips for variant in result.case.variants}
