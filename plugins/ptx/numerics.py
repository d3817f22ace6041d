"""What PTX's arithmetic does to the bits, as functions that the generated code calls; arrays of all lanes."""

from __future__ import annotations

from typing import Any

import numpy as np

from fna.plugins.ptx.number_types import Array, f16, f32, f64, s32, s64, u16, u32, u64

LANES = np.arange(32)
_SMALLEST_NORMAL = f32.type(1.1754944e-38)
_LANE_GROUP, _LANE_IN_GROUP = LANES >> 2, LANES & 3
_PAIR = np.arange(2)


def truncated_to_fp32(wide: Array) -> Array:
    """fp64 to fp32 toward zero, as tensor cores sum (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores")."""
    return (wide.view(u64) & np.uint64(0xFFFF_FFFF_E000_0000)).view(f64).astype(f32)


def to_tf32(bits: Array) -> Array:
    """cvt.rna.tf32.f32: round to 10 bits of mantissa, ties away from zero; infinities and NaN stay."""
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))


def to_bf16(bits: Array) -> Array:
    """cvt.rn.bf16.f32: round to nearest even, in the low 16 bits."""
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FFF), rounded)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32. The product is exact in fp64; the sum is rounded there first, which matters once in 2^29."""
    return (a.astype(f64) * b + c).astype(f32)


def exp2(exponent: Array, flush: bool) -> Array:
    """ex2.approx.f32 and its .ftz form."""
    power = np.exp2(exponent.astype(f64)).astype(f32)
    if flush:
        power = np.where(np.abs(exponent) < _SMALLEST_NORMAL, f32.type(1), power)
        power = np.where(np.abs(power) < _SMALLEST_NORMAL, f32.type(0), power)
    return power


def divide_signed(a: Array, b: Array) -> Array:
    """div.s32: toward zero; by zero it is unspecified, here by one."""
    wide_a, wide_b = a.astype(s64), np.asarray(b).astype(s64)
    wide_b = np.where(wide_b == 0, 1, wide_b)
    quotient = np.abs(wide_a) // np.abs(wide_b)
    return np.where((wide_a < 0) != (wide_b < 0), -quotient, quotient).astype(s32)


def unpack_fp32_pair(bits: Array) -> Array:
    """[n] uint64 -> [n, 2] fp32."""
    return np.ascontiguousarray(bits).view(f32).reshape(-1, 2)


def pack_fp32_pair(pair: Array) -> Array:
    """[n, 2] fp32 -> [n] uint64."""
    return np.ascontiguousarray(pair.astype(f32)).view(u64).reshape(-1)


def permute_lanes(bits: Array, order: Array) -> Array:
    """Every lane takes the value of lane `order[lane]` of its warp."""
    return np.ascontiguousarray(bits.reshape(-1, 32)[:, order]).reshape(-1)


def shuffle_by_index(bits: Array, index: Array) -> Array:
    """shfl.sync.idx with a lane's own index."""
    lanes = (index.reshape(-1, 32) & np.uint32(31)).astype(s64)
    return np.take_along_axis(bits.reshape(-1, 32), lanes, 1).reshape(-1)


def count_bits(bits: Array) -> Array:
    """popc.b32: how many bits are set."""
    return np.unpackbits(np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 4), axis=1).sum(1, dtype=np.uint32)


def reduce_warp(bits: Array, members: Array, what: str, kind: np.dtype[Any]) -> Array:
    """redux.sync: min, max or add over a whole warp, to every lane."""
    if not (members == np.uint32(0xFFFFFFFF)).all():
        raise NotImplementedError("redux.sync of a part of a warp")
    values = bits.view(kind).reshape(-1, 32)
    if what == "add":
        reduced = values.sum(1, dtype=kind)
    else:
        reduced = values.min(1) if what == "min" else values.max(1)
    return np.repeat(reduced, 32).view(u32)


def multiply_matrices(
    shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array], truncate: bool
) -> list[Array]:
    """mma.sync of a warp's fragments, [n * 32] uint32 each (PTX ISA, "Matrix fragments for mma.m16n8k8 and m16n8k16").

    Args:
        shape: m16n8k16, or m16n8k8 for tf32.
        kind: f16, bf16 or tf32, of the factors; sums are fp32.
        a: fragments of the left factor.
        b: fragments of the right factor.
        c: fragments of what is added.
        truncate: sum as tensor cores do, 8 (tf32: 4) products at a time toward zero, else once to nearest.
    """
    warps = a[0].size // 32
    left, right, step = _gather_factors(shape, kind, a, b, warps)
    total = np.empty((warps, 16, 8), f64)
    for i, fragment in enumerate(c):
        total[:, _LANE_GROUP + 8 * (i >> 1), 2 * _LANE_IN_GROUP + (i & 1)] = fragment.view(f32).reshape(warps, 32)
    if truncate:
        for k in range(0, left.shape[2], step):
            total = truncated_to_fp32(np.matmul(left[:, :, k : k + step], right[:, k : k + step]) + total).astype(f64)
    else:
        total = np.matmul(left, right) + total
    rounded = total.astype(f32)
    places = ((_LANE_GROUP + 8 * (i >> 1), 2 * _LANE_IN_GROUP + (i & 1)) for i in range(4))
    return [np.ascontiguousarray(rounded[:, row, column]).view(u32).reshape(-1) for row, column in places]


def _gather_factors(shape: str, kind: str, a: list[Array], b: list[Array], warps: int) -> tuple[Array, Array, int]:
    """The factors [warps, 16, K] and [warps, K, 8] in fp64, and how many products a tensor core sums at once."""
    first, second = [x.reshape(warps, 32) for x in a], [x.reshape(warps, 32) for x in b]
    group, within = _LANE_GROUP, _LANE_IN_GROUP
    if shape == "m16n8k16":
        left, right = np.empty((warps, 16, 16)), np.empty((warps, 16, 8))
        for i, fragment in enumerate(first):
            rows, columns = group + 8 * (i & 1), 2 * within + 8 * (i >> 1)
            left[:, rows[:, None], columns[:, None] + _PAIR] = widened_pairs(fragment, kind)
        for i, fragment in enumerate(second):
            right[:, (2 * within + 8 * i)[:, None] + _PAIR, group[:, None]] = widened_pairs(fragment, kind)
        return left, right, 8
    left, right = np.empty((warps, 16, 8)), np.empty((warps, 8, 8))
    kept = np.uint32(0xFFFFE000)
    for i, fragment in enumerate(first):
        left[:, group + 8 * (i & 1), within + 4 * (i >> 1)] = (fragment & kept).view(f32)
    for i, fragment in enumerate(second):
        right[:, within + 4 * i, group] = (fragment & kept).view(f32)
    return left, right, 4


def widened_pairs(bits: Array, kind: str) -> Array:
    """[..] uint32 that hold two f16 or bf16 each -> [.., 2] fp64."""
    pairs = np.ascontiguousarray(bits).view(u16).reshape(*bits.shape, 2)
    if kind == "f16":
        return pairs.view(f16).astype(f64)
    return (pairs.astype(u32) << np.uint32(16)).view(f32).astype(f64)


def matrix_rows_to_lanes(rows: Array, transposed: bool) -> Array:
    """ldmatrix: 8 x 8 matrices of 16 bits [n, 8, 8] -> a register of every lane [n * 32] uint32."""
    group, within = _LANE_GROUP, _LANE_IN_GROUP
    if transposed:
        low, high = rows[:, 2 * within, group], rows[:, 2 * within + 1, group]
    else:
        low, high = rows[:, group, 2 * within], rows[:, group, 2 * within + 1]
    return (low.astype(u32) | (high.astype(u32) << np.uint32(16))).reshape(-1)


def lanes_to_matrix_rows(register: Array, transposed: bool) -> Array:
    """stmatrix: a register of every lane [n * 32] uint32 -> 8 x 8 matrices of 16 bits [n, 8, 8]."""
    bits = register.reshape(-1, 32)
    low, high = (bits & np.uint32(0xFFFF)).astype(u16), (bits >> np.uint32(16)).astype(u16)
    group, within = _LANE_GROUP, _LANE_IN_GROUP
    rows = np.empty((len(bits), 8, 8), u16)
    if transposed:
        rows[:, 2 * within, group], rows[:, 2 * within + 1, group] = low, high
    else:
        rows[:, group, 2 * within], rows[:, group, 2 * within + 1] = low, high
    return rows
