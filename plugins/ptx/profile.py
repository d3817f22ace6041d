"""What a launch issues: instructions by class, shared-memory wavefronts and global sectors against the ideal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fna.plugins.ptx.number_types import Array, s32, s64

BANKS, BANK_BYTES, SECTOR_BYTES = 32, 4, 32
_NO_WORD = 1 << 40

_CLASSES = (
    ("mma", "mma"), ("wgmma.mma", "wgmma"), ("ldmatrix", "ldmatrix"), ("stmatrix", "stmatrix"), ("ld.shared", "ld.shared"),
    ("st.shared", "st.shared"), ("ld.global", "ld.global"), ("st.global", "st.global"), ("cp.async.c", "cp.async"),
    ("bar.", "bar"), ("ex2", "ex2"), ("shfl", "shfl"), ("redux", "shfl"), ("div.full", "div"), ("bra", "branch"),
    ("ret", "branch"), ("mov", "mov"), ("cvt", "cvt"), ("ld.param", "mov"),
)  # fmt: skip


def classify(operation: str) -> str:
    """The class of an instruction, for counting."""
    for start, name in _CLASSES:
        if operation.startswith(start) and not operation.startswith("cp.async.commit"):
            return name
    return "fp32" if operation.endswith(".f32") else "int/logic"


@dataclass
class Requests:
    """Memory requests of warps at one instruction: how many, wavefronts or sectors, and how few would do.

    Those of which no lane takes part count as well: they move nothing.
    """

    count: int = 0
    moved: int = 0
    ideal: int = 0

    def add(self, count: int, moved: int, ideal: int) -> None:
        """Add one execution."""
        self.count += count
        self.moved += moved
        self.ideal += ideal


class Profile:
    """Counts of one launch. Blocks are always counted; memory behaviour only if `detailed`."""

    def __init__(self, detailed: bool) -> None:
        self.detailed = detailed
        self.blocks: Counter[int] = Counter()  # basic block -> executions by a CTA
        self.by_cta: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self.shared: defaultdict[int, Requests] = defaultdict(Requests)  # instruction -> wavefronts
        self.sectors: defaultdict[int, Requests] = defaultdict(Requests)  # instruction -> sectors

    def enter_block(self, block: int, ctas: Array) -> None:
        """Count a basic block that CTAs run."""
        self.blocks[block] += len(ctas)
        for cta in ctas:
            self.by_cta[int(cta)][block] += 1

    def block_runs(self, ctas: Sequence[int] | None = None) -> Counter[int]:
        """Executions of each basic block by some CTAs, or by all."""
        return self.blocks if ctas is None else sum((self.by_cta[cta] for cta in ctas), Counter())

    def shared_request(self, instruction: int, address: Array, mask: Array | None, size: int) -> None:
        """A load or store of all lanes: 8 bytes a lane take two phases of half a warp, 16 bytes four."""
        if not self.detailed:
            return
        words = max(1, size // BANK_BYTES)
        at = (address.astype(s64) // BANK_BYTES).reshape(-1, 32 // words)
        live = np.ones(at.shape, bool) if mask is None else mask.reshape(at.shape)
        touched = np.where(live[:, :, None], at[:, :, None] + np.arange(words), -1)
        self._add_wavefronts(instruction, touched.reshape(len(at), -1), words)

    def matrix_request(self, instruction: int, rows: Array, count: int) -> None:
        """A load or store of matrices: a phase a matrix of eight rows."""
        if not self.detailed:
            return
        touched = (rows.astype(s64) // BANK_BYTES).reshape(-1, 8)[:, :, None] + np.arange(4)
        self._add_wavefronts(instruction, touched.reshape(len(touched), -1), count)

    def _add_wavefronts(self, instruction: int, words: Array, phases: int) -> None:
        """`words` [phases of all warps, words]; -1 is no word. Equal words are one access, others of a bank wait."""
        count = words.shape[0]
        key = np.sort(np.where(words < 0, _NO_WORD, (words % BANKS) * (1 << 24) + words // BANKS), 1)
        new = np.ones(key.shape, bool)
        new[:, 1:] = key[:, 1:] != key[:, :-1]
        new &= key < _NO_WORD
        histogram = np.zeros((count, BANKS + 1), s32)
        np.add.at(histogram, (np.arange(count)[:, None], np.where(new, key >> 24, BANKS)), 1)
        ideal = -(-new.sum(1) // BANKS)
        self.shared[instruction].add(count // phases, int(histogram[:, :BANKS].max(1).sum()), int(ideal.sum()))

    def global_request(self, instruction: int, address: Array, mask: Array | None, size: int) -> None:
        """A load or store of all lanes, in sectors of 32 bytes."""
        if not self.detailed:
            return
        sector = (address.view(s64) // SECTOR_BYTES).reshape(-1, 32)
        if mask is not None:
            sector = np.where(mask.reshape(-1, 32), sector, -1)
        sector = np.sort(sector, 1)
        new = np.ones(sector.shape, bool)
        new[:, 1:] = sector[:, 1:] != sector[:, :-1]
        live = (sector >= 0).sum(1)
        moved = int((new & (sector >= 0)).sum())
        self.sectors[instruction].add(len(live), moved, int(np.ceil(live * size / SECTOR_BYTES).sum()))
