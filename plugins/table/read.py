"""Find and read the table of compiled kernels that `fna plugin` writes."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from fna.errors import InputFileError
from fna.plugins.built import table_folder
from fna.plugins.table.chips import FALLBACK

ENVIRONMENT = "FNA_KERNEL_TABLE"


@dataclass(frozen=True)
class CompiledKernel:
    """One compiled kernel: where its image lies in kernels.bin, and how to launch it. `sm` 0 is PTX."""

    variant: str
    sm: int
    offset: int
    packed: int
    size: int
    shared: int
    warps: int
    symbol: str
    layout: str


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
        with self.data.open("rb") as file:
            file.seek(kernel.offset)
            return zlib.decompress(file.read(kernel.packed), -15)


def find_table() -> Table | None:
    """The table in the folder that FNA_KERNEL_TABLE names, else the one that `fna plugin` built, else None."""
    named = os.environ.get(ENVIRONMENT)
    folder = Path(named) if named else table_folder()
    if (folder / "kernels.json").exists() and (folder / "kernels.bin").exists():
        return load_table(folder)
    if named:
        raise InputFileError(
            f"{ENVIRONMENT} is {named}, but kernels.json and kernels.bin are not there; run fna plugin"
        )
    return None


def load_table(folder: Path) -> Table:
    """Read kernels.json in `folder`."""
    try:
        rows = json.loads((folder / "kernels.json").read_text())["kernels"]
        kernels = [CompiledKernel(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputFileError(
            f"{folder / 'kernels.json'} cannot be read ({error}); build it anew: fna plugin"
        ) from error
    return Table({(k.variant, k.sm): k for k in kernels}, folder / "kernels.bin")
