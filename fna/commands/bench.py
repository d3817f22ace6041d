"""`fna bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.errors import InvalidArgumentError
from fna.files import check_writable
from fna.plan import DEFAULT_LANDMARKS
from fna.validate.bench import BACKENDS

if TYPE_CHECKING:
    from fna.validate.bench.models import BenchResult


@click.command("bench", short_help="Time dense against FNA on this machine.")
@click.argument("model", default="dinov2-small-saliency")
@click.option("--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True)
@options.plan_options(landmarks={"multiple": True, "default": (DEFAULT_LANDMARKS,), "help": "S; may be repeated."})
@options.resolution(
    "resolutions",
    multiple=True,
    help="Image size: 518, or HEIGHTxWIDTH; may be repeated.  [default: the plan's, or the model's own]",
)
@click.option(
    "--count", "counted", is_flag=True, help="Count cycles on a --target that is not here, instead of timing."
)
@options.target(help="With --count: the device, as in jetson-agx-orin.")
@click.option("--runs", type=click.IntRange(min=1), default=7, show_default=True, help="Timed runs of each model.")
@options.batch_size()
@options.precision(help="Of weights and activations.  [default: fp32; fp16 with --count]")
@click.option("--csv", "csv_file", type=options.PATH, help="Write every number as CSV.")
@options.plot(help="Draw time against tokens: .svg, .png or .pdf.")
@options.json_file()
@options.quiet()
def command(
    model: str,
    backend: str,
    plan: options.PlanChoice,
    resolutions: tuple[tuple[int, int], ...],
    counted: bool,
    target: str | None,
    runs: int,
    batch: int,
    precision: str | None,
    csv_file: Path | None,
    plot: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Time MODEL dense against FNA, taking turns in one process; count operations and bytes beside.

    Dense and FNA are timed in every form that the backend offers, and the fastest of each counts. The baseline is named.

    With --count nothing is timed: the compiled kernels of one block run on this CPU, and the cycles of what they issue are counted
    for a --target, FNA beside a plain exact kernel. Exit code 3, with the reason, for a backend that this machine lacks.
    """
    if counted or target is not None:
        if not (counted and target is not None):
            raise InvalidArgumentError("--count and --target go together: fna bench --count --target jetson-agx-orin")
        if csv_file is not None or plot is not None or plan.file is not None or batch != 1:
            raise InvalidArgumentError(
                "--count counts one block at batch 1; leave out --csv, --plot, --plan and --batch"
            )
        _count(model, target, plan, resolutions, precision or "fp16", json_file, quiet)
        return
    for path in (json_file, csv_file, plot):
        if path is not None:
            check_writable(path)
    with progress(quiet, bar=True) as say:
        say("importing PyTorch")
        from fna.export.sources.loading import load_model
        from fna.files import write_text
        from fna.validate.bench.backends import check_backend
        from fna.validate.bench.models import bench
        from fna.validate.bench.output import draw, dump_csv, plot_kind

        check_backend(backend)
        if plot is not None:
            plot_kind(plot)
        loaded = load_model(model)
        counts = dict.fromkeys(plan.settings["landmarks"])
        plans = [plan.make(loaded.num_blocks, towers=loaded.towers, landmarks=count) for count in counts]
        result = bench(
            loaded,
            plans if plan.file is None else plans[:1],
            resolutions or (plans[0].resolution or loaded.native_size,),
            backend=backend,  # type: ignore[arg-type]
            runs=runs,
            batch=batch,
            precision=precision or "fp32",  # type: ignore[arg-type]
            on_step=say,
        )
        write_json(json_file, result)
        if csv_file is not None:
            write_text(csv_file, dump_csv(result))
        if plot is not None:
            draw(result, plot)
    _print(result, quiet)


def _count(
    model: str,
    target: str,
    plan: options.PlanChoice,
    resolutions: tuple[tuple[int, int], ...],
    precision: str,
    json_file: Path | None,
    quiet: bool,
) -> None:
    from fna.commands.counted import print_counted

    if json_file is not None:
        check_writable(json_file)
    with progress(quiet) as say:
        say("importing PyTorch")
        from fna.engines.targets import find_target
        from fna.export.sources.dino_saliency import cache_folder
        from fna.export.sources.loading import load_model
        from fna.validate.bench.cycles import count_cycles, usual_cores
        from fna.validate.bench.models import block_sizes

        device = find_target(target)
        loaded = load_model(model)
        sizes = block_sizes(loaded, resolutions or (loaded.native_size,))
        cores = [(count, core) for count in dict.fromkeys(plan.settings["landmarks"]) for core in usual_cores(count)]
        result = count_cycles(
            loaded.name,
            device,
            sizes,
            cores,
            dtype=precision,  # type: ignore[arg-type]
            cache=cache_folder() / "counted-kernels",
            on_step=say,
        )
        write_json(json_file, result)
    print_counted(result, make_console(quiet))


def _print(result: BenchResult, quiet: bool) -> None:
    from rich.table import Table

    from fna.validate.bench.models import format_size

    console = make_console(quiet)
    machine = result.machine
    console.print(
        f"{result.model} on {result.backend}, {machine.get('gpu') or machine['processor']}, {machine['threads']} threads, batch "
        f"{result.batch}, {result.precision}, milliseconds (fastest-slowest)"
    )
    table = Table(box=None, pad_edge=False)
    titles = (
        "resolution",
        "tokens",
        "S",
        "blocks",
        "exact",
        "by the plan",
        "speed-up",
        "images/s",
        "GFLOP",
        "attention",
        "peak MiB",
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in result.rows:
        counted = row.counts
        peaks = [timing.peak_mib for timing in (row.dense, row.fna)]
        table.add_row(
            format_size(row.height, row.width),
            str(row.tokens),
            str(row.landmarks) if row.landmarks else "focal",
            str(row.blocks),
            *(f"{timing.median:.0f} ({timing.fastest:.0f}-{timing.slowest:.0f})" for timing in (row.dense, row.fna)),
            f"{row.speedup:.2f}x",
            f"{row.dense.images_per_second:.2f} {row.fna.images_per_second:.2f}",
            f"{counted.dense_gflop:.1f} {counted.fna_gflop:.1f}" if counted else "",
            f"{counted.attention_share:.0%}" if counted else "",
            " ".join(f"{peak:.0f}" for peak in peaks if peak is not None),
        )
    console.print(table)
    for size, row in {format_size(row.height, row.width): row for row in result.rows}.items():
        others = [f"{name} {timing.median:.0f}" for name, timing in row.exact_forms.items() if name != row.baseline]
        rest = f", the fastest form of exact attention here (others: {', '.join(others)})" if others else ""
        console.print(f"{size}: speed-up against {row.baseline}{rest}", markup=False)
    for crossing in result.break_even:
        said = f"pays from {crossing.tokens:.0f} tokens on, " if crossing.tokens is not None else ""
        console.print(f"{_setting(crossing.landmarks)}: {said}{crossing.reason}")


def _setting(landmarks: int) -> str:
    return f"S={landmarks}" if landmarks else "focal"
