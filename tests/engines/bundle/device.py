"""A device that a bundle was copied to, with stand-ins on its PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from ..conftest import STAND_IN


@dataclass
class Device:
    """A bundle on a device: its folder, and what is on the PATH there."""

    root: Path
    bin: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the bundle, from another folder."""
        command = [str(self.root / script), *arguments]
        settings = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": "/nowhere", **self.env, **env}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.bin, env=settings, timeout=300
        )

    def calls(self, of: str = "trtexec") -> list[list[str]]:
        """The arguments of every call of a stand-in, `--help` left out."""
        log = self.bin / f"{of}.log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def make_device(root: Path, folder: Path, *tools: str) -> Device:
    folder.mkdir()
    for tool in tools:
        shutil.copy(STAND_IN / ("trtexec" if "trt" in tool or "rtx" in tool else tool), folder / tool)
    env = {"STAND_IN_LOG": str(folder / "trtexec.log"), "STAND_IN_RUNNER_LOG": str(folder / "runner.log")}
    env["STAND_IN_TRITON_LOG"] = str(folder / "tritonserver.log")
    return Device(root, folder, {**env, "FNA_RUNNER": str(folder / "runner")})
