"""Compile every kernel variant for every chip ahead of time, and write the table that the library and PyTorch load.

    python -m fna.plugins.aot --output build/plugin

Nothing here needs a GPU. `fna.plugins.table` does the work and says what the files are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fna.errors import FnaError
from fna.plugins.launch_plan import all_variants
from fna.plugins.table.build import build_table
from fna.plugins.table.chips import ALL_IMAGES, chip_name


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the ahead-of-time build; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fna.plugins.aot", description="Compile the kernels ahead of time.")
    parser.add_argument("--output", type=Path, default=Path("build/plugin"), help="folder of the table (build/plugin)")
    parser.add_argument("--sm", default=",".join(map(str, ALL_IMAGES)), help="chips, such as 87,90; 0 is PTX")
    parser.add_argument("--only", default="", help="regular expression on the variants' names")
    parser.add_argument("--jobs", type=int, default=None, help="worker processes (one per core)")
    parser.add_argument("--list", action="store_true", help="print what each kernel uses")
    arguments = parser.parse_args(argv)
    try:
        chips = [int(sm) for sm in arguments.sm.split(",")]
        chosen = [v for v in all_variants() if re.search(arguments.only, v.name)]
        entries = build_table(arguments.output, chips=chips, variants=chosen, jobs=arguments.jobs, progress=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.list:
        for e in entries:
            used = f"{e.registers:4} registers {e.stack:4} stack {e.shared:7} shared {e.warps:3} warps"
            print(f"{e.variant:28} {chip_name(e.sm):10} {used}")
    size = (arguments.output / "kernels.bin").stat().st_size
    print(f"{len(entries)} kernels, {size / 2**20:.1f} MiB packed, in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
