"""CTAs that run in step: their registers, their shared memory, and what an instruction does to them.

Registers are flat arrays of all lanes [CTAs * threads] of unsigned bits, or None before anything is written. The functions that
`translate.py` generates from a kernel's basic blocks call the methods here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fna.errors import CheckFailedError
from fna.plugins.ptx import warpgroups
from fna.plugins.ptx.accesses import LAST_EPOCH, Access, first, make_identities, make_stamps
from fna.plugins.ptx.memory import GlobalMemory, SharedMemory
from fna.plugins.ptx.number_types import Array, s64, u16, u32
from fna.plugins.ptx.numerics import lanes_to_matrix_rows, matrix_rows_to_lanes
from fna.plugins.ptx.reports import Fault

if TYPE_CHECKING:
    from fna.plugins.ptx.kernel import Kernel
    from fna.plugins.ptx.profile import Profile

Split = tuple[Array, int, int]
"""Which CTAs take a branch, where it leads, and where the others go."""


@dataclass(frozen=True)
class Copy:
    """An asynchronous copy in flight: where it lands, and the bytes [n, size] that it brings."""

    access: Access
    brought: Array


class Group:
    """Some CTAs of a launch that took the same branches so far."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        ctas: Array,  # [C] linear indices in the grid
        grid: tuple[int, int, int],
        arguments: Sequence[int | float],
        profile: Profile,
    ) -> None:
        self.kernel, self.memory, self.profile = kernel, memory, profile
        self.ctas, self.grid, self.arguments = ctas, grid, arguments
        self.shared = SharedMemory(len(ctas), kernel.shared_stride, kernel.shared_granule, memory.reports)
        self.epoch = 0
        self.copies: list[Copy] = []
        self.copy_groups: list[list[Copy]] = []
        self.reads: list[Copy] = []  # of matrix products in flight, which bring nothing
        self.read_groups: list[list[Copy]] = []
        self._index_lanes()
        # A register that is read but never written is LLVM's undef; all ones is as good as any and shows.
        undefined = {i: np.full(self.lanes, -1, s64).astype(kernel.widths[i]) for i in kernel.undefined}
        self.registers: list[Array | None] = [undefined.get(i) for i in range(len(kernel.widths))]

    def _index_lanes(self) -> None:
        self.threads = self.kernel.program.threads
        self.lanes = len(self.ctas) * self.threads
        self.every_lane = np.arange(self.lanes)
        self.thread = np.tile(np.arange(self.threads), len(self.ctas))
        self.identities = make_identities(np.repeat(self.ctas, self.threads), self.thread)
        self.shared_start = np.repeat(np.arange(len(self.ctas)) * self.kernel.shared_stride, self.threads)
        self._cache: dict[Any, Array] = {}

    def part(self, kept: Array) -> Group:
        """Some of the CTAs, with all that they hold; `kept` [C] bool."""
        made = object.__new__(Group)
        made.kernel, made.memory, made.profile = self.kernel, self.memory, self.profile
        made.ctas, made.grid, made.arguments = self.ctas[kept], self.grid, self.arguments
        made.shared, made.epoch = self.shared.part(kept), self.epoch
        made.registers = [None if r is None else r.reshape(len(kept), -1)[kept].reshape(-1) for r in self.registers]
        new_slot = np.cumsum(kept) - 1
        for flying in ("copies", "reads"):
            setattr(made, flying, [self._moved(copy, kept, new_slot) for copy in getattr(self, flying)])
        for flying in ("copy_groups", "read_groups"):
            groups = getattr(self, flying)
            setattr(made, flying, [[self._moved(copy, kept, new_slot) for copy in group] for group in groups])
        made._index_lanes()
        return made

    def _moved(self, copy: Copy, kept: Array, new_slot: Array) -> Copy:
        slot = copy.access.lanes // self.threads
        here = kept[slot]
        shift = (new_slot[slot] - slot)[here]
        old = copy.access.part(here)
        lanes, offsets = old.lanes + shift * self.threads, old.offsets + shift * self.shared.stride
        return Copy(Access(old.listing, old.instruction, old.size, lanes, offsets, old.stamps), copy.brought[here])

    # Operands

    def constant(self, bits: int, width: np.dtype[Any]) -> Array:
        """One value for all lanes."""
        return self._cached((bits, width), lambda: np.full(self.lanes, bits, width))

    def special(self, name: str) -> Array:
        """A special register such as %tid.x, as uint32; CTAs have one dimension."""
        return self._cached(name, lambda: self._special(name))

    def _special(self, name: str) -> Array:
        what, _, axis = name[1:].partition(".")
        position = "xyz".index(axis or "x")
        if what == "ctaid":
            x, y, _ = self.grid
            index = (self.ctas % x, self.ctas // x % y, self.ctas // (x * y))[position]
            return np.repeat(index, self.threads).astype(u32)
        simple: dict[str, Array | int] = {
            "tid": self.thread if position == 0 else 0,
            "nctaid": self.grid[position],
            "ntid": self.threads if position == 0 else 1,
            "laneid": self.thread & 31,
        }
        return np.broadcast_to(np.asarray(simple[what]).astype(u32), self.lanes).copy()

    def parameter(self, index: int, width: np.dtype[Any]) -> Array:
        """A launch argument for all lanes."""
        given = self.arguments[index]
        bits = struct.unpack("<I", struct.pack("<f", given))[0] if isinstance(given, float) else given
        return self.constant(bits & ((1 << 8 * width.itemsize) - 1), width)

    def _cached(self, key: Any, make: Callable[[], Array]) -> Array:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    # Control

    def branch(self, predicate: Array, negated: bool, target: int, other: int) -> int | Split:
        """Where the group goes; a split where its CTAs part."""
        taken = predicate.reshape(len(self.ctas), self.threads) ^ negated
        some, every = np.asarray(taken.any(1)), np.asarray(taken.all(1))
        if (some != every).any():
            (parted,) = first(some != every)
            raise CheckFailedError(
                f"a branch divides CTA {self.ctas[parted]}: {taken[parted].sum()} of its {self.threads} threads take it, "
                "but the machine runs a CTA's threads in step"
            )
        if some.all():
            return target
        return (some, target, other) if some.any() else other

    def barrier(self) -> None:
        """bar.sync 0 of all threads."""
        self.epoch += 1
        if self.epoch > LAST_EPOCH:
            raise CheckFailedError(
                f"{self.kernel.name} passes more than {LAST_EPOCH} barriers, which the machine cannot count"
            )

    # Shared memory

    def _shared_access(self, instruction: int, address: Array, mask: Array | None, size: int, lanes: Array) -> Access:
        if mask is not None:
            lanes, address = lanes[mask], address[mask]
        offsets = address.astype(s64)
        start = self.shared_start if lanes is self.every_lane else self.shared_start[lanes]
        access = self._access(instruction, size, lanes, offsets + start)
        limit = self.kernel.shared_bytes - size
        if not lanes.size or (offsets.max() <= limit and not np.bitwise_or.reduce(offsets) & (size - 1)):
            return access
        bad = (offsets > limit) | (offsets % size != 0)
        (place,) = first(bad)
        example = f"byte {offsets[place]} of {self.kernel.shared_bytes}, {size} bytes, {access.who(place)}"
        self.shared.report(Fault.SHARED_BOUNDS, access, int(bad.sum()), example)
        return access.part(~bad)

    def _access(self, instruction: int, size: int, lanes: Array, offsets: Array) -> Access:
        identities = self.identities if lanes is self.every_lane else self.identities[lanes]
        stamps = make_stamps(identities, self.epoch, instruction)
        return Access(self.kernel.listing, instruction, size, lanes, offsets, stamps)

    def load_shared(
        self, instruction: int, address: Array, mask: Array | None, width: np.dtype[Any], into: list[int]
    ) -> None:
        """ld.shared of as many elements as there are registers."""
        size = width.itemsize * len(into)
        self.profile.shared_request(instruction, address, mask, size)
        access = self._shared_access(instruction, address, mask, size, self.every_lane)
        if access.lanes.size:
            self._write_registers(into, self.shared.load(access).view(width), access.lanes)

    def store_shared(
        self, instruction: int, address: Array, mask: Array | None, width: np.dtype[Any], stored: list[Array]
    ) -> None:
        """st.shared of as many elements as there are arrays."""
        size = width.itemsize * len(stored)
        self.profile.shared_request(instruction, address, mask, size)
        access = self._shared_access(instruction, address, mask, size, self.every_lane)
        if access.lanes.size:
            self.shared.store(access, self._stacked(stored, width, access.lanes), self.memory.order(access.lanes.size))

    def _stacked(self, stored: list[Array], width: np.dtype[Any], lanes: Array) -> Array:
        columns = [np.broadcast_to(column, self.lanes)[lanes].astype(width, copy=False) for column in stored]
        return np.stack(columns, 1).view("u1")

    def _write_registers(self, into: list[int], loaded: Array, lanes: Array) -> None:
        """Columns of `loaded` [n, registers] to the lanes; other lanes keep what they have."""
        for register, column in zip(into, loaded.T, strict=True):
            width = self.kernel.widths[register]
            column = np.ascontiguousarray(column).astype(width, copy=False)
            if lanes.size < self.lanes:
                before = self.registers[register]
                merged = np.zeros(self.lanes, width) if before is None else before.copy()
                merged[lanes] = column
                column = merged
            self.registers[register] = column

    def _matrix_access(self, instruction: int, address: Array, count: int) -> Access:
        """The first 8 * count lanes of a warp give the addresses of the matrices' rows."""
        lanes = self.every_lane.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        rows = np.ascontiguousarray(address.reshape(-1, 32)[:, : 8 * count]).reshape(-1)
        self.profile.matrix_request(instruction, rows, count)
        access = self._shared_access(instruction, rows, None, 16, lanes)
        if access.lanes.size != lanes.size:
            raise CheckFailedError(f"{self.kernel.name}: matrix rows out of bounds: {self._text(instruction)}")
        return access

    def load_matrix(self, instruction: int, address: Array, count: int, transposed: bool, into: list[int]) -> None:
        """The instruction ldmatrix, of `count` 8 x 8 matrices of 16 bits."""
        access = self._matrix_access(instruction, address, count)
        rows = self.shared.load(access).view(u16).reshape(-1, count, 8, 8)
        for matrix, register in enumerate(into):
            self.registers[register] = matrix_rows_to_lanes(rows[:, matrix], transposed)

    def store_matrix(self, instruction: int, address: Array, count: int, transposed: bool, stored: list[Array]) -> None:
        """The instruction stmatrix, of `count` 8 x 8 matrices of 16 bits."""
        access = self._matrix_access(instruction, address, count)
        rows = np.stack([lanes_to_matrix_rows(register, transposed) for register in stored], 1)
        self.shared.store(access, rows.reshape(-1, 8).view("u1"))

    # Asynchronous copies

    def copy_async(
        self, instruction: int, target: Array, source: Array, size: int, taken: Array | None, mask: Array | None
    ) -> None:
        """cp.async of `size` bytes, of which `taken` come from the source and the rest are zeros."""
        taken = np.full(self.lanes, size, s64) if taken is None else taken.astype(s64)
        reading = taken > 0 if mask is None else mask & (taken > 0)
        self.profile.shared_request(instruction, target, mask, size)
        self.profile.global_request(instruction, source, reading, size)
        access = self._shared_access(instruction, target, mask, size, self.every_lane)
        if not access.lanes.size:
            return
        self.shared.start_copy(access)
        self.copies.append(Copy(access, self._read_source(instruction, source, size, taken, access.lanes)))

    def _read_source(self, instruction: int, source: Array, size: int, taken: Array, lanes: Array) -> Array:
        brought = np.zeros((self.lanes, size), "u1")
        reading = lanes[taken[lanes] > 0]
        access = self.memory.resolve(self._access(instruction, size, reading, reading), source[reading])
        if access.lanes.size:
            kept = np.arange(size) < taken[access.lanes][:, None]
            brought[access.lanes] = np.where(kept, self.memory.load(access), 0)
        return brought[lanes]

    def commit_copies(self) -> None:
        """cp.async.commit_group."""
        self.copy_groups.append(self.copies)
        self.copies = []

    def wait_copies(self, left: int) -> None:
        """cp.async.wait_group: all but the last `left` groups land. Other warps see them behind the next barrier only."""
        while len(self.copy_groups) > left:
            for copy in self.copy_groups.pop(0):
                # They land now, not when they were started: a warp that has not passed a barrier since races with them.
                access = copy.access
                landed = self._access(access.instruction, access.size, access.lanes, access.offsets)
                self.shared.land_copy(landed, copy.brought)

    # Matrix products of warpgroups

    def multiply_warpgroups(
        self,
        instruction: int,
        kind: str,
        left: Array | list[Array],
        right: Array,
        added: Array | bool,
        transposed: tuple[bool, bool],
        into: list[int],
    ) -> None:
        """wgmma.mma_async: `left` by descriptors or in registers, `right` by descriptors; `added`: onto what `into` holds."""
        factors = []
        for factor, rows, turned in ((left, warpgroups.ROWS, transposed[0]), (right, 2 * len(into), transposed[1])):
            if isinstance(factor, list):
                factors.append(warpgroups.factor_of_registers(factor, kind))
            else:
                chunks = self._load_chunks(instruction, warpgroups.Descriptors.read(factor).chunks(rows, turned))
                factors.append(warpgroups.factor_of_chunks(chunks, rows, kind, turned))
        onto = np.broadcast_to(np.asarray(added), self.lanes)
        if onto.any() != onto.all():
            raise CheckFailedError(
                f"{self.kernel.name}: warpgroups differ in what they add to: {self._text(instruction)}"
            )
        held = [self.registers[register] for register in into] if onto.all() else []
        product = warpgroups.multiply(factors[0], factors[1], held, self.kernel.truncate)  # type: ignore[arg-type]
        for register, bits in zip(into, product, strict=True):
            self.registers[register] = bits

    def _load_chunks(self, instruction: int, addresses: Array) -> Array:
        """16 bytes at each address [warpgroups, ..]; read on behalf of all four warps, and until they are waited for."""
        groups = len(addresses)
        flat = addresses.reshape(groups, 1, -1)
        first_lanes = self.every_lane.reshape(groups, 4, 32)[:, :, :1]
        lanes = np.broadcast_to(first_lanes, (groups, 4, flat.shape[2])).reshape(-1)
        everywhere = np.broadcast_to(flat, (groups, 4, flat.shape[2])).reshape(-1)
        access = self._shared_access(instruction, everywhere, None, warpgroups.CHUNK, lanes)
        if access.lanes.size != lanes.size:
            raise CheckFailedError(f"{self.kernel.name}: a factor out of bounds: {self._text(instruction)}")
        loaded = self.shared.load(access)
        self.reads.append(Copy(access, np.zeros((lanes.size, 0), "u1")))
        return np.ascontiguousarray(loaded.reshape(groups, 4, *addresses.shape[1:], warpgroups.CHUNK)[:, 0])

    def commit_products(self) -> None:
        """wgmma.commit_group."""
        self.read_groups.append(self.reads)
        self.reads = []

    def wait_products(self, left: int) -> None:
        """wgmma.wait_group: until now the factors of all but the last `left` groups were read."""
        while len(self.read_groups) > left:
            for read in self.read_groups.pop(0):
                access = read.access
                self.shared.note_read(self._access(access.instruction, access.size, access.lanes, access.offsets))

    # Global memory

    def _global_access(self, instruction: int, address: Array, mask: Array | None, size: int) -> Access:
        lanes = self.every_lane if mask is None else np.nonzero(mask)[0]
        return self.memory.resolve(self._access(instruction, size, lanes, lanes), address[lanes])

    def load_global(
        self, instruction: int, address: Array, mask: Array | None, width: np.dtype[Any], into: list[int]
    ) -> None:
        """ld.global of as many elements as there are registers."""
        size = width.itemsize * len(into)
        self.profile.global_request(instruction, address, mask, size)
        access = self._global_access(instruction, address, mask, size)
        if access.lanes.size:
            self._write_registers(into, self.memory.load(access).view(width), access.lanes)

    def store_global(
        self, instruction: int, address: Array, mask: Array | None, width: np.dtype[Any], stored: list[Array]
    ) -> None:
        """st.global of as many elements as there are arrays."""
        size = width.itemsize * len(stored)
        self.profile.global_request(instruction, address, mask, size)
        access = self._global_access(instruction, address, mask, size)
        if access.lanes.size:
            stacked = self._stacked(stored, width, access.lanes)
            self.memory.store(access, stacked, self.memory.order(access.lanes.size))

    def _text(self, instruction: int) -> str:
        return self.kernel.program.instructions[instruction].text
