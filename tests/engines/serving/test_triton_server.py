"""The model repository in a real Triton server, on a CPU: what its ensembles answer, and how it holds under load."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from shared_build import locked

from fna.engines.builder.options import BatchRange
from fna.engines.load_test import agree, bad_requests, hold, make_samples
from fna.engines.serving.client import RefusedError, TritonClient
from fna.engines.serving.cpu_server import CpuServer, fetch_server, serve
from fna.engines.serving.model_repository import write_model_repository
from fna.errors import MissingCapabilityError
from fna.export.passes.eight_bit import EIGHT_BIT
from fna.export.preprocessing import Preprocessing, bundled_photographs
from fna.export.variants import FileVariant, make_variant
from fna.runtime import open_session, run_session

CLIENTS = 4


@pytest.fixture(scope="module")
def eight_bit(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same file in each type of 8 bits."""
    files = {kind: tmp_path_factory.mktemp("eight") / f"{kind}.onnx" for kind in EIGHT_BIT}
    for kind, file in files.items():
        make_variant(tiny, file, FileVariant(eight_bit=(kind,)), bundled_photographs()[:2])
    return files


@pytest.fixture(scope="module")
def repository(tiny: Path, eight_bit: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    output = folder / "models"
    write_model_repository(tiny, output, batch=BatchRange(1, 4, 8))
    for kind, file in eight_bit.items():
        write_model_repository(file, folder / kind, batch=BatchRange(1, 4, 8))
        shutil.copytree(folder / kind / f"{kind}_onnxruntime", output / f"{kind}_onnxruntime")
    return output


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[CpuServer]:
    try:
        with locked("triton-server"):
            fetch_server()
    except MissingCapabilityError as missing:
        pytest.skip(str(missing))
    with serve(repository, ["tiny_portable", *(f"{kind}_onnxruntime" for kind in EIGHT_BIT)]) as running:
        yield running
    end = time.monotonic() + 10
    while is_group(running.process.pid) and time.monotonic() < end:  # until init has reaped them
        time.sleep(0.1)
    assert not is_group(running.process.pid)


def is_group(number: int) -> bool:
    """Whether a process of a group is left."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_photograph_over_http_gets_what_fna_run_gives(server: CpuServer, tiny: Path) -> None:
    client = TritonClient(server.address)
    session = open_session(tiny)
    for _, image in bundled_photographs()[:2]:
        answer = client.infer("tiny_portable", np.asarray(image)[None])
        pixels = Preprocessing().apply(image, 56, 56)[None]
        for name, expected in run_session(session, {"pixel_values": pixels}).items():
            assert np.linalg.norm(answer[name] - expected) < 2e-3 * np.linalg.norm(
                expected
            )  # as the preprocessing model


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_a_file_in_8_bits_gets_what_onnxruntime_gives(server: CpuServer, eight_bit: dict[str, Path], kind: str) -> None:
    pixels = Preprocessing().apply(bundled_photographs()[2][1], 56, 56)[None]
    answer = TritonClient(server.address).infer(f"{kind}_onnxruntime", pixels, "pixel_values")
    for name, expected in run_session(open_session(eight_bit[kind]), {"pixel_values": pixels}).items():
        assert np.linalg.norm(answer[name] - expected) < 1e-5 * np.linalg.norm(expected)


def test_every_warm_up_ran_and_the_configurations_are_read_unchanged(server: CpuServer, repository: Path) -> None:
    """Triton fails to load a model whose warm-up fails."""
    text = server.log.read_text()
    for size in (1, 4, 8):
        assert f"batch {size}" in (repository / "tiny_onnxruntime" / "config.pbtxt").read_text()
    assert "successfully loaded 'tiny_onnxruntime'" in text
    assert "error" not in text.lower().replace("log_error", "").replace("exit-on-error", "").replace(
        "exit_on_error", ""
    )


def test_under_load_nothing_is_lost_or_mixed_up_and_clients_are_told_of_the_stop(
    server: CpuServer, repository: Path
) -> None:
    """Each client has its own photograph; bad requests and a reload come in between. The last test: it stops the server."""
    samples = make_samples(repository, "tiny", CLIENTS)
    for index, sample in enumerate(samples):
        assert [agree(sample.expected, other.expected) for other in samples] == [n == index for n in range(CLIENTS)]
    tally = hold(
        lambda: TritonClient(server.address),
        "tiny_portable",
        samples,
        3,
        reload=("tiny_onnxruntime",),
        stop=server.stop,
    )
    tally.check(CLIENTS)
    assert tally.told == CLIENTS
    assert len(tally.seconds) > CLIENTS
    assert tally.refused.keys() == bad_requests(samples[0], 8).keys()
    assert all(text.startswith("400: ") for text in tally.refused.values()), tally.refused
    with pytest.raises((OSError, RefusedError)):
        TritonClient(server.address).infer("tiny_portable", samples[0].image)
