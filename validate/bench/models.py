"""Exact attention against FNA of the same model: timed in turns in one process, on whatever is here."""

from __future__ import annotations

import copy
import csv
import ctypes
import gc
import io
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from fna.errors import InputFileError, InvalidLandmarksError, MissingCapabilityError
from fna.export.sources.loading import LoadedModel, check_resolution
from fna.export.trace import INPUT_NAME, TORCH_TYPES, Precision, TraceOptions, export_onnx
from fna.machine import describe_machine as describe_machine
from fna.patching import find_attention_blocks, patch
from fna.plan import Plan
from fna.runtime import open_session, run_session
from fna.special_tokens import detect_prefix_tokens
from fna.validate.bench.counts import Counts, count

Backend = Literal["onnxruntime", "onnxruntime-cuda", "torch", "torch-compile", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
WARM_UP_RUNS = 2
QUICK_RUNS = 3
QUICK_SHARES = (0.43, 0.7, 1.0)
"""Of the native resolution, for `--bench quick`."""

Say = Callable[..., None]


class Timing(BaseModel):
    """Latencies of one model, in milliseconds.

    Attributes:
        median: of all timed runs.
        fastest: of all.
        slowest: of all.
        runs: how many were timed, after warm-up.
        images_per_second: at the median.
        peak_mib: largest memory taken since before the model was opened, weights included: of the process on a CPU, of
            PyTorch's allocator on a GPU; None where it cannot be told.
    """

    model_config = ConfigDict(frozen=True)

    median: float
    fastest: float
    slowest: float
    runs: int
    images_per_second: float
    peak_mib: float | None = None


class BenchRow(BaseModel):
    """Exact attention and FNA at one resolution.

    Attributes:
        backend: what ran the models.
        resolution: side of the square images, in pixels.
        tokens: tokens per image, prefix tokens included.
        landmarks: S.
        blocks: how many blocks were FNA.
        dense: latency with exact attention.
        fna: latency with FNA.
        speedup: median of dense over median of FNA.
        counts: operations and bytes.
    """

    model_config = ConfigDict(frozen=True)

    backend: Backend
    resolution: int
    tokens: int
    landmarks: int
    blocks: int
    dense: Timing
    fna: Timing
    speedup: float
    counts: Counts | None = None


class BreakEven(BaseModel):
    """From how many tokens on FNA is faster.

    Attributes:
        landmarks: S.
        tokens: interpolated between two measured sizes, on logarithmic axes; None if it lies outside of them.
        reason: what was seen instead.
    """

    model_config = ConfigDict(frozen=True)

    landmarks: int
    tokens: float | None
    reason: str


class BenchResult(BaseModel):
    """What `fna bench` writes.

    Attributes:
        model: its name.
        backend: what ran it.
        batch: images per run.
        precision: of weights and activations.
        runs: timed runs of each model.
        blocks: how many blocks were FNA.
        num_blocks: how many attention blocks the model has.
        machine: what it was run on.
        plan: the plan with the first S.
        rows: one per resolution and S.
        break_even: one per S.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    backend: Backend
    batch: int
    precision: str
    runs: int
    blocks: int
    num_blocks: int
    machine: dict[str, Any]
    plan: dict[str, Any]
    rows: tuple[BenchRow, ...]
    break_even: tuple[BreakEven, ...]


def bench(
    model: LoadedModel,
    plans: Sequence[Plan],
    resolutions: Sequence[int],
    *,
    backend: Backend = "onnxruntime",
    runs: int = 7,
    batch: int = 1,
    precision: Precision = "fp32",
    warm_up: int = WARM_UP_RUNS,
    on_step: Say = lambda *_progress: None,
) -> BenchResult:
    """Time a model dense and by each plan, taking turns.

    Args:
        model: to be timed.
        plans: which blocks are FNA; usually one per S.
        resolutions: sides of square images, in pixels.
        backend: what runs the models.
        runs: timed runs of each, after warm-up.
        batch: images per run.
        precision: of weights and activations.
        warm_up: runs of each before those that are timed.
        on_step: called with what is being done, how much of it is done, and how much there is.

    Raises:
        ModelSourceError: for a resolution that the model does not take.
        InvalidLandmarksError: for more landmarks than tokens at a resolution.
        InvalidPlanError: for a plan that was made for another model or resolution.
        MissingCapabilityError: if this machine lacks the backend.
    """
    for resolution in resolutions:
        check_resolution(model, resolution, resolution)
        for plan in plans:
            plan.check_fits(model.name, (resolution, resolution))
        _check_landmarks(model, plans, resolution)
    open_model = _OPENERS[backend]
    rows = []
    for place, resolution in enumerate(sorted(set(resolutions))):
        on_step(f"preparing {resolution}", place, len(resolutions))
        dense_plan = plans[0].model_copy(update={"blocks": ()})
        with tempfile.TemporaryDirectory() as folder:
            setting = _Setting(model, resolution, batch, precision, Path(folder))
            opened = [open_model(setting, plan) for plan in (dense_plan, *plans)]
            on_step(f"timing at {resolution}", place, len(resolutions))
            timings = _time_alternately(opened, runs, warm_up, batch)
            for timed in opened:
                timed.close()
        rows += [
            _row(model, plan, resolution, backend, precision, timings[0], timing)
            for plan, timing in zip(plans, timings[1:], strict=True)
        ]
    return BenchResult(
        model=model.name,
        backend=backend,
        batch=batch,
        precision=precision,
        runs=runs,
        blocks=len(plans[0].blocks),
        num_blocks=plans[0].num_blocks,
        machine=describe_machine(),
        plan=plans[0].model_dump(mode="json"),
        rows=tuple(rows),
        break_even=find_break_even(rows),
    )


def _check_landmarks(model: LoadedModel, plans: Sequence[Plan], resolution: int) -> None:
    most = max((entry.landmarks for plan in plans for entry in plan.blocks), default=0)
    tokens = (resolution // model.patch_size) ** 2 + detect_prefix_tokens(find_attention_blocks(model.module)[0].tower)
    if most > tokens:
        raise InvalidLandmarksError(
            f"{most} landmarks were asked for, but at resolution {resolution} there are only {tokens} tokens; ask for fewer"
        )


def check_backend(backend: str) -> None:
    """Refuse a backend that this machine lacks, before any work.

    Raises:
        MissingCapabilityError: saying what is missing.
    """
    if backend in ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        _need_gpu(backend)


def bench_quickly(model: LoadedModel, plan: Plan, resolution: int, on_step: Say) -> dict[str, Any]:
    """Time a model in PyTorch at up to three sizes, a few runs each, for the report."""
    patch_size = model.patch_size
    sides = {round(resolution * share / patch_size) * patch_size for share in QUICK_SHARES}
    tokens_needed = max((entry.landmarks for entry in plan.blocks), default=1)
    fitting = [side for side in sides if (side // patch_size) ** 2 > tokens_needed] or [resolution]
    chosen = sorted(fitting) if model.any_resolution else [resolution]
    result = bench(model, [plan.for_squares()], chosen, backend="torch", runs=QUICK_RUNS, warm_up=1, on_step=on_step)
    data: dict[str, Any] = json.loads(result.model_dump_json())
    return data


def read_bench(path: Path) -> dict[str, Any]:
    """Read the JSON file of `fna bench`.

    Raises:
        InputFileError: if it is none.
    """
    try:
        result = BenchResult.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(
            f"{path} cannot be read: {error.strerror}; give a JSON file of fna bench, or quick"
        ) from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputFileError(f"{path} is no JSON file of this version's fna bench ({reason})") from None
    data: dict[str, Any] = json.loads(result.model_dump_json())
    return data


def find_break_even(rows: Sequence[BenchRow]) -> tuple[BreakEven, ...]:
    """Return for each S where the two curves meet, between two measured sizes."""
    found = []
    for landmarks in sorted({row.landmarks for row in rows}):
        chosen = sorted((row for row in rows if row.landmarks == landmarks), key=lambda row: row.tokens)
        found.append(_break_even(landmarks, [(row.tokens, row.speedup) for row in chosen]))
    return tuple(found)


def _break_even(landmarks: int, points: Sequence[tuple[int, float]]) -> BreakEven:
    (first, first_speedup), (last, last_speedup) = points[0], points[-1]
    if first_speedup >= 1:
        return BreakEven(
            landmarks=landmarks, tokens=None, reason=f"FNA is faster already at {first} tokens, the fewest measured"
        )
    for (left, slower), (right, faster) in itertools.pairwise(points):
        if slower < 1 <= faster:
            share = -math.log(slower) / (math.log(faster) - math.log(slower))
            tokens = math.exp(math.log(left) + share * (math.log(right) - math.log(left)))
            return BreakEven(landmarks=landmarks, tokens=round(tokens, 1), reason=f"between {left} and {right} tokens")
    reason = f"exact attention is faster up to {last} tokens, the most measured ({last_speedup:.2f} times the speed)"
    return BreakEven(landmarks=landmarks, tokens=None, reason=reason)


def dump_csv(result: BenchResult) -> str:
    """Return the rows as CSV, one column per number."""
    stream = io.StringIO()
    rows = [_flatten(json.loads(row.model_dump_json())) for row in result.rows]
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def plot_kind(path: Path) -> str:
    """Return the format of a plot by its path's suffix.

    Raises:
        InputFileError: for another than .svg, .png and .pdf.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("svg", "png", "pdf"):
        raise InputFileError(f"{path} is to be a plot; give a name ending in .svg, .png or .pdf")
    return kind


def draw(result: BenchResult, path: Path) -> None:
    """Draw time against tokens on logarithmic axes, the break-even marked; SVG, PNG or PDF by the path's suffix.

    Raises:
        InputFileError: for another suffix, or if it cannot be written.
    """
    from matplotlib.figure import Figure

    from fna.files import written_whole

    kind = plot_kind(path)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    dense = {row.tokens: row.dense for row in result.rows}
    tokens = sorted(dense)
    medians = [dense[n].median for n in tokens]
    axes.plot(tokens, medians, color="#7a8591", marker="v", label="exact attention")
    axes.fill_between(
        tokens, [dense[n].fastest for n in tokens], [dense[n].slowest for n in tokens], color="#7a8591", alpha=0.2
    )
    for number, crossing in enumerate(result.break_even):
        chosen = sorted((row for row in result.rows if row.landmarks == crossing.landmarks), key=lambda row: row.tokens)
        (line,) = axes.plot(
            [row.tokens for row in chosen], [row.fna.median for row in chosen], marker="o", label=f"FNA, S={crossing.landmarks}",
            color=("#2b7bba", "#c2571a", "#3a8f6b", "#8a63b8")[number % 4],
        )  # fmt: skip
        if crossing.tokens is not None:
            label = f"S={crossing.landmarks} pays from {crossing.tokens:.0f} tokens"
            axes.axvline(crossing.tokens, color=line.get_color(), linestyle=":", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"milliseconds per batch of {result.batch}")
    axes.set_title(
        f"{result.model} on {result.backend}, {result.precision}, {result.machine['processor']}", fontsize=10
    )
    axes.minorticks_off()
    axes.set_xticks(tokens, [str(value) for value in tokens])
    axes.grid(True, alpha=0.4)
    axes.legend(frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)


# ---------------------------------------------------------------- timing


class _Setting:
    """What is timed, apart from the plan."""

    def __init__(self, model: LoadedModel, resolution: int, batch: int, precision: Precision, folder: Path) -> None:
        self.model = model
        self.resolution = resolution
        self.batch = batch
        self.precision = precision
        self.folder = folder
        shape = (batch, 3, resolution, resolution)
        self.pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def export(self, plan: Plan) -> Path:
        """Write the ONNX file of one plan."""
        counts = "-".join(str(entry.landmarks) for entry in plan.blocks) or "dense"
        path = self.folder / f"{counts}-{self.resolution}.onnx"
        options = TraceOptions(self.resolution, self.resolution, precision=self.precision)
        export_onnx(self.model, plan, options, path)
        return path


class _Timed:
    """A model that is open: one call runs a batch, and returns when it is done."""

    def __init__(self, run: Callable[[], float], close: Callable[[], None], peak_mib: float | None) -> None:
        self.run = run  # returns seconds
        self.close = close
        self.peak_mib = peak_mib


def _time_alternately(opened: Sequence[_Timed], runs: int, warm_up: int, batch: int) -> list[Timing]:
    seconds: list[list[float]] = [[] for _ in opened]
    for turn in range(warm_up + runs):
        for timed, values in zip(opened, seconds, strict=True):
            elapsed = timed.run()
            if turn >= warm_up:
                values.append(elapsed)
    return [_summarise(values, batch, timed.peak_mib) for timed, values in zip(opened, seconds, strict=True)]


def _summarise(seconds: list[float], batch: int, peak_mib: float | None) -> Timing:
    values = [value * 1e3 for value in seconds]
    median = statistics.median(values)
    return Timing(
        median=median, fastest=min(values), slowest=max(values), runs=len(values),
        images_per_second=batch * 1e3 / median, peak_mib=peak_mib,
    )  # fmt: skip


def _row(
    model: LoadedModel, plan: Plan, resolution: int, backend: Backend, precision: str, dense: Timing, fna: Timing
) -> BenchRow:
    prefix = plan.prefix_tokens
    if prefix is None:
        prefix = detect_prefix_tokens(find_attention_blocks(model.module)[0].tower)
    full = plan.model_copy(update={"prefix_tokens": prefix})
    return BenchRow(
        backend=backend,
        resolution=resolution,
        tokens=(resolution // model.patch_size) ** 2 + prefix,
        landmarks=max((entry.landmarks for entry in plan.blocks), default=0),
        blocks=len(plan.blocks),
        dense=dense,
        fna=fna,
        speedup=dense.median / fna.median,
        counts=count(model, full, resolution, resolution, precision),
    )


def _clocked(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# ---------------------------------------------------------------- backends


def _open_onnxruntime(provider: Literal["cpu", "cuda"]) -> Callable[[_Setting, Plan], _Timed]:
    def opener(setting: _Setting, plan: Plan) -> _Timed:
        if provider == "cuda":
            _need_gpu("onnxruntime-cuda")
        path = setting.export(plan)
        with _peak_memory() as peak:
            session = open_session(path, provider=provider)
            inputs = {INPUT_NAME: setting.pixels}
            run_session(session, inputs)
        return _Timed(
            lambda: _clocked(lambda: run_session(session, inputs)),
            lambda: None,
            peak.mib if provider == "cpu" else None,
        )

    return opener


def _open_torch(setting: _Setting, plan: Plan) -> _Timed:
    return _torch(setting, plan, lambda module: module)


def _open_compiled(setting: _Setting, plan: Plan) -> _Timed:
    def compile_module(module: Any) -> Any:
        torch.compiler.reset()
        return torch.compile(module, dynamic=False)

    try:
        return _torch(setting, plan, compile_module)
    except Exception as error:  # the compiler's own errors are of many kinds; mostly there is no C++ compiler
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingCapabilityError(
            f"torch.compile does not work on this machine: {reason}; use --backend torch"
        ) from error


def _torch(setting: _Setting, plan: Plan, prepare: Callable[[Any], Any]) -> _Timed:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with _peak_memory() as peak, torch.inference_mode():
        module = copy.deepcopy(setting.model.module).to(device, TORCH_TYPES[setting.precision])
        if plan.blocks:
            patch(module, plan)
        ready = prepare(module)
        pixels = torch.from_numpy(setting.pixels).to(device, TORCH_TYPES[setting.precision])
        ready(pixels)
    mib = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak.mib

    def run() -> float:
        with torch.inference_mode():
            return _clocked(lambda: _synchronised(ready, pixels, device))

    return _Timed(run, lambda: None, mib)


def _synchronised(module: Any, pixels: torch.Tensor, device: torch.device) -> None:
    module(pixels)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _open_engine(flavour: Literal["tensorrt", "tensorrt-rtx"]) -> Callable[[_Setting, Plan], _Timed]:
    """An engine built on this machine's GPU; timed on the device, in rounds of a few launches. Untried: no GPU was there."""

    def opener(setting: _Setting, plan: Plan) -> _Timed:
        from fna.engines.builder.build import build_engine
        from fna.engines.builder.options import BuildOptions, parse_batch
        from fna.engines.flavours import import_flavour
        from fna.engines.run.engine import Engine

        _need_gpu(flavour)
        import_flavour(flavour)
        path = setting.export(plan)
        engine_path = path.with_suffix(".engine")
        batch = parse_batch(str(setting.batch))
        build_engine(path, engine_path, BuildOptions(backend=flavour, batch=batch))
        engine = Engine(engine_path)
        inputs = {INPUT_NAME: setting.pixels}
        return _Timed(lambda: engine.bench(inputs, runs=10, warm_up=2).median / 1e3, engine.close, None)

    return opener


def _need_gpu(backend: str) -> None:
    from fna.engines.device import NoGpuError, read_gpu

    try:
        read_gpu()
    except NoGpuError as error:
        raise MissingCapabilityError(
            f"--backend {backend} needs an NVIDIA GPU, but {error}; here are: onnxruntime, torch, torch-compile"
        ) from None


_OPENERS: dict[Backend, Callable[[_Setting, Plan], _Timed]] = {
    "onnxruntime": _open_onnxruntime("cpu"),
    "onnxruntime-cuda": _open_onnxruntime("cuda"),
    "torch": _open_torch,
    "torch-compile": _open_compiled,
    "tensorrt": _open_engine("tensorrt"),
    "tensorrt-rtx": _open_engine("tensorrt-rtx"),
}


# ---------------------------------------------------------------- memory


class _Peak:
    """Filled when the block ends."""

    mib: float | None = None


@contextmanager
def _peak_memory() -> Iterator[_Peak]:
    """Measure by how much the process's resident memory peaks above what it is at the start; Linux only."""
    peak = _Peak()
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    _return_free_memory()
    try:
        refs.write_text("5", encoding="ascii")  # resets the peak, see proc(5)
        before = _status_kib(status, "VmRSS")
    except (OSError, ValueError):
        yield peak
        return
    yield peak
    peak.mib = round((_status_kib(status, "VmHWM") - before) / 1024, 1)


def _return_free_memory() -> None:
    """Give back what was freed, or the next model would use it again and seem to need nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status_kib(path: Path, key: str) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no {key}")
