"""Command line of the PTX machine: `check` runs the compiled kernels, `barriers` takes synchronisation out, `count` counts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fna.errors import FnaError

DEFAULT_TABLE = Path("build/plugin")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fna.plugins.ptx", description="The compiled kernels on this CPU.")
    commands = parser.add_subparsers(required=True)
    check = commands.add_parser("check", help="run every compiled kernel and compare; name what cannot be modelled")
    check.set_defaults(run=_check)
    check.add_argument("--quick", action="store_true", help="the cases of make test only")
    barriers = commands.add_parser("barriers", help="take barriers and waits out, one at a time, and see what notices")
    barriers.set_defaults(run=_barriers)
    barriers.add_argument("--step", type=int, default=1, help="every STEP-th synchronisation (all)")
    for command in (check, barriers):
        command.add_argument("--only", default="", help="regular expression on the cases' names")
        command.add_argument("--table", type=Path, default=DEFAULT_TABLE, help="folder of the table (build/plugin)")
        command.add_argument("--sm", default="", help="chips, such as 87,90; 0 is the fallback (all in the table)")
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from fna.plugins.ptx.cases import all_cases, quick_cases
    from fna.plugins.ptx.check import check, covered_kernels, unmodelled_kernels

    images, chips = _images(arguments)
    skipped = unmodelled_kernels(images, chips)
    cases = [c for c in (quick_cases() if arguments.quick else all_cases()) if re.search(arguments.only, c.name)]
    results = []
    for result in check(images, chips, cases, skipped):
        results.append(result)
        outcome = result.outcome
        mark = "ok    " if outcome.passed else "FAILED"
        where = ", ".join(f"sm_{sm}" if sm else "PTX" for sm in result.chips)
        print(f"{mark} {result.case.name}: error {outcome.error:.1e}, {outcome.seconds:.1f} s ({where})", flush=True)
        for fault in outcome.faults:
            print(f"       {fault}")
    for kernel in skipped:
        print(f"NOT PROVEN {kernel.variant} on sm_{kernel.sm}: {kernel.reason}")
    failed = sum(not result.outcome.passed for result in results)
    kernels = sum(sm in chips for _, sm in images.by_name)
    print(
        f"{len(covered_kernels(results))} of {kernels} compiled kernels ran, {len(skipped)} cannot be modelled; {failed} cases failed"
    )
    return 1 if failed else 0


def _barriers(arguments: argparse.Namespace) -> int:
    from fna.plugins.ptx.calls import Chip
    from fna.plugins.ptx.mutations import mutate, mutation_cases

    images, chips = _images(arguments)
    total, noticed = 0, 0
    for cases in mutation_cases():
        if any(re.search(arguments.only, case.name) for case in cases):
            print(", ".join(case.name for case in cases), flush=True)
            for mutation in mutate(cases, Chip(images, chips[0]), step=arguments.step):
                alone = len(mutation.removed) == 1
                total, noticed = total + alone, noticed + (alone and mutation.noticed)
                print(f"  {mutation}", flush=True)
    print(f"{noticed} of {total} missing synchronisations were noticed")
    return 0


def _images(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from fna.plugins.ptx.images import load_images

    images = load_images(arguments.table)
    named = [int(sm) for sm in arguments.sm.split(",") if sm]
    return images, named or images.chips()


if __name__ == "__main__":
    sys.exit(main())
