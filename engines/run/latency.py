"""Times of one batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from fna.runtime import Arrays


class Latency(BaseModel):
    """Times of one batch, in milliseconds.

    Attributes:
        median: of all timed runs.
        p99: 99 in 100 runs were no slower.
        fastest: of all.
        slowest: of all.
        throughput: images a second, batches sent one after the other without waiting in between.
        runs: how many were timed, after warm-up.
        batch: images in a batch.
        cuda_graph: whether the device replayed a recorded graph.
        measures: what a time is from and to.
    """

    model_config = ConfigDict(frozen=True)

    median: float
    p99: float
    fastest: float
    slowest: float
    throughput: float
    runs: int
    batch: int
    cuda_graph: bool = False
    measures: str


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes, in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def summarise(
    seconds: Sequence[float], total: float, inputs: Arrays, *, measures: str, cuda_graph: bool = False
) -> Latency:
    """Sum up timed runs: the seconds of each, and of as many that were sent without waiting in between."""
    values = [value * 1e3 for value in seconds]
    batch = int(next(iter(inputs.values())).shape[0])
    return Latency(
        median=statistics.median(values),
        p99=float(np.percentile(values, 99)),
        fastest=min(values),
        slowest=max(values),
        throughput=batch * len(values) / total,
        runs=len(values),
        batch=batch,
        cuda_graph=cuda_graph,
        measures=measures,
    )
