"""What the machine reports: faults, and notes on what is allowed but worth knowing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """Behaviour that PTX leaves undefined or that makes a result depend on timing."""

    SHARED_BOUNDS = "shared memory out of bounds or misaligned"
    SHARED_UNINITIALISED = "read of uninitialised shared memory"
    SHARED_READ_AFTER_WRITE = "shared memory: a warp reads what another wrote, with no barrier between"
    SHARED_WRITE_AFTER_WRITE = "shared memory: a warp writes over what another wrote, with no barrier between"
    SHARED_WRITE_AFTER_READ = "shared memory: a warp writes over what another read, with no barrier between"
    SHARED_TWO_VALUES = "shared memory: one instruction stores two values to one address"
    COPY_READ_IN_FLIGHT = "read of an asynchronous copy in flight"
    COPY_OVERWRITTEN_IN_FLIGHT = "write over an asynchronous copy in flight"
    GLOBAL_BOUNDS = "global memory out of bounds"
    GLOBAL_MISALIGNED = "global memory misaligned"
    GLOBAL_READ_ONLY = "write to a read-only tensor"
    GLOBAL_UNINITIALISED = "read of uninitialised global memory"
    GLOBAL_READ_AFTER_WRITE = "global memory: a warp reads what another wrote, with no barrier between"
    GLOBAL_WRITE_AFTER_WRITE = "global memory: a warp writes over what another wrote, with no barrier between"
    GLOBAL_WRITE_AFTER_READ = "global memory: a warp writes over what another read, with no barrier between"
    GLOBAL_TWO_VALUES = "global memory: one instruction stores two values to one address"
    CTAS_READ_AFTER_WRITE = "global memory: a CTA reads what another wrote in the same launch"
    CTAS_WRITE_AFTER_WRITE = "global memory: a CTA writes over what another wrote in the same launch"
    CTAS_WRITE_AFTER_READ = "global memory: a CTA writes over what another read in the same launch"


class Note(StrEnum):
    """Behaviour that is defined, but that a reader may want to know of."""

    SAME_VALUE = "several threads write one value to one address"
    WITHIN_WARP = "a lane reads what another lane of its warp wrote, with no barrier between"


@dataclass
class Report:
    """One kind of behaviour at one instruction: how many lanes showed it, an example, and the other instruction of a race."""

    kind: Fault | Note
    kernel: str
    instruction: str
    source: str
    count: int
    example: str
    other: str = ""

    def __str__(self) -> str:
        against = f"; the other is {self.other}" if self.other else ""
        place = f" at {self.source}" if self.source else ""
        return f"{self.kernel}: {self.kind}: {self.instruction}{place}: {self.count} times, such as {self.example}{against}"


class Reports:
    """All reports of a memory, one for each kind and instruction."""

    def __init__(self) -> None:
        self._reports: dict[tuple[Fault | Note, str, int, int], Report] = {}

    def __iter__(self) -> Iterator[Report]:
        return iter(self._reports.values())

    @property
    def faults(self) -> list[Report]:
        """The reports that no kernel may cause."""
        return [report for report in self if isinstance(report.kind, Fault)]

    def add(self, key: tuple[Fault | Note, str, int, int], made: Report) -> None:
        """Count a behaviour; `key` is its kind, kernel, instruction and, for a race, the other instruction (else -1)."""
        if key in self._reports:
            self._reports[key].count += made.count
        else:
            self._reports[key] = made
