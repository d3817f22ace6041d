"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Two pytest workers share two cores: more threads each would only take turns.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a tiny FNA file, one of `writers` below; written once for all workers."""
    from filelock import FileLock
    from tiny_files import write_grafted, write_traced

    from fna.export.operators.builder import HIGHEST_OPSET

    folder = tmp_path_factory.getbasetemp().parent
    writers = {
        "traced": write_traced,
        "norm-grid": lambda path: write_traced(path, layers="1,3", sampler="norm-grid"),
        "highest-opset": lambda path: write_traced(path, opset=HIGHEST_OPSET),
        "dense": lambda path: write_traced(path, layers="none"),
        "dynamic": lambda path: write_traced(path, dynamic_size=True),
        "grafted": write_grafted,
    }

    def find(name: str) -> Path:
        path = folder / f"tiny-{name}.onnx"
        with FileLock(folder / f"tiny-{name}.lock"):
            if not path.exists():
                writers[name](path)
        return path

    return find


def pytest_unconfigure() -> None:
    """What was frozen may go: bindings look for what they leaked when Python ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _libraries_are_no_garbage() -> None:
    """What the libraries hold is looked through once, not by every later collection: half a million objects with PyTorch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
