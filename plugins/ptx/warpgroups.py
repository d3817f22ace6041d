"""wgmma, the matrix instructions of sm_90: factors in shared memory by descriptor, results in the registers of four warps.

Layouts are those of CUTLASS's `mma_sm90_desc.hpp` ("Canonical layouts"), which spells out the PTX ISA's "Shared memory matrix layout".
What is not modelled: the fences between the generic and the asynchronous proxy, and reads of results before they are waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fna.plugins.ptx.number_types import Array, f16, f32, f64, s64, u16, u32, u64
from fna.plugins.ptx.numerics import truncated_to_fp32, widened_pairs

THREADS = 128
ROWS = 64
CHUNK = 16
"""Bytes that a layout keeps together."""

DEPTH_BYTES = 32
"""Of a row of a factor: 16 elements of 16 bits, or 8 of tf32."""

_UNITS = {0: 1, 1: 8, 2: 4, 3: 2}
"""Descriptor's swizzle mode -> chunks that are swizzled together: none, 128, 64 and 32 bytes."""


@dataclass(frozen=True)
class Descriptors:
    """One matrix of each warpgroup in shared memory: byte addresses and strides, and the swizzle, which is one for all."""

    start: Array  # [warpgroups]
    leading: Array
    stride: Array
    units: int

    @staticmethod
    def read(bits: Array) -> Descriptors:
        """Of uint64 of all lanes; a warpgroup's lanes agree."""
        own = bits.reshape(-1, THREADS)[:, 0].astype(u64)
        start, leading, stride = (
            (((own >> np.uint64(at)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(s64) for at in (0, 16, 32)
        )
        modes = set((own >> np.uint64(62)).tolist())
        if len(modes) != 1:
            raise NotImplementedError("wgmma with different swizzles in one launch")
        return Descriptors(start, leading, stride, _UNITS[modes.pop()])

    def chunks(self, rows: int, transposed: bool) -> Array:
        """Addresses of the matrix's chunks [warpgroups, ..]: [rows, 2], or [16, rows / 8] if transposed."""
        start, leading, stride = (part[:, None, None] for part in (self.start, self.leading, self.stride))
        if transposed:
            depth, chunk = np.arange(16)[:, None], np.arange(rows // 8)[None]
            if self.units == 1:
                inside = chunk * stride + depth // 8 * leading + depth % 8 * CHUNK
            else:
                inside = chunk // self.units * leading + depth // 8 * stride
                inside = inside + chunk % self.units * CHUNK + depth % 8 * self.units * CHUNK
        else:
            row, chunk = np.arange(rows)[:, None], np.arange(2)[None]
            step = leading if self.units == 1 else CHUNK
            inside = row % 8 * self.units * CHUNK + row // 8 * stride + chunk * step
        address = start + inside
        return address ^ ((address >> 7 & (self.units - 1)) << 4)


def factor_of_chunks(chunks: Array, rows: int, kind: str, transposed: bool) -> Array:
    """The matrix [warpgroups, rows, depth] in fp64, of the chunks' bytes [warpgroups, .., 16] in the order of `chunks`."""
    groups = len(chunks)
    if kind == "tf32":
        return _cut_tf32(chunks.view(u32).reshape(groups, rows, 8))
    halves = chunks.view(u16).reshape(groups, 16, rows) if transposed else chunks.view(u16).reshape(groups, rows, 16)
    wide = (
        halves.view(f16).astype(f64) if kind == "f16" else (halves.astype(u32) << np.uint32(16)).view(f32).astype(f64)
    )
    return wide.mT if transposed else wide


def factor_of_registers(registers: list[Array], kind: str) -> Array:
    """The left factor [warpgroups, 64, depth] in fp64, of four registers of every lane."""
    lane = np.arange(THREADS)
    row, within = lane // 32 * 16 + lane % 32 // 4, lane % 4
    groups = registers[0].size // THREADS
    factor = np.empty((groups, ROWS, 8 if kind == "tf32" else 16))
    for i, register in enumerate(registers):
        bits = register.reshape(groups, THREADS)
        rows = row + 8 * (i & 1)
        if kind == "tf32":
            factor[:, rows, within + 4 * (i >> 1)] = _cut_tf32(bits)
        else:
            factor[:, rows[:, None], (2 * within + 8 * (i >> 1))[:, None] + np.arange(2)] = widened_pairs(bits, kind)
    return factor


def _cut_tf32(bits: Array) -> Array:
    return (bits & np.uint32(0xFFFFE000)).view(f32).astype(f64)


def multiply(left: Array, right: Array, added: list[Array] | None, truncate: bool) -> list[Array]:
    """Registers of `left @ right^T` plus what is added: [warpgroups, 64, depth] and [warpgroups, N, depth]."""
    groups, columns = len(left), right.shape[1]
    lane = np.arange(THREADS)
    places = [
        (lane // 32 * 16 + lane % 32 // 4 + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * (lane % 4) + (i & 1))
        for i in range(columns // 2)
    ]
    total = np.matmul(left, right.mT)
    for (row, column), register in zip(places, added or [], strict=False):
        total[:, row, column] += register.view(f32).reshape(groups, THREADS)
    rounded = truncated_to_fp32(total) if truncate else total.astype(f32)
    return [np.ascontiguousarray(rounded[:, row, column]).view(u32).reshape(-1) for row, column in places]
