"""Make the source distribution and the wheels that carry kernels and libraries: `make release`, after `fna plugin` for all machines.

    python -m fna.plugins.release SOURCE --table build/plugin -o dist

Every wheel carries the libraries of all machines, since a bundle for a Jetson is made on a workstation, and the kernels once
(`fna.plugins.carried`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fna.errors import BuildError, CheckFailedError, FnaError, MissingCapabilityError
from fna.plugins.built import CONSTANTS, KERNEL_FILE, LIBRARIES, MACHINES
from fna.plugins.carried import carry
from fna.plugins.library import NEWEST_GLIBC, glibc_of

_LEFT_OUT = shutil.ignore_patterns("build", "dist", ".*", "*.egg-info", "__pycache__", "prebuilt", "tests", "studies")


def make_release(source: Path, table: Path, output: Path) -> list[Path]:
    """Write a wheel for each machine and the source distribution; return them.

    Args:
        source: the checkout.
        table: folder of kernels, with the libraries of every machine.
        output: folder to write to.

    Raises:
        MissingCapabilityError: if kernels or a library are not built; says how.
        CheckFailedError: if a library needs a newer C library than the oldest device has.
        BuildError: if the packages cannot be built.
    """
    _check(table)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fna-release-") as folder:
        stage = Path(folder) / "fna"
        shutil.copytree(source, stage, ignore=_LEFT_OUT)
        shutil.copytree(source / "plugins" / "tests", stage / "plugins" / "tests")
        _build("build_sdist", output, stage)
        carry(table, stage / "plugins" / "prebuilt")
        for machine in MACHINES:
            platform = f"manylinux_{NEWEST_GLIBC[0]}_{NEWEST_GLIBC[1]}_{machine}"
            _build("build_wheel", output, stage, {"--build-option": ["--plat-name", platform]})
    return [*sorted(output.glob("fna-*.whl")), *output.glob("fna-*.tar.gz")]


def _build(step: str, output: Path, stage: Path, settings: dict[str, list[str]] | None = None) -> None:
    """Have setuptools build a package, by its PEP 517 interface."""
    code = f"from setuptools import build_meta; build_meta.{step}({str(output.resolve())!r}, {settings!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=stage, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise BuildError(f"the packages cannot be built: {said}")


def _check(table: Path) -> None:
    libraries = [table / machine / name for machine in MACHINES for name in LIBRARIES]
    for needed in (table / KERNEL_FILE, table / CONSTANTS, *libraries):
        if not needed.is_file():
            raise MissingCapabilityError(
                f"{needed} is missing; run: fna plugin -o {table} --machine {','.join(MACHINES)}"
            )
    for library in libraries:
        if glibc_of(library) > NEWEST_GLIBC:
            raise CheckFailedError(
                f"{library} needs glibc {'.'.join(map(str, glibc_of(library)))}, but JetPack 6 has "
                f"{'.'.join(map(str, NEWEST_GLIBC))}; compile it on Ubuntu 22.04"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints the packages. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fna.plugins.release", description="Make wheels and source distribution."
    )
    parser.add_argument("source", type=Path, help="the checkout")
    parser.add_argument("--table", type=Path, required=True, help="folder that fna plugin wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the packages")
    options = parser.parse_args(arguments)
    try:
        for package in make_release(options.source, options.table, options.output):
            print(f"{package}: {package.stat().st_size / 1e6:.1f} MB")
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
