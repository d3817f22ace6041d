"""Command line of the PTX machine: `check` runs the compiled kernels, `barriers` mutates them, `count` and `programs` count."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fna.errors import FnaError

if TYPE_CHECKING:
    from fna.plugins.ptx.count import LaunchCount
    from fna.plugins.ptx.images import PtxImages

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
    count = commands.add_parser("count", help="count what a call issues, FNA beside exact attention")
    count.set_defaults(run=_count)
    count.add_argument("--tokens", type=int, nargs="+", default=[1370], help="N (1370)")
    count.add_argument("--heads", type=int, nargs="+", default=[6, 12], help="H (6 12)")
    count.add_argument("--landmarks", type=int, nargs="+", default=[64, 128], help="S (64 128)")
    count.add_argument(
        "--chebyshev", nargs=2, metavar=("STEPS", "LOW"), help="the cheaper core instead of Newton-Schulz, as in 8 0.05"
    )
    count.add_argument(
        "--focal",
        nargs="+",
        type=_level,
        default=[],
        metavar="SIZE:GAP",
        help="focal attention with these levels on the largest square grid, as in 2:2 4:6",
    )
    count.add_argument("--multiprocessors", type=int, default=16, help="of the GPU (16, as on Jetson AGX Orin)")
    count.add_argument("--clock", type=float, default=1.3, help="in GHz, for the time that the cycles imply (1.3)")
    programs = commands.add_parser("programs", help="count what the planner's predictions rest on, and write the table")
    programs.set_defaults(run=_programs)
    programs.add_argument("--output", type=Path, default=None, help="the file (counted_programs.json of this package)")
    for command in (check, barriers, programs):
        command.add_argument("--only", default="", help="regular expression on the names of cases or programs")
    for command in (check, barriers, count, programs):
        command.add_argument("--table", type=Path, default=DEFAULT_TABLE, help="folder of the table (build/plugin)")
        command.add_argument("--sm", default="", help="chips, such as 87,90; 0 is the fallback (all in the table)")
    return parser


def _level(text: str) -> tuple[int, int]:
    size, gap = map(int, text.split(":"))
    return size, gap


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
    there = {key for key in images.by_name if key[1] in chips}
    covered = covered_kernels(results)
    if not (arguments.quick or arguments.only):
        for name, sm in sorted(there - covered - {(kernel.variant, kernel.sm) for kernel in skipped}):
            print(f"NOT PROVEN {name} on sm_{sm}: it runs only beside kernels that cannot be modelled")
    failed = sum(not result.outcome.passed for result in results)
    print(
        f"{len(covered)} of {len(there)} compiled kernels ran, {len(skipped)} cannot be modelled; {failed} cases failed"
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


def _count(arguments: argparse.Namespace) -> int:
    from itertools import product
    from math import isqrt

    from fna.chebyshev import ChebyshevSteps
    from fna.focal_keys import NEAR
    from fna.plugins.programs import Multiprocessors
    from fna.plugins.ptx.count import CallSize, compile_exact, count_attention, count_exact
    from fna.plugins.ptx.count_focal import FocalSize, count_focal

    images, chips = _images(arguments)
    chosen = arguments.chebyshev
    steps = ChebyshevSteps(int(chosen[0]), float(chosen[1])) if chosen else None
    exact = compile_exact(chips[0])
    for tokens, heads in product(arguments.tokens, arguments.heads):
        sizes = [
            CallSize(tokens, heads, count, Multiprocessors(arguments.multiprocessors), chebyshev=steps)
            for count in arguments.landmarks
        ]
        print(
            f"\nN = {tokens}, H = {heads}, D = 64, fp16, {arguments.multiprocessors} multiprocessors; cycles: overlapped to serial"
        )
        whole = count_exact(exact, sizes[0])
        _print_launches([whole], arguments.clock)
        for size in sizes:
            print(f"FNA, S = {size.landmarks}, {'Newton-Schulz' if steps is None else steps}")
            _print_beside(count_attention(images, chips[0], size), whole, arguments.clock)
        if arguments.focal:
            side = isqrt(tokens - 1)
            focal = FocalSize((side, side), heads, Multiprocessors(arguments.multiprocessors), (NEAR, *arguments.focal))
            print(f"focal, {side} x {side} patches, levels {focal.levels}, tile {focal.tile}, hot {focal.hot}")
            _print_beside(count_focal(images, chips[0], focal), whole, arguments.clock)
    return 0


def _print_beside(launches: list[LaunchCount], whole: LaunchCount, clock: float) -> None:
    _print_launches(launches, clock)
    overlapped, serial = sum(x.overlapped for x in launches), sum(x.serial for x in launches)
    print(
        f"  over exact attention: {overlapped / whole.overlapped:.3f} overlapped, {serial / whole.serial:.3f} serial",
        flush=True,
    )


def _programs(arguments: argparse.Namespace) -> int:
    from fna.files import write_text
    from fna.plugins.programs import COUNTED_PROGRAMS, counted_programs, dump_programs
    from fna.plugins.ptx.programs import count_programs

    images, chips = _images(arguments)
    chip = 0 if 0 in chips else chips[0]
    costs = dict(counted_programs()) if arguments.only else {}
    for key, cost in count_programs(images, chip, arguments.only):
        costs[key] = cost
        print(key, flush=True)
    about = "python -m fna.plugins.ptx programs: counts of the PTX of sm_80, not times"
    write_text(arguments.output or COUNTED_PROGRAMS, dump_programs(costs, about))
    return 0


def _print_launches(launches: list[LaunchCount], clock: float) -> None:
    for launch in launches:
        cta = launch.costliest
        print(
            f"  {launch.name:24} {launch.ctas:4} CTAs of {launch.warps} warps: {cta.instructions:6.0f} instructions a warp; "
            f"tensor {cta.tensor:6.0f}, issue {cta.issue:6.0f}, memory {cta.memory:6.0f} (wavefronts {cta.wavefronts:.0f}, "
            f"ideal {cta.ideal_wavefronts:.0f}; sectors {cta.sectors:.0f}); critical path {launch.overlapped:.0f} to "
            f"{launch.serial:.0f}, {launch.overlapped / clock / 1000:.1f} to {launch.serial / clock / 1000:.1f} us"
        )
        print("    " + ", ".join(f"{name} {count:.0f}" for name, count in launch.classes.items()), flush=True)


def _images(arguments: argparse.Namespace) -> tuple[PtxImages, list[int]]:
    from fna.plugins.ptx.images import load_images

    images = load_images(arguments.table)
    named = [int(sm) for sm in arguments.sm.split(",") if sm]
    return images, named or images.chips()


if __name__ == "__main__":
    sys.exit(main())
