"""What one instruction touches, and stamps that say who touched a place last.

A stamp is one int64: CTA, epoch (barriers passed), instruction and thread, from the high bits to the low. -1 is nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fna.plugins.ptx.number_types import Array, s64
from fna.plugins.ptx.parsing import Instruction

THREAD_BITS, INSTRUCTION_BITS, EPOCH_BITS = 10, 18, 16
_MOMENT = THREAD_BITS + INSTRUCTION_BITS
_CTA = _MOMENT + EPOCH_BITS
LAST_EPOCH = (1 << EPOCH_BITS) - 1
NOBODY = -1


@dataclass(frozen=True)
class Listing:
    """A kernel's name and instructions, for reports."""

    kernel: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Access:
    """`size` bytes at each of `offsets` of a memory, by the lanes `lanes` of a group of CTAs; `stamps` says who and when."""

    listing: Listing
    instruction: int
    size: int
    lanes: Array  # [n] int64
    offsets: Array  # [n] int64
    stamps: Array  # [n] int64

    @property
    def rows(self) -> Array:
        """Offsets in units of `size`."""
        return self.offsets // self.size

    def part(self, kept: Array | slice) -> Access:
        """The same for some of the lanes: a mask or an order of them."""
        picked = self.lanes[kept], self.offsets[kept], self.stamps[kept]
        return Access(self.listing, self.instruction, self.size, *picked)

    def who(self, position: int) -> str:
        """The lane at a position, for messages."""
        return describe(self.stamps[position])


def make_stamps(cta: Array, epoch: int, instruction: int, thread: Array) -> Array:
    """The stamps of lanes at one instruction."""
    return (cta << _CTA) | (s64.type(epoch) << _MOMENT) | (s64.type(instruction) << THREAD_BITS) | thread


def moment_of(stamps: Array) -> Array:
    """CTA and epoch together: equal where no barrier lies between two accesses of one CTA."""
    return stamps >> _MOMENT


def cta_of(stamps: Array) -> Array:
    """The linear index of the CTA."""
    return stamps >> _CTA


def epoch_of(stamps: Array) -> Array:
    """Barriers that the CTA had passed."""
    return moment_of(stamps) & LAST_EPOCH


def instruction_of(stamps: Array) -> Array:
    """Position of the instruction in its kernel."""
    return (stamps >> THREAD_BITS) & ((1 << INSTRUCTION_BITS) - 1)


def warp_of(stamps: Array) -> Array:
    """The warp in its CTA."""
    return (stamps & ((1 << THREAD_BITS) - 1)) >> 5


def describe(stamp: int) -> str:
    """For messages."""
    thread = stamp & ((1 << THREAD_BITS) - 1)
    return f"CTA {stamp >> _CTA} warp {thread >> 5} thread {thread}"


def first(mask: Array) -> tuple[int, ...]:
    """Position of the first True."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))
