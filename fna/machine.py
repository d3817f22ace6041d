"""What a measurement was made on. Importing it needs nothing but the standard library."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from fna import __version__


def describe_machine() -> dict[str, Any]:
    """Return processor, threads, memory and system; of a GPU what its speed depends on; on a Jetson the power mode."""
    import torch

    machine: dict[str, Any] = {
        "processor": processor_name(),
        "threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        clocks = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "driver": command_output("nvidia-smi", clocks, "--format=csv,noheader"),
        }
    machine["power_mode"] = power_mode()
    return {name: fact for name, fact in machine.items() if fact != ""}


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the versions of fna, of those packages that are installed, and of Python."""
    versions = {"fna": __version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name).split("+")[0]  # without what it was built for, as in 2.5.1+cpu
        except metadata.PackageNotFoundError:
            continue
    return {**versions, "python": platform.python_version()}


def processor_name() -> str:
    """Return the processor's name as Linux gives it, else its architecture."""
    names = [line.split(":", 1)[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Return the size of the main memory in GiB; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def power_mode() -> str:
    """Return a Jetson's power mode, which latency depends on; nothing elsewhere."""
    return command_output("nvpmodel", "-q")


def command_output(*command: str) -> str:
    """Return what a command prints, on one line; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(done.stdout.split()) if done.returncode == 0 else ""


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file of the system; none where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
