"""Which keys each tile of patches attends to in focal attention: static lists, the same on every machine and in every version.

Near patches are keys themselves. Farther out, a cell of c x c patches is one key: one of its patches, drawn once for each tile and
cell, with the bias log(patches that may be drawn). Cells are aligned to the grid's first row and column; those at the edges
are smaller. Levels are nested: a cell is split into those of the next finer level unless it is far enough from the tile.

The draw is written down here, so that other languages can repeat it. With 64-bit unsigned arithmetic and the mixing function

    mix(z): z += 0x9E3779B97F4A7C15; z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z ^ z >> 31

(SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), the word of a cell is
mix(mix(mix(mix(seed) ^ tile) ^ size) ^ cell), with tiles and cells of each size numbered row by row. Of the cell's n patches that may
be drawn, row by row, number ((word >> 32) * n) >> 32 is the key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fna.errors import InvalidArgumentError

Levels = tuple[tuple[int, int], ...]
"""(size, gap) of each level, finest first: cells of `size` x `size` patches from `gap` patches away from the tile on."""

NEAR: tuple[int, int] = (1, 0)
"""The first of all levels: single patches, at any distance."""

LARGEST_SEED = 2**32 - 1

FAR_BELOW = -1e30
"""The bias that hides a key for good: no fp32 score comes near it. Not infinite, because builders may fold infinities into NaN."""

_Words = npt.NDArray[np.uint64]
_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FocalKeys:
    """Queries and keys of each tile; T tiles of at most Q patches, K keys of each at most. NumPy, so that a trace sees constants.

    Attributes:
        queries: token of each query, int32 `[T, Q]`; tiles at the edge repeat their first.
        keys: token of each key, int32 `[T, K]`, prefix tokens first; shorter lists repeat token 0.
        bias: added to each key's scores, fp32 `[T, K]`; `FAR_BELOW` where a list is shorter.
        places: where each patch token's output stands among the `T * Q` queries, int32 `[N - prefix]`.
    """

    queries: npt.NDArray[np.int32]
    keys: npt.NDArray[np.int32]
    bias: npt.NDArray[np.float32]
    places: npt.NDArray[np.int32]

    @property
    def query_counts(self) -> _Integers:
        """Queries of each tile without those that are repeated, `[T]`."""
        repeated: _Integers = (self.queries[:, 1:] == self.queries[:, :1]).sum(axis=1)
        return self.queries.shape[1] - repeated

    @property
    def key_counts(self) -> _Integers:
        """Keys of each tile, `[T]`."""
        counts: _Integers = (self.bias > np.float32(FAR_BELOW)).sum(axis=1)
        return counts

    def tensors(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, bias and places."""
        queries, keys, bias, places = (
            torch.tensor(array, device=device) for array in (self.queries, self.keys, self.bias, self.places)
        )
        return queries, keys, bias, places


def check_focal(patches: tuple[int, int], tile: int, levels: Levels, seed: int) -> None:
    """Refuse settings that no key lists can be made from.

    Raises:
        InvalidArgumentError: naming the setting, what is needed and what was given.
    """
    rows, columns = patches
    if rows < 1 or columns < 1:
        raise InvalidArgumentError(f"patches is {rows} x {columns}, but at least one row and one column is needed")
    if not 1 <= tile <= max(patches):
        raise InvalidArgumentError(
            f"tile is {tile}, but the grid has {rows} x {columns} patches; use 1 to {max(patches)}"
        )
    if not levels or levels[0] != NEAR:
        raise InvalidArgumentError(
            f"levels are {levels}, but the first must be {NEAR}: near patches as keys themselves"
        )
    for (finer, nearer), (coarser, farther) in pairwise(levels):
        if coarser <= finer or coarser % finer:
            raise InvalidArgumentError(
                f"levels have cells of {coarser} after {finer}, but each size must be a multiple of the one before"
            )
        if farther < nearer or farther < 1:
            raise InvalidArgumentError(
                f"levels begin at {farther} for cells of {coarser} and {nearer} for {finer}, but gaps must ascend from 1"
            )
    if not 0 <= seed <= LARGEST_SEED:
        raise InvalidArgumentError(f"seed is {seed}, but 0 to {LARGEST_SEED} is needed")


@lru_cache(maxsize=64)
def focal_keys(
    patches: tuple[int, int],
    prefix_tokens: int,
    tile: int,
    levels: Levels,
    seed: int = 0,
    masked: tuple[int, ...] = (),
    tiles: tuple[int, ...] | None = None,
) -> FocalKeys:
    """List the queries and keys of every tile, or of some.

    Args:
        patches: rows and columns of the grid of patches; N is `prefix_tokens` plus their product.
        prefix_tokens: class and register tokens at the front, keys of every tile.
        tile: side of a tile of queries, in patches.
        levels: see `Levels`; `((1, 0),)` is exact attention.
        seed: of the draw.
        masked: tokens that are no key of any tile and never drawn for their cell.
        tiles: numbers of those that are listed, in that order; the places of patches in others mean nothing. None is all.

    Raises:
        InvalidArgumentError: see `check_focal`; also where all keys of a tile are masked.
    """
    check_focal(patches, tile, levels, seed)
    rows, columns = patches
    allowed = np.ones(prefix_tokens + rows * columns, dtype=bool)
    allowed[list(masked)] = False
    prefix = np.flatnonzero(allowed[:prefix_tokens])
    open_patches = allowed[prefix_tokens:].reshape(rows, columns)
    tile_queries, tile_keys, tile_biases = [], [], []
    corners = list(_tile_corners(patches, tile))
    for number in range(len(corners)) if tiles is None else tiles:
        top, left = corners[number]
        bottom, right = min(top + tile, rows), min(left + tile, columns)
        drawn, counts = _draw_tile(open_patches, (top, left, bottom, right), number, levels, seed)
        keys = np.concatenate([prefix, prefix_tokens + drawn])
        if not len(keys):
            raise InvalidArgumentError(f"all tokens that tile {number} could attend to are masked; mask fewer tokens")
        tile_queries.append(
            prefix_tokens + (np.arange(top, bottom)[:, None] * columns + np.arange(left, right)).ravel()
        )
        tile_keys.append(keys)
        tile_biases.append(np.concatenate([np.zeros(len(prefix)), np.log(counts)]))
    queries = _pad(tile_queries, tile * tile, None)
    places = np.zeros(rows * columns, dtype=np.int64)
    for number, tokens in enumerate(tile_queries):
        places[tokens - prefix_tokens] = number * tile * tile + np.arange(len(tokens))
    longest = max(len(keys) for keys in tile_keys)
    return FocalKeys(
        queries=queries.astype(np.int32),
        keys=_pad(tile_keys, longest, 0).astype(np.int32),
        bias=_pad(tile_biases, longest, FAR_BELOW).astype(np.float32),
        places=places.astype(np.int32),
    )


def _tile_corners(patches: tuple[int, int], tile: int) -> Iterator[tuple[int, int]]:
    for top in range(0, patches[0], tile):
        for left in range(0, patches[1], tile):
            yield top, left


def _draw_tile(
    open_patches: npt.NDArray[np.bool_],  # [rows, columns]
    window: tuple[int, int, int, int],  # top, left, bottom, right
    number: int,
    levels: Levels,
    seed: int,
) -> tuple[_Integers, _Integers]:
    """The patches that a tile attends to, coarsest cells first, and how many patches each stands for."""
    rows, columns = open_patches.shape
    top, left, bottom, right = window
    patches: list[_Integers] = []
    counts: list[_Integers] = []
    split, coarser = np.ones((1, 1), dtype=bool), 0  # which cells of the level before are left to this one
    for size, gap in reversed(levels):
        cell_rows, cell_columns = math.ceil(rows / size), math.ceil(columns / size)
        if coarser:
            ratio = coarser // size
            split = split.repeat(ratio, 0).repeat(ratio, 1)[:cell_rows, :cell_columns]
        else:
            split = np.ones((cell_rows, cell_columns), dtype=bool)
        away = np.maximum(
            _distance(np.arange(cell_rows) * size, size, rows, top, bottom)[:, None],
            _distance(np.arange(cell_columns) * size, size, columns, left, right)[None],
        )
        taken = split & ((away >= gap) if size > 1 else True)
        cells = np.flatnonzero(taken.ravel())
        level_patches, level_counts = _draw_cells(
            open_patches, cells, cell_columns, size, _words(seed, number, size, cells)
        )
        patches.append(level_patches)
        counts.append(level_counts)
        split, coarser = split & ~taken, size
    return np.concatenate(patches), np.concatenate(counts)


def _distance(start: _Integers, size: int, end: int, low: int, high: int) -> _Integers:
    """Patches between the cells `[start, start + size)` and the tile `[low, high)` along one axis."""
    last = np.minimum(start + size, end)
    return np.maximum(0, np.maximum(start - high, low - last))


def _draw_cells(
    open_patches: npt.NDArray[np.bool_], cells: _Integers, cell_columns: int, size: int, words: _Words
) -> tuple[_Integers, _Integers]:
    rows, columns = open_patches.shape
    inside = np.arange(size * size)
    row = (cells // cell_columns * size)[:, None] + inside // size  # [cells, size * size]
    column = (cells % cell_columns * size)[:, None] + inside % size
    in_grid = (row < rows) & (column < columns)
    eligible = in_grid & open_patches[np.minimum(row, rows - 1), np.minimum(column, columns - 1)]
    counts = eligible.sum(axis=1)
    some = counts > 0
    eligible, counts, row, column, words = eligible[some], counts[some], row[some], column[some], words[some]
    ordinal = ((words >> np.uint64(32)) * counts.astype(np.uint64)) >> np.uint64(32)
    chosen = (eligible.cumsum(axis=1) == (ordinal.astype(np.int64) + 1)[:, None]).argmax(axis=1)
    index = np.arange(len(counts))
    return row[index, chosen] * columns + column[index, chosen], counts


def _words(seed: int, tile: int, size: int, cells: _Integers) -> _Words:
    word = _mix(np.array([seed], dtype=np.uint64))
    for part in (tile, size):
        word = _mix(word ^ np.uint64(part))
    return _mix(word ^ cells.astype(np.uint64))


def _mix(z: _Words) -> _Words:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _pad(lists: list[npt.NDArray], length: int, filler: float | None) -> npt.NDArray:
    """One row a list; shorter lists end with `filler`, or with their own first value where it is None."""
    return np.stack(
        [np.pad(row, (0, length - len(row)), constant_values=row[0] if filler is None else filler) for row in lists]
    )
