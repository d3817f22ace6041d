"""Hold many clients against a Triton server and check every answer: `python -m fna.engines.load_test FILE.onnx`.

Each client sends its own photograph and knows its own answer, so that an answer given to another client is noticed. On the way, bad
requests are sent and the model is reloaded; at the end the server is stopped under load. Without `--url` the server is one for a CPU
(`fna.engines.serving.cpu_server`), once with dynamic batching and once without.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fna.engines.builder.options import BatchRange, parse_batch
from fna.engines.bundle.tolerances import failures, task_tolerances, tolerance_of
from fna.engines.serving.client import RefusedError, TritonClient
from fna.engines.serving.cpu_server import serve
from fna.engines.serving.model_repository import write_model_repository
from fna.errors import CheckFailedError, FnaError
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.preprocessing import bundled_photographs
from fna.files import load_onnx, write_text
from fna.runtime import Arrays, open_session, run_session

LARGEST_ERROR = 5e-3
"""Relative L2 of an answer: batches and fp32 sums in another order. Two photographs' answers are far further apart."""

_PATIENCE_SECONDS = 60.0

Agrees = Callable[[Arrays, Arrays], bool]
"""Whether an answer has the expected outputs."""


@dataclass(frozen=True)
class Sample:
    """A photograph and the outputs that it has to get."""

    image: NDArray[np.uint8]  # [1, rows, columns, 3]
    expected: Arrays


@dataclass
class Tally:
    """What happened to the requests of all clients.

    Attributes:
        seconds: of each answered request, from sending to the whole answer.
        wrong: answers that are not the client's own.
        failed: requests without an answer while the server was to run, with what was said.
        accepted: bad requests that were answered as if they were good.
        refused: of the bad requests, what was said by kind.
        told: clients that learnt of the stop by an error within the patience of a client.
        answered_while_stopping: requests that were sent before the stop and still answered.
        elapsed: seconds of load before the stop.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    told: int = 0
    answered_while_stopping: int = 0
    elapsed: float = 0.0

    def summary(self) -> dict[str, object]:
        """Return the numbers for people and JSON: milliseconds, requests a second, counts."""
        p50, p99 = (float(np.percentile(self.seconds, q)) * 1e3 for q in (50, 99)) if self.seconds else (0.0, 0.0)
        return {
            "requests": len(self.seconds), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1),
            "requests_per_second": round(len(self.seconds) / self.elapsed, 1) if self.elapsed else 0.0,
            "lost": len(self.failed), "wrong": self.wrong, "bad_requests_accepted": self.accepted, "refused": self.refused,
            "clients_told_of_the_stop": self.told,
        }  # fmt: skip

    def check(self, clients: int) -> None:
        """Raise where a request was lost or mixed up, a bad one accepted, or a client not told that the server stopped.

        Raises:
            CheckFailedError: naming the first thing that was wrong.
        """
        if not self.seconds:
            raise CheckFailedError("no request was answered; the server's log says why")
        if self.failed:
            raise CheckFailedError(f"{len(self.failed)} requests were lost; the first: {self.failed[0]}")
        if self.wrong:
            raise CheckFailedError(f"{self.wrong} answers were not those of the client's photograph")
        if self.accepted:
            raise CheckFailedError(f"the bad request {self.accepted[0]!r} was answered as if it were good")
        if self.told not in (0, clients):
            raise CheckFailedError(f"{clients - self.told} of {clients} clients were not told that the server stopped")


def make_samples(repository: Path, name: str, count: int) -> list[Sample]:
    """Cut `count` different photographs out of the bundled ones, of two sizes, and compute their answers with onnxruntime alone."""
    photographs = [np.asarray(image) for _, image in bundled_photographs()]
    preprocess = open_session(repository / f"{name}_preprocess" / "1" / "model.onnx")
    model = open_session(repository / f"{name}_onnxruntime" / "1" / "model.onnx")
    samples = []
    for index in range(count):
        whole = photographs[index % len(photographs)]
        rows, columns = (whole.shape[0] * 3 // 4, whole.shape[1] * 3 // 4) if index % 2 else whole.shape[:2]
        shift = (index // len(photographs)) * 7 % 32
        image = np.ascontiguousarray(np.roll(whole, shift, axis=1)[:rows, :columns])[None]
        samples.append(Sample(image, run_session(model, run_session(preprocess, {"raw_image": image}))))
    return samples


def bad_requests(sample: Sample, largest_batch: int) -> dict[str, NDArray[np.generic]]:
    """Return inputs that a server has to refuse, by what is wrong with them."""
    image = sample.image
    return {
        "type": image.astype(np.float32),
        "channels": np.ascontiguousarray(image[..., :2]),
        "rank": image[0],
        "empty": image[:, :0, :0],
        "no columns": image[:, :, :0],
        "no photograph": image[:0],
        "batch": np.repeat(image[:, :8, :8], largest_batch + 1, axis=0),
    }


def hold(
    client: Callable[[], TritonClient],
    model: str,
    samples: Sequence[Sample],
    seconds: float,
    *,
    reload: Sequence[str] = (),
    largest_batch: int = 8,
    stop: Callable[[], object] | None = None,
    agrees: Agrees | None = None,
) -> Tally:
    """Hold one client for each sample against a server.

    Args:
        client: makes a connection of its own for each.
        model: that takes photographs.
        samples: photographs and answers.
        seconds: of load.
        reload: models to load anew in the middle; none where the server does not let clients.
        largest_batch: of the model.
        stop: stops the server, at the end and under load; None leaves it running.
        agrees: whether an answer has the expected outputs; `agree` if None.
    """
    tally, lock, stopping, ended = Tally(), threading.Lock(), threading.Event(), threading.Event()

    def one_client(sample: Sample) -> None:
        connection = client()
        while not ended.is_set():
            begun, sent_after_stop = time.perf_counter(), stopping.is_set()
            try:
                answer = connection.infer(model, sample.image)
            except (RefusedError, OSError, http.client.HTTPException) as error:
                with lock:
                    if stopping.is_set():
                        tally.told += 1
                        return
                    tally.failed.append(f"{type(error).__name__}: {error}")
                connection = client()
                continue
            with lock:
                tally.wrong += not (agrees or agree)(answer, sample.expected)
                if not stopping.is_set():
                    tally.seconds.append(time.perf_counter() - begun)
                elif not sent_after_stop:
                    tally.answered_while_stopping += 1

    threads = [threading.Thread(target=one_client, args=(sample,), daemon=True) for sample in samples]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    _send_bad_requests(client(), model, bad_requests(samples[0], largest_batch), tally)
    for name in reload:
        client().load(name)
    time.sleep(max(0.0, seconds - (time.perf_counter() - started)))
    tally.elapsed = time.perf_counter() - started
    (stopping if stop is not None else ended).set()
    if stop is not None:
        stop()
    for thread in threads:
        thread.join(_PATIENCE_SECONDS)
    return tally


def _send_bad_requests(client: TritonClient, model: str, bad: dict[str, NDArray[np.generic]], tally: Tally) -> None:
    for kind, array in bad.items():
        try:
            client.infer(model, array)
            tally.accepted.append(kind)
        except RefusedError as refused:
            tally.refused[kind] = f"{refused.status}: {str(refused)[:120]}"


def agree(answer: Arrays, expected: Arrays) -> bool:
    """Whether an answer has the expected outputs, to `LARGEST_ERROR`."""
    return answer.keys() == expected.keys() and all(
        answer[name].shape == array.shape
        and float(np.linalg.norm(answer[name] - array)) <= LARGEST_ERROR * float(np.linalg.norm(array))
        for name, array in expected.items()
    )


def agree_as_bundled(metadata: FileMetadata) -> Agrees:
    """Return a test of answers by the tolerances of a bundle of the file: a TensorRT engine computes in the file's types."""
    tolerance = tolerance_of(metadata, metadata.precision)

    def agrees(answer: Arrays, expected: Arrays) -> bool:
        tasks = task_tolerances(metadata, expected)
        return answer.keys() == expected.keys() and not any(
            failures(tolerance, tasks.get(name), array, answer[name]) for name, array in expected.items()
        )

    return agrees


def without_batching(repository: Path) -> None:
    """Take dynamic batching out of a repository's configurations."""
    for path in repository.glob("*/config.pbtxt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text(
            "\n".join(line for line in lines if not line.startswith("dynamic_batching")) + "\n", encoding="utf-8"
        )


def load_cpu_server(
    file: Path, clients: int, seconds: float, batch: BatchRange, *, batching: bool, threads: int
) -> Tally:
    """Write a file's repository, start a server with it, hold the clients against it, and stop it under load."""
    with tempfile.TemporaryDirectory(prefix="fna-load-") as folder:
        repository = Path(folder) / "models"
        name = write_model_repository(file, repository, batch=batch).models[0]
        samples = make_samples(repository, name, clients)
        if not batching:
            without_batching(repository)
        model = f"{name}_portable"
        with serve(repository, [model], threads=threads) as server:
            return hold(
                lambda: TritonClient(server.address), model, samples, seconds,
                reload=(f"{name}_onnxruntime",), largest_batch=batch.largest, stop=server.stop,
            )  # fmt: skip


def load_server(address: str, file: Path, clients: int, seconds: float, batch: BatchRange, model: str | None) -> Tally:
    """Hold the clients against a server that runs already and goes on running; answers are computed here, compared as a bundle's."""
    with tempfile.TemporaryDirectory(prefix="fna-load-") as folder:
        repository = Path(folder) / "models"
        name = write_model_repository(file, repository, batch=batch).models[0]
        samples = make_samples(repository, name, clients)
    agrees = agree_as_bundled(read_metadata(load_onnx(file, tensors=False), str(file)))
    return hold(
        lambda: TritonClient(address), model or name, samples, seconds, largest_batch=batch.largest, agrees=agrees
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints a line for each server. The exit code is 1 where a request was lost, mixed up or wrongly accepted."""
    parser = argparse.ArgumentParser(
        prog="python -m fna.engines.load_test",
        description="Hold clients against a Triton server and check every answer.",
    )
    parser.add_argument("file", type=Path, help="file from fna export, its batch size open")
    parser.add_argument("--clients", type=int, default=16, help="at the same time (16)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load (60)")
    parser.add_argument("--batch", default="1:4:8", help="batch sizes of the repository (1:4:8)")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime for a model of the CPU server (1)")
    parser.add_argument("--url", help="host and port of a server that runs; else one for a CPU is started")
    parser.add_argument("--model", help="of that server; else the one with the TensorRT engine")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(arguments)
    numbers: dict[str, dict[str, object]] = {}
    try:
        batch = parse_batch(options.batch)
        if options.url:
            runs = {options.url: lambda: load_server(
                options.url, options.file, options.clients, options.seconds, batch, options.model
            )}  # fmt: skip
        else:
            runs = {
                label: partial(
                    load_cpu_server,
                    options.file,
                    options.clients,
                    options.seconds,
                    batch,
                    batching=batching,
                    threads=options.threads,
                )
                for label, batching in (("dynamic batching", True), ("no batching", False))
            }
        for label, run in runs.items():
            tally = run()
            numbers[label] = tally.summary()
            print(f"{label}: {json.dumps(numbers[label])}", flush=True)
            tally.check(options.clients)
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if options.json:
            write_text(options.json, json.dumps(numbers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
