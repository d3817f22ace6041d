"""Time engines on this machine's GPU, dense against FNA: `python -m fna.validate.bench.engines`.

As `fna bench --backend tensorrt-rtx`, with the settings of docs/benchmarks.md. The machine, its clocks and power mode are
printed first, because the numbers depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fna.engines.doctor import diagnose
from fna.errors import FnaError
from fna.export.sources.loading import DEFAULT_MODEL, load_model
from fna.files import write_text
from fna.plan import uniform_plan
from fna.precision import PRECISIONS
from fna.validate.bench.backends import check_backend
from fna.validate.bench.models import BenchRow, bench

RESOLUTIONS = (518, 1022, 1540)
TURNS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 2 for bad usage, 3 where there is no GPU or no builder."""
    parser = argparse.ArgumentParser(
        prog="python -m fna.validate.bench.engines", description="Time dense and FNA engines on this GPU."
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--backend", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--resolution", type=int, nargs="+", default=RESOLUTIONS)
    parser.add_argument("--layers", default="all", help="FNA blocks")
    parser.add_argument("--landmarks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=100, help=f"launches in each of {TURNS} turns")
    parser.add_argument("--json", type=Path, default=None, help="write every number to this file")
    settings = parser.parse_args(argv)
    try:
        check_backend(settings.backend)
        machine = diagnose()
        print(*(f"{name}: {machine[name]}" for name in ("gpu", "driver", "power mode", settings.backend)), sep="\n")
        model = load_model(settings.model)
        result = bench(
            model,
            [uniform_plan(model.num_blocks, layers=settings.layers, landmarks=settings.landmarks)],
            [(side, side) for side in settings.resolution],
            backend=settings.backend,
            runs=TURNS,
            batch=settings.batch,
            precision=settings.precision,
            warm_up=0,
            launches=settings.runs,
        )
        for row in result.rows:
            _print(row, settings.precision, settings.batch)
        if settings.json is not None:
            write_text(settings.json, result.model_dump_json(indent=2) + "\n")
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print(row: BenchRow, precision: str, batch: int) -> None:
    for name, timing in (("dense", row.dense), ("FNA", row.fna)):
        print(
            f"{row.height} {name:5} {precision} batch {batch}: median {timing.median:.3f} ms, "
            f"p99 {timing.details['p99']:.3f} ms, {timing.images_per_second:.0f} images/s, {timing.peak_mib:.0f} MiB on the device"
            + (f", {row.speedup:.2f}x" if name == "FNA" else "")
        )


if __name__ == "__main__":
    sys.exit(main())
