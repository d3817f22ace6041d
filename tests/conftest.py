"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os

import pytest
import torch

# Two pytest workers share two cores: more threads each would only take turns.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
