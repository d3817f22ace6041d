"""Time engines on this machine's GPU, dense against FNA, in one process: `python -m fna.validate.bench.engines`.

For each resolution both files are traced, cast, built and loaded; then they take turns, so that clocks and neighbours are the same
for both. The machine, its clocks and power mode are printed first, because the numbers depend on them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions
from fna.engines.device import find_gpu
from fna.engines.doctor import diagnose
from fna.engines.run.engine import Engine
from fna.engines.run.latency import Latency
from fna.engines.targets import TARGETS, Target
from fna.errors import FnaError, MissingCapabilityError

RESOLUTIONS = (518, 1022, 1540)
TURNS = 5


@dataclass(frozen=True)
class EngineRow:
    """One engine at one resolution; milliseconds, and MiB of the device that the loaded and run engine takes."""

    model: str
    resolution: int
    precision: str
    batch: int
    latency: Latency
    device_mib: float
    engine_mib: float
    build_seconds: float


def bench_resolution(
    folder: Path, name: str, resolution: int, settings: argparse.Namespace, targets: tuple[Target, ...]
) -> list[EngineRow]:
    """Export, build and time the dense and the FNA engine of one resolution."""
    from fna.export.sources.loading import load_model
    from fna.export.trace import TraceOptions, export_onnx
    from fna.export.variants import Variant, make_variant
    from fna.plan import uniform_plan

    model = load_model(name)
    options = BuildOptions(settings.backend, targets, BatchRange(1, settings.batch, settings.batch))
    engines: dict[str, Engine] = {}
    memory: dict[str, float] = {}
    for label, layers in (("dense", "none"), ("FNA", settings.layers)):
        plan = uniform_plan(model.num_blocks, layers=layers, landmarks=settings.landmarks)
        path = folder / f"{label}-{resolution}.onnx"
        export_onnx(model, plan, TraceOptions(resolution, resolution), path)
        if settings.precision != "fp32":
            cast = folder / f"{label}-{resolution}-{settings.precision}.onnx"
            make_variant(path, cast, Variant(settings.precision, check=False), [])
            path = cast
        build_engine(path, path.with_suffix(".engine"), options)
        before = free_memory()
        engines[label] = Engine(path.with_suffix(".engine"))
        pixels = np.random.default_rng(0).standard_normal((settings.batch, 3, resolution, resolution), dtype=np.float32)
        inputs = {next(iter(engines[label].manifest.profiles)): pixels}
        engines[label].run(inputs)
        memory[label] = (before - free_memory()) / 2**20
    best: dict[str, Latency] = {}
    for _ in range(TURNS):
        for label, engine in engines.items():
            found = engine.bench(inputs, runs=settings.runs, warm_up=20)
            if label not in best or found.median < best[label].median:
                best[label] = found
    rows = []
    for label, engine in engines.items():
        manifest = engine.manifest
        size = manifest.engine_bytes / 2**20
        rows.append(
            EngineRow(
                label,
                resolution,
                settings.precision,
                settings.batch,
                best[label],
                memory[label],
                size,
                manifest.seconds,
            )
        )
        engine.close()
    return rows


def free_memory() -> int:
    """Bytes of the device that nothing holds."""
    from polygraphy import cuda

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.wrapper().check(cuda.wrapper().handle.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return free.value


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 2 for bad usage, 3 where there is no GPU or no builder."""
    parser = argparse.ArgumentParser(
        prog="python -m fna.validate.bench.engines", description="Time dense and FNA engines on this GPU."
    )
    parser.add_argument("--model", default="dinov2-small-saliency")
    parser.add_argument("--backend", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--resolution", type=int, nargs="+", default=RESOLUTIONS)
    parser.add_argument("--layers", default="all", help="FNA blocks")
    parser.add_argument("--landmarks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--json", type=Path, default=None, help="write every number to this file")
    settings = parser.parse_args(argv)
    try:
        gpu = find_gpu()
        if gpu is None:
            raise MissingCapabilityError("timing engines needs a GPU, and this machine has none")
        targets = tuple(target for target in TARGETS if gpu.capability in target.capabilities)[:1]
        machine = {name: value for name, value in diagnose().items() if name != "targets"}
        print(*(f"{name}: {machine[name]}" for name in ("gpu", "driver", "power mode", settings.backend)), sep="\n")
        rows: list[EngineRow] = []
        with tempfile.TemporaryDirectory() as folder:
            for resolution in settings.resolution:
                rows += bench_resolution(Path(folder), settings.model, resolution, settings, targets)
                _print(rows[-2:])
        if settings.json is not None:
            document: dict[str, Any] = {"machine": machine, "settings": {**vars(settings), "json": None}}
            document["rows"] = [asdict(row) | {"latency": row.latency.model_dump()} for row in rows]
            settings.json.write_text(json.dumps(document, indent=2, default=str) + "\n")
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _print(rows: Sequence[EngineRow]) -> None:
    dense, fna = (row.latency.median for row in rows)
    for row in rows:
        print(
            f"{row.resolution} {row.model:5} {row.precision} batch {row.batch}: median {row.latency.median:.3f} ms, "
            f"p99 {row.latency.p99:.3f} ms, {row.latency.throughput:.0f} images/s, {row.device_mib:.0f} MiB on the device"
            + (f", {dense / fna:.2f}x" if row.model == "FNA" else "")
        )


if __name__ == "__main__":
    sys.exit(main())
