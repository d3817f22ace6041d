"""What `make plugin` has to be asked for before a bundle can be made; for the Makefile.

    python -m fna.engines.bundle.chips jetson-agx-orin --table build/plugin --machines aarch64,x86_64

prints a line for each library that is missing or older than the kernels: the machine, and the chips for `SM=`. Chips that the table
holds already stay in the list, since `make plugin` writes the table anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fna.engines.targets import Target, find_target
from fna.errors import FnaError
from fna.plugins.built import KERNEL_FILE, LIBRARY
from fna.plugins.table.chips import FALLBACK
from fna.plugins.table.read import load_table


def missing_libraries(target: Target, table: Path, machines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (machine, chips as in `87,0`) for each plugin library that a bundle for the target would lack."""
    if target.lowering != "plugin":
        return
    needed = {*target.capabilities, FALLBACK}
    there = {sm for _, sm in load_table(table).kernels} if (table / KERNEL_FILE).is_file() else set()
    chips = ",".join(str(sm) for sm in (*sorted((needed | there) - {FALLBACK}), FALLBACK))
    for machine in machines:
        library = table / machine / LIBRARY
        whole = needed <= there and library.is_file()
        if not whole or library.stat().st_mtime < (table / KERNEL_FILE).stat().st_mtime:
            yield machine, chips


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fna.engines.bundle.chips", description="What make plugin has to be asked for."
    )
    parser.add_argument("target")
    parser.add_argument("--table", type=Path, required=True, help="folder that make plugin writes")
    parser.add_argument("--machines", required=True, help="machines to have libraries for, as in aarch64,x86_64")
    options = parser.parse_args(arguments)
    try:
        for machine, chips in missing_libraries(
            find_target(options.target), options.table, options.machines.split(",")
        ):
            print(machine, chips)
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
