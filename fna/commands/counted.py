"""The terminal's table of `fna bench --count`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fna.validate.bench.cycles import CountedBench, CountedCall

_COLUMNS = (
    "", "programs", "instructions a warp", "wavefronts", "ideal", "sectors", "tensor", "issue", "memory", "cycles", "us", "over exact",
)  # fmt: skip


def print_counted(result: CountedBench, console: Console) -> None:
    """A line for each call and each of its launches."""
    from rich.table import Table

    from fna.validate.bench.models import format_size

    console.print(
        f"{result.model} on {result.target}, one block, batch 1, {result.precision}: {result.counted}. {result.multiprocessors} "
        f"multiprocessors at {result.clock_ghz:.2f} GHz, {result.multiply_adds:.0f} multiply-adds a cycle each; {result.chip}. "
        "Up to memory: the costliest program of a launch. cycles: critical path, resources overlapping to taking turns",
        markup=False,
    )
    for size in result.sizes:
        console.print(
            f"\n{format_size(size.height, size.width)} pixels, {size.tokens} tokens, {size.heads} heads of {size.head_size}",
            markup=False,
        )
        table = Table(box=None, pad_edge=False)
        for title in _COLUMNS:
            table.add_column(title, justify="right" if title else "left", no_wrap=True)
        for call in (size.exact, *size.fna):
            _add_call(table, call)
        console.print(table)


def _add_call(table: Table, call: CountedCall) -> None:
    name = f"{call.kind} S={call.landmarks}, {call.core}" if call.landmarks else "exact attention"
    over = f"{call.over_exact:.3f}-{call.serial_over_exact:.3f}" if call.landmarks else ""
    table.add_row(
        name, *[""] * 8, f"{call.cycles:.0f}-{call.serial_cycles:.0f}", f"{call.microseconds:.1f}", over, style="bold"
    )
    for launch in call.launches:
        numbers = (
            launch.wavefronts,
            launch.ideal_wavefronts,
            launch.sectors,
            launch.tensor_cycles,
            launch.issue_cycles,
        )
        table.add_row(
            f"  {launch.name}",
            f"{launch.programs} x {launch.warps} warps",
            f"{sum(launch.instructions.values()):.0f}",
            *(f"{number:.0f}" for number in (*numbers, launch.memory_cycles)),
            f"{launch.cycles:.0f}-{launch.serial_cycles:.0f}",
            f"{launch.microseconds:.1f}",
            "",
        )
