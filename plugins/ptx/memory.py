"""Memory with a shadow: beside every few bytes stands who wrote and who read them last, and whether anybody wrote them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fna.errors import InvalidArgumentError
from fna.plugins.ptx.accesses import (
    NOBODY,
    Access,
    describe,
    epoch_of,
    first,
    instruction_of,
    other_cta,
    other_lane,
    other_warp,
    same_moment,
)
from fna.plugins.ptx.number_types import Array, s8, s32, s64, u8
from fna.plugins.ptx.reports import Fault, Note, Report, Reports

GUARD = 4096
"""Unallocated bytes before, between and after tensors, so that a small step out of one does not land in the next."""

_GLOBAL_GRANULE = 2
_MANY_CTAS = -2
_READ_ONLY, _WRITABLE = 1, 2


@dataclass(frozen=True)
class SpaceFaults:
    """What the faults of a memory are called."""

    uninitialised: Fault
    read_after_write: Fault
    write_after_write: Fault
    write_after_read: Fault
    two_values: Fault


_SHARED_FAULTS = SpaceFaults(
    Fault.SHARED_UNINITIALISED, Fault.SHARED_READ_AFTER_WRITE, Fault.SHARED_WRITE_AFTER_WRITE,
    Fault.SHARED_WRITE_AFTER_READ, Fault.SHARED_TWO_VALUES,
)  # fmt: skip
_GLOBAL_FAULTS = SpaceFaults(
    Fault.GLOBAL_UNINITIALISED, Fault.GLOBAL_READ_AFTER_WRITE, Fault.GLOBAL_WRITE_AFTER_WRITE,
    Fault.GLOBAL_WRITE_AFTER_READ, Fault.GLOBAL_TWO_VALUES,
)  # fmt: skip


class ShadowedMemory:
    """Bytes and their shadow, one entry a granule: who wrote it last, who read it last, and whether several did."""

    def __init__(self, data: Array, granule: int, faults: SpaceFaults, reports: Reports) -> None:
        """`granule`: bytes, a divisor of every access's size or a multiple of it."""
        self.between_ctas = faults is _GLOBAL_FAULTS
        self.data, self.granule, self.faults, self.reports = data, granule, faults, reports
        count = len(data) // granule
        self.wrote, self.read = np.full(count, NOBODY, s64), np.full(count, NOBODY, s64)
        self.readers = np.full(count, -1, s32)  # the epoch in which several warps read, or _MANY_CTAS

    def granules(self, shadow: Array, access: Access) -> Array:
        """The entries [n, granules of the access] of a shadow array."""
        return shadow.reshape(-1, self._width(access))[self._granule_rows(access)]

    def set_granules(self, shadow: Array, access: Access, entries: Array | int | bool) -> None:
        """Write them; `entries` is one for all, or [n, 1]."""
        shadow.reshape(-1, self._width(access))[self._granule_rows(access)] = entries

    def _width(self, access: Access) -> int:
        return max(1, access.size // self.granule)

    def _granule_rows(self, access: Access) -> Array:
        return access.rows if access.size >= self.granule else access.offsets // self.granule

    def where(self, offset: int) -> str:
        """A place in words, for messages."""
        return f"byte {offset}"

    def report(self, kind: Fault | Note, access: Access, count: int, example: str, other: int = -1) -> None:
        """Add a report; `other` is the other instruction of a race."""
        listing = access.listing
        made = listing.instructions[access.instruction]
        against = listing.instructions[other] if other >= 0 else None
        text = f"{against.text} at {against.source or f'line {against.line}'}" if against else ""
        report = Report(kind, listing.kernel, made.text, made.source or f"line {made.line}", count, example, text)
        self.reports.add((kind, listing.kernel, access.instruction, other), report)

    def report_race(self, kind: Fault | Note, access: Access, raced: Array, stamps: Array) -> None:
        """Add a report of a race where `raced` [n, granules] is set, against the accesses that `stamps` names."""
        if not raced.any():
            return
        place = first(raced)
        who = f"{access.who(place[0])} after {describe(stamps[place])}, {self.where(int(access.offsets[place[0]]))}"
        self.report(kind, access, int(raced.sum()), who, int(instruction_of(stamps[place])))

    def note_read(self, access: Access) -> None:
        """Check a read against earlier writes, and remember it."""
        writers = self.granules(self.wrote, access)
        if writers.size and writers.max() >= 0:
            self._check_writers(access, writers)
        self._remember_read(access)

    def _check_writers(self, access: Access, writers: Array) -> None:
        difference = writers ^ access.stamps[:, None]
        if self.between_ctas:
            self.report_race(Fault.CTAS_READ_AFTER_WRITE, access, (writers >= 0) & other_cta(difference), writers)
        now = same_moment(difference)
        if now.any():
            near = now & other_warp(difference)
            self.report_race(self.faults.read_after_write, access, near, writers)
            self.report_race(Note.WITHIN_WARP, access, now & ~near & other_lane(difference), writers)

    def _remember_read(self, access: Access) -> None:
        me = access.stamps[:, None]
        before = self.granules(self.read, access)
        self.set_granules(self.read, access, me)
        # Of several lanes that read one granule now, one is remembered; the others differ from it.
        earlier, beside = before ^ me, self.granules(self.read, access) ^ me
        near = (same_moment(earlier) & other_warp(earlier)) | other_warp(beside)
        far = np.zeros_like(near)
        if self.between_ctas:
            far = ((before >= 0) & other_cta(earlier)) | other_cta(beside)
        if near.any() or far.any():
            readers = self.granules(self.readers, access)
            readers = np.where(near & (readers != _MANY_CTAS), epoch_of(me), readers)
            self._merge_readers(access, np.where(far, _MANY_CTAS, readers), near | far)

    def _merge_readers(self, access: Access, readers: Array, changed: Array) -> None:
        """Lanes that touch one granule may disagree, so only the changed entries are written, many CTAs last."""
        rows = self._granule_rows(access)
        shadow = self.readers.reshape(-1, self._width(access))
        if not self.between_ctas:
            lane, column = np.nonzero(changed)
            shadow[rows[lane], column] = readers[lane, column]
            return
        for kept in (changed & (readers != _MANY_CTAS), changed & (readers == _MANY_CTAS)):
            lane, column = np.nonzero(kept)
            shadow[rows[lane], column] = readers[lane, column]

    def check_write(self, access: Access, same: Array | None) -> None:
        """Check a write against earlier accesses; `same` [n, granules] says where it changes nothing."""
        me = access.stamps[:, None]
        writers = self.granules(self.wrote, access)
        difference = writers ^ me
        near = same_moment(difference) & other_warp(difference)
        far = (writers >= 0) & other_cta(difference) if self.between_ctas else np.zeros_like(near)
        differs = True if same is None else ~same
        self.report_race(Fault.CTAS_WRITE_AFTER_WRITE, access, far & differs, writers)
        self.report_race(self.faults.write_after_write, access, near & differs, writers)
        if same is not None:
            self.report_race(Note.SAME_VALUE, access, (far | near) & same, writers)
        self._check_readers(access, me)

    def _check_readers(self, access: Access, me: Array) -> None:
        readers = self.granules(self.read, access)
        if not (readers >= 0).any():
            return
        several = self.granules(self.readers, access)
        difference = readers ^ me
        near = same_moment(difference) & (other_warp(difference) | (several == epoch_of(me)))
        if self.between_ctas:
            far = (readers >= 0) & (other_cta(difference) | (several == _MANY_CTAS))
            self.report_race(Fault.CTAS_WRITE_AFTER_READ, access, far, readers)
            near &= ~far
        self.report_race(self.faults.write_after_read, access, near, readers)

    def load(self, access: Access) -> Array:
        """The bytes of a checked access, [n, size]."""
        self.note_read(access)
        # One item an access is gathered faster than a row of bytes.
        return self.data.view(f"V{access.size}")[access.rows].view(u8).reshape(-1, access.size)

    def store(self, access: Access, stored: Array, order: Array | slice = slice(None)) -> None:
        """Check and do a write of `stored` [n, size] bytes; `order` of lanes, of which the last one wins."""
        width = max(1, access.size // self.granule)
        rows = access.rows
        view = self.data.reshape(-1, access.size)
        same = (view[rows].reshape(len(rows), width, -1) == stored.reshape(len(rows), width, -1)).all(2)
        self.check_write(access, same)
        view[rows[order]] = stored[order]
        ordered = access.part(order)
        self.set_granules(self.wrote, ordered, ordered.stamps[:, None])
        self._check_two_values(access, stored, view)

    def _check_two_values(self, access: Access, stored: Array, view: Array) -> None:
        doubled = (self.granules(self.wrote, access) != access.stamps[:, None]).any(1)
        if not doubled.any():
            return
        differs = (view[access.rows] != stored).any(1)
        for kind, lanes in ((self.faults.two_values, doubled & differs), (Note.SAME_VALUE, doubled & ~differs)):
            if lanes.any():
                (place,) = first(lanes)
                example = f"{access.who(place)}, {self.where(int(access.offsets[place]))}"
                self.report(kind, access, int(lanes.sum()), example)


class SharedMemory(ShadowedMemory):
    """The shared memory of the CTAs of a group, one after the other; asynchronous copies are `pending` until they land."""

    def __init__(self, ctas: int, stride: int, granule: int, reports: Reports) -> None:
        """`stride`: bytes from one CTA's memory to the next."""
        super().__init__(np.full(ctas * stride, 0xFF, u8), granule, _SHARED_FAULTS, reports)
        self.stride = stride
        self.flying = 0  # copies, of any of the CTAs
        self.pending = np.zeros(len(self.data) // granule, bool)

    def where(self, offset: int) -> str:
        """The byte in its CTA's memory."""
        return f"byte {offset % self.stride}"

    def part(self, kept: Array) -> SharedMemory:
        """The memory of some of the CTAs, copied."""
        made = object.__new__(SharedMemory)
        made.__dict__.update(vars(self))
        for name in ("data", "wrote", "read", "readers", "pending"):
            whole = getattr(self, name)
            setattr(made, name, np.ascontiguousarray(whole.reshape(len(kept), -1)[kept]).reshape(-1))
        return made

    def note_read(self, access: Access) -> None:
        """Also reads of what nobody wrote, or what is in flight."""
        writers = self.granules(self.wrote, access)
        if writers.size and writers.min() < 0:
            unwritten = writers < 0
            place = first(unwritten)[0]
            example = f"{access.who(place)}, {self.where(int(access.offsets[place]))}"
            self.report(self.faults.uninitialised, access, int(unwritten.sum()), example)
        self._check_in_flight(access, Fault.COPY_READ_IN_FLIGHT)
        super().note_read(access)

    def check_write(self, access: Access, same: Array | None) -> None:
        """Also writes over what is in flight."""
        self._check_in_flight(access, Fault.COPY_OVERWRITTEN_IN_FLIGHT)
        super().check_write(access, same)

    def _check_in_flight(self, access: Access, kind: Fault) -> None:
        if not self.flying:
            return
        flying = np.asarray(self.granules(self.pending, access).any(1))
        if flying.any():
            (place,) = first(flying)
            self.report(
                kind, access, int(flying.sum()), f"{access.who(place)}, {self.where(int(access.offsets[place]))}"
            )

    def start_copy(self, access: Access) -> None:
        """Begin an asynchronous copy: its place is neither to be read nor written."""
        self.check_write(access, None)
        self.flying += 1
        self.set_granules(self.pending, access, True)

    def land_copy(self, access: Access, copied: Array) -> None:
        """Finish it: `copied` [n, size] bytes are there for the threads that copied, and for others behind a barrier."""
        self.flying -= 1
        self.data.reshape(-1, access.size)[access.rows] = copied
        self.set_granules(self.pending, access, False)
        self.set_granules(self.wrote, access, access.stamps[:, None])


class GlobalMemory(ShadowedMemory):
    """Tensors between guard zones in one arena. Addresses are this process's own, so its bytes can be viewed as tensors."""

    def __init__(self, size: int = 1 << 24, poison: int = 0xFF) -> None:
        """`size`: bytes for all tensors together; `poison`: what memory holds that nobody wrote."""
        size = -(-size // 65536) * 65536
        raw = np.empty(size + 256, u8)
        start = -raw.ctypes.data % 256
        super().__init__(raw[start : start + size], _GLOBAL_GRANULE, _GLOBAL_FAULTS, Reports())
        self.data[:] = poison
        self.base = self.data.ctypes.data
        self.allocated = np.zeros(size // _GLOBAL_GRANULE, s8)
        self.initialised = np.zeros(size // _GLOBAL_GRANULE, bool)
        self.shuffle: np.random.Generator | None = None
        self._top = GUARD
        self._tensors: list[tuple[int, int, str]] = []

    def allocate(self, name: str, content: Array | int, *, writable: bool = True, alignment: int = 256) -> int:
        """Give a tensor its place and return its address.

        Args:
            name: for messages.
            content: what it holds, or a number of bytes that hold nothing.
            writable: whether a kernel may write it.
            alignment: of the address, at least 2.
        """
        raw = None if isinstance(content, int) else np.ascontiguousarray(content).reshape(-1).view(u8)
        size = content if isinstance(content, int) else np.asarray(raw).size
        start = -(-self._top // alignment) * alignment
        if start + size + GUARD > len(self.data):
            raise InvalidArgumentError(
                f"{name} has {size} bytes, but only {len(self.data) - start} of the arena are left"
            )
        self._top = start + size + GUARD
        place = slice(start // _GLOBAL_GRANULE, -(-(start + size) // _GLOBAL_GRANULE))
        self.allocated[place] = _WRITABLE if writable else _READ_ONLY
        if raw is not None:
            self.data[start : start + size] = raw
            self.initialised[place] = True
        self._tensors.append((start, size, name))
        return self.base + start

    def bytes_at(self, address: int, size: int) -> Array:
        """A view of bytes at an address."""
        return self.data[address - self.base : address - self.base + size]

    def written(self, address: int, size: int) -> bool:
        """Whether every byte there was written or given."""
        start = address - self.base
        return bool(self.initialised[start // _GLOBAL_GRANULE : (start + size) // _GLOBAL_GRANULE].all())

    def where(self, offset: int) -> str:
        """The tensor and the byte in it."""
        for start, size, name in self._tensors:
            if start - GUARD // 2 <= offset < start + size + GUARD // 2:
                return f"{name}{offset - start:+d} of {size}"
        return "no tensor"

    def begin_launch(self) -> None:
        """Forget who did what in the launch before: launches of a stream follow each other."""
        count = self._top // _GLOBAL_GRANULE + 1
        self.wrote[:count] = NOBODY
        self.read[:count] = NOBODY
        self.readers[:count] = -1

    def order(self, lanes: int) -> Array | slice:
        """In which order lanes store: PTX leaves open which of several to one address wins."""
        return slice(None) if self.shuffle is None else self.shuffle.permutation(lanes)

    def resolve(self, access: Access, addresses: Array) -> Access:
        """An access whose `offsets` are still empty, at addresses [n] uint64; lanes that are out of bounds drop out."""
        offsets = (addresses - np.uint64(self.base)).view(s64)
        misaligned = offsets % access.size != 0
        outside = (offsets < 0) | (offsets > len(self.data) - access.size)
        placed = Access(access.listing, access.instruction, access.size, access.lanes, offsets, access.stamps)
        inside = placed.part(~outside & ~misaligned)
        outside[~outside & ~misaligned] = (self.granules(self.allocated, inside) == 0).any(1)
        for kind, lanes in ((Fault.GLOBAL_MISALIGNED, misaligned), (Fault.GLOBAL_BOUNDS, outside & ~misaligned)):
            if lanes.any():
                (place,) = first(lanes)
                example = f"{self.where(int(offsets[place]))}, {access.size} bytes, {access.who(place)}"
                self.report(kind, placed, int(lanes.sum()), example)
        bad = misaligned | outside
        return placed.part(~bad) if bad.any() else placed

    def note_read(self, access: Access) -> None:
        """Also reads of what nobody wrote; read-only tensors take part in no race."""
        missing = ~self.granules(self.initialised, access)
        if missing.any():
            place = first(missing)[0]
            example = f"{self.where(int(access.offsets[place]))}, {access.who(place)}"
            self.report(self.faults.uninitialised, access, int(missing.sum()), example)
        if (self.granules(self.allocated, access) == _WRITABLE).any():
            super().note_read(access)

    def store(self, access: Access, stored: Array, order: Array | slice = slice(None)) -> None:
        """Also writes to read-only tensors."""
        forbidden = (self.granules(self.allocated, access) == _READ_ONLY).any(1)
        if forbidden.any():
            (place,) = first(forbidden)
            self.report(Fault.GLOBAL_READ_ONLY, access, int(forbidden.sum()), self.where(int(access.offsets[place])))
        super().store(access, stored, order)
        self.set_granules(self.initialised, access, True)
