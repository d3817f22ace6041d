"""Dense against FNA of the same model, timed alternately in one process."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from fna.engines.run import open_onnx, run_onnx
from fna.export.sources import LoadedModel
from fna.export.trace import INPUT_NAME, TraceOptions, export_onnx
from fna.plan import Plan

WARM_UP_RUNS = 2


class Timing(BaseModel):
    """Latencies of one model, in milliseconds."""

    model_config = ConfigDict(frozen=True)

    median: float
    fastest: float
    slowest: float
    runs: int


class BenchRow(BaseModel):
    """Dense and FNA at one resolution.

    Attributes:
        backend: what ran the models.
        resolution: side of the square images, in pixels.
        tokens: tokens per image, prefix tokens included.
        landmarks: S.
        blocks: how many blocks were FNA.
        dense: latency with exact attention.
        fna: latency with FNA.
        speedup: median of dense over median of FNA.
    """

    model_config = ConfigDict(frozen=True)

    backend: Literal["onnxruntime"]
    resolution: int
    tokens: int
    landmarks: int
    blocks: int
    dense: Timing
    fna: Timing
    speedup: float


def bench_onnxruntime(
    model: LoadedModel,
    plan: Plan,
    resolutions: Sequence[int],
    *,
    runs: int,
    folder: Path,
    on_step: Callable[[str], None] = lambda _name: None,
) -> list[BenchRow]:
    """Export `model` dense and by `plan`, and time both on onnxruntime's CPU provider, taking turns.

    Args:
        model: to be timed.
        plan: which blocks are FNA.
        resolutions: sides of square images, in pixels.
        runs: timed runs of each, after warm-up.
        folder: where the ONNX files are written.
        on_step: called with what is being done.

    Raises:
        ModelSourceError: for a resolution that the model does not take.
    """
    rows = []
    dense_plan = plan.model_copy(update={"blocks": ()})
    for resolution in resolutions:
        sessions = {}
        for name, chosen in (("dense", dense_plan), ("fna", plan)):
            on_step(f"exporting {name} at {resolution}")
            path = folder / f"{name}-{resolution}.onnx"
            metadata = export_onnx(model, chosen, TraceOptions(resolution, resolution), path)
            sessions[name] = open_onnx(path)
        pixels = np.random.default_rng(0).standard_normal((1, 3, resolution, resolution), dtype=np.float32)
        on_step(f"timing at {resolution}")
        seconds = _time_alternately(sessions, {INPUT_NAME: pixels}, runs)
        timings = {name: _summarise(values) for name, values in seconds.items()}
        rows.append(
            BenchRow(
                backend="onnxruntime",
                resolution=resolution,
                tokens=(resolution // model.patch_size) ** 2 + (metadata.plan.prefix_tokens or 0),
                landmarks=max((entry.landmarks for entry in plan.blocks), default=0),
                blocks=len(plan.blocks),
                dense=timings["dense"],
                fna=timings["fna"],
                speedup=timings["dense"].median / timings["fna"].median,
            )
        )
    return rows


def _time_alternately(sessions: dict[str, Any], inputs: dict[str, Any], runs: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(WARM_UP_RUNS + runs):
        for name, session in sessions.items():
            started = time.perf_counter()
            run_onnx(session, inputs)
            if turn >= WARM_UP_RUNS:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _summarise(seconds: list[float]) -> Timing:
    values = [value * 1e3 for value in seconds]
    return Timing(median=statistics.median(values), fastest=min(values), slowest=max(values), runs=len(values))


def describe_machine() -> dict[str, Any]:
    """Return what a latency depends on: processor, thread count and library versions."""
    import onnxruntime

    return {
        "processor": _processor_name(),
        "threads": os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
