"""Photographs for the passes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_files import SIDE

from fna.export.preprocessing import Preprocessing, bundled_photographs


@pytest.fixture(scope="session")
def pixels() -> list[NDArray[np.float32]]:
    """Photographs, in the preprocessing of the tiny model."""
    return [Preprocessing().apply(image, SIDE, SIDE)[None] for _, image in bundled_photographs()]
