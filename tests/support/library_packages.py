"""timm, open_clip and torchvision for the tests: in a folder of their own, which only a process beside the tests sees.

The torchvision of the package index is built for another PyTorch than the CPU's, so its compiled part does not load; its Python
part does, with `sitecustomize` beside this file. That is a thing of the tests: the product knows nothing of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

PACKAGES = (
    "timm==1.0.31",
    "open_clip_torch==3.3.0",
    "torchvision==0.28.0",
    "vit-pytorch==1.26.11",
    "einops==0.8.2",
    "ftfy==6.3.1",
    "wcwidth==0.9.4",
)


def installed(packages: tuple[str, ...], folder: Path) -> tuple[Path, str]:
    """Put packages, without what they depend on, into a folder, once for all workers of a test run; return why not, if not."""
    with FileLock(str(folder) + ".lock"):
        done = folder / "done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(folder),
                *packages,
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=550)
            done.write_text(run.stderr.strip()[-300:] if run.returncode else "")
        return folder, done.read_text()


def run_beside(libraries: Path, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder in a process that sees the packages."""
    paths = os.pathsep.join((str(libraries), str(script.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=550)
