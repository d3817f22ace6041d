"""`fna plugin`."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import click

from fna.commands import options
from fna.commands.console import make_console
from fna.errors import InvalidArgumentError


@click.command("plugin", short_help="Compile kernels and TensorRT plugin, or list them.")
@options.output(
    help="Folder of the kernel table; the libraries land in a folder of it.  [default: where the commands look]"
)
@click.option(
    "--sm", help="Chips, as in 87,90: compute capabilities times ten; 0 is PTX for all others.  [default: all]"
)
@click.option(
    "--machine",
    "machines",
    default=platform.machine(),
    show_default=True,
    help="Machines to compile the libraries for, as in aarch64,x86_64; none for the kernels alone.",
)
@click.option("--only", default="", help="Regular expression on the kernels' names.")
@click.option("--jobs", type=click.IntRange(min=1), help="Worker processes.  [default: one for each core]")
@click.option("--checks", is_flag=True, help="Also compile what fna validate --emulate-plugin and the tests need.")
@click.option("--list", "listed", is_flag=True, help="Compile nothing; say what is there.")
@options.quiet()
def command(
    output: Path | None,
    sm: str | None,
    machines: str,
    only: str,
    jobs: int | None,
    checks: bool,
    listed: bool,
    quiet: bool,
) -> None:
    """Compile the kernels for every chip, and from them the plugin's libraries for TensorRT. No GPU is needed.

    The first time takes some minutes for each chip. What is compiled already is taken from a cache in the folder.
    """
    from fna.plugins.built import KERNEL_FILE, build_folder, cache_folder, table_folder

    say = make_console(quiet).print
    if listed:
        _list(output or table_folder())
        return
    from fna.plugins.launch_plan import all_variants
    from fna.plugins.library import build_libraries
    from fna.plugins.table.build import build_table
    from fna.plugins.table.chips import ALL_IMAGES

    table = output or build_folder()
    chips = _parse_chips(sm) if sm is not None else ALL_IMAGES
    variants = [variant for variant in all_variants() if re.search(only, variant.name)]
    if not variants:
        raise InvalidArgumentError(f"--only {only!r} fits no kernel; fna plugin --list names them")
    entries = build_table(table, chips=chips, variants=variants, jobs=jobs, progress=not quiet)
    size = (table / KERNEL_FILE).stat().st_size
    say(f"{table}: {len(entries)} kernels, {size / 2**20:.1f} MiB")
    for machine in machines.split(",") if machines != "none" else ():
        for library in build_libraries(table, machine.strip(), header_cache=cache_folder() / "headers", checks=checks):
            say(f"{library}: {library.stat().st_size / 2**20:.1f} MiB")


def _parse_chips(text: str) -> list[int]:
    try:
        return [int(chip) for chip in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(
            f"--sm {text!r} cannot be read; write compute capabilities times ten, as in 87,90,0"
        ) from None


def _list(folder: Path) -> None:
    """Print a table's chips and kernels, and the libraries beside it."""
    from fna.errors import MissingCapabilityError
    from fna.plugins.built import KERNEL_FILE, LIBRARIES, MACHINES
    from fna.plugins.library import glibc_of
    from fna.plugins.table.chips import chip_name
    from fna.plugins.table.read import load_table

    if not (folder / KERNEL_FILE).is_file():
        raise MissingCapabilityError(f"{folder} has no kernels; compile them: fna plugin")
    kernels = load_table(folder).kernels.values()
    lines = [f"{folder}: {len(kernels)} kernels"]
    for chip in sorted({kernel.sm for kernel in kernels}):
        names = sorted({kernel.variant for kernel in kernels if kernel.sm == chip})
        lines.append(
            f"  {chip_name(chip)}: {len(names)} kernels, {', '.join(sorted({n.split('-')[0] for n in names}))}"
        )
    for library in (folder / machine / name for machine in MACHINES for name in LIBRARIES):
        if library.is_file():
            lines.append(f"  {library.relative_to(folder)}: needs glibc {'.'.join(map(str, glibc_of(library)))}")
    click.echo("\n".join(lines))
