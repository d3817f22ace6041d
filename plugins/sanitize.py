"""Run the GPU tests of the kernels under NVIDIA's compute-sanitizer: `python -m fna.plugins.sanitize`.

memcheck finds accesses outside of allocations; racecheck finds threads of a block that race for shared memory; synccheck finds
barriers that not all threads reach. PyTorch's caching allocator is switched off, so that memcheck sees each tensor's own bounds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
_LOCATIONS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
_ERROR_CODE = 97


def main() -> int:
    """Return 0 when every tool is content, 1 when one found something, 3 where there is no compute-sanitizer or GPU."""
    import torch

    if not torch.cuda.is_available():
        print("error: compute-sanitizer needs a CUDA device, and this machine has none", file=sys.stderr)
        return 3
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), *_LOCATIONS)))
    if sanitizer is None:
        print("error: compute-sanitizer is not installed; it comes with the CUDA toolkit", file=sys.stderr)
        return 3
    tests = Path(__file__).resolve().parent.parent / "tests" / "plugins" / "test_gpu.py"
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "small_and_odd", "-p", "no:xdist", str(tests)]
    failed = []
    for tool in TOOLS:
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            str(_ERROR_CODE),
            "--target-processes",
            "all",
            *pytest,
        ]
        print(f"compute-sanitizer {tool}", flush=True)
        done = subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False)
        if done.returncode:
            failed.append(tool)
    if failed:
        print(f"error: compute-sanitizer found errors with {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
