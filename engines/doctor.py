"""What this machine is, and which targets it can build for: `fna doctor`, or `python -m fna.engines.doctor`.

Nothing but the standard library is imported, by this project's modules too; every probe is guarded, and something is always printed:
this is what runs when nothing else does. TensorRT is imported in a process of its own, which may crash.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fna.engines.device import NoGpuError, read_gpu
from fna.engines.flavours import FLAVOURS, default_plugin, how_to_install
from fna.engines.targets import TARGETS, Target
from fna.errors import FnaError
from fna.machine import command_output, memory_gib, power_mode, processor_name, read_lines, tool_versions
from fna.plugins.processor_library import build_processor_library

PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "polygraphy",
    "tensorrt",
    "tensorrt-rtx",
    "triton",
)
TRTEXEC = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
_TIMEOUT_SECONDS = 60
_ABSENT = "not there"


def diagnose() -> dict[str, Any]:
    """Return everything that was found out, as plain JSON values; a probe that failed says so in its place."""
    report: dict[str, Any] = {
        name: _guarded(probe)
        for name, probe in (
            ("system", _system),
            ("processor", lambda: f"{processor_name()}, {os.cpu_count()} threads"),
            ("memory", lambda: f"{memory_gib()} GiB"),
            ("jetson", _jetson),
            ("gpu", _gpu),
            ("driver", _driver),
            ("power mode", lambda: power_mode() or "nvpmodel says nothing (it is a Jetson's tool)"),
            ("python", lambda: f"{platform.python_version()} ({sys.executable})"),
            ("packages", lambda: tool_versions(*PACKAGES)),
            ("tensorrt", lambda: _import_flavour("tensorrt")),
            ("tensorrt-rtx", lambda: _import_flavour("tensorrt-rtx")),
            ("onnxruntime providers", _providers),
            ("onnxruntime kernels", _processor_kernels),
            ("trtexec", _trtexec),
            ("plugin", _plugin),
            ("tools", _tools),
        )
    }
    report["targets"] = _guarded(lambda: {target.name: _verdicts(target, report) for target in TARGETS})
    return report


def format_report(report: dict[str, Any]) -> str:
    """Write a report for people."""
    lines = []
    for name, value in report.items():
        if name == "targets":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {text}" for key, text in value.items()) or _ABSENT
        lines.append(f"{name + ':':23} {value}")
    targets = report.get("targets", {})
    lines += ["", "what can be built here:"]
    if not isinstance(targets, dict):
        return "\n".join([*lines, f"  {targets}"])
    for name, verdicts in targets.items():
        good = [flavour for flavour, reason in verdicts.items() if reason == "yes"]
        lines.append(f"  {name:18} {'yes, with ' + ' and '.join(good) if good else 'no'}")
        lines += [f"  {'':18}   {flavour}: {reason}" for flavour, reason in verdicts.items() if reason != "yes"]
    lines.append("fna bundle packs files for any of them, to be built on the device.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; `--json` prints it as JSON. The exit code is 0."""
    report = diagnose()
    words = sys.argv[1:] if arguments is None else arguments
    print(json.dumps(report, indent=2) if "--json" in words else format_report(report))
    return 0


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"could not be found out ({type(error).__name__}: {' '.join(str(error).split())})"


def _system() -> str:
    names = [
        line.split("=", 1)[1].strip('"\n') for line in read_lines("/etc/os-release") if line.startswith("PRETTY_NAME=")
    ]
    return f"{names[0] if names else platform.system()}, {platform.machine()}, kernel {platform.release()}"


def _jetson() -> str:
    model = Path("/proc/device-tree/model")
    if not Path("/etc/nv_tegra_release").exists() and not model.exists():
        return "no"
    name = model.read_text(errors="replace").strip("\0\n") if model.exists() else "Jetson"
    release = " ".join(read_lines("/etc/nv_tegra_release")[:1]).strip("# \n")
    packages = command_output("dpkg-query", "--showformat=${Version}", "--show", "nvidia-jetpack")
    return ", ".join(part for part in (name, release, f"JetPack {packages}" if packages else "") if part)


def _gpu() -> dict[str, Any] | str:
    try:
        gpu = read_gpu()
    except NoGpuError as error:
        return f"none: {error}"
    return {
        "name": gpu.name,
        "capability": gpu.capability / 10,
        "memory": f"{gpu.memory_bytes / 2**30:.1f} GiB",
        "multiprocessors": gpu.multiprocessors,
        "CUDA": gpu.cuda,
    }


def _driver() -> str:
    return (
        command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "nvidia-smi says nothing"
    )


def _import_flavour(name: str) -> str:
    """A flavour's version if it can be imported, or what Python said."""
    code = f"import {FLAVOURS[name].module} as module; print(module.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
    )
    if done.returncode == 0:
        return done.stdout.strip()
    reason = (done.stderr.strip().splitlines() or [f"the import ended with {done.returncode}"])[-1]
    return f"cannot be imported ({reason}); {how_to_install(name)}"


def _providers() -> str:
    code = "import onnxruntime; print(*onnxruntime.get_available_providers())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown"])[-1]


def _processor_kernels() -> str:
    """Of this processor: `fna run`, `fna bench` and `fna plan --target cpu` have them compiled once."""
    try:
        return str(build_processor_library())
    except FnaError as error:
        return f"none, so standard operators are taken: {error}"


def _trtexec() -> str:
    places = [place for place in TRTEXEC if os.access(place, os.X_OK)]
    return shutil.which("trtexec") or (places[0] if places else _ABSENT)


def _plugin() -> str:
    path = default_plugin()
    return str(path) if path.is_file() else f"not built ({path}); fna plugin builds it"


def _tools() -> dict[str, str]:
    names = ("cmake", "c++", "nvcc", "aarch64-linux-gnu-g++")
    return {name: "yes" if shutil.which(name) or (name == "nvcc" and _nvcc()) else "no" for name in names}


def _nvcc() -> bool:
    return os.access("/usr/local/cuda/bin/nvcc", os.X_OK)


def _verdicts(target: Target, report: dict[str, Any]) -> dict[str, str]:
    """For each flavour: yes, or why not."""
    return {flavour: _verdict(flavour, target, report) for flavour in FLAVOURS}


def _verdict(flavour: str, target: Target, report: dict[str, Any]) -> str:
    if flavour not in target.flavours:
        return target.limits or f"there is no {FLAVOURS[flavour].title} for it"
    title, gpu = FLAVOURS[flavour].title, report["gpu"]
    if flavour == "tensorrt":
        if not isinstance(gpu, dict):
            return f"{title} builds on the device itself, and this machine has no GPU"
        if round(gpu["capability"] * 10) not in target.capabilities:
            return f"{title} builds on the device itself, and this machine's GPU is {gpu['name']} ({gpu['capability']})"
    if not re.fullmatch(r"\d+(\.\d+)+\S*", str(report[flavour])):
        return f"{title} cannot be imported here; {how_to_install(flavour)}"
    if flavour == "tensorrt" and target.lowering == "plugin" and not default_plugin().is_file():
        return f"the plugin is {report['plugin']}"
    return "yes"


if __name__ == "__main__":
    sys.exit(main())
