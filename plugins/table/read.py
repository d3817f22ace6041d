"""Find and read the table of compiled kernels that `fna plugin` writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fna.errors import InputFileError
from fna.plugins.built import KERNEL_FILE, table_folder
from fna.plugins.table.chips import FALLBACK
from fna.plugins.table.kernel_file import CompiledKernel, packed_image, read_kernels, unpack

ENVIRONMENT = "FNA_KERNEL_TABLE"


@dataclass(frozen=True)
class Table:
    """The kernels by (variant, sm), and the file that their images are in."""

    kernels: dict[tuple[str, int], CompiledKernel]
    data: Path

    def find(self, variant: str, sm: int) -> list[CompiledKernel]:
        """The images to try for a chip, best first: its own, then PTX."""
        return [self.kernels[key] for key in ((variant, sm), (variant, FALLBACK)) if key in self.kernels]

    def image(self, kernel: CompiledKernel) -> bytes:
        """Unpack a kernel."""
        return unpack(packed_image(self.data, kernel))


def find_table() -> Table | None:
    """The table in the folder that FNA_KERNEL_TABLE names, else the one that `fna plugin` built, else None."""
    named = os.environ.get(ENVIRONMENT)
    folder = Path(named) if named else table_folder()
    if (folder / KERNEL_FILE).exists():
        return load_table(folder)
    if named:
        raise InputFileError(f"{ENVIRONMENT} is {named}, but {KERNEL_FILE} is not there; run fna plugin")
    return None


def load_table(folder: Path) -> Table:
    """Read the table in `folder`.

    Raises:
        InputFileError: if there is none that can be read.
    """
    return Table({(k.variant, k.sm): k for k in read_kernels(folder / KERNEL_FILE)}, folder / KERNEL_FILE)
