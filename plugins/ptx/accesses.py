"""What one instruction touches, and stamps that say who touched a place last.

A stamp is one int64: CTA, epoch (barriers passed), instruction and thread, from the high bits to the low. -1 is nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fna.plugins.ptx.number_types import Array, s64
from fna.plugins.ptx.parsing import Instruction

THREAD_BITS, INSTRUCTION_BITS, EPOCH_BITS = 10, 18, 16
_MOMENT = THREAD_BITS + INSTRUCTION_BITS
_CTA = _MOMENT + EPOCH_BITS
_WARP = ((1 << THREAD_BITS) - 1) & ~31
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

    @cached_property
    def rows(self) -> Array:
        """Offsets in units of `size`, a power of two."""
        return self.offsets >> (self.size.bit_length() - 1)

    def part(self, kept: Array | slice) -> Access:
        """The same for some of the lanes: a mask or an order of them."""
        picked = self.lanes[kept], self.offsets[kept], self.stamps[kept]
        return Access(self.listing, self.instruction, self.size, *picked)

    def who(self, position: int) -> str:
        """The lane at a position, for messages."""
        return describe(self.stamps[position])


def make_identities(cta: Array, thread: Array) -> Array:
    """The part of a stamp that a lane keeps."""
    return (cta.astype(s64) << _CTA) | thread


def make_stamps(identities: Array, epoch: int, instruction: int) -> Array:
    """The stamps of lanes at one instruction."""
    return identities | ((epoch << _MOMENT) | (instruction << THREAD_BITS))


def same_moment(difference: Array) -> Array:
    """Of the exclusive or of two stamps: whether one CTA made both with no barrier between."""
    return difference >> _MOMENT == 0


def other_cta(difference: Array) -> Array:
    """Of the exclusive or of two stamps: whether two CTAs made them."""
    return difference >> _CTA != 0


def other_warp(difference: Array) -> Array:
    """Of the exclusive or of two stamps of one CTA: whether two warps made them."""
    return difference & _WARP != 0


def other_lane(difference: Array) -> Array:
    """Of the exclusive or of two stamps of one warp: whether two lanes made them."""
    return difference & 31 != 0


def epoch_of(stamps: Array) -> Array:
    """Barriers that the CTA had passed."""
    return (stamps >> _MOMENT) & LAST_EPOCH


def instruction_of(stamps: Array) -> Array:
    """Position of the instruction in its kernel."""
    return (stamps >> THREAD_BITS) & ((1 << INSTRUCTION_BITS) - 1)


def describe(stamp: int) -> str:
    """For messages."""
    thread = stamp & ((1 << THREAD_BITS) - 1)
    return f"CTA {stamp >> _CTA} warp {thread >> 5} thread {thread}"


def first(mask: Array) -> tuple[int, ...]:
    """Position of the first True."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))
