"""Timing models in turns, and the memory that they take."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Timing(BaseModel):
    """Latencies of one model, in milliseconds.

    Attributes:
        median: of all timed runs.
        fastest: of all.
        slowest: of all.
        runs: how many were timed, after warm-up.
        images_per_second: at the median.
        peak_mib: largest memory taken since before the model was opened, weights included: of the process on a CPU, of
            PyTorch's allocator on a GPU, of the device by an engine; None where it cannot be told.
        details: what else the backend says, by name; of an engine p99, its size in MiB and the seconds it was built in.
    """

    model_config = ConfigDict(frozen=True)

    median: float
    fastest: float
    slowest: float
    runs: int
    images_per_second: float
    peak_mib: float | None = None
    details: dict[str, float] = {}


@dataclass(frozen=True)
class OpenModel:
    """A model that is open.

    Attributes:
        run: runs one batch and returns in how many seconds.
        peak_mib: see `Timing`.
        close: frees what it holds.
        details: see `Timing`; asked for after the runs.
    """

    run: Callable[[], float]
    peak_mib: float | None = None
    close: Callable[[], None] = lambda: None
    details: Callable[[], dict[str, float]] = dict


def time_in_turns(models: Sequence[OpenModel], runs: int, warm_up: int, batch: int) -> list[Timing]:
    """Run open models in turns, so that clocks and neighbours are the same for all; the runs of the warm-up do not count."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(warm_up + runs):
        for model, values in zip(models, seconds, strict=True):
            elapsed = model.run()
            if turn >= warm_up:
                values.append(elapsed)
    return [_summarise(values, batch, model) for model, values in zip(models, seconds, strict=True)]


def _summarise(seconds: Sequence[float], batch: int, model: OpenModel) -> Timing:
    values = [value * 1e3 for value in seconds]
    median = statistics.median(values)
    return Timing(
        median=median, fastest=min(values), slowest=max(values), runs=len(values),
        images_per_second=batch * 1e3 / median, peak_mib=model.peak_mib, details=model.details(),
    )  # fmt: skip


def clocked(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class Peak:
    """How many MiB the context added at its peak; filled when it ends."""

    mib: float | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure by how much the process's resident memory peaks above what it is at the start; Linux only."""
    peak = Peak()
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
