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


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One pytest worker at a time builds into build/; the others wait and find it done."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
