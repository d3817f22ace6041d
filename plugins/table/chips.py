"""The chips that kernels are compiled for: the one list of compute capabilities in this package.

A new chip is a line here and, as a device, a line in `fna.engines.targets`.
"""

FALLBACK = 0
"""The table's name for PTX of `FALLBACK_TARGET`, which the driver compiles for any chip that the table does not list."""

FALLBACK_TARGET = 80

FALLBACK_PTX_VERSION = 80
"""PTX ISA 8.0, which drivers of CUDA 12.0 and later read; Triton would write its own compiler's newest."""

SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""Shared memory per block in KiB, by compute capability times ten (CUDA C++ Programming Guide, technical specifications per
compute capability; 11.0 is taken to be as 10.0)."""

COMPILED_AS = {86: 80, 87: 80, 89: 80, 103: 100, 120: 80, 121: 80}
"""Chips that take the PTX that Triton writes for another, each assembled for itself; others have their own.

PTX of sm_80 is for every chip after it, and chips without instructions for products of whole warp groups lose nothing by it. For
sm_103 Triton writes the body of sm_100, which a test compares."""

_FROM_CUDA_13 = (110,)
"""Chips that no driver of CUDA 12 serves under this number (Thor was 10.1 there)."""

CHIPS = tuple(SHARED_KIB)
OLDEST_CHIP = min(CHIPS)
ALL_IMAGES = (*CHIPS, FALLBACK)


def compiled_as(sm: int) -> int:
    """The chip whose PTX a chip's image is made of, or is where `sm` is FALLBACK."""
    return FALLBACK_TARGET if sm == FALLBACK else COMPILED_AS.get(sm, sm)


def shared_limit(sm: int) -> int:
    """Bytes of shared memory that a block may have on a chip; the fallback has to fit the smallest."""
    return (min(SHARED_KIB.values()) if sm == FALLBACK else SHARED_KIB[sm]) * 1024


def newest_toolkit(sm: int) -> int:
    """Major release of CUDA that an image may be assembled by, so that every driver that serves the chip loads it."""
    return 13 if sm in _FROM_CUDA_13 else 12


def chip_name(sm: int) -> str:
    """For messages: `sm_87`, or `sm_80 PTX` for the fallback."""
    return f"sm_{FALLBACK_TARGET} PTX" if sm == FALLBACK else f"sm_{sm}"
