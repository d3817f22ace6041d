"""The Python API of TensorRT versions that cannot run here, read from their own compiled bindings.

The bindings' wheels (`tensorrt-cu12-bindings`, `tensorrt-cu13-bindings`) hold the extension module alone. It imports once the nine C
functions that it takes from TensorRT's libraries exist, so empty ones are compiled, and pybind11's classes, members and
signatures can be read. Nothing of TensorRT can be called that way.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

BINDINGS = {"10.3.0": "tensorrt-cu12-bindings", "11.4.0.106": "tensorrt-cu13-bindings"}
"""JetPack 6's version, and the newest of 11.4."""

_CACHE = Path(__file__).resolve().parents[2] / "build" / "tensorrt-bindings"
_TAKEN = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
_DUMP = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
surface = {}
for name in dir(module):
    value = getattr(module, name)
    members = {item: getattr(value, item).__doc__ or "" for item in dir(value) if not item.startswith("__")}
    surface[name] = members if isinstance(value, type) else (value.__doc__ or "")
print(json.dumps(surface))
"""

Surface = dict[str, Any]
"""Class name to its members' docstrings, which begin with their signatures; functions and constants to their docstring."""


class NoSurfaceError(Exception):
    """The bindings cannot be had here; the text says why."""


def read_surface(version: str) -> Surface:
    """Return the API of one version of TensorRT, fetched once and kept in build/.

    Raises:
        NoSurfaceError: saying what is missing.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    stored = _CACHE / f"{version}.json"
    with (_CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stored.exists():
            folder = _fetch(version)
            text = _dump(folder, "tensorrt_bindings", {"LD_LIBRARY_PATH": str(_stubs(version.split(".")[0]))})
            stored.write_text(text)
    return json.loads(stored.read_text())


def read_rtx_surface() -> Surface:
    """Return the API of the installed TensorRT-RTX."""
    return json.loads(_dump(Path(), "tensorrt_rtx", {}))


def _fetch(version: str) -> Path:
    folder = _CACHE / version
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    done = subprocess.run(
        [*command, f"{BINDINGS[version]}=={version}"], capture_output=True, text=True, check=False, timeout=120
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise NoSurfaceError(f"{BINDINGS[version]}=={version} cannot be downloaded: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder


def _stubs(major: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoSurfaceError("there is no C compiler (cc) to make the empty libraries with")
    folder = _CACHE / f"stubs-{major}"
    folder.mkdir(exist_ok=True)
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _TAKEN))
    for library in _LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def _dump(folder: Path, module: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _DUMP, str(folder), module],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    if done.returncode:
        raise NoSurfaceError(f"{module} cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout
