"""A real Triton server on a machine without a GPU, for tests and load tests of a model repository's onnxruntime half.

The server comes from the package nvidia-pytriton, which carries Triton 2.51 with the Python backend alone. It is unpacked into a
folder of its own: its requirements (NumPy 1, protobuf 6) do not fit beside this project's, and nothing of it is imported here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fna.errors import CheckFailedError, MissingCapabilityError
from fna.plugins.built import cache_folder

PACKAGES = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
"""The server, and the NumPy that its Python process is compiled against: it reads the sizes of NumPy 2's types as 0."""

_BACKEND = Path(__file__).resolve().parent / "onnxruntime_backend.py"
_START_SECONDS = 180.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class CpuServer:
    """A running server.

    Attributes:
        address: host and port of its HTTP interface.
        process: of the server.
        log: file that it writes to.
    """

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """End it as a container's runtime does: asked first, killed where it has not ended in time; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def fetch_server(folder: Path | None = None) -> Path:
    """Return the folder that the server is unpacked in, fetched where it is not there yet (55 MB).

    Raises:
        MissingCapabilityError: if the package is not to be had; says why.
    """
    folder = folder or cache_folder() / "triton-server"
    if not (folder / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*command, "--target", folder, *PACKAGES], capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise MissingCapabilityError(f"Triton for a CPU cannot be had ({said}); it is the package {PACKAGES[0]}")
    return folder


@contextmanager
def serve(
    repository: Path, models: Sequence[str], *, folder: Path | None = None, threads: int = 1
) -> Iterator[CpuServer]:
    """Start a server with some models of a repository, wait until it is ready, and end it afterwards.

    Args:
        repository: that `write_model_repository` wrote.
        models: to load; what an ensemble needs is loaded with it.
        folder: where the server is, or is fetched to.
        threads: of onnxruntime for each model.

    Raises:
        MissingCapabilityError: if the server is not to be had.
        CheckFailedError: if it does not become ready; ends with what it said.
    """
    package = fetch_server(folder)
    with tempfile.TemporaryDirectory(prefix="fna-triton-") as temporary:
        backends = _backends(package, Path(temporary))
        http = _free_port()
        command: list[str | Path] = [
            package / "pytriton" / "tritonserver" / "bin" / "tritonserver",
            *(f"--model-repository={repository}", f"--backend-directory={backends}", f"--http-port={http}"),
            *("--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false", "--exit-timeout-secs=5"),
            *("--model-control-mode=explicit", *(f"--load-model={name}" for name in models)),
        ]
        libraries = (package / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR"))
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "FNA_TRITON_PYTHONPATH": os.pathsep.join(
                [str(package), *(path for path in sys.path if "site-packages" in path)]
            ),
            "FNA_TRITON_THREADS": str(threads),
        }
        log = Path(temporary) / "triton.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        server = CpuServer(f"127.0.0.1:{http}", process, log)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            with suppress(ProcessLookupError):  # a server stopped under load leaves its models' Python processes behind
                os.killpg(process.pid, signal.SIGKILL)


def _backends(package: Path, folder: Path) -> Path:
    """Lay out a backend directory: Triton's Python backend, and `onnxruntime` written in it."""
    server = package / "pytriton" / "tritonserver"
    stub = (
        server / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
    )
    if not stub.is_file():
        raise MissingCapabilityError(f"{PACKAGES[0]} has no Python backend for Python {sys.version.split()[0]}")
    backends = folder / "backends"
    shutil.copytree(server / "backends" / "python", backends / "python", symlinks=True)
    shutil.copy(stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copyfile(_BACKEND, backends / "onnxruntime" / "model.py")
    return backends


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: CpuServer) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{server.address}/v2/health/ready", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    lines = [
        line for line in server.log.read_text(errors="replace").splitlines() if line.startswith(("E", "error", "|"))
    ]
    raise CheckFailedError(f"Triton does not become ready: {json.dumps(lines[-3:])}")
